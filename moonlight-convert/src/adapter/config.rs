//! `adapter_config.json`, as peft writes it.

use std::path::Path;

use moonlight_model::lora::LowRankSettings;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};

use super::error::AdapterError;
use super::pattern::Patterns;
use crate::error::CheckpointError;
use crate::io::confined_dir::ConfinedDir;

/// The file.
pub(super) const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The longest that is read; peft's have a few kB, and a pattern for each module of a large model some 100 kB.
const LONGEST: u64 = 10_000_000;
/// The highest rank that is read: no projection of the family is as wide.
const HIGHEST_RANK: usize = 1 << 16;
/// The largest factor on an adapter's product that is read: what is larger drowns every weight.
const LARGEST_SCALE: f64 = 1e6;

/// What an adapter says of itself.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct AdapterConfig {
    peft_type: String,
    /// The base: a path, or a name on the Hub.
    pub(super) base_model_name_or_path: Option<String>,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    lora_bias: bool,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    modules_to_save: Option<Vec<IgnoredAny>>,
    #[serde(default)]
    rank_pattern: Option<Patterns>,
    #[serde(default)]
    alpha_pattern: Option<Patterns>,
    /// Parameters that have adapters, where it is not modules.
    #[serde(default)]
    pub(super) target_parameters: Option<Vec<String>>,
}

impl AdapterConfig {
    pub(super) fn read(dir: &Path) -> Result<Self, AdapterError> {
        let path = dir.join(ADAPTER_CONFIG);
        if !dir.is_dir() {
            return Err(CheckpointError::not_a_directory(dir).into());
        }
        let confined = ConfinedDir::new(dir).map_err(CheckpointError::read(dir))?;
        let Some(bytes) = confined.read(ADAPTER_CONFIG, LONGEST)? else {
            return Err(AdapterError::NoConfig { dir: dir.to_path_buf() });
        };
        Self::parse(&bytes).map_err(|problem| AdapterError::Config { path, problem })
    }

    /// The configuration of its text. The error is the rest of a sentence that begins with the file's name.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let config: Self = serde_json::from_slice(bytes).map_err(|error| format!("cannot be read: it has {error}"))?;
        let Self { peft_type, r, lora_dropout, rank_pattern, alpha_pattern, .. } = &config;
        let numbers = |patterns: &Option<Patterns>| -> Vec<f64> {
            patterns.iter().flat_map(|patterns| patterns.numbers().collect::<Vec<_>>()).collect()
        };
        let no_rank = |rank: &f64| rank.fract() != 0.0 || !(1.0..=HIGHEST_RANK as f64).contains(rank);
        let rank = Some(*r as f64).into_iter().chain(numbers(rank_pattern)).find(no_rank);
        let alpha = Some(config.lora_alpha).into_iter().chain(numbers(alpha_pattern)).find(|alpha| !alpha.is_finite());
        let wrong = [
            (peft_type != "LORA", format!("is of the type `{peft_type}`; only LORA is known")),
            (config.use_dora, "asks for DoRA, which is not known here".into()),
            (config.fan_in_fan_out, "has `fan_in_fan_out`, which no model of this family needs".into()),
            (config.lora_bias, "has `lora_bias`, which is not known here".into()),
            (
                config.bias.as_ref().is_some_and(|bias| bias != "none"),
                "trains biases, which an adapter here does not hold".into(),
            ),
            (
                config.modules_to_save.as_ref().is_some_and(|modules| !modules.is_empty()),
                "has `modules_to_save`, which an adapter here does not hold".into(),
            ),
            (
                rank.is_some(),
                format!("has a rank of {:?}; whole ones of 1 to {HIGHEST_RANK} are read", rank.unwrap_or_default()),
            ),
            (alpha.is_some(), "has an alpha that is no number".into()),
            (
                !(0.0..1.0).contains(lora_dropout),
                format!("has a dropout of {lora_dropout:?}; it is a share, 0 or more and less than 1"),
            ),
        ];
        match wrong.into_iter().find(|(wrong, _)| *wrong) {
            Some((_, problem)) => Err(problem),
            None => Ok(config),
        }
    }

    /// The rank and the settings of a module, which has several names where it may be targeted as a parameter, too. The
    /// error is the rest of a sentence that begins with a file's name.
    pub(super) fn of(&self, names: &[String]) -> Result<(usize, LowRankSettings), String> {
        let find = |patterns: &Option<Patterns>| patterns.as_ref().and_then(|patterns| patterns.find(names));
        // Checked to be a whole number.
        let rank = find(&self.rank_pattern).map_or(self.r, |rank| rank as usize);
        let alpha = find(&self.alpha_pattern).unwrap_or(self.lora_alpha);
        let settings = LowRankSettings { alpha, rslora: self.use_rslora, dropout: self.lora_dropout };
        check_scale(settings, rank)?;
        Ok((rank, settings))
    }
}

/// Refuses what would make every weight infinite. The error is the rest of a sentence that begins with a file's name.
pub(super) fn check_scale(settings: LowRankSettings, rank: usize) -> Result<(), String> {
    let scale = settings.scale(rank);
    if scale.abs() <= LARGEST_SCALE {
        return Ok(());
    }
    let alpha = settings.alpha;
    Err(format!("has an alpha of {alpha:e} for a rank of {rank}; a factor of up to {LARGEST_SCALE:e} is read"))
}

/// What [`write`](super::write_adapter) has to say.
#[derive(Debug, Clone, Default)]
pub(super) struct NewConfig {
    pub(super) base: String,
    pub(super) rank: usize,
    pub(super) alpha: f64,
    pub(super) dropout: f64,
    pub(super) rslora: bool,
    pub(super) modules: Vec<String>,
    pub(super) parameters: Vec<String>,
    pub(super) ranks: Vec<(String, usize)>,
    pub(super) alphas: Vec<(String, f64)>,
}

impl NewConfig {
    pub(super) fn to_json(&self) -> String {
        let escape = |name: &str| name.replace('.', "\\.");
        let ranks: Map<String, Value> = self.ranks.iter().map(|(name, rank)| (escape(name), json!(rank))).collect();
        let alphas: Map<String, Value> =
            self.alphas.iter().map(|(name, alpha)| (escape(name), number(*alpha))).collect();
        let parameters = (!self.parameters.is_empty()).then_some(&self.parameters);
        // peft refuses a dropout beside adapters of parameters; it plays no part once the adapter is trained.
        let dropout = if parameters.is_some() { 0.0 } else { self.dropout };
        let config = json!({
            "alpha_pattern": alphas,
            "auto_mapping": null,
            "base_model_name_or_path": self.base,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": number(self.alpha),
            "lora_bias": false,
            "lora_dropout": dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": ranks,
            "revision": null,
            "target_modules": self.modules,
            "target_parameters": parameters,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.rslora,
        });
        let mut text = serde_json::to_string_pretty(&config).expect("a map of plain values is JSON");
        text.push('\n');
        text
    }
}

/// A whole number as one: some readers take no other.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

//! `adapter_config.json`, as peft writes it.

use std::path::Path;

use moonlight_model::lora::LowRankSettings;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::AdapterError;
use super::pattern::Key;
use crate::error::CheckpointError;
use crate::io::confined_dir::ConfinedDir;

/// The file.
pub(super) const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The longest that is read; peft's have a few kB, and a pattern for each module of a large model some 100 kB.
const LONGEST: u64 = 10_000_000;

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
    modules_to_save: Option<Value>,
    #[serde(default)]
    rank_pattern: Option<Map<String, Value>>,
    #[serde(default)]
    alpha_pattern: Option<Map<String, Value>>,
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
        let wrong = |problem: String| AdapterError::Config { path: path.clone(), problem };
        let config: Self = serde_json::from_slice(&bytes).map_err(|error| wrong(format!("cannot be read: {error}")))?;
        let unknown = [
            (config.peft_type != "LORA", format!("is of the type `{}`; only LORA is known", config.peft_type)),
            (config.use_dora, "asks for DoRA, which is not known here".into()),
            (config.fan_in_fan_out, "has `fan_in_fan_out`, which no model of this family needs".into()),
            (config.lora_bias, "has `lora_bias`, which is not known here".into()),
            (
                config.bias.as_ref().is_some_and(|bias| bias != "none"),
                "trains biases, which an adapter here does not hold".into(),
            ),
            (
                config.modules_to_save.as_ref().is_some_and(|modules| modules.as_array().is_none_or(|m| !m.is_empty())),
                "has `modules_to_save`, which an adapter here does not hold".into(),
            ),
            (config.r == 0, "has a rank of 0".into()),
        ];
        if let Some((_, problem)) = unknown.into_iter().find(|(wrong, _)| *wrong) {
            return Err(wrong(problem));
        }
        for key in [&config.rank_pattern, &config.alpha_pattern].into_iter().flatten().flat_map(Map::keys) {
            if Key::new(key).is_none() {
                return Err(wrong(format!("has the pattern `{key}`; names, `.*`, `\\d+` and `[0-9]+` are read")));
            }
        }
        Ok(config)
    }

    /// The rank and the settings of a module, which has several names where it may be targeted as a parameter, too.
    pub(super) fn of(&self, names: &[String]) -> (usize, LowRankSettings) {
        let find = |patterns: &Option<Map<String, Value>>| {
            let mut patterns = patterns.iter().flatten();
            let found =
                patterns.find(|(key, _)| Key::new(key).is_some_and(|key| names.iter().any(|name| key.matches(name))));
            found.and_then(|(_, value)| value.as_f64())
        };
        let rank = find(&self.rank_pattern).map_or(self.r, |rank| rank as usize);
        let alpha = find(&self.alpha_pattern).unwrap_or(self.lora_alpha);
        (rank, LowRankSettings { alpha, rslora: self.use_rslora, dropout: self.lora_dropout })
    }
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

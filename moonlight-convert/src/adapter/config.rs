//! `adapter_config.json`, as peft writes it.

use std::fmt;
use std::path::Path;

use moonlight_model::lora::LowRankSettings;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::error::AdapterError;
use super::pattern::Patterns;
use super::targets::{self, Names, Targets};
use crate::error::CheckpointError;
use crate::io::confined_dir::ConfinedDir;

/// The file.
pub(super) const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The longest that is read; peft's have a few kB, and a pattern for each module of a large model some 100 kB.
const LONGEST: u64 = 10_000_000;
/// The most keys; peft's has some 40.
const MOST_KEYS: usize = 1_000;
/// The most tokens that are trained by themselves.
const MOST_TOKENS: usize = 1 << 20;
/// The highest rank that is read: no projection of the family is as wide.
const HIGHEST_RANK: usize = 1 << 16;
/// The largest factor on an adapter's product that is read: what is larger drowns every weight.
const LARGEST_SCALE: f64 = 1e6;

/// What becomes of a key of `adapter_config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// Read by [`AdapterConfig::parse`].
    Read,
    /// Without effect on an adapter that is trained, whatever it says.
    Ignored,
    /// Without effect where it is null, false or empty, and refused where it is anything else: why, and what to do.
    MustBeOff(&'static str, &'static str),
}

pub(super) const MERGE_IN_PEFT: &str =
    "merge it into its model in peft (`merge_and_unload()`, then `save_pretrained`) and use that";
const TRAIN_WITHOUT: &str = "it cannot be merged into weights: train one without it, or run it in peft";

/// Every key that peft 0.21 writes, those of older releases, and those that ms-swift adds. A key that is not here is refused:
/// it may change the arithmetic.
const KEYS: [(&str, Rule); 47] = [
    ("alora_invocation_tokens", Rule::MustBeOff("is activated LoRA, which acts from certain tokens on", TRAIN_WITHOUT)),
    ("alpha_pattern", Rule::Read),
    ("arrow_config", Rule::MustBeOff("routes among several adapters (Arrow)", TRAIN_WITHOUT)),
    // Classes of the base's Python code.
    ("auto_mapping", Rule::Ignored),
    ("base_model_name_or_path", Rule::Read),
    ("bias", Rule::Read),
    // What fresh matrices were made of; `init_lora_weights` says whether that matters.
    ("corda_config", Rule::Ignored),
    ("enable_lora", Rule::MustBeOff("adapts parts of a projection, as peft before 0.3 did", MERGE_IN_PEFT)),
    // Embedding and head of one weight: their adapters are refused where the model has that.
    ("ensure_weight_tying", Rule::Ignored),
    ("eva_config", Rule::Ignored),
    ("exclude_modules", Rule::Read),
    // peft itself sets it to false for `nn.Linear`, and all projections here are.
    ("fan_in_fan_out", Rule::Ignored),
    ("inference_mode", Rule::Ignored),
    ("init_lora_weights", Rule::Read),
    ("kasa_config", Rule::MustBeOff("is KaSA, which changes the base's weights", MERGE_IN_PEFT)),
    ("layer_replication", Rule::MustBeOff("repeats layers of the base", MERGE_IN_PEFT)),
    ("layers_pattern", Rule::Read),
    ("layers_to_transform", Rule::Read),
    // peft passes it over unless `init_lora_weights` is `loftq`, which is refused.
    ("loftq_config", Rule::Ignored),
    ("lora_alpha", Rule::Read),
    ("lora_bias", Rule::MustBeOff("has biases in its adapters", MERGE_IN_PEFT)),
    ("lora_dropout", Rule::Read),
    // ms-swift: the dtype and the learning rates of training.
    ("lora_dtype", Rule::Ignored),
    ("lora_ga_config", Rule::Ignored),
    ("lorap_emb_lr", Rule::Ignored),
    ("lorap_lr_ratio", Rule::Ignored),
    ("megatron_config", Rule::MustBeOff("is for Megatron's parallel layers", MERGE_IN_PEFT)),
    ("megatron_core", Rule::Ignored),
    ("merge_weights", Rule::Ignored),
    ("modules_to_save", Rule::Read),
    ("monteclora_config", Rule::MustBeOff("draws its matrices anew at each pass (MonteCLoRA)", TRAIN_WITHOUT)),
    ("peft_type", Rule::Read),
    ("peft_version", Rule::Ignored),
    // The groups of `use_qalora`.
    ("qalora_group_size", Rule::Ignored),
    ("r", Rule::Read),
    ("rank_pattern", Rule::Read),
    ("revision", Rule::Read),
    ("runtime_config", Rule::Ignored),
    ("target_modules", Rule::Read),
    ("target_parameters", Rule::Read),
    ("task_type", Rule::Read),
    ("trainable_token_indices", Rule::Read),
    ("use_bdlora", Rule::MustBeOff("has block-diagonal matrices (BD-LoRA)", MERGE_IN_PEFT)),
    ("use_dora", Rule::Read),
    ("use_qalora", Rule::MustBeOff("pools its inputs (QA-LoRA)", TRAIN_WITHOUT)),
    ("use_rslora", Rule::Read),
    ("velora_config", Rule::MustBeOff("is VeLoRA", MERGE_IN_PEFT)),
];

/// What is wrong with a file, as the rest of a sentence that begins with its name, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ConfigProblem {
    pub(super) text: String,
    pub(super) hint: Option<String>,
}

impl From<String> for ConfigProblem {
    fn from(text: String) -> Self {
        Self { text, hint: None }
    }
}

impl ConfigProblem {
    pub(super) fn with_hint(text: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { text: text.into(), hint: Some(hint.into()) }
    }
}

/// What peft takes off the base's weights when it puts a saved adapter beside them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BaseInit {
    /// Unchanged.
    Unchanged,
    /// The part of the largest singular values (PiSSA).
    Pissa,
    /// The first columns of `Q` times the first rows of `R` (OLoRA).
    Olora,
}

/// Which biases were trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TrainedBiases {
    None,
    All,
    /// Those of projections with adapters.
    Adapted,
}

/// `trainable_token_indices`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TrainedTokens {
    None,
    /// Of the embedding, and of the head where it is the same weight.
    Embedding(Vec<usize>),
    /// By modules' names.
    ByModule(Vec<(String, Vec<usize>)>),
}

/// What an adapter says of itself.
#[derive(Debug, Clone)]
pub(super) struct AdapterConfig {
    /// The base: a path, or a name on the Hub.
    pub(super) base: Option<String>,
    /// Which of the base's versions on the Hub.
    pub(super) revision: Option<String>,
    r: usize,
    lora_alpha: f64,
    lora_dropout: f64,
    use_rslora: bool,
    pub(super) dora: bool,
    pub(super) initial: BaseInit,
    pub(super) biases: TrainedBiases,
    rank_pattern: Option<Patterns>,
    alpha_pattern: Option<Patterns>,
    pub(super) targets: Targets,
    pub(super) tokens: TrainedTokens,
}

/// The keys with their values as text, in the file's order.
struct Entries<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Entries<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Vec<(String, &'de RawValue)>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut list: Self::Value = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, &RawValue>()? {
                    if list.iter().any(|(known, _)| *known == key) {
                        return Err(A::Error::custom(format!("the key `{key}` twice")));
                    }
                    if list.len() == MOST_KEYS {
                        return Err(A::Error::custom(format!("more than {MOST_KEYS} keys")));
                    }
                    list.push((key, value));
                }
                Ok(list)
            }
        }
        deserializer.deserialize_map(Keys).map(Entries)
    }
}

/// A value of the file. The error is the rest of a sentence that begins with the file's name.
fn value<'a, T: Deserialize<'a>>(key: &str, raw: &'a RawValue) -> Result<T, ConfigProblem> {
    serde_json::from_str(raw.get()).map_err(|error| {
        // Its place would be that in the value.
        let text = error.to_string();
        let what = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
        format!("cannot be read: it has {what} in `{key}`").into()
    })
}

/// Null, false, and what is empty.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
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
        Self::parse(&bytes).map_err(|ConfigProblem { text, hint }| AdapterError::Config { path, problem: text, hint })
    }

    /// The configuration of its text.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ConfigProblem> {
        let text = std::str::from_utf8(bytes).map_err(|_| "is not UTF-8".to_owned())?;
        let Entries(entries) = serde_json::from_str(text).map_err(|error| format!("cannot be read: it has {error}"))?;
        // What is not LoRA at all is said before its keys are gone through.
        match entries.iter().find(|(key, _)| key == "peft_type").map(|(key, raw)| value::<Value>(key, raw)) {
            Some(kind) => match kind? {
                Value::String(kind) if kind == "LORA" => {}
                Value::String(kind) => return Err(format!("is of the type `{kind}`; only LORA is known").into()),
                _ => return Err("has no type of adapter as its `peft_type`".to_owned().into()),
            },
            None if entries.iter().any(|(key, _)| matches!(key.as_str(), "fine_tune_type" | "lora_parameters")) => {
                return Err(ConfigProblem::with_hint(
                    "is mlx-lm's, not peft's",
                    "fuse it with `mlx_lm.fuse` and use that model",
                ));
            }
            None => {
                let hint = "peft writes `\"peft_type\": \"LORA\"`; other libraries' adapters are not read";
                return Err(ConfigProblem::with_hint("has no `peft_type`", hint));
            }
        }
        // peft's own defaults.
        let mut config = Self {
            base: None,
            revision: None,
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            dora: false,
            initial: BaseInit::Unchanged,
            biases: TrainedBiases::None,
            rank_pattern: None,
            alpha_pattern: None,
            targets: Targets::default(),
            tokens: TrainedTokens::None,
        };
        for (key, raw) in &entries {
            match KEYS.iter().find(|(known, _)| known == key) {
                None => {
                    return Err(ConfigProblem::with_hint(
                        format!("has the key `{key}`, which is not known here"),
                        "it may change what the adapter computes; where it does not, take it out of the file",
                    ));
                }
                Some((_, Rule::Ignored)) => {}
                Some((_, Rule::MustBeOff(why, hint))) => {
                    if !is_off(&value(key, raw)?) {
                        return Err(ConfigProblem::with_hint(format!("has `{key}`: it {why}"), *hint));
                    }
                }
                Some((_, Rule::Read)) => config.take(key, raw)?,
            }
        }
        config.check()?;
        Ok(config)
    }

    /// Takes the value of a key that is read.
    fn take(&mut self, key: &str, raw: &RawValue) -> Result<(), ConfigProblem> {
        let with = |problem: String| {
            let hint = "peft writes a list there; where it takes an expression, name the modules instead";
            ConfigProblem::with_hint(format!("has `{key}` with {problem}"), hint)
        };
        match key {
            "base_model_name_or_path" => self.base = value(key, raw)?,
            "revision" => self.revision = value(key, raw)?,
            "r" => self.r = value(key, raw)?,
            "lora_alpha" => self.lora_alpha = value(key, raw)?,
            "lora_dropout" => self.lora_dropout = value(key, raw)?,
            "use_rslora" => self.use_rslora = value::<Option<bool>>(key, raw)?.unwrap_or_default(),
            "use_dora" => self.dora = value::<Option<bool>>(key, raw)?.unwrap_or_default(),
            "rank_pattern" => self.rank_pattern = value(key, raw)?,
            "alpha_pattern" => self.alpha_pattern = value(key, raw)?,
            "target_modules" => self.targets.modules = Names::read(&value(key, raw)?).map_err(with)?,
            "exclude_modules" => self.targets.exclude = Names::read(&value(key, raw)?).map_err(with)?,
            "layers_to_transform" => self.targets.layers = targets::layers(&value(key, raw)?).map_err(with)?,
            "layers_pattern" => {
                self.targets.layers_patterns = targets::layer_patterns(&value(key, raw)?).map_err(with)?
            }
            "target_parameters" => {
                self.targets.parameters = targets::texts(&value(key, raw)?).map_err(with)?.into_iter().collect();
            }
            "modules_to_save" => self.targets.saved = targets::saved(&value(key, raw)?).map_err(with)?,
            "init_lora_weights" => self.initial = initial(&value(key, raw)?)?,
            "trainable_token_indices" => self.tokens = tokens(&value(key, raw)?).map_err(with)?,
            "bias" => {
                self.biases = match value::<Option<String>>(key, raw)?.as_deref() {
                    None | Some("none") => TrainedBiases::None,
                    Some("all") => TrainedBiases::All,
                    Some("lora_only") => TrainedBiases::Adapted,
                    Some(other) => {
                        return Err(format!("has the `bias` `{other}`; peft knows none, all, lora_only").into());
                    }
                };
            }
            "task_type" => match value::<Option<String>>(key, raw)?.as_deref() {
                None | Some("CAUSAL_LM") => {}
                Some(task) => {
                    return Err(ConfigProblem::with_hint(
                        format!("is for the task `{task}`; models here are of CAUSAL_LM"),
                        "a classifier's or an encoder's head is not loaded; an adapter of the layers alone is once the task \
                         is CAUSAL_LM or null",
                    ));
                }
            },
            _ => {}
        }
        Ok(())
    }

    /// Refuses numbers that no adapter has, and combinations that peft has not.
    fn check(&self) -> Result<(), ConfigProblem> {
        let Self { lora_dropout, rank_pattern, alpha_pattern, .. } = self;
        let numbers = |patterns: &Option<Patterns>| -> Vec<f64> {
            patterns.iter().flat_map(|patterns| patterns.numbers().collect::<Vec<_>>()).collect()
        };
        let no_rank = |rank: &f64| rank.fract() != 0.0 || !(1.0..=HIGHEST_RANK as f64).contains(rank);
        let rank = Some(self.r as f64).into_iter().chain(numbers(rank_pattern)).find(no_rank);
        let alpha = Some(self.lora_alpha).into_iter().chain(numbers(alpha_pattern)).find(|alpha| !alpha.is_finite());
        let wrong = [
            (
                rank.is_some(),
                format!("has a rank of {:?}; whole ones of 1 to {HIGHEST_RANK} are read", rank.unwrap_or_default()),
            ),
            (alpha.is_some(), "has an alpha that is no finite number".into()),
            (
                !(0.0..1.0).contains(lora_dropout),
                format!("has a dropout of {lora_dropout:?}; it is a share, 0 or more and less than 1"),
            ),
        ];
        match wrong.into_iter().find(|(wrong, _)| *wrong) {
            Some((_, problem)) => Err(problem.into()),
            None => Ok(()),
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

/// What `init_lora_weights` means for an adapter that is loaded (`LoraLayer.update_layer` of peft 0.21).
fn initial(value: &Value) -> Result<BaseInit, ConfigProblem> {
    let text = match value {
        Value::Null | Value::Bool(_) => return Ok(BaseInit::Unchanged),
        Value::String(text) => text.as_str(),
        _ => return Err("has an `init_lora_weights` that is neither a truth value nor a word".to_owned().into()),
    };
    let convert = "save it with `save_pretrained(path_initial_model_for_weight_conversion=...)`, which makes a plain LoRA of \
                   it, or merge it into its model in peft";
    match text.to_ascii_lowercase().as_str() {
        // How fresh matrices are drawn; the base keeps its weights.
        "gaussian" | "eva" | "orthogonal" | "mica" => Ok(BaseInit::Unchanged),
        "pissa" => Ok(BaseInit::Pissa),
        "olora" => Ok(BaseInit::Olora),
        fast if fast.starts_with("pissa_niter_") => Err(ConfigProblem::with_hint(
            format!(
                "has `init_lora_weights` `{text}`: peft draws random numbers for what it takes off the base's weights"
            ),
            convert,
        )),
        "corda" | "lora_ga" | "loftq" => Err(ConfigProblem::with_hint(
            format!(
                "has `init_lora_weights` `{text}`: it fits weights that training has changed, which only its data give"
            ),
            convert,
        )),
        _ => Err(ConfigProblem::with_hint(
            format!("has the `init_lora_weights` `{text}`, which is not known here"),
            "where it does not change the base's weights, set it to true",
        )),
    }
}

/// `trainable_token_indices`. The error is the end of "has KEY with ...".
fn tokens(value: &Value) -> Result<TrainedTokens, String> {
    let list = |value: &Value| -> Option<Vec<usize>> {
        let list = value.as_array().filter(|list| list.len() <= MOST_TOKENS)?;
        list.iter().map(|token| token.as_u64().and_then(|token| usize::try_from(token).ok())).collect()
    };
    let read = match value {
        Value::Null => Some(TrainedTokens::None),
        Value::Object(map) => {
            let entries = map.iter().map(|(module, value)| Some((module.clone(), list(value)?)));
            entries.collect::<Option<_>>().map(TrainedTokens::ByModule)
        }
        value => list(value).map(TrainedTokens::Embedding),
    };
    read.ok_or_else(|| "a value that is no list of token ids".into())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(change: Value) -> Result<AdapterConfig, ConfigProblem> {
        let mut config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]});
        let Value::Object(change) = change else { panic!("not an object") };
        change.into_iter().for_each(|(key, value)| config[key] = value);
        AdapterConfig::parse(config.to_string().as_bytes())
    }

    /// The file that peft 0.21.0 writes for `LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])`.
    const PEFT: &str = r#"{"alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
        "base_model_name_or_path": "base", "bias": "none", "corda_config": null, "ensure_weight_tying": false,
        "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
        "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
        "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 4, "lora_bias": false, "lora_dropout": 0.0,
        "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
        "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.0", "qalora_group_size": 16, "r": 2,
        "rank_pattern": {}, "revision": null, "target_modules": ["q_proj"], "target_parameters": null,
        "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null, "use_dora": false,
        "use_qalora": false, "use_rslora": false, "velora_config": null}"#;

    #[test]
    fn every_key_of_peft_is_known() {
        let config = AdapterConfig::parse(PEFT.as_bytes()).unwrap();
        assert_eq!((config.r, config.lora_alpha, config.base.as_deref()), (2, 4.0, Some("base")));
        let mut keys: Vec<&str> = KEYS.iter().map(|(key, _)| *key).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), KEYS.len(), "a key is listed once");
    }

    #[test]
    fn what_changes_the_arithmetic_is_refused_by_name() {
        for (change, text, hint) in [
            (json!({"alora_invocation_tokens": [12, 44]}), "`alora_invocation_tokens`: it is activated LoRA", "peft"),
            (json!({"lora_bias": true}), "`lora_bias`: it has biases", "merge_and_unload"),
            (
                json!({"layer_replication": [[0, 4], [2, 5]]}),
                "`layer_replication`: it repeats layers",
                "merge_and_unload",
            ),
            (json!({"megatron_config": {"tp": 1}}), "`megatron_config`", "merge_and_unload"),
            (json!({"use_qalora": true}), "`use_qalora`", "train one without"),
            (json!({"use_bdlora": {"nblocks": 2}}), "`use_bdlora`", "merge_and_unload"),
            (json!({"arrow_config": {"top_k": 3}}), "`arrow_config`", "train one without"),
            (json!({"kasa_config": {"beta": 1.0}}), "`kasa_config`", "merge_and_unload"),
            (json!({"monteclora_config": {"num_samples": 8}}), "`monteclora_config`", "train one without"),
            (json!({"velora_config": {"num_groups": 64}}), "`velora_config`", "merge_and_unload"),
            (json!({"enable_lora": [true, false]}), "`enable_lora`", "merge_and_unload"),
            (json!({"init_lora_weights": "pissa_niter_16"}), "`pissa_niter_16`: peft draws", "path_initial_model"),
            (json!({"init_lora_weights": "corda"}), "`corda`: it fits weights that training", "path_initial_model"),
            (json!({"init_lora_weights": "lora_ga"}), "`lora_ga`: it fits", "path_initial_model"),
            (json!({"init_lora_weights": "loftq"}), "`loftq`: it fits", "path_initial_model"),
            (json!({"init_lora_weights": "new"}), "`new`, which is not known here", "set it to true"),
            (json!({"task_type": "SEQ_CLS"}), "for the task `SEQ_CLS`", "classifier"),
            (json!({"use_new_thing": false}), "the key `use_new_thing`, which is not known", "take it out"),
            (json!({"peft_type": "LOHA"}), "of the type `LOHA`", ""),
            (json!({"bias": "some"}), "the `bias` `some`", ""),
            (json!({"target_modules": "(q"}), "`target_modules` with an expression", ""),
        ] {
            let problem = parsed(change.clone()).unwrap_err();
            assert!(problem.text.contains(text), "{change}: {problem:?}");
            assert!(problem.hint.unwrap_or_default().contains(hint), "{change}");
        }
        let problem =
            AdapterConfig::parse(br#"{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}"#).unwrap_err();
        assert!(problem.text.contains("mlx-lm's"), "{problem:?}");
        let problem = AdapterConfig::parse(br#"{"r": 8}"#).unwrap_err();
        assert!(problem.text.contains("has no `peft_type`"), "{problem:?}");
        let problem = AdapterConfig::parse(br#"{"peft_type": "LORA", "r": 8, "r": 4}"#).unwrap_err();
        assert!(problem.text.contains("the key `r` twice"), "{problem:?}");
    }

    #[test]
    fn what_does_not_matter_is_passed_over() {
        for change in [
            json!({"init_lora_weights": "gaussian", "inference_mode": false, "peft_version": "0.99"}),
            json!({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
            json!({"init_lora_weights": "orthogonal"}),
            json!({"init_lora_weights": false, "fan_in_fan_out": true, "auto_mapping": {"unsloth_fixed": true}}),
            json!({"enable_lora": null, "merge_weights": false, "loftq_config": {"loftq_bits": 4}}),
            json!({"lora_dtype": null, "lorap_lr_ratio": null, "lorap_emb_lr": 1e-6, "qalora_group_size": 32}),
        ] {
            assert_eq!(parsed(change.clone()).unwrap().initial, BaseInit::Unchanged, "{change}");
        }
        assert_eq!(parsed(json!({"init_lora_weights": "pissa"})).unwrap().initial, BaseInit::Pissa);
        assert_eq!(parsed(json!({"init_lora_weights": "OLoRA"})).unwrap().initial, BaseInit::Olora);
    }
}

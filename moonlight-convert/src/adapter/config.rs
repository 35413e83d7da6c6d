//! Reading and writing peft's `adapter_config.json`.

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

/// The file's name in an adapter.
pub(super) const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Size limit in bytes; peft's files have a few kB, and one with a pattern for each module of a large model about 100
/// kB.
const LONGEST: u64 = 10_000_000;
/// The most keys; peft writes about 40.
const MOST_KEYS: usize = 1_000;
/// The most tokens in `trainable_token_indices`.
const MOST_TOKENS: usize = 1 << 20;
/// The highest rank; no projection of the family is as wide.
const HIGHEST_RANK: usize = 1 << 16;
/// The largest scale of an adapter; a larger one would dominate every weight.
const LARGEST_SCALE: f64 = 1e6;

/// How a key of `adapter_config.json` is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// It is read by [`AdapterConfig::parse`].
    Read,
    /// It has no effect on a trained adapter, whatever its value.
    Ignored,
    /// It has no effect if it is null, false or empty, and is refused otherwise: the reason, and a hint.
    MustBeOff(&'static str, &'static str),
}

pub(super) const MERGE_IN_PEFT: &str =
    "merge it into its model with peft (`merge_and_unload()`, then `save_pretrained`), and use that model";
const TRAIN_WITHOUT: &str = "train an adapter without it, or run this one in peft: it cannot be merged into weights";

/// Every key that peft 0.21 or an older release writes, and those that ms-swift adds. An unknown key is refused,
/// because it may change the arithmetic.
const KEYS: [(&str, Rule); 47] = [
    (
        "alora_invocation_tokens",
        Rule::MustBeOff("enables activated LoRA, which takes effect after certain tokens", TRAIN_WITHOUT),
    ),
    ("alpha_pattern", Rule::Read),
    ("arrow_config", Rule::MustBeOff("routes between several adapters (Arrow)", TRAIN_WITHOUT)),
    // Names classes of the base's Python code.
    ("auto_mapping", Rule::Ignored),
    ("base_model_name_or_path", Rule::Read),
    ("bias", Rule::Read),
    // Describes how fresh matrices were initialized; `init_lora_weights` says whether that matters.
    ("corda_config", Rule::Ignored),
    ("enable_lora", Rule::MustBeOff("adapts parts of a projection (peft before 0.3)", MERGE_IN_PEFT)),
    // Concerns tied embeddings, whose adapters are refused in any case.
    ("ensure_weight_tying", Rule::Ignored),
    ("eva_config", Rule::Ignored),
    ("exclude_modules", Rule::Read),
    // peft sets it to false for `nn.Linear`, and all projections here are of that class.
    ("fan_in_fan_out", Rule::Ignored),
    ("inference_mode", Rule::Ignored),
    ("init_lora_weights", Rule::Read),
    ("kasa_config", Rule::MustBeOff("enables KaSA, which changes the base's weights", MERGE_IN_PEFT)),
    ("layer_replication", Rule::MustBeOff("repeats layers of the base model", MERGE_IN_PEFT)),
    ("layers_pattern", Rule::Read),
    ("layers_to_transform", Rule::Read),
    // peft ignores it unless `init_lora_weights` is `loftq`, which is refused.
    ("loftq_config", Rule::Ignored),
    ("lora_alpha", Rule::Read),
    ("lora_bias", Rule::MustBeOff("adds biases to the adapters", MERGE_IN_PEFT)),
    ("lora_dropout", Rule::Read),
    // From ms-swift: the dtype and the learning rates of training.
    ("lora_dtype", Rule::Ignored),
    ("lora_ga_config", Rule::Ignored),
    ("lorap_emb_lr", Rule::Ignored),
    ("lorap_lr_ratio", Rule::Ignored),
    ("megatron_config", Rule::MustBeOff("belongs to Megatron's parallel layers", MERGE_IN_PEFT)),
    ("megatron_core", Rule::Ignored),
    ("merge_weights", Rule::Ignored),
    ("modules_to_save", Rule::Read),
    ("monteclora_config", Rule::MustBeOff("samples new matrices in each pass (MonteCLoRA)", TRAIN_WITHOUT)),
    ("peft_type", Rule::Read),
    ("peft_version", Rule::Ignored),
    // Only used with `use_qalora`.
    ("qalora_group_size", Rule::Ignored),
    ("r", Rule::Read),
    ("rank_pattern", Rule::Read),
    ("revision", Rule::Read),
    ("runtime_config", Rule::Ignored),
    ("target_modules", Rule::Read),
    ("target_parameters", Rule::Read),
    ("task_type", Rule::Read),
    ("trainable_token_indices", Rule::Read),
    ("use_bdlora", Rule::MustBeOff("makes the matrices block-diagonal (BD-LoRA)", MERGE_IN_PEFT)),
    ("use_dora", Rule::Read),
    ("use_qalora", Rule::MustBeOff("pools the inputs (QA-LoRA)", TRAIN_WITHOUT)),
    ("use_rslora", Rule::Read),
    ("velora_config", Rule::MustBeOff("enables VeLoRA", MERGE_IN_PEFT)),
];

/// What is wrong with the file, as the rest of a sentence that begins with its name, and a hint.
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

/// What peft subtracts from the base's weights when it loads a saved adapter (`init_lora_weights`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BaseInit {
    /// Nothing.
    Unchanged,
    /// The component of the largest singular values (PiSSA).
    Pissa,
    /// The first columns of `Q` times the first rows of `R` (OLoRA).
    Olora,
}

/// Which biases were trained (`bias`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TrainedBiases {
    None,
    All,
    /// Those of the projections that have adapters.
    Adapted,
}

/// `trainable_token_indices`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TrainedTokens {
    None,
    /// Tokens of the embedding, and of a tied head.
    Embedding(Vec<usize>),
    /// Tokens by the name of the module.
    ByModule(Vec<(String, Vec<usize>)>),
}

/// A parsed `adapter_config.json`.
#[derive(Debug, Clone)]
pub(super) struct AdapterConfig {
    /// The base model: a path, or a name on the Hub.
    pub(super) base: Option<String>,
    /// The revision of the base model on the Hub.
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

/// The keys with their raw values, in the file's order.
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

/// Parses a value. The error is the rest of a sentence that begins with the file's name.
fn value<'a, T: Deserialize<'a>>(key: &str, raw: &'a RawValue) -> Result<T, ConfigProblem> {
    serde_json::from_str(raw.get()).map_err(|error| {
        // The position in the message is relative to the value, and would mislead.
        let text = error.to_string();
        let what = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
        format!("cannot be read: it has {what} in `{key}`").into()
    })
}

/// Whether a value is null, false or empty.
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

    /// Parses the file's bytes.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ConfigProblem> {
        let text = std::str::from_utf8(bytes).map_err(|_| "is not UTF-8".to_owned())?;
        let Entries(entries) = serde_json::from_str(text).map_err(|error| format!("cannot be read: it has {error}"))?;
        // An adapter of another kind is reported as such, and not by its first unknown key.
        match entries.iter().find(|(key, _)| key == "peft_type").map(|(key, raw)| value::<Value>(key, raw)) {
            Some(kind) => match kind? {
                Value::String(kind) if kind == "LORA" => {}
                Value::String(kind) => {
                    return Err(format!("has the `peft_type` `{kind}`; only LORA is supported").into());
                }
                _ => return Err("has a `peft_type` that is not a string".to_owned().into()),
            },
            None if entries.iter().any(|(key, _)| matches!(key.as_str(), "fine_tune_type" | "lora_parameters")) => {
                return Err(ConfigProblem::with_hint(
                    "is in the format of mlx-lm, not of peft",
                    "fuse the adapter with `mlx_lm.fuse`, and use that model",
                ));
            }
            None => {
                let hint = "convert the adapter to peft's format, which has `\"peft_type\": \"LORA\"`";
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
                        format!("has the unknown key `{key}`"),
                        "remove the key, if it does not change what the adapter computes",
                    ));
                }
                Some((_, Rule::Ignored)) => {}
                Some((_, Rule::MustBeOff(why, hint))) => {
                    if !is_off(&value(key, raw)?) {
                        return Err(ConfigProblem::with_hint(format!("has `{key}`: it {why}"), *hint));
                    }
                }
                Some((_, Rule::Read)) => config.set(key, raw)?,
            }
        }
        config.check()?;
        Ok(config)
    }

    /// Sets the field of a key that is read.
    fn set(&mut self, key: &str, raw: &RawValue) -> Result<(), ConfigProblem> {
        let with = |problem: String| {
            let hint = "write a list of names, as peft does";
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
            "init_lora_weights" => self.initial = base_init(&value(key, raw)?)?,
            "trainable_token_indices" => self.tokens = tokens(&value(key, raw)?).map_err(with)?,
            "bias" => {
                self.biases = match value::<Option<String>>(key, raw)?.as_deref() {
                    None | Some("none") => TrainedBiases::None,
                    Some("all") => TrainedBiases::All,
                    Some("lora_only") => TrainedBiases::Adapted,
                    Some(other) => {
                        return Err(format!("has the `bias` `{other}`; supported are none, all, lora_only").into());
                    }
                };
            }
            "task_type" => match value::<Option<String>>(key, raw)?.as_deref() {
                None | Some("CAUSAL_LM") => {}
                Some(task) => {
                    return Err(ConfigProblem::with_hint(
                        format!("has the `task_type` `{task}`; only CAUSAL_LM is supported"),
                        "set `task_type` to CAUSAL_LM, if the adapter is of the layers alone; the heads of classifiers and \
                         encoders are not supported",
                    ));
                }
            },
            _ => {}
        }
        Ok(())
    }

    /// Checks ranks, alphas and the dropout.
    fn check(&self) -> Result<(), ConfigProblem> {
        let Self { lora_dropout, rank_pattern, alpha_pattern, .. } = self;
        let numbers = |patterns: &Option<Patterns>| -> Vec<f64> {
            patterns.iter().flat_map(|patterns| patterns.numbers().collect::<Vec<_>>()).collect()
        };
        let is_invalid = |rank: &f64| rank.fract() != 0.0 || !(1.0..=HIGHEST_RANK as f64).contains(rank);
        let rank = Some(self.r as f64).into_iter().chain(numbers(rank_pattern)).find(is_invalid);
        let alpha = Some(self.lora_alpha).into_iter().chain(numbers(alpha_pattern)).find(|alpha| !alpha.is_finite());
        let wrong = [
            (
                rank.is_some(),
                format!("has the rank {:?}; supported are integers from 1 to {HIGHEST_RANK}", rank.unwrap_or_default()),
            ),
            (alpha.is_some(), "has a non-finite alpha".into()),
            (
                !(0.0..1.0).contains(lora_dropout),
                format!("has the dropout {lora_dropout:?}; it must be at least 0 and less than 1"),
            ),
        ];
        match wrong.into_iter().find(|(wrong, _)| *wrong) {
            Some((_, problem)) => Err(problem.into()),
            None => Ok(()),
        }
    }

    /// The rank and the settings of a module, by any of its names: as a module, and as a parameter. The error is the rest
    /// of a sentence that begins with the file's name.
    pub(super) fn settings_of(&self, names: &[String]) -> Result<(usize, LowRankSettings), String> {
        let find = |patterns: &Option<Patterns>| patterns.as_ref().and_then(|patterns| patterns.find(names));
        // `check` has refused ranks that are not integers.
        let rank = find(&self.rank_pattern).map_or(self.r, |rank| rank as usize);
        let alpha = find(&self.alpha_pattern).unwrap_or(self.lora_alpha);
        let settings = LowRankSettings { alpha, rslora: self.use_rslora, dropout: self.lora_dropout };
        check_scale(settings, rank)?;
        Ok((rank, settings))
    }
}

/// What `init_lora_weights` subtracts from the base's weights when an adapter is loaded (`LoraLayer.update_layer` of
/// peft 0.21).
fn base_init(value: &Value) -> Result<BaseInit, ConfigProblem> {
    let text = match value {
        Value::Null | Value::Bool(_) => return Ok(BaseInit::Unchanged),
        Value::String(text) => text.as_str(),
        _ => return Err("has an `init_lora_weights` that is neither a boolean nor a string".to_owned().into()),
    };
    let convert = "save it with `save_pretrained(path_initial_model_for_weight_conversion=...)`, which makes a plain LoRA of \
                   it, or merge it into its model with peft";
    match text.to_ascii_lowercase().as_str() {
        // Only initializes the matrices; the base keeps its weights.
        "gaussian" | "eva" | "orthogonal" | "mica" => Ok(BaseInit::Unchanged),
        "pissa" => Ok(BaseInit::Pissa),
        "olora" => Ok(BaseInit::Olora),
        fast if fast.starts_with("pissa_niter_") => Err(ConfigProblem::with_hint(
            format!("has `init_lora_weights` `{text}`: what peft subtracts from the base's weights is random"),
            convert,
        )),
        "corda" | "lora_ga" | "loftq" => Err(ConfigProblem::with_hint(
            format!("has `init_lora_weights` `{text}`: it changes the base's weights depending on the training data"),
            convert,
        )),
        _ => Err(ConfigProblem::with_hint(
            format!("has the unknown `init_lora_weights` `{text}`"),
            "set it to true, if it does not change the base's weights",
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
    read.ok_or_else(|| "a value that is not a list of token ids".into())
}

/// Refuses scales that would make weights infinite. The error is the rest of a sentence that begins with a file's name.
pub(super) fn check_scale(settings: LowRankSettings, rank: usize) -> Result<(), String> {
    let scale = settings.scale(rank);
    if scale.abs() <= LARGEST_SCALE {
        return Ok(());
    }
    let alpha = settings.alpha;
    Err(format!("has the alpha {alpha:e} for the rank {rank}; the scale may be at most {LARGEST_SCALE:e}"))
}

/// The content of a new `adapter_config.json`, for [`write_adapter`](super::write_adapter).
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
        // peft refuses dropout for adapters of parameters; a trained adapter does not need it.
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

/// A number for the config. Some readers accept only integers, so that 8.0 is written as 8.
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
    fn keys_that_change_the_arithmetic_are_refused_by_name() {
        for (change, text, hint) in [
            (
                json!({"alora_invocation_tokens": [12, 44]}),
                "`alora_invocation_tokens`: it enables activated LoRA",
                "peft",
            ),
            (json!({"lora_bias": true}), "`lora_bias`: it adds biases", "merge_and_unload"),
            (
                json!({"layer_replication": [[0, 4], [2, 5]]}),
                "`layer_replication`: it repeats layers",
                "merge_and_unload",
            ),
            (json!({"megatron_config": {"tp": 1}}), "`megatron_config`", "merge_and_unload"),
            (json!({"use_qalora": true}), "`use_qalora`", "train an adapter without"),
            (json!({"use_bdlora": {"nblocks": 2}}), "`use_bdlora`", "merge_and_unload"),
            (json!({"arrow_config": {"top_k": 3}}), "`arrow_config`", "train an adapter without"),
            (json!({"kasa_config": {"beta": 1.0}}), "`kasa_config`", "merge_and_unload"),
            (json!({"monteclora_config": {"num_samples": 8}}), "`monteclora_config`", "train an adapter without"),
            (json!({"velora_config": {"num_groups": 64}}), "`velora_config`", "merge_and_unload"),
            (json!({"enable_lora": [true, false]}), "`enable_lora`", "merge_and_unload"),
            (
                json!({"init_lora_weights": "pissa_niter_16"}),
                "`pissa_niter_16`: what peft subtracts",
                "path_initial_model",
            ),
            (json!({"init_lora_weights": "corda"}), "`corda`: it changes the base's weights", "path_initial_model"),
            (json!({"init_lora_weights": "lora_ga"}), "`lora_ga`: it changes", "path_initial_model"),
            (json!({"init_lora_weights": "loftq"}), "`loftq`: it changes", "path_initial_model"),
            (json!({"init_lora_weights": "new"}), "unknown `init_lora_weights` `new`", "set it to true"),
            (json!({"task_type": "SEQ_CLS"}), "`task_type` `SEQ_CLS`", "classifier"),
            (json!({"use_new_thing": false}), "the unknown key `use_new_thing`", "remove the key"),
            (json!({"peft_type": "LOHA"}), "`peft_type` `LOHA`", ""),
            (json!({"bias": "some"}), "the `bias` `some`", ""),
            (json!({"target_modules": "(q"}), "`target_modules` with an invalid or unsupported expression", ""),
        ] {
            let problem = parsed(change.clone()).unwrap_err();
            assert!(problem.text.contains(text), "{change}: {problem:?}");
            assert!(problem.hint.unwrap_or_default().contains(hint), "{change}");
        }
        let problem =
            AdapterConfig::parse(br#"{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}"#).unwrap_err();
        assert!(problem.text.contains("mlx-lm"), "{problem:?}");
        let problem = AdapterConfig::parse(br#"{"r": 8}"#).unwrap_err();
        assert!(problem.text.contains("has no `peft_type`"), "{problem:?}");
        let problem = AdapterConfig::parse(br#"{"peft_type": "LORA", "r": 8, "r": 4}"#).unwrap_err();
        assert!(problem.text.contains("the key `r` twice"), "{problem:?}");
    }

    #[test]
    fn keys_without_effect_are_ignored() {
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

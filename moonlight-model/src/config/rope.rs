//! [`RopeConfig`]: the keys of `config.json` for the rotary embedding and its scaling.

use burn::config::Config;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::error::ConfigError;
use super::keys::Keys;
use super::limits::{MAX_LENGTH, check_positive_number, check_size, require};
use super::other_keys::{REMOVE_HINT, quote, truncate};

/// The default of `rope_theta` in transformers for every supported class.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;

/// The config of a rotary embedding (arXiv 2104.09864).
#[derive(Config, Debug, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct RopeConfig {
    /// Base of the frequencies.
    #[config(default = 10_000.0)]
    #[cfg_attr(feature = "schema", schemars(rename = "rope_theta"))]
    pub theta: f64,
    /// Whether a rotated pair is two adjacent dimensions, `(x0, x1), (x2, x3)`, as in the DeepSeek family. If not, the pair is half
    /// a head apart, `(x0, x_{d/2})`, as in Llama.
    #[config(default = true)]
    #[cfg_attr(feature = "schema", schemars(rename = "rope_interleave"))]
    pub interleave: bool,
    /// How the frequencies are scaled for longer contexts.
    #[cfg_attr(
        feature = "schema",
        schemars(rename = "rope_scaling", with = "Option<serde_json::Map<String, serde_json::Value>>")
    )]
    pub scaling: Option<RopeScaling>,
}

/// How the frequencies of the rotary embedding are scaled for contexts longer than in pre-training (`rope_scaling` and its
/// `rope_type`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    /// Position interpolation (arXiv 2306.15595): every frequency is divided by a factor.
    Linear {
        /// The divisor of all frequencies.
        factor: f64,
    },
    /// Dynamic NTK scaling: `theta` grows for sequences longer than `max_position_embeddings`. It has no effect here, because no
    /// sequence is that long.
    Dynamic {
        /// The growth of `theta`; kept for writing the file.
        factor: f64,
    },
    /// Llama 3.1: low frequencies are divided by a factor, high ones kept, and those between interpolated.
    Llama3(Llama3Config),
    /// YaRN (arXiv 2309.00071).
    Yarn(YarnConfig),
}

/// The scaling of Llama 3.1 and later. A frequency whose wavelength is below `original / high_freq_factor` tokens is kept, one
/// whose wavelength is above `original / low_freq_factor` is divided by `factor`, and those between are interpolated.
#[derive(Config, Debug, PartialEq)]
pub struct Llama3Config {
    /// The divisor of low frequencies.
    pub factor: f64,
    /// The original context divided by the wavelength above which `factor` applies in full.
    pub low_freq_factor: f64,
    /// The original context divided by the wavelength below which a frequency is kept.
    pub high_freq_factor: f64,
    /// Context length before the extension.
    pub original_max_position_embeddings: usize,
}

/// YaRN (arXiv 2309.00071): low frequencies are interpolated, high frequencies kept, and attention logits scaled.
#[derive(Config, Debug, PartialEq)]
pub struct YarnConfig {
    /// The context length divided by the original one.
    pub factor: f64,
    /// Context length before the extension.
    pub original_max_position_embeddings: usize,
    /// A frequency with at least this many rotations over the original context is kept.
    #[config(default = 32.0)]
    pub beta_fast: f64,
    /// A frequency with at most this many rotations over the original context is divided by `factor` in full.
    #[config(default = 1.0)]
    pub beta_slow: f64,
    /// Numerator of the factor on cos and sin.
    pub mscale: Option<f64>,
    /// Denominator of the factor on cos and sin; its square is a factor on the attention scores.
    pub mscale_all_dim: Option<f64>,
    /// The factor on cos and sin; `None` to derive it from the other keys.
    pub attention_factor: Option<f64>,
    /// Whether the ends of the ramp between kept and interpolated frequencies are rounded to whole dimensions.
    #[config(default = true)]
    pub truncate: bool,
}

/// YaRN's `mscale(s, m) = 0.1 m ln(s) + 1` for `s > 1`, else 1.
pub(crate) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

impl RopeConfig {
    /// The keys that are read.
    pub(crate) const KEYS: &[&str] = &["rope_interleave", "rope_parameters", "rope_scaling", "rope_theta"];

    /// The YaRN scaling; `None` with another scaling or none.
    pub fn yarn(&self) -> Option<&YarnConfig> {
        match &self.scaling {
            Some(RopeScaling::Yarn(yarn)) => Some(yarn),
            _ => None,
        }
    }

    /// Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (as published). A file may have both if they
    /// agree. `interleaves` is the default of the model class.
    pub(crate) fn read(
        keys: &mut Keys,
        interleaves: bool,
        max_position_embeddings: usize,
    ) -> Result<Self, ConfigError> {
        const PARAMETERS: &str = "rope_parameters";
        const SCALING: &str = "rope_scaling";
        let interleave = keys.boolean("rope_interleave")?.unwrap_or(interleaves);
        let theta = keys.number("rope_theta")?;
        let mut object = |field: &'static str| match keys.take(field) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(ConfigError::Invalid { field, problem: format!("must be an object, not {other}") }),
        };
        let (field, map) = match (object(PARAMETERS)?, object(SCALING)?) {
            (Some(parameters), Some(scaling)) => {
                let differs =
                    scaling.iter().any(|(key, value)| parameters.get(key).is_some_and(|other| other != value));
                require(!differs, SCALING, || "contradicts `rope_parameters`".into())?;
                let both = scaling.into_iter().chain(parameters).collect();
                (SCALING, both)
            }
            (Some(parameters), None) => (PARAMETERS, parameters),
            (None, Some(scaling)) => (SCALING, scaling),
            (None, None) => (SCALING, Map::new()),
        };
        let mut inner = Keys { map };
        let theta = inner.number("rope_theta")?.or(theta).unwrap_or(DEFAULT_ROPE_THETA);
        let [new, old] = [inner.string("rope_type")?, inner.string("type")?];
        if let (Some(new), Some(old)) = (&new, &old) {
            require(new == old, field, || format!("has the `rope_type` `{new}` and the `type` `{old}`"))?;
        }
        let kind = new.or(old).unwrap_or_else(|| "default".into());
        let scaling = match kind.as_str() {
            "default" => None,
            "linear" => Some(RopeScaling::Linear { factor: factor(&mut inner)? }),
            "dynamic" => Some(RopeScaling::Dynamic { factor: factor(&mut inner)? }),
            "llama3" => {
                let original = original(keys, &mut inner, max_position_embeddings)?;
                Some(RopeScaling::Llama3(Llama3Config::read(&mut inner, original)?))
            }
            "yarn" => {
                let original = original(keys, &mut inner, max_position_embeddings)?;
                Some(RopeScaling::Yarn(YarnConfig::read(&mut inner, original, max_position_embeddings)?))
            }
            other => {
                return Err(ConfigError::Unsupported {
                    key: field.into(),
                    problem: format!(
                        "has the type `{}`; supported are `default`, `linear`, `dynamic`, `llama3` and `yarn`",
                        truncate(other)
                    ),
                    hint: None,
                });
            }
        };
        // Keys that were not read must have a value that changes nothing.
        for (key, value) in inner.map.into_iter().filter(|(_, value)| !value.is_null()) {
            let harmless = match key.as_str() {
                "partial_rotary_factor" | "attn_factor" | "extrapolation_factor" => value.as_f64() == Some(1.0),
                "factor" => kind == "default" && value.as_f64() == Some(1.0),
                // How the model was trained, as in Yarn-Llama-2.
                "finetuned" => value.is_boolean(),
                _ => false,
            };
            if !harmless {
                return Err(ConfigError::Unsupported {
                    key: format!("{field}.{}", truncate(&key)),
                    problem: format!("is {}, which is not supported with the scaling `{kind}`", quote(&value)),
                    hint: Some(REMOVE_HINT),
                });
            }
        }
        Ok(Self { theta, interleave, scaling })
    }

    /// Writes the keys as published files spell them; `interleaves` is the default of the model class.
    pub(crate) fn write(&self, map: &mut Map<String, Value>, interleaves: bool) {
        map.insert("rope_theta".into(), json!(self.theta));
        if self.interleave != interleaves {
            map.insert("rope_interleave".into(), json!(self.interleave));
        }
        if let Some(scaling) = &self.scaling {
            map.insert("rope_scaling".into(), scaling.to_value());
        }
    }

    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        match &self.scaling {
            None => Ok(()),
            Some(RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor }) => {
                check_positive_number(*factor, "rope_scaling.factor")
            }
            Some(RopeScaling::Llama3(llama)) => llama.validate(),
            Some(RopeScaling::Yarn(yarn)) => yarn.validate(),
        }
    }
}

/// Reads `factor`, which is required except with YaRN.
fn factor(inner: &mut Keys) -> Result<f64, ConfigError> {
    inner.number("factor")?.ok_or(ConfigError::Missing { field: "rope_scaling.factor" })
}

/// Reads `original_max_position_embeddings` as transformers does: first outside the scaling, then in it, then as
/// `max_position_embeddings`.
fn original(keys: &mut Keys, inner: &mut Keys, max_position_embeddings: usize) -> Result<usize, ConfigError> {
    const FIELD: &str = "original_max_position_embeddings";
    let (outer, inner) = (keys.optional_length(FIELD)?, inner.optional_length(FIELD)?);
    Ok(outer.or(inner).unwrap_or(max_position_embeddings))
}

impl RopeScaling {
    fn to_value(&self) -> Value {
        // Remote code and older transformers read `type`, newer transformers `rope_type`.
        match self {
            Self::Linear { factor } => json!({"type": "linear", "rope_type": "linear", "factor": factor}),
            Self::Dynamic { factor } => json!({"type": "dynamic", "rope_type": "dynamic", "factor": factor}),
            Self::Llama3(llama) => json!({
                "type": "llama3",
                "rope_type": "llama3",
                "factor": llama.factor,
                "low_freq_factor": llama.low_freq_factor,
                "high_freq_factor": llama.high_freq_factor,
                "original_max_position_embeddings": llama.original_max_position_embeddings,
            }),
            Self::Yarn(yarn) => yarn.to_value(),
        }
    }
}

impl Llama3Config {
    fn read(keys: &mut Keys, original_max_position_embeddings: usize) -> Result<Self, ConfigError> {
        let mut number =
            |key: &'static str, field: &'static str| keys.number(key)?.ok_or(ConfigError::Missing { field });
        Ok(Self {
            factor: number("factor", "rope_scaling.factor")?,
            low_freq_factor: number("low_freq_factor", "rope_scaling.low_freq_factor")?,
            high_freq_factor: number("high_freq_factor", "rope_scaling.high_freq_factor")?,
            original_max_position_embeddings,
        })
    }

    fn validate(&self) -> Result<(), ConfigError> {
        check_size(self.original_max_position_embeddings, "rope_scaling.original_max_position_embeddings", MAX_LENGTH)?;
        check_positive_number(self.factor, "rope_scaling.factor")?;
        check_positive_number(self.low_freq_factor, "rope_scaling.low_freq_factor")?;
        check_positive_number(self.high_freq_factor, "rope_scaling.high_freq_factor")?;
        require(self.high_freq_factor > self.low_freq_factor, "rope_scaling.high_freq_factor", || {
            format!("is {}, not above low_freq_factor ({})", self.high_freq_factor, self.low_freq_factor)
        })
    }
}

impl YarnConfig {
    fn read(
        keys: &mut Keys,
        original_max_position_embeddings: usize,
        max_position_embeddings: usize,
    ) -> Result<Self, ConfigError> {
        Ok(Self {
            factor: keys
                .number("factor")?
                .unwrap_or(max_position_embeddings as f64 / original_max_position_embeddings.max(1) as f64),
            original_max_position_embeddings,
            beta_fast: keys.number("beta_fast")?.unwrap_or(32.0),
            beta_slow: keys.number("beta_slow")?.unwrap_or(1.0),
            mscale: keys.number("mscale")?,
            mscale_all_dim: keys.number("mscale_all_dim")?,
            attention_factor: keys.number("attention_factor")?,
            truncate: keys.boolean("truncate")?.unwrap_or(true),
        })
    }

    fn validate(&self) -> Result<(), ConfigError> {
        check_size(self.original_max_position_embeddings, "rope_scaling.original_max_position_embeddings", MAX_LENGTH)?;
        check_positive_number(self.factor, "rope_scaling.factor")?;
        check_positive_number(self.beta_fast, "rope_scaling.beta_fast")?;
        check_positive_number(self.beta_slow, "rope_scaling.beta_slow")?;
        require(self.beta_fast >= self.beta_slow, "rope_scaling.beta_fast", || {
            format!("is {}, below beta_slow ({})", self.beta_fast, self.beta_slow)
        })
    }

    fn to_value(&self) -> Value {
        let mut map = json!({
            "type": "yarn",
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
        });
        for (key, value) in [
            ("mscale", self.mscale),
            ("mscale_all_dim", self.mscale_all_dim),
            ("attention_factor", self.attention_factor),
        ] {
            if let Some(value) = value {
                map[key] = json!(value);
            }
        }
        if !self.truncate {
            map["truncate"] = json!(false);
        }
        map
    }
}

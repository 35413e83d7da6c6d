//! The rotary position embedding's part of the configuration.

use burn::config::Config;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::error::ConfigError;
use super::keys::Keys;
use super::limits::{MAX_LENGTH, check_positive_number, check_size, require};
use super::other_keys::{quote, truncate};

/// transformers' default of `rope_theta` for every class of the family.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;

/// Rotary position embedding (arXiv 2104.09864).
#[derive(Config, Debug, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct RopeConfig {
    /// Base of the frequencies.
    #[config(default = 10_000.0)]
    #[cfg_attr(feature = "schema", schemars(rename = "rope_theta"))]
    pub theta: f64,
    /// Whether a pair are neighbouring dimensions, `(x0, x1), (x2, x3)`, as in the DeepSeek family, or half a head apart,
    /// `(x0, x_{d/2})`, as in Llama.
    #[config(default = true)]
    #[cfg_attr(feature = "schema", schemars(rename = "rope_interleave"))]
    pub interleave: bool,
    /// How the frequencies are changed for longer contexts.
    #[cfg_attr(
        feature = "schema",
        schemars(rename = "rope_scaling", with = "Option<serde_json::Map<String, serde_json::Value>>")
    )]
    pub scaling: Option<RopeScaling>,
}

/// How the frequencies of the rotary embedding are changed for contexts longer than the model was first trained on
/// (`rope_scaling` and its `rope_type`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    /// Every frequency is divided by a factor: positions are interpolated (arXiv 2306.15595).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// A base that grows with sequences longer than `max_position_embeddings`. No sequence is longer than that here, and up
    /// to there it changes nothing.
    Dynamic {
        /// How fast it grows.
        factor: f64,
    },
    /// Llama 3.1's: slow frequencies are divided, fast ones kept, and those between interpolated.
    Llama3(Llama3Config),
    /// YaRN (arXiv 2309.00071).
    Yarn(YarnConfig),
}

/// The scaling of Llama 3.1 and later: a frequency is kept where its wavelength is below `original / high_freq_factor`
/// tokens, divided by `factor` where it is above `original / low_freq_factor`, and mixed between.
#[derive(Config, Debug, PartialEq)]
pub struct Llama3Config {
    /// The divisor of slow frequencies.
    pub factor: f64,
    /// The original context divided by the shortest wavelength that takes the whole divisor.
    pub low_freq_factor: f64,
    /// The original context divided by the longest wavelength that is kept.
    pub high_freq_factor: f64,
    /// Context length before the extension.
    pub original_max_position_embeddings: usize,
}

/// YaRN: interpolate slow frequencies, keep fast ones, sharpen attention.
#[derive(Config, Debug, PartialEq)]
pub struct YarnConfig {
    /// How many times longer the context is than the original.
    pub factor: f64,
    /// Context length before the extension.
    pub original_max_position_embeddings: usize,
    /// Rotations over the original context above which a frequency is kept.
    #[config(default = 32.0)]
    pub beta_fast: f64,
    /// Rotations below which a frequency is interpolated.
    #[config(default = 1.0)]
    pub beta_slow: f64,
    /// Numerator of the scale of cos and sin.
    pub mscale: Option<f64>,
    /// Denominator of the scale of cos and sin, and the scale (squared) of the attention scores.
    pub mscale_all_dim: Option<f64>,
    /// Given scale of cos and sin, in place of the one derived from the factor.
    pub attention_factor: Option<f64>,
    /// Whether the ramp's ends are rounded to whole dimensions.
    #[config(default = true)]
    pub truncate: bool,
}

/// YaRN's `mscale(s, m) = 0.1 m ln(s) + 1` for `s > 1`, else 1.
pub(crate) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

impl RopeConfig {
    /// The keys of `config.json` that it is read from.
    pub(crate) const KEYS: &[&str] = &["rope_interleave", "rope_parameters", "rope_scaling", "rope_theta"];

    /// Scaling by YaRN, where that is what the configuration has.
    pub fn yarn(&self) -> Option<&YarnConfig> {
        match &self.scaling {
            Some(RopeScaling::Yarn(yarn)) => Some(yarn),
            _ => None,
        }
    }

    /// Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (as published); `interleaves` is the model
    /// class's own layout. Of the two spellings a file may have one, or both with the same content.
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
                require(!differs, SCALING, || "and `rope_parameters` say different things".into())?;
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
                        "has the type `{}`; known are default, linear, dynamic, llama3 and yarn",
                        truncate(other)
                    ),
                    hint: None,
                });
            }
        };
        // What is left must change nothing.
        for (key, value) in inner.map.into_iter().filter(|(_, value)| !value.is_null()) {
            let harmless = match key.as_str() {
                "partial_rotary_factor" | "attn_factor" | "extrapolation_factor" => value.as_f64() == Some(1.0),
                "factor" => kind == "default" && value.as_f64() == Some(1.0),
                // How a model came to its scaling; Yarn-Llama-2 has it.
                "finetuned" => value.is_boolean(),
                _ => false,
            };
            if !harmless {
                return Err(ConfigError::Unsupported {
                    key: format!("{field}.{}", truncate(&key)),
                    problem: format!("is {}, and the scaling `{kind}` knows no such key here", quote(&value)),
                    hint: Some("if it changes nothing that the model computes, remove it from config.json"),
                });
            }
        }
        Ok(Self { theta, interleave, scaling })
    }

    /// Writes the published spelling; `interleaves` is the model class's own layout.
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

/// `factor`, which every scaling but YaRN's must have.
fn factor(inner: &mut Keys) -> Result<f64, ConfigError> {
    inner.number("factor")?.ok_or(ConfigError::Missing { field: "rope_scaling.factor" })
}

/// `original_max_position_embeddings`, which transformers looks for outside of the scaling first, and reads as
/// `max_position_embeddings` where it is absent.
fn original(keys: &mut Keys, inner: &mut Keys, max_position_embeddings: usize) -> Result<usize, ConfigError> {
    const FIELD: &str = "original_max_position_embeddings";
    let (outer, inner) = (keys.optional_length(FIELD)?, inner.optional_length(FIELD)?);
    Ok(outer.or(inner).unwrap_or(max_position_embeddings))
}

impl RopeScaling {
    fn to_value(&self) -> Value {
        // `type` for the remote code and older releases, `rope_type` for newer ones.
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

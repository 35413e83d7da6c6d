//! The rotary position embedding's part of the configuration.

use burn::config::Config;
use serde_json::{Map, Value, json};

use super::error::ConfigError;
use super::keys::Keys;
use super::limits::{LONGEST, positive_number, require, size};

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
    /// Context extension by YaRN (arXiv 2309.00071).
    #[cfg_attr(
        feature = "schema",
        schemars(rename = "rope_scaling", with = "Option<serde_json::Map<String, serde_json::Value>>")
    )]
    pub yarn: Option<YarnConfig>,
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

    /// Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (as published); `interleaves` is the model class's own layout.
    pub(crate) fn read(keys: &mut Keys, interleaves: bool) -> Result<Self, ConfigError> {
        const FIELD: &str = "rope_parameters";
        let object = |field: &'static str, value: Value| match value {
            Value::Object(map) => Ok(Keys { map }),
            other => Err(ConfigError::Invalid { field, problem: format!("must be an object, not {other}") }),
        };
        let interleave = keys.boolean("rope_interleave")?.unwrap_or(interleaves);
        let theta = keys.number("rope_theta")?;
        let mut parameters = match (keys.take(FIELD), keys.take("rope_scaling")) {
            (Some(parameters), _) => object(FIELD, parameters)?,
            (None, Some(scaling)) => object("rope_scaling", scaling)?,
            (None, None) => Keys { map: Map::new() },
        };
        let theta = parameters.number("rope_theta")?.or(theta).unwrap_or(DEFAULT_ROPE_THETA);
        let kind = match parameters.string("rope_type")? {
            Some(kind) => Some(kind),
            None => parameters.string("type")?,
        };
        let yarn = match kind.as_deref() {
            None | Some("default") => None,
            Some("yarn") => Some(YarnConfig::read(&mut parameters)?),
            Some(other) => {
                return Err(ConfigError::Invalid {
                    field: "rope_scaling",
                    problem: format!("has the type `{other}`; known are `default` and `yarn`"),
                });
            }
        };
        Ok(Self { theta, interleave, yarn })
    }

    /// Writes the published spelling; `interleaves` is the model class's own layout.
    pub(crate) fn write(&self, map: &mut Map<String, Value>, interleaves: bool) {
        map.insert("rope_theta".into(), json!(self.theta));
        if self.interleave != interleaves {
            map.insert("rope_interleave".into(), json!(self.interleave));
        }
        if let Some(yarn) = &self.yarn {
            map.insert("rope_scaling".into(), yarn.to_value());
        }
    }

    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let Some(yarn) = &self.yarn else { return Ok(()) };
        size(yarn.original_max_position_embeddings, "rope_scaling.original_max_position_embeddings", LONGEST)?;
        positive_number(yarn.factor, "rope_scaling.factor")?;
        positive_number(yarn.beta_fast, "rope_scaling.beta_fast")?;
        positive_number(yarn.beta_slow, "rope_scaling.beta_slow")?;
        require(yarn.beta_fast >= yarn.beta_slow, "rope_scaling.beta_fast", || {
            format!("is {}, below beta_slow ({})", yarn.beta_fast, yarn.beta_slow)
        })
    }
}

impl YarnConfig {
    fn read(keys: &mut Keys) -> Result<Self, ConfigError> {
        Ok(Self {
            factor: keys.number("factor")?.ok_or(ConfigError::Missing { field: "rope_scaling.factor" })?,
            original_max_position_embeddings: keys
                .optional_size("original_max_position_embeddings")?
                .ok_or(ConfigError::Missing { field: "rope_scaling.original_max_position_embeddings" })?,
            beta_fast: keys.number("beta_fast")?.unwrap_or(32.0),
            beta_slow: keys.number("beta_slow")?.unwrap_or(1.0),
            mscale: keys.number("mscale")?,
            mscale_all_dim: keys.number("mscale_all_dim")?,
            attention_factor: keys.number("attention_factor")?,
            truncate: keys.boolean("truncate")?.unwrap_or(true),
        })
    }

    fn to_value(&self) -> Value {
        // `type` for the remote code and older releases, `rope_type` for newer ones.
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

//! `[optimizer]`.

use std::borrow::Cow;

use moonlight_optim::{AdamWConfig, MuonConfig, ParameterRules, QkClip, Rounding, UpdateScale};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize, Serializer, ser};
use serde_json::{Map, Value};

use super::check::Check;
use super::reader::read_flattened;
use super::schema::merged;

const DESCRIPTION: &str = "Muon or AdamW. The keys are those of `MuonConfig` and `AdamWConfig` in one table; the defaults are those \
                           of \"Muon is Scalable for LLM Training\" (arXiv 2502.16982).";

/// The optimizer of the weight matrices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    /// Muon for weight matrices, AdamW for embeddings, head, norms and biases.
    #[default]
    Muon,
    /// AdamW for every parameter.
    AdamW,
}

/// `[optimizer]`: Muon or AdamW, and their settings.
///
/// A recipe has the keys of both optimizers in one table; `weight_decay` and `rounding` apply to both.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimizerRecipe {
    /// The optimizer of the weight matrices.
    pub name: OptimizerName,
    /// The peak learning rate of both optimizers.
    pub learning_rate: f64,
    /// The learning rate of embedding and output head, relative to `learning_rate`.
    pub embedding_rate_factor: f64,
    /// QK-clip's threshold on attention logits; 0 for no QK-clip.
    pub qk_clip: f64,
    /// Settings of Muon; not used with `name = "adamw"`.
    pub muon: MuonConfig,
    /// Settings of AdamW, which with `name = "muon"` takes the parameters that are not matrices.
    pub adamw: AdamWConfig,
}

/// The keys of `[optimizer]` in addition to those of [`MuonConfig`] and [`AdamWConfig`], and those that both optimizers share.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
struct Keys {
    /// The optimizer of the weight matrices.
    name: OptimizerName,
    /// The peak learning rate, from 0, of Muon and AdamW alike. With the scale `report` Muon takes AdamW's rates, from 2e-4 to
    /// 2e-3. Required.
    learning_rate: f64,
    /// The learning rate of embedding and output head relative to `learning_rate`, above 0. Default: 1, the same rate.
    /// Megatron's `--decoupled-lr` is the product of both.
    #[serde(skip_serializing_if = "Option::is_none")]
    embedding_rate_factor: Option<f64>,
    /// Decoupled weight decay, from 0, of every parameter including norms: `W <- W - lr * weight_decay * W`.
    weight_decay: f64,
    /// How parameters in half precision take an update; it has no effect on f32 parameters. The default `master` keeps an f32
    /// copy, because many updates are smaller than half the spacing of bf16 numbers and would be rounded away.
    rounding: Rounding,
    /// The factor of the scales `report`, `update_norm` and `hidden_size`, above 0: the `0.2` in `0.2 sqrt(max(A, B))`, which is
    /// the RMS of Muon's update. Default: 0.2, to match the RMS of AdamW's.
    #[serde(skip_serializing_if = "Option::is_none")]
    update_rms: Option<f64>,
    /// QK-clip (MuonClip, Kimi K2, which uses 100): the largest attention logit, from 0, to leave unchanged. Query and key
    /// weights of heads above it are scaled down after the step. Use it if attention logits grow without bound; it measures
    /// the logits in every step, which takes time. 0 turns it off.
    qk_clip: f64,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            name: OptimizerName::Muon,
            learning_rate: 1e-3,
            embedding_rate_factor: None,
            weight_decay: 0.1,
            rounding: Rounding::MasterWeights,
            update_rms: None,
            qk_clip: 0.0,
        }
    }
}

impl<'de> Deserialize<'de> for OptimizerRecipe {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (keys, adamw, muon) = read_flattened(deserializer)?;
        Ok(Self::of(keys, muon, adamw))
    }
}

impl Serialize for OptimizerRecipe {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { name, learning_rate, embedding_rate_factor, qk_clip, muon, adamw } = self;
        let keys = Keys {
            name: *name,
            learning_rate: *learning_rate,
            embedding_rate_factor: (*embedding_rate_factor != 1.0).then_some(*embedding_rate_factor),
            weight_decay: muon.weight_decay,
            rounding: muon.rounding,
            update_rms: update_rms(&muon.scale),
            qk_clip: *qk_clip,
        };
        let mut table = Map::new();
        for part in [serde_json::to_value(keys), serde_json::to_value(muon), serde_json::to_value(adamw)] {
            let Value::Object(part) = part.map_err(ser::Error::custom)? else { continue };
            for (key, value) in part.into_iter().filter(|(_, value)| !value.is_null()) {
                table.entry(key).or_insert(value);
            }
        }
        // The name of the scale is enough: the factor is written as `update_rms`, and a hidden size of 0 means the model's.
        if !matches!(muon.scale, UpdateScale::HiddenSize { hidden: 1.., .. })
            && let Some(Value::Object(scale)) = table.get("scale")
            && let Some(word) = scale.keys().next().cloned()
        {
            table.insert("scale".into(), word.into());
        }
        table.serialize(serializer)
    }
}

impl JsonSchema for OptimizerRecipe {
    fn schema_name() -> Cow<'static, str> {
        "OptimizerRecipe".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let parts =
            [Keys::json_schema(generator), AdamWConfig::json_schema(generator), MuonConfig::json_schema(generator)];
        merged(DESCRIPTION, parts)
    }
}

impl Default for OptimizerRecipe {
    fn default() -> Self {
        Self::of(Keys::default(), MuonConfig::new(), AdamWConfig::new())
    }
}

impl OptimizerRecipe {
    fn of(keys: Keys, mut muon: MuonConfig, mut adamw: AdamWConfig) -> Self {
        let Keys { name, learning_rate, embedding_rate_factor, weight_decay, rounding, update_rms, qk_clip } = keys;
        let embedding_rate_factor = embedding_rate_factor.unwrap_or(1.0);
        (adamw.weight_decay, adamw.rounding) = (weight_decay, rounding);
        (muon.weight_decay, muon.rounding) = (weight_decay, rounding);
        // The default depends on the coefficients. It is filled in because `recipe.toml` must contain every value.
        muon.steps.get_or_insert(muon.coefficients.default_steps());
        if let Some(rms) = update_rms {
            muon.scale = muon.scale.with_update_rms(rms);
        }
        Self { name, learning_rate, embedding_rate_factor, qk_clip, muon, adamw }
    }

    pub(super) fn check(&self, check: &mut Check<'_>) {
        if !check.has("optimizer.learning_rate") {
            let hint = "write one from 2e-4 to 2e-3: with the default scale Muon takes AdamW's rates";
            check.missing("optimizer.learning_rate", hint);
        }
        let Self { learning_rate, embedding_rate_factor, qk_clip, .. } = *self;
        let MuonConfig { weight_decay, momentum, .. } = self.muon;
        let AdamWConfig { betas, epsilon, .. } = self.adamw;
        check.require("optimizer.learning_rate", learning_rate >= 0.0, || {
            format!("is {learning_rate}; it must be at least 0")
        });
        check.require("optimizer.embedding_rate_factor", embedding_rate_factor > 0.0, || {
            format!("is {embedding_rate_factor}; it must be above 0")
        });
        check.require("optimizer.weight_decay", weight_decay >= 0.0, || {
            format!("is {weight_decay}; it must be at least 0")
        });
        check.require("optimizer.momentum", (0.0..1.0).contains(&momentum), || {
            format!("is {momentum}; it must be at least 0 and below 1")
        });
        let steps = self.newton_schulz_steps();
        check.require("optimizer.newton_schulz_steps", (1..=100).contains(&steps), || {
            format!("is {steps}; it must be from 1 to 100")
        });
        let rms = update_rms(&self.muon.scale).unwrap_or(1.0);
        let key = if check.has("optimizer.update_rms") { "optimizer.update_rms" } else { "optimizer.scale" };
        check.require(key, rms > 0.0, || format!("is {rms}; it must be above 0"));
        check.require("optimizer.betas", betas.iter().all(|beta| (0.0..1.0).contains(beta)), || {
            format!("is {betas:?}; each must be at least 0 and below 1")
        });
        check.require("optimizer.epsilon", epsilon > 0.0, || format!("is {epsilon}; it must be above 0"));
        check.require("optimizer.qk_clip", qk_clip >= 0.0, || format!("is {qk_clip}; it must be at least 0"));
    }

    /// QK-clip's settings, if it is on.
    pub(crate) fn qk_clip(&self) -> Option<QkClip> {
        (self.qk_clip > 0.0).then_some(QkClip { threshold: self.qk_clip })
    }

    /// Newton-Schulz iterations of a step.
    pub(crate) fn newton_schulz_steps(&self) -> usize {
        self.muon.steps.unwrap_or_else(|| self.muon.coefficients.default_steps())
    }

    /// The rules that assign parameters to optimizers, for a model with this hidden size.
    pub(crate) fn rules(&self, hidden: usize) -> ParameterRules {
        let Self { muon, adamw, embedding_rate_factor, .. } = self;
        let rules = match self.name {
            OptimizerName::AdamW => ParameterRules::adamw(adamw.clone()),
            OptimizerName::Muon => {
                let scale = muon.scale.with_hidden_size(hidden);
                ParameterRules::moonlight(muon.clone().with_scale(scale), adamw.clone())
            }
        };
        if *embedding_rate_factor == 1.0 {
            rules
        } else {
            rules.with_embedding_rate(adamw.clone(), *embedding_rate_factor)
        }
    }
}

/// The factor of a scale, if it has one.
fn update_rms(scale: &UpdateScale) -> Option<f64> {
    match *scale {
        UpdateScale::Report { factor }
        | UpdateScale::UpdateNorm { factor }
        | UpdateScale::HiddenSize { factor, .. } => Some(factor),
        UpdateScale::KellerJordan | UpdateScale::Spectral | UpdateScale::Unit => None,
    }
}

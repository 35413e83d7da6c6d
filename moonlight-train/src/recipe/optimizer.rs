//! `[optimizer]`.

use std::borrow::Cow;

use moonlight_optim::{AdamWConfig, MuonConfig, ParameterRules, QkClip, Rounding, UpdateScale};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize, Serializer, ser};
use serde_json::{Map, Value};

use super::check::Check;
use super::reader::read_flattened;
use super::schema::merged;

const DESCRIPTION: &str = "Muon or AdamW. Its keys are those of `MuonConfig` and `AdamWConfig`, in one table. Defaults are those of \
                           \"Muon is Scalable for LLM Training\".";

/// Which optimizer takes the matrices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    /// Muon for matrices, AdamW for embeddings, head, norms and biases.
    #[default]
    Muon,
    /// AdamW for everything.
    AdamW,
}

/// `[optimizer]`: Muon or AdamW, and their settings.
///
/// A recipe has the keys of all of them in one table; `weight_decay` and `rounding` are both optimizers'.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimizerRecipe {
    /// Which optimizer takes the matrices.
    pub name: OptimizerName,
    /// The peak learning rate of both.
    pub learning_rate: f64,
    /// The largest attention logit that is left as it is; 0 for no QK-clip.
    pub qk_clip: f64,
    /// Muon's settings.
    pub muon: MuonConfig,
    /// AdamW's settings.
    pub adamw: AdamWConfig,
}

/// The keys of `[optimizer]` that are not those of one optimizer alone.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
struct Keys {
    /// Which optimizer takes the matrices.
    name: OptimizerName,
    /// The peak learning rate, for Muon and AdamW alike; Muon at the report's scale takes AdamW's rates, from 2e-4 to 2e-3. Required.
    learning_rate: f64,
    /// Decoupled weight decay, of every parameter, norms included: `W <- W - lr * weight_decay * W`.
    weight_decay: f64,
    /// How parameters in half precision take an update; nothing to f32 parameters. `master` by default, since updates are often smaller
    /// than half a step of bf16.
    rounding: Rounding,
    /// The factor of the scales `report`, `update_norm` and `hidden_size`: `0.2` in `0.2 sqrt(max(A, B))`. Default: 0.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    update_rms: Option<f64>,
    /// The largest attention logit that is left as it is; heads above it are scaled down after the step (MuonClip, Kimi K2, where it is
    /// 100). Costs the logits of every step once more. 0 is off.
    qk_clip: f64,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            name: OptimizerName::Muon,
            learning_rate: 1e-3,
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
        let Self { name, learning_rate, qk_clip, muon, adamw } = self;
        let keys = Keys {
            name: *name,
            learning_rate: *learning_rate,
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
        // The factor is `update_rms`, and a hidden size that is not given is the model's.
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
        let Keys { name, learning_rate, weight_decay, rounding, update_rms, qk_clip } = keys;
        (adamw.weight_decay, adamw.rounding) = (weight_decay, rounding);
        (muon.weight_decay, muon.rounding) = (weight_decay, rounding);
        muon.steps.get_or_insert(muon.coefficients.default_steps());
        if let Some(rms) = update_rms {
            muon.scale = muon.scale.with_update_rms(rms);
        }
        Self { name, learning_rate, qk_clip, muon, adamw }
    }

    pub(super) fn check(&self, check: &mut Check<'_>) {
        if !check.has("optimizer.learning_rate") {
            let hint = "Muon at the report's scale takes AdamW's rates: from 2e-4 to 2e-3";
            check.missing("optimizer.learning_rate", hint);
        }
        let Self { learning_rate, qk_clip, .. } = *self;
        let MuonConfig { weight_decay, momentum, .. } = self.muon;
        let AdamWConfig { betas, epsilon, .. } = self.adamw;
        check.require("optimizer.learning_rate", learning_rate >= 0.0, || {
            format!("is {learning_rate}; a rate must not be negative")
        });
        check.require("optimizer.weight_decay", weight_decay >= 0.0, || {
            format!("is {weight_decay}; it must not be negative")
        });
        check.require("optimizer.momentum", (0.0..1.0).contains(&momentum), || {
            format!("is {momentum}; it must be from 0 to below 1")
        });
        let steps = self.newton_schulz_steps();
        check.require("optimizer.newton_schulz_steps", (1..=100).contains(&steps), || {
            format!("is {steps}; it must be from 1 to 100")
        });
        let rms = update_rms(&self.muon.scale).unwrap_or(1.0);
        let key = if check.has("optimizer.update_rms") { "optimizer.update_rms" } else { "optimizer.scale" };
        check.require(key, rms > 0.0, || format!("is {rms}; it must be above 0"));
        check.require("optimizer.betas", betas.iter().all(|beta| (0.0..1.0).contains(beta)), || {
            format!("is {betas:?}; each must be from 0 to below 1")
        });
        check.require("optimizer.epsilon", epsilon > 0.0, || format!("is {epsilon}; it must be above 0"));
        check.require("optimizer.qk_clip", qk_clip >= 0.0, || format!("is {qk_clip}; it must not be negative"));
    }

    /// QK-clip, if it is asked for.
    pub(crate) fn qk_clip(&self) -> Option<QkClip> {
        (self.qk_clip > 0.0).then_some(QkClip { threshold: self.qk_clip })
    }

    /// Iterations of Muon's orthogonalisation.
    pub(crate) fn newton_schulz_steps(&self) -> usize {
        self.muon.steps.unwrap_or_else(|| self.muon.coefficients.default_steps())
    }

    /// Which optimizer takes which parameters of a model with this hidden size, and its settings.
    pub(crate) fn rules(&self, hidden: usize) -> ParameterRules {
        let Self { muon, adamw, .. } = self;
        match self.name {
            OptimizerName::AdamW => ParameterRules::adamw(adamw.clone()),
            OptimizerName::Muon => {
                let scale = muon.scale.with_hidden_size(hidden);
                ParameterRules::moonlight(muon.clone().with_scale(scale), adamw.clone())
            }
        }
    }
}

/// The factor of a scale that has one.
fn update_rms(scale: &UpdateScale) -> Option<f64> {
    match *scale {
        UpdateScale::Report { factor }
        | UpdateScale::UpdateNorm { factor }
        | UpdateScale::HiddenSize { factor, .. } => Some(factor),
        UpdateScale::KellerJordan | UpdateScale::Spectral | UpdateScale::Unit => None,
    }
}

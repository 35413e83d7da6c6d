//! `[lora]`.

use std::borrow::Cow;
use std::path::PathBuf;

use moonlight_model::lora::LoraConfig;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize};

use super::Recipe;
use super::check::Check;
use super::reader::read_flattened;
use super::run::optional_path;
use super::schema::merged;

/// `[lora]`: with this section the model is frozen, and low-rank adapters are trained instead. Its keys are `path` and those
/// of [`LoraConfig`].
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LoraRecipe {
    /// The folder of an adapter to start from; `None` for new adapters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Rank, scale, dropout and targets of the adapters.
    #[serde(flatten)]
    pub adapters: LoraConfig,
}

/// The keys of `[lora]` in addition to those of [`LoraConfig`].
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
struct Keys {
    /// The folder of an adapter to start from, as peft or an earlier run wrote it; its rank, scale and targets are used then.
    /// Default: new adapters, which change nothing at first.
    #[serde(deserialize_with = "optional_path")]
    path: Option<PathBuf>,
}

impl<'de> Deserialize<'de> for LoraRecipe {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (Keys { path }, adapters) = read_flattened(deserializer)?;
        Ok(Self { path, adapters })
    }
}

impl JsonSchema for LoraRecipe {
    fn schema_name() -> Cow<'static, str> {
        "LoraRecipe".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let parts = [Keys::json_schema(generator), LoraConfig::json_schema(generator)];
        merged(
            "With this section the model is frozen, and low-rank adapters (LoRA, arXiv 2106.09685) are trained instead. \
             Checkpoints contain the adapters only.",
            parts,
        )
    }
}

impl LoraRecipe {
    pub(super) fn check(&self, recipe: &Recipe, check: &mut Check<'_>) {
        let LoraConfig { rank, alpha, dropout, .. } = self.adapters;
        check.require("lora.rank", (1..=4096).contains(&rank), || format!("is {rank}; it must be from 1 to 4096"));
        check.require("lora.alpha", alpha > 0.0, || format!("is {alpha}; it must be above 0"));
        check.require("lora.dropout", (0.0..1.0).contains(&dropout), || {
            format!("is {dropout}; it must be at least 0 and below 1")
        });
        check.require("lora.targets", !self.adapters.targets.is_empty(), || "is empty".into());
        // The rest of the recipe must not change the frozen model.
        check.require("model.path", recipe.model.path.is_some(), || {
            "is missing, but `[lora]` needs the weights of a base model".into()
        });
        check.require("optimizer.qk_clip", recipe.optimizer.qk_clip().is_none(), || {
            "changes weights that `[lora]` freezes; set it to 0".into()
        });
        let stages = recipe.schedule.stages.iter().filter_map(|stage| stage.bias_update_rate);
        let moves_bias = stages.chain([recipe.moe.bias_update_rate]).any(|rate| rate > 0.0);
        check.require("moe.bias_update_rate", !moves_bias, || {
            "changes the routers of a model that `[lora]` freezes; set it to 0".into()
        });
        check.require("train.freeze", recipe.train.freeze.is_empty(), || {
            "has no effect with `[lora]`, which freezes the whole model".into()
        });
    }

    /// These settings as the model takes them.
    pub(crate) fn config(&self) -> LoraConfig {
        self.adapters.clone()
    }
}

//! `[lora]`.

use std::path::PathBuf;

use moonlight_model::lora::{LoraConfig, LowRankSettings};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Recipe;
use super::check::Check;
use super::run::optional_path;

/// Where the section is there, the model is frozen and low-rank adapters learn in its place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraRecipe {
    /// An adapter to start from; rank, scale and targets are its own then. Default: a fresh one.
    #[serde(deserialize_with = "optional_path", skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The rank of each adapter.
    pub rank: usize,
    /// An adapter is scaled by `alpha / rank`. 32 is that of "LoRA Without Regret" (Schulman, Thinking Machines 2025), whatever the
    /// rank.
    pub alpha: f64,
    /// The share of an adapter's inputs that is dropped in training.
    pub dropout: f64,
    /// `attention`, `mlp` (of dense layers), `shared_experts`, `experts`, `all`, or ends of paths as globs (`q_proj`,
    /// `layers.[0-9].**`).
    pub targets: Vec<String>,
    /// Whether the scale is `alpha / sqrt(rank)` (rsLoRA, arXiv 2312.03732).
    pub rslora: bool,
}

impl Default for LoraRecipe {
    fn default() -> Self {
        let targets = vec!["attention".into()];
        Self { path: None, rank: 16, alpha: 32.0, dropout: 0.0, targets, rslora: false }
    }
}

impl LoraRecipe {
    pub(super) fn check(&self, recipe: &Recipe, check: &mut Check<'_>) {
        let Self { rank, alpha, dropout, .. } = *self;
        check.require("lora.rank", (1..=4096).contains(&rank), || format!("is {rank}; it must be from 1 to 4096"));
        check.require("lora.alpha", alpha > 0.0, || format!("is {alpha}; it must be above 0"));
        check.require("lora.dropout", (0.0..1.0).contains(&dropout), || {
            format!("is {dropout}; it must be from 0 to below 1")
        });
        check.require("lora.targets", !self.targets.is_empty(), || "names nothing to adapt".into());
        // What does not go together with a frozen model.
        check.require("model.path", recipe.model.path.is_some(), || {
            "is absent, but `[lora]` needs weights to stand beside".into()
        });
        check.require("optimizer.qk_clip", recipe.optimizer.qk_clip().is_none(), || {
            "scales weights that `[lora]` freezes; leave it at 0".into()
        });
        let stages = recipe.schedule.stages.iter().filter_map(|stage| stage.bias_update_rate);
        let moves_bias = stages.chain([recipe.moe.bias_update_rate]).any(|rate| rate > 0.0);
        check.require("moe.bias_update_rate", !moves_bias, || {
            "moves the routers of a model that `[lora]` freezes; leave it at 0".into()
        });
        check.require("train.freeze", recipe.train.freeze.is_empty(), || {
            "says nothing beside `[lora]`, which freezes the whole model".into()
        });
    }

    /// The model's own form of these settings.
    pub(crate) fn config(&self) -> LoraConfig {
        let settings = LowRankSettings { alpha: self.alpha, rslora: self.rslora, dropout: self.dropout };
        LoraConfig { rank: self.rank, settings, targets: self.targets.clone() }
    }
}

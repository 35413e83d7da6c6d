//! `[lora]`.

use std::path::PathBuf;

use moonlight_model::lora::{LoraConfig, LowRankSettings};
use serde::Serialize;

use super::run::path;
use super::section::Section;
use super::{ModelRecipe, ModelSource, MoeRecipe, OptimizerRecipe, RecipeError, ScheduleConfig, TrainConfig};

/// `[lora]`: where the section is there, the model is frozen and low-rank adapters learn in its place.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoraRecipe {
    /// `path`: an adapter to go on from; rank, scale and targets are its own then. Default: none, a fresh one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// `rank`: of each adapter. Default: 16.
    pub rank: usize,
    /// `alpha`: an adapter is scaled by `alpha / rank`. Default: 32, that of "LoRA Without Regret" (Schulman, Thinking
    /// Machines 2025), whatever the rank.
    pub alpha: f64,
    /// `dropout`: the share of an adapter's inputs that is dropped in training. Default: 0.
    pub dropout: f64,
    /// `targets`: `attention`, `mlp` (of dense layers), `shared_experts`, `experts`, `all`, or ends of paths as globs
    /// (`q_proj`, `layers.[0-9].**`). Default: `["attention"]`.
    pub targets: Vec<String>,
    /// `rslora`: whether the scale is `alpha / sqrt(rank)`. Default: false.
    pub rslora: bool,
}

impl LoraRecipe {
    /// `None` where the recipe has no such section.
    pub(super) fn read(section: &mut Section<'_>) -> Option<Self> {
        let written = section.is_written();
        let path = section.has("path").then(|| path(section, "path", ""));
        let rank = section.whole("rank").unwrap_or(16) as usize;
        section.require("rank", (1..=4096).contains(&rank), || format!("is {rank}; it must be from 1 to 4096"));
        let alpha = section.number("alpha").unwrap_or(32.0);
        section.require("alpha", alpha > 0.0, || format!("is {alpha}; it must be above 0"));
        let dropout = section.number("dropout").unwrap_or(0.0);
        section.require("dropout", (0.0..1.0).contains(&dropout), || {
            format!("is {dropout}; it must be from 0 to below 1")
        });
        let targets = section.strings("targets").unwrap_or_else(|| vec!["attention".into()]);
        section.require("targets", !targets.is_empty(), || "names nothing to adapt".into());
        let rslora = section.boolean("rslora").unwrap_or(false);
        written.then_some(Self { path, rank, alpha, dropout, targets, rslora })
    }

    /// What does not go together with a frozen base.
    pub(super) fn conflict(
        place: &str,
        model: &ModelRecipe,
        optimizer: &OptimizerRecipe,
        schedule: &ScheduleConfig,
        train: &TrainConfig,
        moe: &MoeRecipe,
    ) -> Option<RecipeError> {
        let moves_bias = |rate: Option<f64>| rate.is_some_and(|rate| rate > 0.0);
        let bias_moves =
            moves_bias(Some(moe.bias_update_rate)) || schedule.stages.iter().any(|s| moves_bias(s.bias_update_rate));
        let conflicts = [
            (
                matches!(model.source, ModelSource::Shape(_)),
                "model.path",
                "is absent, but `[lora]` needs weights to stand beside",
            ),
            (optimizer.qk_clip > 0.0, "optimizer.qk_clip", "scales weights that `[lora]` freezes; leave it at 0"),
            (bias_moves, "moe.bias_update_rate", "moves the routers of a model that `[lora]` freezes; leave it at 0"),
            (!train.freeze.is_empty(), "train.freeze", "says nothing beside `[lora]`, which freezes the whole model"),
        ];
        let (_, key, problem) = conflicts.into_iter().find(|(conflict, ..)| *conflict)?;
        let (place, key, problem) = (place.to_owned(), key.to_owned(), problem.to_owned());
        Some(RecipeError::Invalid { place, key, problem, hint: None })
    }

    /// What the model is told.
    pub(crate) fn config(&self) -> LoraConfig {
        let settings = LowRankSettings { alpha: self.alpha, rslora: self.rslora, dropout: self.dropout };
        LoraConfig { rank: self.rank, settings, targets: self.targets.clone() }
    }
}

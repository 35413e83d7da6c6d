//! What a run takes.

use std::path::Path;

use moonlight_model::ModelConfig;

use crate::error::TrainError;
use crate::plan::{TokenFlops, newton_schulz_flops};
use crate::recipe::{Draft, OptimizerName, Recipe};

/// The tokens and floating-point operations of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Training tokens.
    pub tokens: u64,
    /// Floating-point operations, forward and backward.
    pub flops: f64,
    /// Those of Newton-Schulz in addition.
    pub newton_schulz_flops: f64,
}

impl Cost {
    /// Counts a run of so many steps and tokens.
    pub(super) fn new(recipe: &Recipe, config: &ModelConfig, steps: u64, tokens: u64) -> Self {
        let token = TokenFlops::for_sequence(config, recipe.data.sequence_length).training(false);
        // Adapters are so small that their updates are not counted.
        let muon = recipe.optimizer.name == OptimizerName::Muon && recipe.lora.is_none();
        let iteration = recipe.optimizer.muon.build();
        let update = if muon { newton_schulz_flops(config, iteration.newton_schulz(), false) } else { 0.0 };
        Self { tokens, flops: token as f64 * tokens as f64, newton_schulz_flops: update * steps as f64 }
    }

    /// Counts all steps of a recipe, from shapes alone.
    pub(super) fn of(recipe: &Path, sets: &[String]) -> Result<Self, TrainError> {
        let shaped = Draft::load(recipe, sets)?.resolve_shape(None)?;
        let (recipe, config) = (shaped.recipe, shaped.config);
        let step = recipe.train.batch_size * recipe.train.gradient_accumulation * recipe.data.sequence_length;
        Ok(Self::new(&recipe, &config, recipe.train.steps, step as u64 * recipe.train.steps))
    }
}

//! `[train]` and `[moe]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::Check;
use crate::schedule::ScheduleConfig;

/// Steps, batches, validation, checkpoints and what is logged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps of the run. Required, unless `epochs` or the stages of `[schedule]` give them; 0 where `epochs` do and
    /// the data were not read yet.
    pub steps: u64,
    /// How often the run sees its data, in place of `steps`; the steps that these are go into the run's `recipe.toml`. 0 where
    /// `steps` are given.
    pub epochs: f64,
    /// Sequences in one forward pass.
    pub batch_size: usize,
    /// Forward passes for one step.
    pub gradient_accumulation: usize,
    /// The largest global norm of the gradient; 0 for no limit.
    pub gradient_clip: f64,
    /// Steps between validations (there is one at the end in any case); 0 for none in between.
    pub validate_every: u64,
    /// Batches of one validation, always the same ones; 0 for all.
    pub validate_batches: usize,
    /// Steps between checkpoints (there is one at the end in any case); 0 for none in between.
    pub checkpoint_every: u64,
    /// How many of the newest checkpoints are kept; 0 for all.
    pub keep: usize,
    /// Whether the checkpoint with the lowest validation loss is kept as well.
    pub keep_best: bool,
    /// Steps between lines of the log.
    pub log_every: u64,
    /// Steps between measurements of the attention logits and the update RMS, which cost time; 0 for never.
    pub probe_every: u64,
    /// Whether TensorBoard event files are written.
    pub tensorboard: bool,
    /// Which activations are kept for the backward pass.
    pub activation_checkpointing: Checkpointing,
    /// Tokens whose logits are in memory at once; 0 for all of a batch.
    pub loss_chunk_tokens: usize,
    /// Whether each layer is updated as soon as its gradients are there, so that all of them never exist at once (LOMO,
    /// arXiv 2306.09782). Needs `gradient_clip = 0` and `gradient_accumulation = 1`; with `activation_checkpointing = "none"`
    /// it saves the head's gradients alone.
    pub fuse_update: bool,
    /// Parameters that are not trained, as globs over their names in the checkpoint: `*` within one name, `**` for any number of
    /// names (`**.mlp.gate.weight`, `model.embed_tokens.**`).
    pub freeze: Vec<String>,
    /// Whether a run on the CPU that needs more memory than there is (`moonlight plan`) is refused.
    pub check_memory: bool,
    /// Whether SVG plots are drawn at the end.
    pub plots: bool,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 0,
            epochs: 0.0,
            batch_size: 8,
            gradient_accumulation: 1,
            gradient_clip: 1.0,
            validate_every: 100,
            validate_batches: 32,
            checkpoint_every: 500,
            keep: 2,
            keep_best: true,
            log_every: 1,
            probe_every: 50,
            tensorboard: false,
            activation_checkpointing: Checkpointing::None,
            loss_chunk_tokens: 0,
            fuse_update: false,
            freeze: Vec::new(),
            check_memory: true,
            plots: true,
        }
    }
}

/// Which activations are kept for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Checkpointing {
    /// All.
    None,
    /// Each layer's input alone; the layer runs again for its gradient: a third more time, and the activations of one layer
    /// instead of all.
    Block,
}

impl TrainConfig {
    pub(super) fn check(&self, schedule: &ScheduleConfig, check: &mut Check<'_>) {
        let Self { steps, epochs, gradient_clip, fuse_update, .. } = *self;
        check.require("train.epochs", epochs >= 0.0, || format!("is {epochs}; it must be from 0"));
        if !check.has("train.steps") && epochs == 0.0 && steps == 0 {
            check.missing("train.steps", "how many optimizer steps the run takes: steps = 1000, or epochs = 2");
        }
        check.require("train.steps", i64::try_from(steps).is_ok(), || format!("is {steps}, more than any run"));
        for (key, value) in [
            ("train.batch_size", self.batch_size as u64),
            ("train.gradient_accumulation", self.gradient_accumulation as u64),
            ("train.log_every", self.log_every),
        ] {
            check.require(key, value > 0, || "is 0; it must be at least 1".into());
            check.require(key, value <= u64::from(u32::MAX), || format!("is {value}; it must be below 2^32"));
        }
        check.require("train.gradient_clip", gradient_clip >= 0.0, || {
            format!("is {gradient_clip}; a norm is not negative (0 for no limit)")
        });
        check.require("train.fuse_update", !fuse_update || gradient_clip == 0.0, || {
            format!("needs `gradient_clip = 0` (it is {gradient_clip}): the norm is known when all layers are updated")
        });
        let accumulates = self.gradient_accumulation > 1
            || schedule.accumulation.iter().any(|change| change.gradient_accumulation > 1);
        check.require("train.fuse_update", !fuse_update || !accumulates, || {
            "needs `gradient_accumulation = 1`: gradients that are summed have to be kept".into()
        });
    }
}

/// The balance of the experts. Nothing here touches a dense model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MoeRecipe {
    /// `u` of `b += u (sign(e) - mean(sign(e)))` after each step; 0 freezes the bias. Default: 1e-3, or 0 where the run starts from
    /// weights.
    pub bias_update_rate: f64,
    /// The weight of the sequence-wise balance loss (DeepSeek-V3, equation 17).
    pub sequence_balance_weight: f64,
}

impl Default for MoeRecipe {
    fn default() -> Self {
        Self { bias_update_rate: 1e-3, sequence_balance_weight: 1e-4 }
    }
}

impl MoeRecipe {
    pub(super) fn check(&self, check: &mut Check<'_>) {
        for (key, value) in [
            ("moe.bias_update_rate", self.bias_update_rate),
            ("moe.sequence_balance_weight", self.sequence_balance_weight),
        ] {
            check.require(key, value >= 0.0, || format!("is {value}; it must not be negative"));
        }
    }
}

//! `[train]` and `[moe]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::Check;
use crate::schedule::ScheduleConfig;

/// Steps, batches, validation, checkpoints, memory and what is logged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps of the run. Required, unless `epochs` or the stages of `[schedule]` give them. 0 if they are computed from
    /// `epochs`.
    pub steps: u64,
    /// Passes over the training data, instead of `steps`; need not be a whole number. The run's own `recipe.toml` contains the
    /// number of steps. 0 if `steps` is given.
    pub epochs: f64,
    /// Sequences of one micro-batch, from 1. Lower it if activations do not fit into memory, and raise
    /// `gradient_accumulation` instead.
    pub batch_size: usize,
    /// Micro-batches of one step, from 1: a step reads `batch_size * gradient_accumulation` sequences, which several ranks
    /// share.
    pub gradient_accumulation: usize,
    /// The largest global L2 norm of the gradient, from 0; a larger gradient is scaled down to it. 0 for no limit.
    pub gradient_clip: f64,
    /// Steps between validations. There is always one at the end; 0 for that one only.
    pub validate_every: u64,
    /// Micro-batches of one validation, the first ones of the validation data each time; 0 for all of them.
    pub validate_batches: usize,
    /// Steps between checkpoints. There is always one at the end; 0 for that one only. An interrupted process loses at most
    /// this many steps.
    pub checkpoint_every: u64,
    /// The number of newest checkpoints to keep; older ones are removed. 0 keeps all.
    pub keep: usize,
    /// Whether the checkpoint with the lowest validation loss is kept in addition.
    pub keep_best: bool,
    /// Steps between lines of the log, of `metrics.jsonl` and of TensorBoard, from 1.
    pub log_every: u64,
    /// Steps between measurements of the attention logits and of the update RMS; a step that measures them is slower. 0 to never
    /// measure them.
    pub probe_every: u64,
    /// Whether TensorBoard event files are written, into `tensorboard/` of the run's folder.
    pub tensorboard: bool,
    /// Which activations stay in memory for the backward pass. Choose `block` if a run does not fit.
    pub activation_checkpointing: Checkpointing,
    /// Tokens whose logits are in memory at once; 0 for all of a micro-batch. 512 or 1024 saves most of the memory that a large
    /// vocabulary needs, and changes the result by rounding only.
    pub loss_chunk_tokens: usize,
    /// Whether each layer is updated as soon as its gradients exist, and the gradients are freed (LOMO, arXiv 2306.09782), so
    /// that the gradients of one layer are in memory at a time. Needs `gradient_clip = 0`, `gradient_accumulation = 1` and a
    /// world size of 1. With `activation_checkpointing = "none"` it saves the head's gradients only.
    pub fuse_update: bool,
    /// Parameters that are not trained, as globs over their names in the checkpoint: `*` matches within one name, `**` any
    /// number of names (`**.mlp.gate.weight`, `model.embed_tokens.**`).
    pub freeze: Vec<String>,
    /// Whether a run on the CPU is refused if it needs more memory than is available, by the prediction of `moonlight plan`.
    pub check_memory: bool,
    /// Whether SVG plots of the metrics are drawn at the end, into `plots/` of the run's folder.
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

/// Which activations stay in memory for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Checkpointing {
    /// All of them.
    None,
    /// Each layer's input only; the layer runs a second time for its gradient. A step takes about a third longer and needs the
    /// activations of one layer instead of all.
    Block,
}

impl TrainConfig {
    pub(super) fn check(&self, schedule: &ScheduleConfig, check: &mut Check<'_>) {
        let Self { steps, epochs, gradient_clip, fuse_update, .. } = *self;
        check.require("train.epochs", epochs >= 0.0, || format!("is {epochs}; it must be at least 0"));
        if !check.has("train.steps") && epochs == 0.0 && steps == 0 {
            check.missing("train.steps", "write the number of optimizer steps, `steps = 1000`, or `epochs = 2`");
        }
        check.require("train.steps", i64::try_from(steps).is_ok(), || format!("is {steps}; it must be below 2^63"));
        for (key, value) in [
            ("train.batch_size", self.batch_size as u64),
            ("train.gradient_accumulation", self.gradient_accumulation as u64),
            ("train.log_every", self.log_every),
        ] {
            check.require(key, value > 0, || "is 0; it must be at least 1".into());
            check.require(key, value <= u64::from(u32::MAX), || format!("is {value}; it must be below 2^32"));
        }
        check.require("train.gradient_clip", gradient_clip >= 0.0, || {
            format!("is {gradient_clip}; it must be at least 0 (0 for no limit)")
        });
        check.require("train.fuse_update", !fuse_update || gradient_clip == 0.0, || {
            format!(
                "needs `gradient_clip = 0`, not {gradient_clip}: the norm is known only after all layers are updated"
            )
        });
        let accumulates = self.gradient_accumulation > 1
            || schedule.accumulation.iter().any(|change| change.gradient_accumulation > 1);
        check.require("train.fuse_update", !fuse_update || !accumulates, || {
            "needs `gradient_accumulation = 1`: gradients stay in memory until they are summed".into()
        });
    }
}

/// How the load of the experts is balanced. It has no effect on dense models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MoeRecipe {
    /// `u` in `b += u (sign(e) - mean(sign(e)))`, the change of the routers' bias `b` after each step, with `e` the mean load
    /// minus the expert's load; from 0. 0 freezes the bias. Default: 1e-3, or 0 if the run starts from weights.
    pub bias_update_rate: f64,
    /// The weight of the sequence-wise balance loss (DeepSeek-V3, equation 17), from 0.
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
            check.require(key, value >= 0.0, || format!("is {value}; it must be at least 0"));
        }
    }
}

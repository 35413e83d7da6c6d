//! `[train]` and `[moe]`.

use std::str::FromStr;

use serde::Serialize;

use super::section::Section;
use super::{ModelRecipe, ModelSource, ScheduleConfig};

/// `[train]`: steps, batches, validation, checkpoints and what is logged.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainConfig {
    /// `steps`: optimizer steps of the run. Required, unless `epochs` or `[[schedule.stages]]` say it; 0 where `epochs` do
    /// and the data were not read yet.
    pub steps: u64,
    /// `epochs`: how often the run sees its data, in place of `steps`; the steps that these are go into the run's
    /// `recipe.toml`. 0 where `steps` say it. Default: 0.
    pub epochs: f64,
    /// `batch_size`: sequences in one forward pass. Default: 8.
    pub batch_size: usize,
    /// `gradient_accumulation`: forward passes for one step. Default: 1.
    pub gradient_accumulation: usize,
    /// `gradient_clip`: the largest global norm of the gradient; 0 for no limit. Default: 1.
    pub gradient_clip: f64,
    /// `validate_every`: steps between validations (there is one at the end in any case); 0 for never in between.
    /// Default: 100.
    pub validate_every: u64,
    /// `validate_batches`: batches of one validation, always the same ones; 0 for all. Default: 32.
    pub validate_batches: usize,
    /// `checkpoint_every`: steps between checkpoints (there is one at the end in any case); 0 for none in between.
    /// Default: 500.
    pub checkpoint_every: u64,
    /// `keep`: how many of the newest checkpoints stay; 0 for all. Default: 2.
    pub keep: usize,
    /// `keep_best`: whether the checkpoint with the lowest validation loss stays as well. Default: true.
    pub keep_best: bool,
    /// `log_every`: steps between lines of the log. Default: 1.
    pub log_every: u64,
    /// `probe_every`: steps between measurements of the attention logits and the update RMS, which cost time; 0 for
    /// never. Default: 50.
    pub probe_every: u64,
    /// `tensorboard`: whether event files are written. Default: false.
    pub tensorboard: bool,
    /// `activation_checkpointing`: `none`, or `block` to keep each layer's input alone and run the layer again for its
    /// gradient: a third more time, and the activations of one layer instead of all. Default: `none`.
    pub activation_checkpointing: Checkpointing,
    /// `loss_chunk_tokens`: tokens whose logits are in memory at once; 0 for all of a batch. Default: 0.
    pub loss_chunk_tokens: usize,
    /// `fuse_update`: whether each layer is updated as soon as its gradients are there, so that all of them never exist at
    /// once. Needs `gradient_clip = 0` and `gradient_accumulation = 1`, and with `activation_checkpointing = "none"` it
    /// spares the head's gradients alone. Default: false.
    pub fuse_update: bool,
    /// `freeze`: parameters that are not trained, as globs over their names in the checkpoint: `*` within one name, `**` for
    /// any number of names (`**.mlp.gate.weight`, `model.embed_tokens.**`). Default: none.
    pub freeze: Vec<String>,
    /// `check_memory`: whether a run on the CPU that needs more memory than there is (`moonlight plan`) is refused.
    /// Default: true.
    pub check_memory: bool,
    /// `plots`: whether SVG plots are drawn at the end. Default: true.
    pub plots: bool,
}

/// Which activations are kept for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Checkpointing {
    /// All.
    None,
    /// Each layer's input.
    Block,
}

impl FromStr for Checkpointing {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "none" => Ok(Self::None),
            "block" => Ok(Self::Block),
            _ => Err(()),
        }
    }
}

impl TrainConfig {
    pub(super) fn read(section: &mut Section<'_>, schedule: &ScheduleConfig) -> Self {
        let epochs = section.number("epochs").unwrap_or(0.0);
        section.require("epochs", epochs >= 0.0 && epochs.is_finite(), || format!("is {epochs}; it must be from 0"));
        let from_stages: u64 = if epochs > 0.0 { 0 } else { schedule.stages.iter().map(|stage| stage.steps).sum() };
        if !section.has("steps") && epochs == 0.0 && from_stages == 0 {
            section.missing("steps", "how many optimizer steps the run takes: steps = 1000, or epochs = 2");
        }
        let steps = section.whole("steps").unwrap_or(from_stages);
        section.require("steps", i64::try_from(steps).is_ok(), || format!("is {steps}, more than any run"));
        let positive = |section: &mut Section<'_>, key: &str, default: u64| {
            let value = section.whole(key).unwrap_or(default);
            section.require(key, value > 0, || "is 0; it must be at least 1".into());
            section.require(key, value <= u64::from(u32::MAX), || format!("is {value}; it must be below 2^32"));
            value
        };
        let batch_size = positive(section, "batch_size", 8) as usize;
        let gradient_accumulation = positive(section, "gradient_accumulation", 1) as usize;
        let gradient_clip = section.number("gradient_clip").unwrap_or(1.0);
        section.require("gradient_clip", gradient_clip >= 0.0, || {
            format!("is {gradient_clip}; a norm is not negative (0 for no limit)")
        });
        let validate_every = section.whole("validate_every").unwrap_or(100);
        let validate_batches = section.whole("validate_batches").unwrap_or(32) as usize;
        let checkpoint_every = section.whole("checkpoint_every").unwrap_or(500);
        let keep = section.whole("keep").unwrap_or(2) as usize;
        let keep_best = section.boolean("keep_best").unwrap_or(true);
        let log_every = positive(section, "log_every", 1);
        let probe_every = section.whole("probe_every").unwrap_or(50);
        let tensorboard = section.boolean("tensorboard").unwrap_or(false);
        let activation_checkpointing =
            section.choice("activation_checkpointing", &["none", "block"]).unwrap_or(Checkpointing::None);
        let loss_chunk_tokens = section.whole("loss_chunk_tokens").unwrap_or(0) as usize;
        let fuse_update = section.boolean("fuse_update").unwrap_or(false);
        section.require("fuse_update", !fuse_update || gradient_clip == 0.0, || {
            format!("needs `gradient_clip = 0` (it is {gradient_clip}): the norm is known when all layers are updated")
        });
        let accumulates =
            gradient_accumulation > 1 || schedule.accumulation.iter().any(|change| change.gradient_accumulation > 1);
        section.require("fuse_update", !fuse_update || !accumulates, || {
            "needs `gradient_accumulation = 1`: gradients that are summed have to be kept".into()
        });
        let freeze = section.strings("freeze").unwrap_or_default();
        let check_memory = section.boolean("check_memory").unwrap_or(true);
        let plots = section.boolean("plots").unwrap_or(true);
        Self {
            steps,
            epochs,
            batch_size,
            gradient_accumulation,
            gradient_clip,
            validate_every,
            validate_batches,
            checkpoint_every,
            keep,
            keep_best,
            log_every,
            probe_every,
            tensorboard,
            activation_checkpointing,
            loss_chunk_tokens,
            fuse_update,
            freeze,
            check_memory,
            plots,
        }
    }
}

/// `[moe]`: the balance of the experts. Nothing here touches a dense model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MoeRecipe {
    /// `bias_update_rate`: `u` of `b += u (sign(e) - mean(sign(e)))` after each step; 0 freezes the bias. Default:
    /// 1e-3, or 0 where the run starts from weights.
    pub bias_update_rate: f64,
    /// `sequence_balance_weight`: of the sequence-wise balance loss (DeepSeek-V3, equation 17). Default: 1e-4.
    pub sequence_balance_weight: f64,
}

impl MoeRecipe {
    pub(super) fn read(section: &mut Section<'_>, model: &ModelRecipe) -> Self {
        // The report's last stage and DeepSeek-V3's freeze the bias; fine-tuning goes on from there.
        let default = if matches!(model.source, ModelSource::Path(_)) { 0.0 } else { 1e-3 };
        let mut rate = |key: &str, default: f64| {
            let value = section.number(key).unwrap_or(default);
            section.require(key, value >= 0.0, || format!("is {value}; it must not be negative"));
            value
        };
        Self {
            bias_update_rate: rate("bias_update_rate", default),
            sequence_balance_weight: rate("sequence_balance_weight", 1e-4),
        }
    }
}

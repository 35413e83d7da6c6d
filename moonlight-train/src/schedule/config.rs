//! The settings of a schedule: `[schedule]` of a recipe.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The shape of the learning rate over the steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleName {
    /// Warm-up, then the peak rate to the end.
    #[default]
    Constant,
    /// Warm-up, then half a cosine from the peak to the final rate.
    Cosine,
    /// Warm-up, then a straight line from the peak to the final rate.
    Linear,
    /// Warm-up, stable, decay: the peak rate, then a straight line to the final rate over the last `decay_steps` steps. A run
    /// can be extended from a checkpoint before the decay.
    Wsd,
    /// The `stages`, one after the other, as Moonlight was trained (arXiv 2502.16982, section 3.3).
    Stages,
}

/// The shape of the learning rate within a stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StageShape {
    /// A straight line to `to`.
    #[default]
    Linear,
    /// Half a cosine to `to`.
    Cosine,
    /// `to` from the stage's first step on.
    Constant,
}

/// One entry of `[[schedule.stages]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// The number of steps of the stage, from 1.
    pub steps: u64,
    /// The learning rate of the stage's last step, from 0. The stage starts from the last rate of the stage before it, and the
    /// first stage from 0.
    pub to: f64,
    /// The shape of the rate between the two.
    #[serde(default)]
    pub shape: StageShape,
    /// `moe.bias_update_rate` during the stage, from 0. Default: that of `[moe]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bias_update_rate: Option<f64>,
}

/// One entry of `[[schedule.accumulation]]`: a larger or smaller batch from some step on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AccumulationChange {
    /// The first step with the new number, counted from 0.
    pub from_step: u64,
    /// `train.gradient_accumulation` from that step on, from 1.
    pub gradient_accumulation: usize,
}

/// The learning rate and the batch over the steps.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    /// The shape of the learning rate over the steps.
    pub name: ScheduleName,
    /// Steps of the warm-up, a straight line from 0 to the peak `optimizer.learning_rate`. Raise it if the loss jumps or becomes
    /// NaN in the first steps.
    pub warmup_steps: u64,
    /// Steps of the decay of `wsd`; 0 for a fifth of the schedule.
    pub decay_steps: u64,
    /// The final rate as a fraction of the peak, from 0 to 1; for `cosine`, `linear` and `wsd`.
    pub final_fraction: f64,
    /// Steps of the schedule; 0 for `train.steps`. Set it to stop a run before the end of its schedule, and to resume it with
    /// more steps later.
    pub total_steps: u64,
    /// The stages of `name = "stages"`. After the last one its final rate stays.
    pub stages: Vec<Stage>,
    /// Changes of `train.gradient_accumulation` during the run, in the order of their steps.
    pub accumulation: Vec<AccumulationChange>,
}

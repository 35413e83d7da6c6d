//! The settings of a schedule: a recipe's `[schedule]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the learning rate goes over the steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleName {
    /// Warm-up, then the same rate to the end.
    #[default]
    Constant,
    /// Warm-up, then half a cosine down to the final rate.
    Cosine,
    /// Warm-up, then a straight line down to the final rate.
    Linear,
    /// Warm-up, stable, decay: a straight line down over the last `decay_steps`.
    Wsd,
    /// One stage after another, as the report trained Moonlight.
    Stages,
}

/// How the rate goes within a stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StageShape {
    /// Along a straight line.
    #[default]
    Linear,
    /// Along half a cosine.
    Cosine,
    /// `to`, all along.
    Constant,
}

/// One entry of `[[schedule.stages]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// The steps that the stage takes.
    pub steps: u64,
    /// The learning rate that it ends with; it begins with that of the stage before (0 for the first).
    pub to: f64,
    /// How the rate goes from the one to the other.
    #[serde(default)]
    pub shape: StageShape,
    /// The experts' `bias_update_rate` during the stage. Default: that of `[moe]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bias_update_rate: Option<f64>,
}

/// One entry of `[[schedule.accumulation]]`: a larger, or smaller, batch from some step on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AccumulationChange {
    /// The first step, counted from 0, with the new number.
    pub from_step: u64,
    /// Forward passes for one step from there on.
    pub gradient_accumulation: usize,
}

/// The learning rate over the steps.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    /// How the learning rate goes over the steps.
    pub name: ScheduleName,
    /// Steps of the straight line up to the peak.
    pub warmup_steps: u64,
    /// Steps of WSD's decay; 0 for a fifth of the schedule.
    pub decay_steps: u64,
    /// The final rate as a fraction of the peak, for cosine, linear and WSD.
    pub final_fraction: f64,
    /// Steps of the schedule, where the run is to stop before its end; 0 for `train.steps`.
    pub total_steps: u64,
    /// What `name = "stages"` goes through. After the last, its final rate stays.
    pub stages: Vec<Stage>,
    /// Changes of `train.gradient_accumulation` on the way, in order.
    pub accumulation: Vec<AccumulationChange>,
}

//! `[schedule]`.

use std::str::FromStr;

use serde::Serialize;
use toml::Value;

use super::section::{Section, number, whole_number};

/// How the learning rate goes over the steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleName {
    /// Warm-up, then the same rate to the end.
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

impl FromStr for ScheduleName {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "constant" => Ok(Self::Constant),
            "cosine" => Ok(Self::Cosine),
            "linear" => Ok(Self::Linear),
            "wsd" => Ok(Self::Wsd),
            "stages" => Ok(Self::Stages),
            _ => Err(()),
        }
    }
}

/// How the rate goes within a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StageShape {
    /// `to`, all along.
    Constant,
    /// Along a straight line.
    Linear,
    /// Along half a cosine.
    Cosine,
}

impl FromStr for StageShape {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "constant" => Ok(Self::Constant),
            "linear" => Ok(Self::Linear),
            "cosine" => Ok(Self::Cosine),
            _ => Err(()),
        }
    }
}

/// One entry of `[[schedule.stages]]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stage {
    /// `steps`: how long the stage is.
    pub steps: u64,
    /// `to`: the learning rate that it ends with; it begins with that of the stage before (0 for the first).
    pub to: f64,
    /// `shape`: `linear`, `cosine` or `constant`. Default: `linear`.
    pub shape: StageShape,
    /// `bias_update_rate`: of the experts' bias during the stage. Default: that of `[moe]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias_update_rate: Option<f64>,
}

/// One entry of `[[schedule.accumulation]]`: a larger, or smaller, batch from some step on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AccumulationChange {
    /// `from_step`: the first step, counted from 0, with the new number.
    pub from_step: u64,
    /// `gradient_accumulation`: forward passes for one step from there on.
    pub gradient_accumulation: usize,
}

/// `[schedule]`: the learning rate over the steps.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScheduleConfig {
    /// `name`: `constant`, `cosine`, `linear`, `wsd` or `stages`. Default: `constant`.
    pub name: ScheduleName,
    /// `warmup_steps`: steps of the straight line up to the peak. Default: 0.
    pub warmup_steps: u64,
    /// `decay_steps`: length of WSD's decay; 0 for a fifth of the schedule. Default: 0.
    pub decay_steps: u64,
    /// `final_fraction`: the final rate as a fraction of the peak, for cosine, linear and WSD. Default: 0.
    pub final_fraction: f64,
    /// `total_steps`: length of the schedule where the run is to stop before its end; 0 for `train.steps`. Default: 0.
    pub total_steps: u64,
    /// `stages`: what `name = "stages"` goes through. After the last, its final rate stays.
    pub stages: Vec<Stage>,
    /// `accumulation`: changes of `train.gradient_accumulation` on the way, in order. Default: none.
    pub accumulation: Vec<AccumulationChange>,
}

impl ScheduleConfig {
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let name = section
            .choice("name", &["constant", "cosine", "linear", "wsd", "stages"])
            .unwrap_or(ScheduleName::Constant);
        let warmup_steps = section.whole("warmup_steps").unwrap_or(0);
        let decay_steps = section.whole("decay_steps").unwrap_or(0);
        let final_fraction = section.number("final_fraction").unwrap_or(0.0);
        section.require("final_fraction", (0.0..=1.0).contains(&final_fraction), || {
            format!("is {final_fraction}; it must be from 0 to 1")
        });
        let total_steps = section.whole("total_steps").unwrap_or(0);
        let stages: Vec<Stage> = section
            .tables("stages")
            .unwrap_or_default()
            .into_iter()
            .enumerate()
            .map(|(index, table)| read_stage(section, index, table))
            .collect();
        let accumulation: Vec<AccumulationChange> = section
            .tables("accumulation")
            .unwrap_or_default()
            .into_iter()
            .enumerate()
            .map(|(index, table)| read_change(section, index, table))
            .collect();
        section.require("accumulation", accumulation.is_sorted_by(|a, b| a.from_step < b.from_step), || {
            "must go up in `from_step`".into()
        });
        let staged = name == ScheduleName::Stages;
        section.require("stages", staged || stages.is_empty(), || "belong to name = \"stages\" alone".into());
        section.require("stages", !staged || !stages.is_empty(), || "must list at least one stage".into());
        section.require("warmup_steps", !staged || warmup_steps == 0, || {
            "has no place beside stages: make the first stage linear instead".into()
        });
        section.require("decay_steps", name == ScheduleName::Wsd || decay_steps == 0, || {
            "belongs to name = \"wsd\" alone".into()
        });
        Self { name, warmup_steps, decay_steps, final_fraction, total_steps, stages, accumulation }
    }
}

/// Reads one stage; `index` counts from 0.
fn read_stage(section: &mut Section<'_>, index: usize, mut table: toml::Table) -> Stage {
    const KEYS: &[&str] = &["steps", "to", "shape", "bias_update_rate"];
    let mut wrong = |key: &str, problem: String| section.invalid("stages", format!("[{index}].{key} {problem}"), None);
    let steps = table.remove("steps");
    let steps = steps.as_ref().and_then(whole_number).filter(|&steps| steps > 0).unwrap_or_else(|| {
        wrong("steps", "must be a whole number from 1".into());
        1
    });
    let to = table.remove("to");
    let to = to.as_ref().and_then(number).filter(|&to| to >= 0.0).unwrap_or_else(|| {
        wrong("to", "must be the learning rate that the stage ends with".into());
        0.0
    });
    let shape = match table.remove("shape") {
        None => StageShape::Linear,
        Some(value) => value.as_str().and_then(|name| name.parse().ok()).unwrap_or_else(|| {
            wrong("shape", format!("is {value}; it must be one of: linear, cosine, constant"));
            StageShape::Linear
        }),
    };
    let bias_update_rate = table.remove("bias_update_rate").and_then(|value: Value| {
        let rate = number(&value).filter(|&rate| rate >= 0.0);
        if rate.is_none() {
            wrong("bias_update_rate", "must be a number from 0".into());
        }
        rate
    });
    if let Some(key) = table.keys().next() {
        section.unknown_inner(&format!("stages[{index}].{key}"), key, KEYS);
    }
    Stage { steps, to, shape, bias_update_rate }
}

/// Reads one change of the batch; `index` counts from 0.
fn read_change(section: &mut Section<'_>, index: usize, mut table: toml::Table) -> AccumulationChange {
    const KEYS: &[&str] = &["from_step", "gradient_accumulation"];
    let mut whole = |key: &str, least: u64| {
        let value = table.remove(key).as_ref().and_then(whole_number).filter(|value| *value >= least);
        value.filter(|&value| value <= u64::from(u32::MAX)).unwrap_or_else(|| {
            section.invalid("accumulation", format!("[{index}].{key} must be a whole number from {least}"), None);
            least
        })
    };
    let (from_step, passes) = (whole("from_step", 0), whole("gradient_accumulation", 1));
    if let Some(key) = table.keys().next() {
        section.unknown_inner(&format!("accumulation[{index}].{key}"), key, KEYS);
    }
    AccumulationChange { from_step, gradient_accumulation: passes as usize }
}

//! Checks of `[schedule]`.

use super::check::Check;
use crate::schedule::{Schedule, ScheduleConfig, ScheduleName};

pub(super) fn check(config: &ScheduleConfig, check: &mut Check<'_>) {
    let ScheduleConfig { name, warmup_steps, decay_steps, final_fraction, stages, accumulation, .. } = config;
    check.require("schedule.final_fraction", (0.0..=1.0).contains(final_fraction), || {
        format!("is {final_fraction}; it must be from 0 to 1")
    });
    for (index, stage) in stages.iter().enumerate() {
        let key = |key: &str| format!("schedule.stages[{index}].{key}");
        check.require(&key("steps"), stage.steps > 0, || "must be at least 1".into());
        check.require(&key("to"), stage.to >= 0.0, || "must be a learning rate of at least 0".into());
        check.require(&key("bias_update_rate"), stage.bias_update_rate.is_none_or(|rate| rate >= 0.0), || {
            "must be at least 0".into()
        });
    }
    for (index, change) in accumulation.iter().enumerate() {
        let key = |key: &str| format!("schedule.accumulation[{index}].{key}");
        let most = u64::from(u32::MAX);
        check.require(&key("from_step"), change.from_step <= most, || "must be below 2^32".into());
        let passes = change.gradient_accumulation;
        check.require(&key("gradient_accumulation"), passes > 0 && passes as u64 <= most, || {
            "must be at least 1 and below 2^32".into()
        });
    }
    check.require("schedule.accumulation", accumulation.is_sorted_by(|a, b| a.from_step < b.from_step), || {
        "must be in the order of `from_step`".into()
    });
    let staged = *name == ScheduleName::Stages;
    check.require("schedule.stages", staged || stages.is_empty(), || "needs `schedule.name = \"stages\"`".into());
    check.require("schedule.stages", !staged || !stages.is_empty(), || "must have at least one stage".into());
    check.require("schedule.warmup_steps", !staged || *warmup_steps == 0, || {
        "has no effect with stages: let the first stage be linear instead".into()
    });
    check.require("schedule.decay_steps", *name == ScheduleName::Wsd || *decay_steps == 0, || {
        "needs `schedule.name = \"wsd\"`".into()
    });
}

/// Checks that warm-up and decay fit into the steps.
pub(super) fn check_length(config: &ScheduleConfig, learning_rate: f64, steps: u64, check: &mut Check<'_>) {
    if let Err(error) = Schedule::new(config, learning_rate, steps) {
        check.invalid(error.key, error.problem, None);
    }
}

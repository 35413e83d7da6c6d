//! The learning rate over the steps.
//!
//! Steps count from 0. Step `s` of a warm-up of `w` steps has the rate `peak * (s + 1) / w`: the first step already learns,
//! step `w - 1` has the peak, and the decay starts with step `w`. In a decay from step `a` to the schedule's end `n`, step `s`
//! is at the fraction `(s + 1 - a) / (n - a)` of the line or cosine, so that the last step has the final rate. Stages follow
//! the same convention: the last step of a stage has the stage's rate.

mod config;

pub use config::{AccumulationChange, ScheduleConfig, ScheduleName, Stage, StageShape};

/// A schedule that does not fit into its steps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{key}` {problem}")]
pub struct ScheduleError {
    /// The key of the recipe.
    pub key: &'static str,
    /// What is wrong, as the rest of a sentence that starts with the key.
    pub problem: String,
}

/// The learning rate of each step, and the other settings that change during a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    segments: Vec<Segment>,
    /// The rate before the first segment.
    initial: f64,
    accumulation: Vec<AccumulationChange>,
}

/// Consecutive steps in which the rate changes from one value to another.
#[derive(Debug, Clone, PartialEq)]
struct Segment {
    /// The first step after the segment.
    end: u64,
    steps: u64,
    from: f64,
    to: f64,
    shape: StageShape,
    bias_update_rate: Option<f64>,
}

impl Schedule {
    /// The schedule of a run of `steps` steps with the peak `learning_rate`.
    ///
    /// With `name = "stages"` the stages have their own rates, and `learning_rate` is not used.
    ///
    /// # Errors
    ///
    /// [`ScheduleError`] if warm-up and decay do not fit into the steps.
    pub fn new(config: &ScheduleConfig, learning_rate: f64, steps: u64) -> Result<Self, ScheduleError> {
        let total = if config.total_steps > 0 { config.total_steps } else { steps };
        let warmup = config.warmup_steps;
        let mut schedule = Self { segments: Vec::new(), initial: 0.0, accumulation: config.accumulation.clone() };
        if config.name == ScheduleName::Stages {
            for stage in &config.stages {
                schedule.push(stage.steps, stage.to, stage.shape);
                if let Some(segment) = schedule.segments.last_mut() {
                    segment.bias_update_rate = stage.bias_update_rate;
                }
            }
            return Ok(schedule);
        }
        if warmup > total {
            let problem = format!("is {warmup}, more than the {total} steps of the schedule");
            return Err(ScheduleError { key: "schedule.warmup_steps", problem });
        }
        if warmup == 0 {
            schedule.initial = learning_rate;
        }
        let after = total - warmup;
        let last = learning_rate * config.final_fraction;
        schedule.push(warmup, learning_rate, StageShape::Linear);
        match config.name {
            ScheduleName::Cosine => schedule.push(after, last, StageShape::Cosine),
            ScheduleName::Linear => schedule.push(after, last, StageShape::Linear),
            ScheduleName::Wsd => {
                let decay = if config.decay_steps > 0 { config.decay_steps } else { (total / 5).min(after) };
                if decay > after {
                    let problem = format!("is {decay}, more than the {after} steps after the warm-up");
                    return Err(ScheduleError { key: "schedule.decay_steps", problem });
                }
                schedule.push(after - decay, learning_rate, StageShape::Constant);
                schedule.push(decay, last, StageShape::Linear);
            }
            ScheduleName::Constant | ScheduleName::Stages => {
                schedule.push(after, learning_rate, StageShape::Constant);
            }
        }
        // Without steps there is no segment, and `rate` would be 0.
        if schedule.segments.is_empty() {
            schedule.push(1, learning_rate, StageShape::Constant);
        }
        Ok(schedule)
    }

    /// Appends a segment that starts at the rate of the last one. Does nothing for 0 steps.
    fn push(&mut self, steps: u64, to: f64, shape: StageShape) {
        if steps == 0 {
            return;
        }
        let (start, from) = self.segments.last().map_or((0, self.initial), |last| (last.end, last.to));
        let end = start + steps;
        self.segments.push(Segment { end, steps, from, to, shape, bias_update_rate: None });
    }

    /// The segment of a step. Steps after the end of the schedule belong to the last one.
    fn segment(&self, step: u64) -> Option<&Segment> {
        self.segments.iter().find(|segment| step < segment.end).or(self.segments.last())
    }

    /// The learning rate of step `step`, counted from 0.
    pub fn rate(&self, step: u64) -> f64 {
        let Some(segment) = self.segment(step) else { return 0.0 };
        let done = step + 1 - (segment.end - segment.steps).min(step);
        let done = (done as f64 / segment.steps as f64).min(1.0);
        let Segment { from, to, .. } = *segment;
        match segment.shape {
            StageShape::Constant => to,
            // Exactly `to`, which the formulas below reach only up to rounding.
            _ if done >= 1.0 => to,
            StageShape::Linear => from + (to - from) * done,
            StageShape::Cosine => to + (from - to) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        }
    }

    /// Micro-batches of step `step`, if the schedule sets them; otherwise `train.gradient_accumulation` applies.
    pub fn gradient_accumulation(&self, step: u64) -> Option<usize> {
        self.accumulation.iter().rfind(|change| change.from_step <= step).map(|change| change.gradient_accumulation)
    }

    /// The bias update rate after step `step`, if its stage sets one; otherwise `moe.bias_update_rate` applies.
    pub fn bias_update_rate(&self, step: u64) -> Option<f64> {
        self.segment(step)?.bias_update_rate
    }
}

#[cfg(test)]
mod tests;

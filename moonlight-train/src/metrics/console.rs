//! One readable line for each logged step and each validation, with torchtitan's fields in torchtitan's order.
//!
//! The line is logged at the level `info`, so the log's filter applies to it. `metrics.jsonl` has the same numbers for programs.

use std::fmt::Write;
use std::time::{Duration, Instant};

use super::{Metrics, Reporter, Split};
use crate::error::TrainError;

/// One field of the line; `None` leaves it out.
type Column = (&'static str, fn(&Metrics) -> Option<String>);

const COLUMNS: &[Column] = &[
    ("loss", |m| m.loss.map(|loss| format!("{loss:.4}"))),
    ("grad_norm", |m| m.grad_norm.map(|norm| format!("{norm:.4}"))),
    ("memory", |m| m.memory_mib.map(|memory| format!("{:.2}GiB", memory / 1024.0))),
    ("tps", |m| m.tokens_per_second.map(|speed| format!("{speed:.0}"))),
    ("lr", |m| m.lr.map(|lr| format!("{lr:.2e}"))),
    // In a training step the perplexity only repeats the loss.
    ("perplexity", |m| m.perplexity.filter(|_| m.split == Split::Valid).map(|perplexity| format!("{perplexity:.2}"))),
    ("imbalance", |m| m.expert_imbalance.map(|imbalance| format!("{imbalance:.2}"))),
    ("dead", |m| m.dead_experts.filter(|&dead| dead > 0.0).map(|dead| format!("{dead:.0}"))),
    ("logit", |m| m.max_attention_logit.map(|logit| format!("{logit:.1}"))),
    ("rms", |m| m.update_rms_muon.map(|rms| format!("{rms:.3}"))),
];

impl Metrics {
    /// The metrics as one line: the step of `steps`, each field that was measured, and for a training step the time left.
    fn line(&self, steps: u64, eta: Option<Duration>) -> String {
        let width = steps.to_string().len();
        let mut line = match self.split {
            Split::Train => format!("step: {:>width$}/{steps}", self.step),
            Split::Valid => format!("validate step: {:>width$}/{steps}", self.step),
        };
        for (name, column) in COLUMNS {
            if let Some(value) = column(self) {
                let _ = write!(line, "  {name}: {value}");
            }
        }
        if let Some(eta) = eta {
            let _ = write!(line, "  eta: {}", duration(eta));
        }
        line
    }
}

/// Logs a line for each record.
pub(crate) struct ConsoleLines {
    /// Steps of the whole run.
    steps: u64,
    /// Steps taken when the run started or resumed, plus those begun since.
    begun: u64,
    /// A step, and the moment at which it began; the time left is predicted from the speed since then.
    since: Option<(u64, Instant)>,
    first: u64,
}

impl ConsoleLines {
    /// The lines of a run that has taken `first` of its `steps` steps.
    pub(crate) fn new(first: u64, steps: u64) -> Self {
        Self { steps, begun: first, since: None, first }
    }

    /// The predicted time to the last step. It includes validations and checkpoints, as often as they occurred so far.
    fn eta(&self, step: u64) -> Option<Duration> {
        let (from, at) = self.since?;
        let (done, left) = (step.checked_sub(from)?, self.steps.checked_sub(step)?);
        (done > 0 && left > 0).then(|| at.elapsed().mul_f64(left as f64 / done as f64))
    }
}

impl Reporter for ConsoleLines {
    fn begin_step(&mut self) {
        // The clock restarts with the second step, because the first one compiles and tunes kernels.
        if self.begun <= self.first + 1 {
            self.since = Some((self.begun, Instant::now()));
        }
        self.begun += 1;
    }

    fn report(&mut self, metrics: &Metrics) -> Result<(), TrainError> {
        let eta = if metrics.split == Split::Train { self.eta(metrics.step) } else { None };
        tracing::info!("{}", metrics.line(self.steps, eta));
        Ok(())
    }
}

/// A duration in its two largest units: `45s`, `2m10s`, `3h05m`, `12d04h`.
fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64().round() as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_have_a_fixed_order() {
        let metrics = Metrics {
            step: 12,
            loss: Some(2.5),
            grad_norm: Some(0.25),
            tokens_per_second: Some(1234.5),
            lr: Some(2e-3),
            dead_experts: Some(0.0),
            ..Metrics::default()
        };
        let line = metrics.line(400, Some(Duration::from_secs(130)));
        assert_eq!(line, "step:  12/400  loss: 2.5000  grad_norm: 0.2500  tps: 1234  lr: 2.00e-3  eta: 2m10s");
    }

    #[test]
    fn a_validation_shows_its_perplexity_and_dead_experts_are_shown_if_there_are_any() {
        let mut metrics = Metrics { split: Split::Valid, step: 7, perplexity: Some(12.345), ..Metrics::default() };
        metrics.dead_experts = Some(3.0);
        assert_eq!(metrics.line(10, None), "validate step:  7/10  perplexity: 12.35  dead: 3");
        metrics.split = Split::Train;
        assert_eq!(metrics.line(10, None), "step:  7/10  dead: 3");
    }

    #[test]
    fn a_duration_has_two_units() {
        let seconds = [0.4, 59.4, 130.0, 3600.0, 11_100.0, 1_051_200.0];
        let shown = seconds.map(|seconds| duration(Duration::from_secs_f64(seconds)));
        assert_eq!(shown, ["0s", "59s", "2m10s", "1h00m", "3h05m", "12d04h"]);
    }

    #[test]
    fn the_time_left_is_counted_from_the_second_step_and_ends_with_the_run() {
        let mut lines = ConsoleLines::new(5, 9);
        assert_eq!(lines.eta(6), None, "no step has begun");
        lines.begin_step();
        assert_eq!(lines.since.map(|(step, _)| step), Some(5));
        assert!(lines.eta(6).is_some(), "the first step is all there is to go by");
        lines.begin_step();
        lines.begin_step();
        lines.since = lines.since.map(|(step, at)| (step, at.checked_sub(Duration::from_secs(10)).unwrap()));
        // Steps 6 and 7 took 10 s, and one step is left.
        assert_eq!(lines.eta(8).map(|left| left.as_secs_f64().round()), Some(5.0));
        assert_eq!(lines.eta(9), None);
    }
}

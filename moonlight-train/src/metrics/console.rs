//! One readable line per step, in torchtitan's order of fields.

use std::fmt::Write;

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
    // During training it only repeats the loss.
    ("perplexity", |m| m.perplexity.filter(|_| m.split == Split::Valid).map(|perplexity| format!("{perplexity:.2}"))),
    ("imbalance", |m| m.expert_imbalance.map(|imbalance| format!("{imbalance:.2}"))),
    ("dead", |m| m.dead_experts.filter(|&dead| dead > 0.0).map(|dead| format!("{dead:.0}"))),
    ("logit", |m| m.max_attention_logit.map(|logit| format!("{logit:.1}"))),
    ("rms", |m| m.update_rms_muon.map(|rms| format!("{rms:.3}"))),
];

impl Metrics {
    /// The metrics as one line.
    pub(crate) fn line(&self) -> String {
        let mut line = match self.split {
            Split::Train => format!("step: {:>6}", self.step),
            Split::Valid => format!("validate step: {:>6}", self.step),
        };
        for (name, column) in COLUMNS {
            if let Some(value) = column(self) {
                let _ = write!(line, "  {name}: {value}");
            }
        }
        line
    }
}

/// Logs a line for each record.
pub(crate) struct ConsoleLines;

impl Reporter for ConsoleLines {
    fn report(&mut self, metrics: &Metrics) -> Result<(), TrainError> {
        tracing::info!("{}", metrics.line());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_in_a_fixed_order() {
        let metrics = Metrics {
            step: 12,
            loss: Some(2.5),
            grad_norm: Some(0.25),
            tokens_per_second: Some(1234.5),
            lr: Some(2e-3),
            dead_experts: Some(0.0),
            ..Metrics::default()
        };
        assert_eq!(metrics.line(), "step:     12  loss: 2.5000  grad_norm: 0.2500  tps: 1234  lr: 2.00e-3");
    }

    #[test]
    fn a_validation_shows_its_perplexity_and_dead_experts_show_when_there_are_some() {
        let mut metrics = Metrics { split: Split::Valid, step: 7, perplexity: Some(12.345), ..Metrics::default() };
        metrics.dead_experts = Some(3.0);
        assert_eq!(metrics.line(), "validate step:      7  perplexity: 12.35  dead: 3");
        metrics.split = Split::Train;
        assert_eq!(metrics.line(), "step:      7  dead: 3");
    }
}

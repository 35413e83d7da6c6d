//! The metrics of a run: one record for the dashboard, the log line, `metrics.jsonl` and TensorBoard alike.
//!
//! A new metric needs a field of [`Metrics`] and its row of `METRICS` here, its value where it is measured (for what a
//! step measures, `trainer/step_result.rs`), and, to be in the log line, a column in `console.rs`.

mod console;
mod dashboard;
mod file;
mod memory;
mod reporter;
#[cfg(unix)]
mod stderr;
#[cfg(not(unix))]
#[path = "stderr_other.rs"]
mod stderr;

use serde::Serialize;

pub(crate) use console::ConsoleLines;
pub(crate) use dashboard::{Dashboard, Progress};
pub(crate) use file::MetricsFile;
pub use memory::{peak_memory_mib, resident_memory_mib};
pub(crate) use reporter::{LogEvery, Reporter};

/// Which data a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// A training step.
    #[default]
    Train,
    /// A validation.
    Valid,
}

/// The metrics of one step or one validation; what was not measured is absent.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Metrics {
    /// Training or validation.
    pub split: Split,
    /// Steps taken so far, this one included.
    pub step: u64,
    /// Tokens read so far.
    pub tokens: u64,
    /// Mean over the predicted tokens, nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// `e^loss`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// The learning rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Global norm of the gradient before clipping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Tokens read a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Resident memory of the process, MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<f64>,
    /// Load of the busiest expert over the mean load, the worst layer's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_imbalance: Option<f64>,
    /// Experts of all layers that got no token in the step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_experts: Option<f64>,
    /// The largest attention logit of all heads and layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_attention_logit: Option<f64>,
    /// The share of attention logits above 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_above_100: Option<f64>,
    /// RMS of Muon's last update, before the learning rate and without decay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_rms_muon: Option<f64>,
    /// RMS of AdamW's last update, before the learning rate and without decay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_rms_adamw: Option<f64>,
}

/// How one metric is shown.
pub(crate) struct Metric {
    /// Its name in files and on TensorBoard.
    pub(crate) key: &'static str,
    /// Its name on the dashboard.
    pub(crate) title: &'static str,
    pub(crate) unit: Option<&'static str>,
    pub(crate) higher_is_better: bool,
    /// Whether validations have it too.
    pub(crate) validated: bool,
    pub(crate) value: fn(&Metrics) -> Option<f64>,
    /// The plot at the end of a run; `None` for none.
    pub(crate) plot: Option<Plot>,
}

/// A plot of a metric over the steps.
pub(crate) struct Plot {
    /// The file's name without its extension.
    pub(crate) file: &'static str,
    pub(crate) title: &'static str,
    /// The legend of the training steps' curve; that of a validated metric has a second curve, "validation".
    pub(crate) legend: &'static str,
}

impl Metric {
    const fn new(key: &'static str, title: &'static str, value: fn(&Metrics) -> Option<f64>) -> Self {
        Self { key, title, unit: None, higher_is_better: false, validated: false, value, plot: None }
    }

    const fn unit(self, unit: &'static str) -> Self {
        Self { unit: Some(unit), ..self }
    }

    const fn plot(self, file: &'static str, title: &'static str, legend: &'static str) -> Self {
        Self { plot: Some(Plot { file, title, legend }), ..self }
    }

    const fn validated(self) -> Self {
        Self { validated: true, ..self }
    }
}

/// Every metric, in the order in which the dashboard shows them.
pub(crate) const METRICS: &[Metric] = &[
    Metric::new("loss", "Loss", |m| m.loss).validated().plot("loss", "Loss (nats per token)", "training"),
    Metric::new("perplexity", "Perplexity", |m| m.perplexity).validated(),
    Metric::new("lr", "Learning rate", |m| m.lr).plot("lr", "Learning rate", "learning rate"),
    Metric::new("grad_norm", "Gradient norm", |m| m.grad_norm).plot("grad_norm", "Gradient norm", "before clipping"),
    Metric {
        higher_is_better: true,
        ..Metric::new("tokens_per_second", "Speed", |m| m.tokens_per_second).unit("tokens/s")
    },
    Metric::new("memory_mib", "Memory", |m| m.memory_mib).unit("MiB"),
    Metric::new("expert_imbalance", "Expert imbalance", |m| m.expert_imbalance).plot(
        "expert_load",
        "Expert load, busiest over mean (worst layer)",
        "imbalance",
    ),
    Metric::new("dead_experts", "Dead experts", |m| m.dead_experts),
    Metric::new("max_attention_logit", "Largest attention logit", |m| m.max_attention_logit),
    Metric::new("update_rms_muon", "Update RMS, Muon", |m| m.update_rms_muon),
    Metric::new("update_rms_adamw", "Update RMS, AdamW", |m| m.update_rms_adamw),
];

impl Metrics {
    /// Every metric that was measured, under its name on TensorBoard: `train/loss`.
    pub(crate) fn scalars(&self) -> impl Iterator<Item = (String, f64)> + '_ {
        let split = match self.split {
            Split::Train => "train",
            Split::Valid => "valid",
        };
        METRICS.iter().filter_map(move |metric| Some((format!("{split}/{}", metric.key), (metric.value)(self)?)))
    }

    /// The balance of the experts' load: the worst layer's maximum over mean, and the number of experts without a
    /// token; `None` for a dense model.
    pub(crate) fn balance(loads: &[Option<Vec<u64>>]) -> Option<(f64, f64)> {
        let of_layer = |load: &Vec<u64>| {
            let total: u64 = load.iter().sum();
            let largest = load.iter().copied().max().unwrap_or(0);
            largest as f64 * load.len() as f64 / (total as f64).max(1.0)
        };
        let layers: Vec<&Vec<u64>> = loads.iter().flatten().collect();
        let worst = layers.iter().map(|load| of_layer(load)).reduce(f64::max)?;
        let dead = layers.iter().flat_map(|load| load.iter()).filter(|&&load| load == 0).count();
        Some((worst, dead as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balance_is_of_the_worst_layer_and_dead_experts_are_counted() {
        let loads = [None, Some(vec![4, 4, 4, 4]), Some(vec![0, 8, 8, 0])];
        assert_eq!(Metrics::balance(&loads), Some((2.0, 2.0)));
        assert_eq!(Metrics::balance(&[None]), None);
    }

    #[test]
    fn a_record_holds_what_was_measured() {
        let metrics = Metrics { step: 3, tokens: 96, loss: Some(1.5), ..Metrics::default() };
        let json = serde_json::to_string(&metrics).unwrap();
        assert_eq!(json, r#"{"split":"train","step":3,"tokens":96,"loss":1.5}"#);
    }
}

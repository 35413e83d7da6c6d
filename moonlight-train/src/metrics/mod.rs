//! The metrics of a run: one record for the dashboard, the log line, `metrics.jsonl` and TensorBoard.
//!
//! To add a metric, give it a field of [`Metrics`] and a row of `METRICS` here, and set it where it is measured (what a step
//! measures, in `trainer/step_result.rs`). A column in `console.rs` shows it in the log line as well. `CONTRIBUTING.md` has the
//! whole list, with tests and the manual.

mod console;
mod dashboard;
mod file;
mod memory;
mod record_file;
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
pub(crate) use record_file::{RecordFile, read_records};
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

/// The metrics of one step or one validation: a line of `metrics.jsonl`. What was not measured is absent from it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Metrics {
    /// `train` or `valid`.
    pub split: Split,
    /// Steps taken so far, including this one.
    pub step: u64,
    /// Training tokens read so far over all ranks, without padding.
    pub tokens: u64,
    /// Cross-entropy, the mean over the predicted tokens, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// `e^loss`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Learning rate of the step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Global L2 norm of the gradient before clipping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Tokens per second over all ranks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Resident memory of the process after the step, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<f64>,
    /// Load of the busiest expert divided by the mean load of its layer; the largest over the layers. 1 is perfect balance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_imbalance: Option<f64>,
    /// Experts, over all layers, to which no token of the step was routed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_experts: Option<f64>,
    /// The largest attention logit over all heads and layers, measured every `train.probe_every` steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_attention_logit: Option<f64>,
    /// The share of attention logits above 100, the threshold of Kimi K2's QK-clip.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_above_100: Option<f64>,
    /// RMS of Muon's update, before the learning rate and without decay; every `train.probe_every` steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_rms_muon: Option<f64>,
    /// RMS of AdamW's update, before the learning rate and without decay; every `train.probe_every` steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_rms_adamw: Option<f64>,
}

/// How a metric is named and shown.
pub(crate) struct Metric {
    /// The key in `metrics.jsonl` and on TensorBoard.
    pub(crate) key: &'static str,
    /// The name on the dashboard.
    pub(crate) title: &'static str,
    pub(crate) unit: Option<&'static str>,
    pub(crate) higher_is_better: bool,
    /// Whether a validation measures it too.
    pub(crate) validated: bool,
    pub(crate) value: fn(&Metrics) -> Option<f64>,
    /// The SVG that is drawn at the end of a run, if any.
    pub(crate) plot: Option<Plot>,
}

/// A plot of a metric over the steps.
pub(crate) struct Plot {
    /// The file name without its extension.
    pub(crate) file: &'static str,
    pub(crate) title: &'static str,
    /// The legend of the curve of the training steps. A validated metric has a second curve, "validation".
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
    Metric::new("share_above_100", "Attention logits above 100", |m| m.share_above_100),
    Metric::new("update_rms_muon", "Update RMS, Muon", |m| m.update_rms_muon),
    Metric::new("update_rms_adamw", "Update RMS, AdamW", |m| m.update_rms_adamw),
];

impl Metrics {
    /// Every metric that was measured, with its TensorBoard tag: `train/loss`.
    pub(crate) fn scalars(&self) -> impl Iterator<Item = (String, f64)> + '_ {
        let split = match self.split {
            Split::Train => "train",
            Split::Valid => "valid",
        };
        METRICS.iter().filter_map(move |metric| Some((format!("{split}/{}", metric.key), (metric.value)(self)?)))
    }

    /// How evenly tokens are routed: the largest maximum over mean of a layer, and the number of experts without a token.
    /// `None` for a dense model. `loads` are tokens for each expert of each layer.
    pub(crate) fn expert_balance(loads: &[Option<Vec<u64>>]) -> Option<(f64, f64)> {
        let imbalance = |load: &Vec<u64>| {
            let total: u64 = load.iter().sum();
            let largest = load.iter().copied().max().unwrap_or(0);
            // A step in which a layer routed nothing has imbalance 0 and not NaN, which JSON cannot represent.
            largest as f64 * load.len() as f64 / (total as f64).max(1.0)
        };
        let layers: Vec<&Vec<u64>> = loads.iter().flatten().collect();
        let worst = layers.iter().map(|load| imbalance(load)).reduce(f64::max)?;
        let dead = layers.iter().flat_map(|load| load.iter()).filter(|&&load| load == 0).count();
        Some((worst, dead as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expert_balance_is_that_of_the_worst_layer_and_counts_dead_experts() {
        let loads = [None, Some(vec![4, 4, 4, 4]), Some(vec![0, 8, 8, 0])];
        assert_eq!(Metrics::expert_balance(&loads), Some((2.0, 2.0)));
        assert_eq!(Metrics::expert_balance(&[None]), None);
    }

    #[test]
    fn every_field_has_a_row_and_a_line_of_the_manual() {
        let one = Some(1.0);
        // Without `..`: a new field does not compile until it is here.
        let all = Metrics {
            split: Split::Train,
            step: 1,
            tokens: 1,
            loss: one,
            perplexity: one,
            lr: one,
            grad_norm: one,
            tokens_per_second: one,
            memory_mib: one,
            expert_imbalance: one,
            dead_experts: one,
            max_attention_logit: one,
            share_above_100: one,
            update_rms_muon: one,
            update_rms_adamw: one,
        };
        let record = serde_json::to_value(&all).unwrap();
        let fields: Vec<_> = record.as_object().unwrap().keys().map(String::as_str).collect();
        let rows: Vec<_> = METRICS.iter().map(|metric| metric.key).collect();
        assert_eq!(fields[..3], ["split", "step", "tokens"]);
        assert_eq!(fields[3..], rows, "the rows of METRICS are the fields of Metrics, in their order");
        let page = include_str!("../../../docs/src/reference/metrics.md");
        for field in &fields[1..] {
            assert!(page.contains(&format!("| `{field}` |")), "metrics.md has no row for `{field}`");
        }
    }

    #[test]
    fn a_record_contains_only_what_was_measured() {
        let metrics = Metrics { step: 3, tokens: 96, loss: Some(1.5), ..Metrics::default() };
        let json = serde_json::to_string(&metrics).unwrap();
        assert_eq!(json, r#"{"split":"train","step":3,"tokens":96,"loss":1.5}"#);
    }
}

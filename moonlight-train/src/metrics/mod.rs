//! The figures of a run: one record for the dashboard, the log line, `metrics.jsonl` and TensorBoard alike.

mod dashboard;
mod file;
mod line;
mod memory;

use burn::train::ItemLazy;
use serde::Serialize;

pub(crate) use dashboard::register;
pub(crate) use file::MetricsFile;
pub use memory::{peak_memory_mib, resident_memory_mib};

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

/// The figures of one step or one validation; what was not measured is absent.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Figures {
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

/// One figure: its name in files, its name on the dashboard, and how to get it.
pub(crate) struct Figure {
    pub(crate) key: &'static str,
    pub(crate) title: &'static str,
    pub(crate) unit: Option<&'static str>,
    pub(crate) of: fn(&Figures) -> Option<f64>,
}

/// Every figure, in the order in which it is shown.
pub(crate) const FIGURES: &[Figure] = &[
    Figure { key: "loss", title: "Loss", unit: None, of: |f| f.loss },
    Figure { key: "perplexity", title: "Perplexity", unit: None, of: |f| f.perplexity },
    Figure { key: "lr", title: "Learning rate", unit: None, of: |f| f.lr },
    Figure { key: "grad_norm", title: "Gradient norm", unit: None, of: |f| f.grad_norm },
    Figure { key: "tokens_per_second", title: "Speed", unit: Some("tokens/s"), of: |f| f.tokens_per_second },
    Figure { key: "memory_mib", title: "Memory", unit: Some("MiB"), of: |f| f.memory_mib },
    Figure { key: "expert_imbalance", title: "Expert imbalance", unit: None, of: |f| f.expert_imbalance },
    Figure { key: "dead_experts", title: "Dead experts", unit: None, of: |f| f.dead_experts },
    Figure { key: "max_attention_logit", title: "Largest attention logit", unit: None, of: |f| f.max_attention_logit },
    Figure { key: "update_rms_muon", title: "Update RMS, Muon", unit: None, of: |f| f.update_rms_muon },
    Figure { key: "update_rms_adamw", title: "Update RMS, AdamW", unit: None, of: |f| f.update_rms_adamw },
];

impl Figures {
    /// Every figure that was measured, under its name on TensorBoard: `train/loss`.
    pub(crate) fn scalars(&self) -> impl Iterator<Item = (String, f64)> + '_ {
        let split = match self.split {
            Split::Train => "train",
            Split::Valid => "valid",
        };
        FIGURES.iter().filter_map(move |figure| Some((format!("{split}/{}", figure.key), (figure.of)(self)?)))
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

impl ItemLazy for Figures {
    fn sync(self) -> Result<Self, burn::tensor::ExecutionError> {
        Ok(self) // numbers on the host already
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balance_is_of_the_worst_layer_and_dead_experts_are_counted() {
        let loads = [None, Some(vec![4, 4, 4, 4]), Some(vec![0, 8, 8, 0])];
        assert_eq!(Figures::balance(&loads), Some((2.0, 2.0)));
        assert_eq!(Figures::balance(&[None]), None);
    }

    #[test]
    fn a_record_holds_what_was_measured() {
        let figures = Figures { step: 3, tokens: 96, loss: Some(1.5), ..Figures::default() };
        let json = serde_json::to_string(&figures).unwrap();
        assert_eq!(json, r#"{"split":"train","step":3,"tokens":96,"loss":1.5}"#);
    }
}

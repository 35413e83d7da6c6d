//! A run on several GPUs: memory of each by part, bytes of a step, and time from the rates that are published.
//!
//! All of it is arithmetic on shapes, each number with its formula, in the design of `moonlight_optim::distributed`: every
//! worker holds the whole model and all gradients of a micro-batch, and its part of the optimizer. `P` is the number of
//! parameters that are trained, `M` those of them that Muon takes, `N` the number of workers, `b` the bytes of a weight.

use moonlight_model::config::ParameterKind;
use serde::Serialize;

use super::flops::{is_muon_parameter, newton_schulz_flops};
use super::{MemoryPart, MemoryPlan};

/// What a run is asked about.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cluster {
    /// GPUs, a worker each.
    pub workers: u64,
    /// Of the slowest link between two workers, bytes a second in one direction.
    pub link: f64,
    /// Of a GPU's matrix units in the type of the weights, operations a second.
    pub matmul: f64,
    /// Tokens of a step, of all workers together.
    pub tokens: u64,
    /// Whether momentum is gathered, as in the report's Algorithm 1.
    pub flat: bool,
    /// Bytes of a value of momentum that is gathered.
    pub gather_bytes: u64,
}

/// A number, and what it is made of.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Quantity {
    /// What it is.
    pub name: &'static str,
    /// Bytes, or seconds.
    pub value: f64,
    /// How it is computed.
    pub formula: String,
}

/// A run on several GPUs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MultiGpuPlan {
    /// GPUs.
    pub workers: u64,
    /// Memory of a GPU, bytes.
    pub memory: Vec<Quantity>,
    /// What a worker sends in a step, bytes.
    pub sent: Vec<Quantity>,
    /// Of a step, seconds; each part as if it were alone.
    pub time: Vec<Quantity>,
}

impl MultiGpuPlan {
    /// Works it out.
    pub fn new(plan: &MemoryPlan, cluster: Cluster) -> Self {
        let settings = &plan.settings;
        let shapes = plan.config.parameter_shapes();
        let (mut muon, mut adamw) = (0_u64, 0_u64);
        for shape in shapes.iter().filter(|shape| shape.kind != ParameterKind::CorrectionBias) {
            *(if is_muon_parameter(shape) && settings.muon { &mut muon } else { &mut adamw }) += shape.count();
        }
        let newton_schulz = if settings.muon { newton_schulz_flops(&plan.config, 5, false) } else { 0.0 };
        let (trained, workers, bytes) = (muon + adamw, cluster.workers as f64, settings.bytes as f64);
        let (billion, share) = (trained as f64 / 1e9, (workers - 1.0) / workers);
        let master = if settings.masters && settings.bytes < 4 { 4.0 } else { 0.0 };
        let momentum = (settings.momentum_bytes + settings.second_moment_bytes) as f64;
        let largest = plan.largest_phase();
        let part = |part: MemoryPart| largest.of(part) as f64;

        let item = |name, value, formula| Quantity { name, value, formula };
        let memory = vec![
            item("weights", bytes * trained as f64, format!("b P = {bytes} x {billion:.3} 10^9")),
            item(
                "gradients",
                bytes * trained as f64,
                "b P: of a step's micro-batches, summed before they are shared out".to_string(),
            ),
            item(
                "optimizer state",
                ((momentum + master) * muon as f64 + (8.0 + master) * adamw as f64) / workers,
                format!(
                    "(({momentum} + {master}) M + (8 + {master}) (P - M)) / N, M = {:.3} 10^9: momentum or Adam's two \
                     moments, f32 masters",
                    muon as f64 / 1e9
                ),
            ),
            item(
                "activations",
                part(MemoryPart::LayerInputs) + part(MemoryPart::Activations) + part(MemoryPart::Logits),
                format!(
                    "of a micro-batch of {} x {} tokens at the step's largest moment, by `moonlight plan`",
                    settings.batch, settings.sequence
                ),
            ),
            item(
                "buckets",
                // Sent and received bytes, of the bucket under way and of the next one; the largest bucket is a parameter.
                {
                    let parameter = shapes.iter().map(|shape| shape.count()).max().unwrap_or(0).max(1 << 22);
                    4.0 * bytes * parameter as f64
                },
                "4 b times the largest of a parameter and 2^22: two buckets, going and coming".to_string(),
            ),
            item(
                "new values",
                (bytes + 4.0) * trained as f64 / workers,
                "(b + 4) P / N: this worker's part of gradient and weights in f32 and b bytes, in the update"
                    .to_string(),
            ),
        ];

        let values = bytes * trained as f64 * share;
        let gathered = if cluster.flat { cluster.gather_bytes as f64 * muon as f64 * share } else { 0.0 };
        let sent = vec![
            item("gradients", values, "b P (N - 1) / N: reduce-scatter".to_string()),
            item(
                "momentum",
                gathered,
                match cluster.flat {
                    true => format!(
                        "at most {} M (N - 1) / N: parts of matrices go to who holds other parts",
                        cluster.gather_bytes
                    ),
                    false => "none: matrices are whole".to_string(),
                },
            ),
            item("parameters", values, "b P (N - 1) / N: all-gather".to_string()),
        ];

        let step = plan.token_flops().training(settings.recompute) as f64 * cluster.tokens as f64;
        let all: f64 = sent.iter().map(|item| item.value).sum();
        let time = vec![
            item(
                "forward and backward",
                step / workers / cluster.matmul,
                format!("{step:.3e} operations of {} tokens / N / the matmul rate", cluster.tokens),
            ),
            item(
                "Newton-Schulz",
                newton_schulz / workers / cluster.matmul,
                format!(
                    "{newton_schulz:.3e} operations / N / the matmul rate, {:.2} % of the pass{}",
                    100.0 * newton_schulz / step,
                    if cluster.flat { "; more for matrices that lie on several workers" } else { "" }
                ),
            ),
            item(
                "sending",
                all / cluster.link,
                "bytes sent / link; gradients while the last backward runs".to_string(),
            ),
        ];
        Self { workers: cluster.workers, memory, sent, time }
    }

    /// Memory of a GPU, bytes.
    pub fn memory_bytes(&self) -> f64 {
        self.memory.iter().map(|item| item.value).sum()
    }

    /// The same for people, each number with its formula.
    pub fn table(&self) -> String {
        let mut text = format!("\non {} GPUs, a worker each\n", self.workers);
        let mut block = |title: &str, items: &[Quantity], unit: &str, scale: f64| {
            text += &format!("{title}\n");
            for item in items {
                text += &format!("  {:<21} {:>10.3} {unit}  {}\n", item.name, item.value / scale, item.formula);
            }
            let sum: f64 = items.iter().map(|item| item.value).sum();
            text += &format!("  {:<21} {:>10.3} {unit}\n", "together", sum / scale);
        };
        block("memory of a GPU", &self.memory, "GB", 1e9);
        block("sent by a worker in a step", &self.sent, "GB", 1e9);
        block("time of a step, at the rates given", &self.time, "s ", 1.0);
        text
    }
}

#[cfg(test)]
mod tests {
    use moonlight_model::ModelConfig;

    use super::*;
    use crate::plan::MemorySettings;

    fn scale(workers: u64, flat: bool, sequence: usize) -> MultiGpuPlan {
        let settings = MemorySettings {
            batch: 1,
            sequence,
            bytes: 2,
            recompute: true,
            loss_chunk_tokens: 1024,
            fused: false,
            accumulates: true,
            muon: true,
            momentum_bytes: 4,
            second_moment_bytes: 0,
            masters: true,
            probed: false,
            cpu: false,
            plain_attention: false,
            threads: 1,
            frozen: Vec::new(),
            lora: None,
            packed: None,
        };
        let plan = MemoryPlan::new(ModelConfig::preset("moonlight-16b-a3b").unwrap(), settings);
        let tokens = 2048 * 8192;
        MultiGpuPlan::new(&plan, Cluster { workers, link: 50e9, matmul: 989e12, tokens, flat, gather_bytes: 2 })
    }

    fn of(items: &[Quantity], name: &str) -> f64 {
        items.iter().find(|item| item.name == name).unwrap().value
    }

    #[test]
    fn moonlight_16b_by_hand() {
        let eight = scale(8, false, 8192);
        // All parameters but the routers' biases; embedding, head and norms are AdamW's.
        let trained = 15_960_110_208.0 - 26.0 * 64.0;
        let adamw = 2.0 * 335_544_320.0 + 27.0 * (2048.0 * 2.0 + 512.0) + 2048.0;
        assert_eq!(of(&eight.memory, "weights"), 2.0 * trained);
        let state = 8.0 * (trained - adamw) + 12.0 * adamw;
        assert!((of(&eight.memory, "optimizer state") / (state / 8.0) - 1.0).abs() < 1e-12);
        assert_eq!(of(&eight.sent, "gradients"), 2.0 * trained * 7.0 / 8.0);
        // Weights and gradients alone are 64 GB. Of GPUs of 80 GB eight are too few for the state, and 64 are not.
        assert!(eight.memory_bytes() > 80e9);
        assert!(scale(64, false, 8192).memory_bytes() < 80e9, "{}", scale(64, false, 8192).table());
    }

    #[test]
    fn the_flat_form_stays_within_the_reports_ratio() {
        let sum = |scale: &MultiGpuPlan| scale.sent.iter().map(|item| item.value).sum::<f64>();
        let ratio = sum(&scale(64, true, 4096)) / sum(&scale(64, false, 4096));
        // With bf16 gradients and weights it is (2 + 2 + 2) / (2 + 2) of Muon's share.
        assert!(ratio > 1.0 && ratio <= 1.5, "{ratio}");
    }
}

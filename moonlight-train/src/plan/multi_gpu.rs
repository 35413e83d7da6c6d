//! A run on several GPUs: memory of each, bytes sent in a step, and time from given rates.
//!
//! Everything is computed from shapes, and each number comes with its formula. The model of a run is `moonlight_optim::distributed`:
//! every rank has all weights, all gradients of a micro-batch, and its shard of the optimizer state. `P` is the number of
//! trained parameters, `M` the number that Muon updates, `N` the world size, `b` the bytes of a weight.

use moonlight_model::config::ParameterKind;
use moonlight_optim::NewtonSchulz;
use serde::Serialize;

use super::flops::{is_muon_parameter, newton_schulz_flops};
use super::{MemoryPart, MemoryPlan, StepPhase};

/// The GPUs, their rates, and the size of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// The number of ranks, each with a GPU.
    pub world_size: u64,
    /// The slowest link between two ranks, bytes per second in one direction.
    pub link: f64,
    /// A GPU's rate for matrix products in the dtype of the weights, operations per second.
    pub matmul: f64,
    /// Tokens in a step, over all ranks.
    pub tokens: u64,
    /// Whether momentum is gathered, as in the report's Algorithm 1 (`form = "flat"`).
    pub flat: bool,
    /// Bytes of a gathered momentum value: 4, or 2 for bf16.
    pub gather_bytes: u64,
    /// The iteration of Muon's updates.
    pub newton_schulz: NewtonSchulz,
}

/// A predicted number and its formula.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Quantity {
    /// What is measured: `weights`, `sending`.
    pub name: &'static str,
    /// Bytes, or seconds.
    pub value: f64,
    /// How it is computed.
    pub formula: String,
}

/// The prediction for several GPUs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MultiGpuPlan {
    /// The number of ranks.
    #[serde(rename = "ranks")]
    pub world_size: u64,
    /// Memory of each GPU, bytes.
    pub memory: Vec<Quantity>,
    /// What each rank sends in a step, bytes.
    pub sent: Vec<Quantity>,
    /// Time of a step, seconds, without overlap of computing and sending.
    pub time: Vec<Quantity>,
}

impl MultiGpuPlan {
    /// Computes the prediction from the plan of one GPU.
    pub fn new(plan: &MemoryPlan, cluster: Cluster) -> Self {
        let settings = &plan.settings;
        let shapes = plan.config.parameter_shapes();
        let (mut muon, mut adamw) = (0_u64, 0_u64);
        for shape in shapes.iter().filter(|shape| shape.kind != ParameterKind::CorrectionBias) {
            *(if is_muon_parameter(shape) && settings.muon { &mut muon } else { &mut adamw }) += shape.count();
        }
        let newton_schulz =
            if settings.muon { newton_schulz_flops(&plan.config, &cluster.newton_schulz, false) } else { 0.0 };
        let (trained, ranks, bytes) = (muon + adamw, cluster.world_size as f64, settings.bytes_per_value as f64);
        let (billion, share) = (trained as f64 / 1e9, (ranks - 1.0) / ranks);
        let master = if settings.master_weights && settings.bytes_per_value < 4 { 4.0 } else { 0.0 };
        let momentum = (settings.momentum_bytes + settings.second_moment_bytes) as f64;
        // The peak of activations alone: the largest phase on one GPU is often the update of all parameters, which is sharded here.
        let parts = [MemoryPart::LayerInputs, MemoryPart::Activations, MemoryPart::Logits];
        let activations = |phase: &StepPhase| parts.iter().map(|&part| phase.bytes(part)).sum::<u64>();
        let activations = plan.phases().iter().map(activations).max().unwrap_or(0);

        let item = |name, value, formula| Quantity { name, value, formula };
        let memory = vec![
            item("weights", bytes * trained as f64, format!("b P = {bytes} x {billion:.3} 10^9")),
            item(
                "gradients",
                bytes * trained as f64,
                "b P: summed over a step's micro-batches before they are sharded".to_string(),
            ),
            item(
                "optimizer state",
                ((momentum + master) * muon as f64 + (8.0 + master) * adamw as f64) / ranks,
                format!(
                    "(({momentum} + {master}) M + (8 + {master}) (P - M)) / N, M = {:.3} 10^9: momentum or Adam's two \
                     moments, f32 masters",
                    muon as f64 / 1e9
                ),
            ),
            item(
                "activations",
                activations as f64,
                format!("of a micro-batch of {} x {} tokens, at their peak", settings.batch, settings.sequence),
            ),
            item(
                "buckets",
                // Two buckets are in flight, each with a send and a receive buffer. A bucket is at least as large as its largest parameter.
                {
                    let parameter = shapes.iter().map(|shape| shape.count()).max().unwrap_or(0).max(1 << 22);
                    4.0 * bytes * parameter as f64
                },
                "4 b times the larger of the largest parameter and 2^22: two buckets, sent and received".to_string(),
            ),
            item(
                "new values",
                (bytes + 4.0) * trained as f64 / ranks,
                "(b + 4) P / N: this rank's shard of gradients and weights in f32 and b bytes, in the update"
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
                        "at most {} M (N - 1) / N: shards of matrices, gathered by the other ranks that have a shard of them",
                        cluster.gather_bytes
                    ),
                    false => "none: each matrix is on one rank".to_string(),
                },
            ),
            item("parameters", values, "b P (N - 1) / N: all-gather".to_string()),
        ];

        let step = plan.token_flops().training(settings.recompute) as f64 * cluster.tokens as f64;
        let all: f64 = sent.iter().map(|item| item.value).sum();
        let time = vec![
            item(
                "forward and backward",
                step / ranks / cluster.matmul,
                format!("{step:.3e} operations of {} tokens / N / the matmul rate", cluster.tokens),
            ),
            item(
                "Newton-Schulz",
                newton_schulz / ranks / cluster.matmul,
                format!(
                    "{newton_schulz:.3e} operations / N / the matmul rate, {:.2} % of the pass{}",
                    100.0 * newton_schulz / step,
                    if cluster.flat { "; more for matrices that several ranks share" } else { "" }
                ),
            ),
            item(
                "sending",
                all / cluster.link,
                "bytes sent / link; gradients are sent during the last backward pass".to_string(),
            ),
        ];
        Self { world_size: cluster.world_size, memory, sent, time }
    }

    /// Memory of a GPU, bytes.
    pub fn memory_bytes(&self) -> f64 {
        self.memory.iter().map(|item| item.value).sum()
    }

    /// A table with a line for each number and its formula.
    pub fn table(&self) -> String {
        let mut text = format!("\non {} GPUs, a rank each\n", self.world_size);
        let mut block = |title: &str, items: &[Quantity], unit: &str, scale: f64| {
            text += &format!("{title}\n");
            for item in items {
                text += &format!("  {:<21} {:>10.3} {unit}  {}\n", item.name, item.value / scale, item.formula);
            }
            let sum: f64 = items.iter().map(|item| item.value).sum();
            text += &format!("  {:<21} {:>10.3} {unit}\n", "total", sum / scale);
        };
        block("memory of each GPU", &self.memory, "GB", 1e9);
        block("sent by each rank in a step", &self.sent, "GB", 1e9);
        block("time of a step, at the rates given", &self.time, "s ", 1.0);
        text
    }
}

#[cfg(test)]
mod tests {
    use moonlight_model::ModelConfig;
    use moonlight_optim::Coefficients;

    use super::*;
    use crate::plan::MemorySettings;

    fn scale(world_size: u64, flat: bool, sequence: usize) -> MultiGpuPlan {
        let settings = MemorySettings {
            batch: 1,
            sequence,
            bytes_per_value: 2,
            recompute: true,
            loss_chunk_tokens: 1024,
            fuse_update: false,
            gradient_accumulation: 2048,
            accumulates: true,
            muon: true,
            momentum_bytes: 4,
            second_moment_bytes: 0,
            master_weights: true,
            probes: false,
            cpu: false,
            unfused_attention: false,
            threads: 1,
            frozen: Vec::new(),
            lora: None,
            quantization: None,
        };
        let plan = MemoryPlan::new(ModelConfig::preset("moonlight-16b-a3b").unwrap(), settings);
        let tokens = 2048 * 8192;
        let newton_schulz = NewtonSchulz::new(&Coefficients::Report, 5);
        let (link, matmul) = (50e9, 989e12);
        let cluster = Cluster { world_size, link, matmul, tokens, flat, gather_bytes: 2, newton_schulz };
        MultiGpuPlan::new(&plan, cluster)
    }

    fn of(items: &[Quantity], name: &str) -> f64 {
        items.iter().find(|item| item.name == name).unwrap().value
    }

    #[test]
    fn moonlight_16b_matches_the_formulas_by_hand() {
        let eight = scale(8, false, 8192);
        // All parameters but the routers' biases; embedding, head and norms are AdamW's.
        let trained = 15_960_110_208.0 - 26.0 * 64.0;
        let adamw = 2.0 * 335_544_320.0 + 27.0 * (2048.0 * 2.0 + 512.0) + 2048.0;
        assert_eq!(of(&eight.memory, "weights"), 2.0 * trained);
        let state = 8.0 * (trained - adamw) + 12.0 * adamw;
        assert!((of(&eight.memory, "optimizer state") / (state / 8.0) - 1.0).abs() < 1e-12);
        assert_eq!(of(&eight.sent, "gradients"), 2.0 * trained * 7.0 / 8.0);
        // Weights and gradients alone are 64 GB: eight GPUs of 80 GB have too little left for the optimizer state, 64 have enough.
        assert!(eight.memory_bytes() > 80e9);
        assert!(scale(64, false, 8192).memory_bytes() < 80e9, "{}", scale(64, false, 8192).table());
    }

    #[test]
    fn the_flat_form_sends_at_most_half_as_much_again() {
        let sum = |scale: &MultiGpuPlan| scale.sent.iter().map(|item| item.value).sum::<f64>();
        let ratio = sum(&scale(64, true, 4096)) / sum(&scale(64, false, 4096));
        // With bf16 gradients and weights it is (2 + 2 + 2) / (2 + 2) of Muon's share.
        assert!(ratio > 1.0 && ratio <= 1.5, "{ratio}");
    }
}

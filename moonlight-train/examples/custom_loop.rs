//! Your own training loop, without the trainer: a small Moonlight learns this file byte by byte, with Muon.
//!
//! ```text
//! cargo run -p moonlight-train --example custom_loop
//! ```
//!
//! It shows the five parts of a step: batches, forward and backward with gradients summed over micro-batches, a learning rate,
//! the optimizer, and the update of the router bias, which balances the experts. What `moonlight train` adds (data pipeline,
//! gradient clipping, checkpoints, resuming, several devices) is left out.

use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData};
use moonlight_model::{CausalLm, LmBatch, ModelConfig, Probe};
use moonlight_optim::{AdamWConfig, MuonConfig, OptimizerOptions, ParameterRules};

/// What the model learns: the bytes of this file.
const TEXT: &[u8] = include_bytes!("custom_loop.rs");

const STEPS: usize = 30;
/// Forward and backward passes whose gradients make one step.
const MICRO_BATCHES: usize = 2;
const BATCH: usize = 4;
const SEQUENCE: usize = 64;
const LEARNING_RATE: f64 = 1e-2;
/// The weight of the sequence-wise balance loss and the update rate of the router bias in DeepSeek-V3.
const BALANCE_WEIGHT: f64 = 1e-4;
const BIAS_RATE: f64 = 1e-3;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // On an autodiff device, tensors record what their gradients need.
    let device = Device::default().autodiff();
    device.seed(1);
    let config = config()?;
    let mut model = config.init(&device);

    // Muon for the hidden matrices and the experts, AdamW for embedding, head, norms and biases. The rules are checked
    // against the model, and the table lists which optimizer takes which parameter.
    let assignment = ParameterRules::moonlight(MuonConfig::new(), AdamWConfig::new()).assign(&model)?;
    println!("{assignment}\n");
    // Matrices of equal shape, such as one projection of all layers, are orthogonalized in one batch.
    let mut optimizer = assignment.build(OptimizerOptions::new())?;

    let mut losses = Vec::with_capacity(STEPS);
    for step in 0..STEPS {
        let mut gradients = GradientsAccumulator::<CausalLm>::new();
        let mut expert_loads = Vec::new();
        let mut loss = 0.0;
        for micro_batch in 0..MICRO_BATCHES {
            let batch = batch(step * MICRO_BATCHES + micro_batch, &device);
            let output = model.loss(&batch, BALANCE_WEIGHT, Probe::default());
            // The loss of the step is the mean over all its tokens: each micro-batch adds its sum over the tokens of the step.
            let mean = output.loss_sum / (MICRO_BATCHES * BATCH * SEQUENCE) as f64;
            loss += f64::from(mean.clone().into_scalar::<f32>());
            let objective = match output.balance_loss {
                Some(balance) => mean + balance / MICRO_BATCHES as f64,
                None => mean,
            };
            gradients.accumulate(&model, GradientsParams::from_grads(objective.backward(), &model));
            add_loads(&mut expert_loads, output.stats.expert_loads());
        }
        model = optimizer.step(learning_rate(step), model, gradients.grads())?;
        // The bias has no gradient. It is raised for experts with few tokens and lowered for experts with many.
        model = model.update_router_bias(&expert_loads, BIAS_RATE);
        println!("step {:2}: loss {loss:.3} nats a byte, learning rate {:.1e}", step + 1, learning_rate(step));
        losses.push(loss);
    }

    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..3]), mean(&losses[STEPS - 3..]));
    assert!(last < 0.75 * first, "the loss falls: {first:.3} in the first three steps, {last:.3} in the last three");
    Ok(())
}

/// A Moonlight of two layers, one dense and one with eight experts, over the 256 bytes: keys as in a `config.json`.
fn config() -> Result<ModelConfig, moonlight_model::ConfigError> {
    ModelConfig::from_json(
        r#"{
            "model_type": "deepseek_v3", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
            "q_lora_rank": null, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
            "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
            "moe_intermediate_size": 48, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": true,
            "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1
        }"#,
    )
}

/// `BATCH` windows of the text: tokens and, for each, the one that follows it, both `[BATCH, SEQUENCE]`.
fn batch(index: usize, device: &Device) -> LmBatch {
    // With a prime stride the windows are spread over the text.
    let start = |row: usize| (index * BATCH + row) * 7919 % (TEXT.len() - SEQUENCE);
    let window = |shift: usize| {
        let rows = (0..BATCH).flat_map(|row| &TEXT[start(row) + shift..][..SEQUENCE]);
        let values: Vec<i32> = rows.map(|&byte| i32::from(byte)).collect();
        Tensor::<2, Int>::from_data(TensorData::new(values, [BATCH, SEQUENCE]), device)
    };
    LmBatch {
        tokens: window(0),
        targets: window(1),
        // Every prediction counts. 0 would leave one out, such as padding or a user's message.
        loss_mask: Tensor::ones([BATCH, SEQUENCE], device),
        // Each sequence is one document.
        segments: None,
    }
}

/// Three steps of warm-up, then a cosine down to a tenth.
fn learning_rate(step: usize) -> f64 {
    let warm_up = ((step + 1) as f64 / 3.0).min(1.0);
    let progress = step as f64 / STEPS as f64;
    LEARNING_RATE * warm_up * (0.1 + 0.45 * (1.0 + (std::f64::consts::PI * progress).cos()))
}

/// Adds the number of tokens routed to each expert of each layer; `None` for dense layers.
fn add_loads(sum: &mut Vec<Option<Vec<u64>>>, loads: Vec<Option<Vec<u64>>>) {
    if sum.is_empty() {
        *sum = loads;
        return;
    }
    for (sum, load) in sum.iter_mut().zip(loads) {
        if let (Some(sum), Some(load)) = (sum, load) {
            sum.iter_mut().zip(load).for_each(|(sum, load)| *sum += load);
        }
    }
}

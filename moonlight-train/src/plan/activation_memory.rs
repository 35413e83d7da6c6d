//! What the graph of one decoder layer, and of the head, keeps for the backward pass: numbers of values, not bytes.
//!
//! A forward pass in the graph keeps the inputs of every matrix product and of every kernel (`moonlight_model::kernels`). The
//! sums below follow the layer's code line by line, so a change of a layer needs a change here; `tests/plan_memory.rs` compares
//! them with what is allocated. `n` is the number of tokens of a micro-batch.

use moonlight_model::config::{MlpRole, ModelConfig, MoeShape, ProjectionRole};
use moonlight_model::lora::AdapterShape;

use super::MemorySettings;

/// The values that a layer's graph keeps, and the most that its backward pass allocates in addition.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LayerActivations {
    /// Kept by the graph. The layer's input is not counted here: it is the output of the previous layer, which the caller adds.
    pub(super) kept: u64,
    /// Gradients of activations, at their peak.
    pub(super) transient: u64,
}

/// The activations of layer `layer`, counted from 0.
pub(super) fn layer_activations(
    config: &ModelConfig,
    layer: usize,
    settings: &MemorySettings,
    adapters: &[AdapterShape],
) -> LayerActivations {
    let (batch, sequence) = (settings.batch, settings.sequence);
    let n = (batch * sequence) as u64;
    let hidden = config.hidden_size as u64;
    let (attention, attention_transient) = attention_activations(config, batch, sequence, settings.unfused_attention);
    let (feed_forward, feed_forward_transient) = match config.moe_of_layer(layer) {
        Some(moe) => moe_activations(config, moe, n),
        None => {
            let width = config.intermediate_size as u64;
            // Kept: gate, up and their product. The backward pass frees the product before it makes the gradients of gate and up.
            (3 * n * width, 2 * n * width)
        }
    };
    // 3 [tokens, hidden]: the normalized inputs of attention and feed-forward, and the residual sum between them.
    let kept = 3 * n * hidden + attention + feed_forward;
    let (more, less) = match &settings.lora {
        Some(lora) => adapter_difference(config, layer, n, (lora.rank, adapters)),
        None => (0, 0),
    };
    // The backward passes of attention and feed-forward do not overlap, so only the larger one counts. The gradients of the residual
    // stream and of the normalized input are alive in both.
    let transient = 2 * n * hidden + attention_transient.max(feed_forward_transient);
    LayerActivations { kept: kept + more - less, transient }
}

/// What LoRA changes in a layer, as `(more, less)`: the values that adapters keep in addition (their products of width `rank`), and
/// those that are no longer kept. A frozen projection needs its input only for an adapter's gradient.
fn adapter_difference(
    config: &ModelConfig,
    layer: usize,
    n: u64,
    (rank, adapters): (usize, &[AdapterShape]),
) -> (u64, u64) {
    let adapted: Vec<ProjectionRole> =
        adapters.iter().filter(|adapter| adapter.layer == layer).map(|adapter| adapter.role).collect();
    let moe = config.moe_of_layer(layer);
    let rows = moe.map_or(0, |moe| n * moe.num_experts_per_tok as u64);
    let adapter_rows = adapted.iter().map(|role| if matches!(role, ProjectionRole::Experts(_)) { rows } else { n });
    let more = adapter_rows.sum::<u64>() * rank as u64;
    let any = |wanted: &dyn Fn(ProjectionRole) -> bool| adapted.iter().any(|&role| wanted(role));
    let hidden = config.hidden_size as u64;
    let mut less = 0;
    if !any(&|role| matches!(role, ProjectionRole::Attention(_)) && role.reads_hidden()) {
        less += n * hidden;
    }
    if let Some(moe) = moe {
        if !any(&|role| matches!(role, ProjectionRole::Experts(MlpRole::Gate | MlpRole::Up))) {
            less += rows * hidden;
        }
        if !any(&|role| role == ProjectionRole::Experts(MlpRole::Down)) {
            less += rows * moe.moe_intermediate_size as u64;
        }
    }
    // The MLP that sees every token: that of a dense layer, or the shared experts.
    let width = match moe {
        Some(moe) => moe.n_shared_experts * moe.moe_intermediate_size,
        None => config.intermediate_size,
    };
    let of_mlp = |role| match role {
        ProjectionRole::Mlp(part) | ProjectionRole::SharedExperts(part) => Some(part),
        ProjectionRole::Attention(_) | ProjectionRole::Experts(_) | ProjectionRole::Router => None,
    };
    if !any(&|role| matches!(of_mlp(role), Some(MlpRole::Gate | MlpRole::Up))) {
        less += n * hidden;
    }
    if !any(&|role| of_mlp(role) == Some(MlpRole::Down)) {
        less += n * width as u64;
    }
    (more, less)
}

/// Kept and transient values of attention; `unfused` holds all scores at once.
fn attention_activations(config: &ModelConfig, batch: usize, sequence: usize, unfused: bool) -> (u64, u64) {
    let n = (batch * sequence) as u64;
    let heads = config.num_attention_heads as u64;
    let widths = config.attention_widths();
    let [query, key_value, output, latent] =
        [widths.query, widths.key_value, widths.output, widths.latent].map(|width| width as u64);
    // `heads`: the fused kernel keeps the logarithm of each softmax's denominator.
    let kept = n * (query + key_value + output + latent + heads);
    // Gradients of the output, of the query before and after rotary embedding, and of keys and values.
    let mut transient = n * (output + 2 * query + key_value);
    if unfused {
        // Scores, probabilities and their gradients, for all heads at once.
        transient += 5 * batch as u64 * heads * (sequence as u64).pow(2);
    }
    (kept, transient)
}

/// Kept and transient values of a mixture of experts for `n` tokens.
fn moe_activations(config: &ModelConfig, moe: &MoeShape, n: u64) -> (u64, u64) {
    let hidden = config.hidden_size as u64;
    let (k, width) = (moe.num_experts_per_tok as u64, moe.moe_intermediate_size as u64);
    let shared = (moe.n_shared_experts * moe.moe_intermediate_size) as u64;
    let experts = moe.n_routed_experts as u64;
    let rows = n * k;
    // Each pair of token and expert has a row of input, output, gate, up and their product. The shared experts read the normalized
    // input, which is counted once, so they keep only gate, up and product.
    let kept = rows * (2 * hidden + 3 * width) + 3 * n * shared;
    // The router: scores of all experts, and the intermediate values of the chosen experts' weights.
    let routing = n * (4 * experts + 6 * k);
    // The backward pass frees kept values as it makes their gradients. In addition it allocates, one after the other: the gradient of
    // the experts' outputs; those of gate and up, when outputs and product are freed; that of the experts' inputs.
    let transient = (rows * hidden).max((2 * rows * width).saturating_sub(rows * hidden)).max(rows * width);
    (kept + routing, transient + n * hidden)
}

/// Values that the head needs for `tokens` tokens at once, as `(kept, logits)`, where `logits` includes their gradient. A frozen head
/// keeps only the input of its norm.
pub(super) fn head_activations(config: &ModelConfig, tokens: u64, frozen: bool) -> (u64, u64) {
    let kept = if frozen { 1 } else { 2 };
    (kept * tokens * config.hidden_size as u64, 2 * tokens * config.vocab_size as u64)
}

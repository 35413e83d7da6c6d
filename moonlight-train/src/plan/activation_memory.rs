//! What one decoder layer and the head hold for their gradients, in values.
//!
//! A forward pass in the graph keeps the inputs of every product and of every kernel (`moonlight_model::kernels`); the
//! list below follows the code, in its order. `n` is the number of tokens of a micro-batch.

use moonlight_model::config::{MlpRole, ModelConfig, MoeShape, ProjectionRole};
use moonlight_model::lora::AdapterShape;

use super::MemorySettings;

/// Values that a layer's graph keeps, and the most that its backward pass holds beside them at a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LayerActivations {
    /// Kept, the layer's own input not counted: it is the previous layer's last sum.
    pub(super) kept: u64,
    /// Gradients of activations, at the widest place.
    pub(super) transient: u64,
}

/// Of layer `layer`.
pub(super) fn of_layer(
    config: &ModelConfig,
    layer: usize,
    settings: &MemorySettings,
    adapters: &[AdapterShape],
) -> LayerActivations {
    let (batch, sequence) = (settings.batch, settings.sequence);
    let n = (batch * sequence) as u64;
    let hidden = config.hidden_size as u64;
    let (attention, attention_transient) = of_attention(config, batch, sequence, settings.plain_attention);
    let (feed_forward, feed_forward_transient) = match config.moe_of_layer(layer) {
        Some(moe) => of_moe(config, moe, n),
        None => {
            let width = config.intermediate_size as u64;
            // gate, up and their product; on the way back, the product gone, its gradient becomes those of the two.
            (3 * n * width, 2 * n * width)
        }
    };
    // Beside them: the normed input of either half, and the sum between the halves.
    let kept = 3 * n * hidden + attention + feed_forward;
    let (more, less) = match &settings.lora {
        Some(lora) => of_adapters(config, layer, n, (lora.rank, adapters)),
        None => (0, 0),
    };
    // The gradient of the residual stream waits while either half is gone through.
    let transient = 2 * n * hidden + attention_transient.max(feed_forward_transient);
    LayerActivations { kept: kept + more - less, transient }
}

/// What adapters add to a layer, their narrow products, and what a frozen product need not keep: its input, where no
/// adapter wants it either and no kernel has it.
fn of_adapters(config: &ModelConfig, layer: usize, n: u64, (rank, adapters): (usize, &[AdapterShape])) -> (u64, u64) {
    let adapted: Vec<ProjectionRole> =
        adapters.iter().filter(|adapter| adapter.layer == layer).map(|adapter| adapter.role).collect();
    let moe = config.moe_of_layer(layer);
    let rows = moe.map_or(0, |moe| n * moe.num_experts_per_tok as u64);
    let narrow = adapted.iter().map(|role| if matches!(role, ProjectionRole::Experts(_)) { rows } else { n });
    let more = narrow.sum::<u64>() * rank as u64;
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
    // Every token visits the one MLP of a dense layer, or the shared experts.
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

fn of_attention(config: &ModelConfig, batch: usize, sequence: usize, plain: bool) -> (u64, u64) {
    let n = (batch * sequence) as u64;
    let heads = config.num_attention_heads as u64;
    let widths = config.attention_widths();
    let [query, key_value, output, latent] =
        [widths.query, widths.key_value, widths.output, widths.latent].map(|width| width as u64);
    // The logarithm of each softmax's denominator stays as well.
    let kept = n * (query + key_value + output + latent + heads);
    // Gradients of output, query (turned and not), keys and values.
    let mut transient = n * (output + 2 * query + key_value);
    if plain {
        // Scores, probabilities and their gradients of all heads at once.
        transient += 5 * batch as u64 * heads * (sequence as u64).pow(2);
    }
    (kept, transient)
}

fn of_moe(config: &ModelConfig, moe: &MoeShape, n: u64) -> (u64, u64) {
    let hidden = config.hidden_size as u64;
    let (k, width) = (moe.num_experts_per_tok as u64, moe.moe_intermediate_size as u64);
    let shared = (moe.n_shared_experts * moe.moe_intermediate_size) as u64;
    let experts = moe.n_routed_experts as u64;
    let rows = n * k;
    // Rows as they go to the experts and as they come back, gate, up and their product, and the shared ones' three.
    let kept = rows * (2 * hidden + 3 * width) + 3 * n * shared;
    // Scores and what the weights of the chosen are made of.
    let routing = n * (4 * experts + 6 * k);
    // On the way back things go as their gradients come. Beyond what was kept there are, one after the other: the gradient
    // of the rows that came back; those of gate and up in place of the rows and the product; those of the rows that went.
    let transient = (rows * hidden).max((2 * rows * width).saturating_sub(rows * hidden)).max(rows * width);
    (kept + routing, transient + n * hidden)
}

/// Values that the head holds for `tokens` tokens at a time: what it keeps, and the logits with their gradient. A frozen
/// head does not keep its input.
pub(super) fn of_head(config: &ModelConfig, tokens: u64, frozen: bool) -> (u64, u64) {
    let kept = if frozen { 1 } else { 2 };
    (kept * tokens * config.hidden_size as u64, 2 * tokens * config.vocab_size as u64)
}

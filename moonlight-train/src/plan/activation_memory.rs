//! What one decoder layer and the head hold for their gradients, in values.
//!
//! A forward pass in the graph keeps the inputs of every product and of every kernel (`moonlight_model::kernels`); the
//! list below follows the code, in its order. `n` is the number of tokens of a micro-batch.

use moonlight_model::config::{AttentionShape, ModelConfig, MoeShape};
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
    let prefix = format!("layers.{layer}.");
    let adapted: Vec<&str> = adapters.iter().filter_map(|adapter| adapter.path.strip_prefix(&prefix)).collect();
    let moe = config.moe_of_layer(layer);
    let rows = moe.map_or(0, |moe| n * moe.num_experts_per_tok as u64);
    let narrow = adapted.iter().map(|path| if path.starts_with("mlp.experts.") { rows } else { n });
    let more = narrow.sum::<u64>() * rank as u64;
    let any = |names: &[&str]| adapted.iter().any(|path| names.contains(path));
    let hidden = config.hidden_size as u64;
    let mut less = 0;
    let queries = ["self_attn.q_proj", "self_attn.q_a_proj", "self_attn.k_proj", "self_attn.v_proj"];
    if !any(&queries) && !any(&["self_attn.kv_a_proj_with_mqa"]) {
        less += n * hidden;
    }
    let (inner, width) = match moe {
        Some(moe) => ("mlp.shared_experts.", moe.n_shared_experts * moe.moe_intermediate_size),
        None => ("mlp.", config.intermediate_size),
    };
    if let Some(moe) = moe {
        if !any(&["mlp.experts.gate_proj", "mlp.experts.up_proj"]) {
            less += rows * hidden;
        }
        if !any(&["mlp.experts.down_proj"]) {
            less += rows * moe.moe_intermediate_size as u64;
        }
    }
    let named = |name: &str| any(&[&format!("{inner}{name}")]);
    if !named("gate_proj") && !named("up_proj") {
        less += n * hidden;
    }
    if !named("down_proj") {
        less += n * width as u64;
    }
    (more, less)
}

fn of_attention(config: &ModelConfig, batch: usize, sequence: usize, plain: bool) -> (u64, u64) {
    let n = (batch * sequence) as u64;
    let heads = config.num_attention_heads as u64;
    let (query, key_value, output, compressed) = match &config.attention {
        AttentionShape::Mla(mla) => {
            let (nope, rope, value) = (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim);
            let query = heads * (nope + rope) as u64;
            let key_value = heads * (nope + value) as u64;
            // The latent before its norm lies in one tensor with the shared key; then the normed one, and the turned key.
            let mut compressed = (mla.kv_lora_rank + rope + mla.kv_lora_rank + rope) as u64;
            if let Some(rank) = mla.q_lora_rank {
                compressed += 2 * rank as u64;
            }
            (query, key_value, heads * value as u64, compressed)
        }
        AttentionShape::Gqa(gqa) => {
            let width = gqa.head_dim as u64;
            (heads * width, 2 * gqa.num_key_value_heads as u64 * width, heads * width, 0)
        }
    };
    // The logarithm of each softmax's denominator stays as well.
    let kept = n * (query + key_value + output + compressed + heads);
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

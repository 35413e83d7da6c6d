//! QK-clip (Kimi K2): after a step, scales down the query and key weights of heads whose attention logits grew too large.

use burn::tensor::Tensor;
use moonlight_model::attention::QkClipProjections;
use moonlight_model::{CausalLm, Projection};
use moonlight_optim::{HeadLayout, QkClip, WeightLayout, replace_value};

/// The model after clipping by the largest logit of each head in the step, `largest[layer][head]`.
pub(super) fn clip(mut model: CausalLm, largest: &[Vec<f64>], clip: QkClip) -> CausalLm {
    let heads = model.config().num_attention_heads;
    for (layer, largest) in model.layers.iter_mut().zip(largest) {
        let factors = clip.factors(largest);
        // A multiplication by 1 would only copy the weights.
        if factors.iter().all(|&factor| factor == 1.0) {
            continue;
        }
        let QkClipProjections { query, key_value, nope, rope, value } = layer.self_attn.qk_clip_projections_mut();
        let parts = HeadLayout { heads, nope, rope, value, layout: WeightLayout::InOut };
        scale(query, |weight| parts.clip_query(weight, &factors));
        if let Some(key_value) = key_value {
            scale(key_value, |weight| parts.clip_key_value(weight, &factors));
        }
    }
    model
}

/// Applies `scaled` to a projection's weight `[in, out]`, and to its bias as a weight of one row, because the bias contributes
/// to the logits too.
fn scale(layer: &mut Projection, scaled: impl Fn(Tensor<2>) -> Tensor<2>) {
    layer.weight = layer.weight.clone().map(|weight| replace_value(&weight, scaled(weight.clone().inner())));
    layer.bias = layer.bias.take().map(|bias| {
        bias.map(|bias| {
            let [outputs] = bias.dims();
            replace_value(&bias, scaled(bias.clone().inner().reshape([1, outputs])).reshape([outputs]))
        })
    });
}

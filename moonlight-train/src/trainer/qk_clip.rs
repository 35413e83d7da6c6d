//! QK-clip after a step, where the recipe asks for it: heads whose attention logits grew too large are held down.

use burn::tensor::Tensor;
use moonlight_model::attention::Attention;
use moonlight_model::config::AttentionShape;
use moonlight_model::{CausalLm, Projection};
use moonlight_optim::{HeadLayout, QkClip, WeightLayout, replace_value};

/// The model with each head scaled by its largest logit of the step, `largest[layer][head]`.
///
/// In latent attention keys share what is rotated only. In grouped-query attention whole keys are shared by the heads of a
/// group, so that the query takes all of the factor.
pub(super) fn clip(mut model: CausalLm, largest: &[Vec<f64>], clip: QkClip) -> CausalLm {
    let heads = model.config().num_attention_heads;
    let layout = WeightLayout::InOut;
    let parts = match &model.config().attention {
        AttentionShape::Mla(mla) => {
            HeadLayout { heads, nope: mla.qk_nope_head_dim, rope: mla.qk_rope_head_dim, value: mla.v_head_dim, layout }
        }
        AttentionShape::Gqa(gqa) => HeadLayout { heads, nope: 0, rope: gqa.head_dim, value: 0, layout },
    };
    for (layer, largest) in model.layers.iter_mut().zip(largest) {
        let factors = clip.factors(largest);
        if factors.iter().all(|&factor| factor == 1.0) {
            continue;
        }
        let query = |weight: Tensor<2>| parts.clip_query(weight, &factors);
        match &mut layer.self_attn {
            Attention::Mla(attention) => {
                if let Some(projection) = attention.q_proj.as_mut().or(attention.q_b_proj.as_mut()) {
                    scale(projection, query);
                }
                scale(&mut attention.kv_b_proj, |weight| parts.clip_key_value(weight, &factors));
            }
            Attention::Gqa(attention) => scale(&mut attention.q_proj, query),
        }
    }
    model
}

/// Applies `scaled` to a layer's weight `[in, out]`, and to its bias as a weight of one row.
fn scale(layer: &mut Projection, scaled: impl Fn(Tensor<2>) -> Tensor<2>) {
    layer.weight = layer.weight.clone().map(|weight| replace_value(&weight, scaled(weight.clone().inner())));
    layer.bias = layer.bias.take().map(|bias| {
        bias.map(|bias| {
            let [outputs] = bias.dims();
            replace_value(&bias, scaled(bias.clone().inner().reshape([1, outputs])).reshape([outputs]))
        })
    });
}

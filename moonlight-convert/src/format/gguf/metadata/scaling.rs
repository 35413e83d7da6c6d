//! The scaling of the rotary embedding, both ways.

use moonlight_model::ModelConfig;
use moonlight_model::config::{Llama3Config, RopeScaling, YarnConfig};
use serde_json::{Value as Json, json};

use super::add::Keys;
use super::config::Reader;
use crate::format::gguf::names::{self, Architecture};

/// YaRN's `mscale(s, m) = 0.1 m ln(s) + 1` for `s > 1`, else 1.
fn mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// The factor of a model on cos and sin, by the precedence of transformers, and that on the attention scores, whose square it is.
pub(super) fn attention_factors(yarn: &YarnConfig) -> (f64, f64) {
    let all_dim = yarn.mscale_all_dim.filter(|all_dim| *all_dim != 0.0);
    let on_rotation = match (yarn.attention_factor, yarn.mscale.filter(|mscale| *mscale != 0.0), all_dim) {
        (Some(factor), _, _) => factor,
        (None, Some(numerator), Some(all_dim)) => mscale(yarn.factor, numerator) / mscale(yarn.factor, all_dim),
        _ => mscale(yarn.factor, 1.0),
    };
    (on_rotation, all_dim.map_or(1.0, |all_dim| mscale(yarn.factor, all_dim)))
}

/// Writes the scaling of the rotary embedding.
///
/// In `deepseek2`, llama.cpp multiplies cos and sin by `attn_factor` `a`, and attention scores by the square of
/// `a (1 + 0.1 m ln(factor))`, where `m` is ten times `yarn_log_multiplier` (a quirk of its converter that its loader undoes), and with a
/// linear scaling by `(1 + 0.1 ln(factor))^2` in addition. Solved for both, this expresses every YaRN scaling.
pub(super) fn add_scaling(keys: &mut Keys<'_>, config: &ModelConfig) -> Result<(), String> {
    let latent = keys.architecture == Architecture::Deepseek2;
    let log_multiplier = |factor: f64, on_scores: f64| {
        // At exactly 0 llama.cpp takes another formula.
        let multiplier = (on_scores - 1.0) / (0.1 * factor.ln());
        0.1 * if multiplier.abs() < 1e-9 { 1e-9 } else { multiplier }
    };
    match &config.rope.scaling {
        // Dynamic scaling has no effect up to `max_position_embeddings`; the factors of Llama 3.1 are a tensor.
        None | Some(RopeScaling::Dynamic { .. } | RopeScaling::Llama3(_)) => {}
        Some(RopeScaling::Linear { factor }) => {
            keys.put("rope.scaling.type", "linear");
            keys.number("rope.scaling.factor", *factor);
            if latent && *factor != 1.0 {
                let undone = 1.0 / (1.0 + 0.1 * factor.ln());
                keys.number("rope.scaling.yarn_log_multiplier", log_multiplier(*factor, undone));
            }
        }
        Some(RopeScaling::Yarn(yarn)) => {
            if !yarn.truncate {
                return Err(
                    "llama.cpp rounds the ends of YaRN's ramp, and the model does not (`truncate` is false)".into()
                );
            }
            keys.put("rope.scaling.type", "yarn");
            keys.number("rope.scaling.factor", yarn.factor);
            keys.size("rope.scaling.original_context_length", yarn.original_max_position_embeddings)?;
            keys.number("rope.scaling.yarn_beta_fast", yarn.beta_fast);
            keys.number("rope.scaling.yarn_beta_slow", yarn.beta_slow);
            let (on_rotation, on_scores) = attention_factors(yarn);
            if latent {
                if yarn.factor > 1.0 {
                    let multiplier = match yarn.mscale_all_dim {
                        // As the model has it, without a rounding error.
                        Some(all_dim) if on_rotation == 1.0 && all_dim != 0.0 => 0.1 * all_dim,
                        _ => log_multiplier(yarn.factor, on_scores / on_rotation),
                    };
                    keys.number("rope.scaling.yarn_log_multiplier", multiplier);
                } else if on_rotation != 1.0 {
                    return Err(
                        "an `attention_factor` has no place in the architecture `deepseek2` with a `factor` of 1"
                            .into(),
                    );
                }
                if on_rotation != 1.0 {
                    keys.number("rope.scaling.attn_factor", on_rotation);
                }
            } else {
                let default = mscale(yarn.factor, 1.0);
                if on_rotation != default {
                    keys.number("rope.scaling.attn_factor", on_rotation / default);
                }
            }
        }
    }
    Ok(())
}

/// Reads what [`add_scaling`] writes.
pub(super) fn read_scaling(keys: &mut Reader<'_>) -> Result<Option<Json>, String> {
    let kind = keys.string("rope.scaling.type")?;
    let factor = keys.number("rope.scaling.factor")?;
    let context = keys.size("rope.scaling.original_context_length")?;
    let fast = keys.number("rope.scaling.yarn_beta_fast")?;
    let slow = keys.number("rope.scaling.yarn_beta_slow")?;
    let multiplier = keys.number("rope.scaling.yarn_log_multiplier")?;
    let rotation = keys.number("rope.scaling.attn_factor")?;
    let intended = keys.number("rope.scaling.yarn_attn_factor")?.filter(|factor| *factor != 1.0);
    if keys.number("rope.scaling.yarn_ext_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(keys.unsupported("rope.scaling.yarn_ext_factor", "is supported only with the value 1"));
    }
    let latent = keys.architecture == Architecture::Deepseek2;
    // Where llama.cpp finds a factor and no type, it takes the linear one.
    let (kind, factor) = match (kind, factor) {
        (Some("none"), _) | (None | Some("linear"), None | Some(0.0 | 1.0)) => return Ok(None),
        (None | Some("linear"), Some(factor)) => ("linear", factor),
        (Some("yarn"), Some(factor)) if factor > 0.0 => ("yarn", factor),
        _ => return Err(keys.unsupported("rope.scaling.type", "is neither `none`, `linear` nor `yarn` with a factor")),
    };
    if kind == "linear" {
        return Ok(Some(json!({"type": "linear", "factor": factor})));
    }
    let mut scaling = json!({
        "type": "yarn",
        "factor": factor,
        "beta_fast": fast.unwrap_or(32.0),
        "beta_slow": slow.unwrap_or(1.0),
    });
    if let Some(context) = context {
        scaling["original_max_position_embeddings"] = json!(context);
    }
    let default = mscale(factor, 1.0);
    if latent {
        // The decimal number that a tenth was taken of.
        let multiplier = multiplier.map(|multiplier| (multiplier * 1e8).round() / 1e7).filter(|found| *found != 0.0);
        match (multiplier, rotation) {
            (Some(all_dim), None) => {
                scaling["mscale"] = json!(all_dim);
                scaling["mscale_all_dim"] = json!(all_dim);
            }
            (multiplier, rotation) => {
                let without = if multiplier.is_none() { default } else { 1.0 };
                let rotation = rotation.unwrap_or(1.0) * without;
                let scores = rotation * mscale(factor, multiplier.unwrap_or(0.0));
                scaling["attention_factor"] = json!(rotation);
                if factor > 1.0 {
                    scaling["mscale_all_dim"] = json!((scores - 1.0) / (0.1 * factor.ln()));
                }
            }
        }
    } else {
        if multiplier.is_some() {
            return Err(keys.unsupported("rope.scaling.yarn_log_multiplier", "is not supported in this architecture"));
        }
        match (rotation, intended) {
            (Some(rotation), _) => scaling["attention_factor"] = json!(rotation * default),
            (None, Some(intended)) => scaling["attention_factor"] = json!(intended),
            (None, None) => {}
        }
    }
    Ok(Some(scaling))
}

/// The `rope_scaling` of the Llama whose factors these are. A file has no other record of it.
pub(super) fn llama3(theta: f64, dim: u64, factors: &[f32]) -> Result<Json, String> {
    const CONTEXTS: [usize; 4] = [8192, 4096, 2048, 16_384];
    let other =
        || "has frequencies in `rope_freqs.weight` that are not those of Llama 3.1 and its successors".to_owned();
    // The width comes from the file: nothing is allocated for it before this check.
    if factors.len() as u64 != dim / 2 {
        return Err(other());
    }
    let dim = factors.len() * 2;
    let largest = factors.iter().copied().fold(1.0f32, f32::max);
    if largest == 1.0 && factors.iter().all(|factor| *factor == 1.0) {
        return Ok(Json::Null);
    }
    for original_max_position_embeddings in CONTEXTS {
        let llama = Llama3Config {
            factor: f64::from(largest),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings,
        };
        let expected = names::llama3_factors(theta, dim, &llama);
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * b.abs();
        if expected.len() == factors.len() && factors.iter().zip(&expected).all(close) {
            return Ok(json!({
                "rope_type": "llama3",
                "factor": llama.factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original_max_position_embeddings,
            }));
        }
    }
    Err(other())
}

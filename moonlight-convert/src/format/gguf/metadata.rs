//! The keys of the metadata that describe a model, in both directions.
//!
//! `config.json` has more than GGUF's keys can express: how groups of experts are ranked, the epsilon of the latent norms, the
//! name of the model class. What reading the standard keys would not restore is written as JSON under [`OWN`], which other
//! programs ignore. Standard keys win where they exist: only keys of `config.json` that they do not restore are in it.
//!
//! Differences between this project's model and llama.cpp that no key expresses:
//!
//! * llama.cpp uses `rms_norm_eps` for the norms of latents, too. transformers uses 1e-6 there; Moonlight has 1e-5 elsewhere. Without
//!   effect unless latents are tiny, and noted only where an epsilon is above 1e-5.
//! * llama.cpp ranks groups of experts by their two best experts, as DeepSeek-V3 does; DeepSeek-V2 ranks by the best. Noted.

mod add;
mod config;
mod scaling;
#[cfg(test)]
mod tests;

use moonlight_model::ModelConfig;
use moonlight_model::config::{AttentionShape, MoeShape, RopeScaling, TopkMethod};
use serde_json::{Map, Value as Json};

use super::block::BlockType;
use super::header::TensorInfo;
use super::names;
use super::value::Metadata;

pub(crate) use add::add;
pub(super) use config::IGNORED;
pub(crate) use config::config;

/// The key for what the standard keys do not express.
pub(super) const OWN: &str = "moonlight.config";

/// Below this, an epsilon has no effect on a norm of values of usual size.
const SMALL_EPSILON: f64 = 1e-5;
/// Keys of `config.json` that are not compared: they are restored from elsewhere, or describe the files.
const NOT_COMPARED: [&str; 5] = ["architectures", "dtype", "quantization_config", "torch_dtype", "vocab_size"];

/// What a file says about itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct General {
    /// `general.name`.
    pub(crate) name: Option<String>,
    /// `general.license`: an identifier such as `mit`.
    pub(crate) license: Option<String>,
}

/// Values of `expert_gating_func`.
const SOFTMAX: u32 = 1;
const SIGMOID: u32 = 2;

/// What llama.cpp computes differently from this project, as sentences for the user.
pub(crate) fn notes(config: &ModelConfig) -> Vec<String> {
    let mut notes = Vec::new();
    if let AttentionShape::Mla(mla) = &config.attention {
        let (latent, all) = (mla.latent_norm_eps, config.rms_norm_eps);
        if latent != all && latent.max(all) > SMALL_EPSILON {
            notes.push(format!(
                "llama.cpp uses `rms_norm_eps` ({all:e}) in the norms of latents, too, where the model has {latent:e}"
            ));
        }
    }
    if let Some(moe) = &config.moe
        && moe.topk_method == TopkMethod::GroupLimitedGreedy
        && groups(moe).0 > 1
    {
        notes.push(
            "llama.cpp ranks groups of experts by their two best experts, this model by the best one: some tokens are routed \
             to other experts there"
                .into(),
        );
    }
    notes
}

/// The number of groups that limit the choice of experts, and how many of them a token uses. llama.cpp requires fewer.
fn groups(moe: &MoeShape) -> (usize, usize) {
    match moe.topk_method {
        TopkMethod::NoauxTc | TopkMethod::GroupLimitedGreedy if moe.topk_group < moe.n_group => {
            (moe.n_group, moe.topk_group)
        }
        _ => (1, 1),
    }
}

/// Adds what the other keys would not restore.
fn add_own(metadata: &mut Metadata, config: &ModelConfig) -> Result<(), String> {
    // Only the names matter: biases, the correction bias and an untied head follow from the tensors that exist.
    let tensors: Vec<TensorInfo> = names::tensors(config)?
        .into_iter()
        .map(|tensor| TensorInfo {
            name: tensor.name,
            shape: tensor.shape.iter().map(|&size| size as u64).collect(),
            block_type: BlockType::F32,
            offset: 0,
        })
        .collect();
    let factors = match &config.rope.scaling {
        Some(RopeScaling::Llama3(llama)) => Some(names::llama3_factors(config.rope.theta, config.rope_dim(), llama)),
        _ => None,
    };
    let restored = match config::standard(metadata, &tensors, factors.as_deref()) {
        Ok(Json::Object(map)) => ModelConfig::from_value(Json::Object(map)).map_err(|error| error.to_string()),
        Ok(_) => Err("the metadata is no config".into()),
        Err(problem) => Err(problem),
    };
    // Without the keys that are ignored: they describe other files and programs.
    let plain = ModelConfig { extra: Map::new(), ..config.clone() };
    let Json::Object(mut wanted) = plain.to_value() else { return Ok(()) };
    let restored = match restored {
        Ok(restored) => ModelConfig { extra: Map::new(), ..restored }.to_value(),
        // For example factors that no known Llama has: then all keys are written.
        Err(_) => Json::Object(Map::new()),
    };
    wanted.retain(|key, value| !NOT_COMPARED.contains(&key.as_str()) && restored.get(key) != Some(value));
    // A key that would be restored and that the config does not have.
    for (key, _) in restored.as_object().into_iter().flatten() {
        if !NOT_COMPARED.contains(&key.as_str()) && plain.to_value().get(key).is_none() {
            wanted.insert(key.clone(), Json::Null);
        }
    }
    if !wanted.is_empty() {
        metadata.insert(OWN, Json::Object(wanted).to_string());
    }
    Ok(())
}

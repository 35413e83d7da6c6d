//! Whether a run that resumes is the run that wrote the checkpoint.

use std::collections::BTreeSet;

use burn::tensor::DType;
use moonlight_infer::tokenizer::{Tokenizer, TokenizerFile};
use moonlight_model::{CausalLm, ModelConfig};
use xxhash_rust::xxh3::Xxh3;

use super::fingerprint::fingerprint;
use crate::checkpoint::{ContentHash, Difference, Differences, FoundCheckpoint, RunIdentity, shape_differences};
use crate::data::Dataset;
use crate::error::TrainError;
use crate::recipe::Recipe;

/// Refuses the checkpoint of another run, and logs the changes that are allowed.
pub(super) fn check_same_run(
    identity: &RunIdentity,
    config: &ModelConfig,
    model: &CausalLm,
    found: &FoundCheckpoint,
) -> Result<(), TrainError> {
    let mut differences = Differences::default();
    match &found.state.identity {
        Some(then) => differences = identity.differences(then),
        // A checkpoint of an earlier version records no identity; only the dtype of its weights can be compared.
        None if identity.dtype != dtype_name(model) => differences.refused.push(Difference {
            key: "the dtype of the weights".into(),
            now: identity.dtype.clone(),
            then: dtype_name(model),
        }),
        None => {}
    }
    // `dtype` of a config.json is only a name, and may be absent; the weights' own dtype was compared above.
    let shape_of = |config: &ModelConfig| ModelConfig { dtype: None, ..config.clone() }.to_value();
    let shape = shape_differences(&shape_of(config), &shape_of(model.config()));
    let known: BTreeSet<String> = differences.refused.iter().map(|difference| difference.key.clone()).collect();
    differences.refused.extend(shape.into_iter().filter(|difference| !known.contains(&difference.key)));
    if !differences.refused.is_empty() {
        return Err(TrainError::OtherRun { checkpoint: found.path.clone(), differences: differences.refused });
    }
    for difference in differences.announced {
        tracing::info!("changed since the checkpoint: {difference}");
    }
    Ok(())
}

fn dtype_name(model: &CausalLm) -> String {
    format!("{:?}", model.dtype()).to_lowercase()
}

/// What identifies the run: its recipe, and hashes of everything that the recipe names.
pub(super) fn run_identity(
    recipe: &Recipe,
    model: &CausalLm,
    tokenizer: Option<&Tokenizer>,
    dataset: &Dataset,
    dtype: Option<DType>,
) -> Result<RunIdentity, TrainError> {
    let mut hash = Xxh3::new();
    for TokenizerFile { name, contents } in tokenizer.map(Tokenizer::files).unwrap_or_default() {
        for part in [name.as_bytes(), &contents] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part);
        }
    }
    let name = tokenizer.map_or("none".into(), |tokenizer| format!("`{}`", tokenizer.name()));
    // A built-in tokenizer has no files, so its name stands for its contents.
    let is_built_in = tokenizer.is_none_or(|tokenizer| tokenizer.files().is_empty());
    if is_built_in {
        hash.update(name.as_bytes());
    }
    let base = match (&recipe.lora, &recipe.model.path) {
        (Some(_), Some(path)) => Some(ContentHash { name: format!("`{}`", path.display()), hash: fingerprint(path)? }),
        _ => None,
    };
    let dtype = dtype.map_or_else(|| dtype_name(model), |dtype| format!("{dtype:?}").to_lowercase());
    Ok(RunIdentity {
        recipe: serde_json::to_value(recipe).expect("a recipe contains only what JSON can hold"),
        dtype,
        tokenizer: ContentHash { name, hash: format!("{:032x}", hash.digest128()) },
        train_data: ContentHash {
            name: format!("{} tokens in {} sequences", dataset.train_tokens(), dataset.train_sequences()),
            hash: format!("{:016x}", dataset.train_hash()),
        },
        valid_data: ContentHash {
            name: format!("{} tokens", dataset.valid_tokens()),
            hash: format!("{:016x}", dataset.valid_hash()),
        },
        base,
    })
}

//! What can go wrong with an adapter.

use std::path::PathBuf;

use moonlight_model::lora::LoraError;

use crate::error::CheckpointError;
use crate::printable::Printable;

/// An adapter that cannot be opened, loaded or saved.
///
/// The message is one sentence; [`hint`](AdapterError::hint) says what to do where we know.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A file or directory, or the base.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The directory has no `adapter_config.json`.
    #[error("`{}` has no `adapter_config.json`", Printable(dir.display()))]
    NoConfig {
        /// The directory.
        dir: PathBuf,
    },
    /// The `adapter_config.json` cannot be read, or asks for what is not LoRA as we know it.
    #[error("`{}` {}", Printable(path.display()), Printable(problem))]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
        /// What to do about it, where we know.
        hint: Option<String>,
    },
    /// The directory has no `adapter_model.safetensors`.
    #[error("`{}` has no `adapter_model.safetensors`", Printable(dir.display()))]
    NoWeights {
        /// The directory.
        dir: PathBuf,
    },
    /// The file of weights is broken, or holds what is not an adapter of this model.
    #[error("`{}` {}", Printable(path.display()), Printable(problem))]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
        /// What to do about it, where we know.
        hint: Option<String>,
    },
    /// The adapter changes more than projections, as DoRA or trained embeddings do: it can be used and merged, not trained.
    #[error("the adapter `{}` {}, and cannot be trained further", Printable(dir.display()), Printable(what))]
    NotTrainable {
        /// The adapter.
        dir: PathBuf,
        /// What it does, as the middle of a sentence.
        what: String,
    },
    /// The adapter changes weights that are in few bits.
    #[error("the adapter `{}` changes `{}` itself, which is in few bits", Printable(dir.display()), Printable(path))]
    Quantized {
        /// The adapter.
        dir: PathBuf,
        /// The weight.
        path: String,
    },
    /// Matrices of another rank than the configuration names.
    #[error(
        "`{}` holds an adapter of rank {found} for `{}`; `adapter_config.json` says {expected}",
        Printable(path.display()), Printable(module)
    )]
    Rank {
        /// The file.
        path: PathBuf,
        /// The module, by its name in the file.
        module: String,
        /// The rank of the matrices.
        found: usize,
        /// The rank that the configuration names.
        expected: usize,
    },
    /// The base model is not where the adapter says.
    #[error("the adapter `{}` {}", Printable(dir.display()), match base {
        Some(base) => format!("was trained on `{}`, which is not there", Printable(base)),
        None => "does not say which model it was trained on".into(),
    })]
    NoBase {
        /// The adapter.
        dir: PathBuf,
        /// What its configuration calls the base.
        base: Option<String>,
    },
    /// The adapter does not fit the model.
    #[error("the adapter `{}` does not fit: {source}", Printable(dir.display()))]
    Mismatch {
        /// The adapter.
        dir: PathBuf,
        /// Why not.
        source: LoraError,
    },
}

impl AdapterError {
    /// What to do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Checkpoint(error) => error.hint(),
            Self::NoConfig { .. } => {
                Some("an adapter is a directory as peft saves it, with `adapter_config.json`".into())
            }
            Self::NoWeights { dir } if dir.join("adapter_model.bin").exists() => {
                Some("`adapter_model.bin` is there: only safetensors files are read; load it in peft and save it anew with `save_pretrained(..., safe_serialization=True)`".into())
            }
            Self::NoBase { .. } => Some("name the base model beside the adapter".into()),
            Self::Rank { .. } => Some("the two files are not of one adapter".into()),
            Self::Mismatch { source, .. } => source.hint(),
            Self::Config { hint, .. } | Self::Weights { hint, .. } => hint.clone(),
            Self::NotTrainable { .. } => {
                Some("merge it into its model first, and train a new adapter on what comes of that".into())
            }
            Self::Quantized { .. } => {
                Some("merge the adapter into its model in full first, and quantize what comes of that".into())
            }
            _ => None,
        }
    }
}

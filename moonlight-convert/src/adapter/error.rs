//! Errors of opening, loading and saving an adapter.

use std::path::PathBuf;

use moonlight_model::lora::LoraError;

use crate::error::CheckpointError;
use crate::printable::Printable;

/// Why an adapter cannot be opened, loaded or saved.
///
/// The message is one sentence; [`hint`](AdapterError::hint) says what to do, where something helps.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// An error of a file, or of the base model.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The directory has no `adapter_config.json`.
    #[error("`{}` has no `adapter_config.json`", Printable(dir.display()))]
    NoConfig {
        /// The directory.
        dir: PathBuf,
    },
    /// The `adapter_config.json` is invalid or asks for something unsupported.
    #[error("`{}` {}", Printable(path.display()), Printable(problem))]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
        /// What to do, where something helps.
        hint: Option<String>,
    },
    /// The directory has no `adapter_model.safetensors`.
    #[error("`{}` has no `adapter_model.safetensors`", Printable(dir.display()))]
    NoWeights {
        /// The directory.
        dir: PathBuf,
    },
    /// The weight file is damaged, or is not an adapter of this model.
    #[error("`{}` {}", Printable(path.display()), Printable(problem))]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
        /// What to do, where something helps.
        hint: Option<String>,
    },
    /// The adapter changes weights of the base, as DoRA or trained embeddings do: it can be used and merged, but not
    /// trained further.
    #[error("the adapter `{}` {} and cannot be trained further", Printable(dir.display()), Printable(what))]
    NotTrainable {
        /// The adapter.
        dir: PathBuf,
        /// The change, as the middle of a sentence.
        what: String,
    },
    /// The adapter changes weights that are quantized.
    #[error("the adapter `{}` changes the weight `{}`, which is quantized", Printable(dir.display()), Printable(path))]
    Quantized {
        /// The adapter.
        dir: PathBuf,
        /// The path of the weight.
        path: String,
    },
    /// Matrices have another rank than in the config.
    #[error(
        "`{}` contains an adapter of rank {found} for `{}`; `adapter_config.json` says {expected}",
        Printable(path.display()), Printable(module)
    )]
    Rank {
        /// The file.
        path: PathBuf,
        /// The module's name in the file.
        module: String,
        /// The rank of the matrices.
        found: usize,
        /// The rank in the config.
        expected: usize,
    },
    /// The base model is not where the adapter's config says.
    #[error("the adapter `{}` {}", Printable(dir.display()), match base {
        Some(base) => format!("was trained on `{}`, which does not exist", Printable(base)),
        None => "does not say which model it was trained on".into(),
    })]
    NoBase {
        /// The adapter.
        dir: PathBuf,
        /// The base model in the config.
        base: Option<String>,
    },
    /// The adapter does not match the model.
    #[error("the adapter `{}` does not match the model: {source}", Printable(dir.display()))]
    Mismatch {
        /// The adapter.
        dir: PathBuf,
        /// The difference.
        source: LoraError,
    },
}

impl AdapterError {
    /// What to do, where something helps.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Checkpoint(error) => error.hint(),
            Self::NoConfig { .. } => {
                Some("pass a directory that peft has saved, with `adapter_config.json`".into())
            }
            Self::NoWeights { dir } if dir.join("adapter_model.bin").exists() => {
                Some("load `adapter_model.bin` with peft and save it with `save_pretrained(..., safe_serialization=True)`: only safetensors files are read".into())
            }
            Self::NoBase { .. } => Some("name the base model in addition to the adapter".into()),
            Self::Rank { .. } => Some("check that the two files belong to the same adapter".into()),
            Self::Mismatch { source, .. } => source.hint(),
            Self::Config { hint, .. } | Self::Weights { hint, .. } => hint.clone(),
            Self::NotTrainable { .. } => {
                Some("merge it into its model first, and train a new adapter on the result".into())
            }
            Self::Quantized { .. } => {
                Some("merge the adapter into the unquantized model first, and quantize the result".into())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{every_variant, rendered};

    #[test]
    fn messages_and_hints() {
        use AdapterError as E;
        let examples = every_variant!(AdapterError:
            E::Checkpoint(_) => [E::Checkpoint(CheckpointError::NoSuchDirectory { path: "adapter".into() })],
            E::NoConfig { .. } => [E::NoConfig { dir: "adapter".into() }],
            E::Config { .. } => [E::Config {
                path: "adapter/adapter_config.json".into(),
                problem: "has the unknown key `use_new_thing`".into(),
                hint: Some("remove the key, if it does not change what the adapter computes".into()),
            }],
            E::NoWeights { .. } => [E::NoWeights { dir: "adapter".into() }],
            E::Weights { .. } => [E::Weights {
                path: "adapter/adapter_model.safetensors".into(),
                problem: "contains no tensors".into(),
                hint: None,
            }],
            E::NotTrainable { .. } => [E::NotTrainable { dir: "adapter".into(), what: "is DoRA".into() }],
            E::Quantized { .. } => [E::Quantized { dir: "adapter".into(), path: "layers.0.self_attn.q_proj".into() }],
            E::Rank { .. } => [E::Rank {
                path: "adapter/adapter_model.safetensors".into(),
                module: "layers.0.self_attn.q_proj".into(),
                found: 3,
                expected: 4,
            }],
            E::NoBase { .. } => [
                E::NoBase { dir: "adapter".into(), base: Some("base".into()) },
                E::NoBase { dir: "adapter".into(), base: None },
            ],
            E::Mismatch { .. } => [E::Mismatch {
                dir: "adapter".into(),
                source: LoraError::Shape {
                    path: "layers.0.self_attn.q_proj".into(),
                    a: vec![40, 3],
                    b: vec![3, 60],
                    weight: vec![48, 60],
                },
            }],
        );
        let text: String = examples.iter().map(|error| rendered(error, error.hint())).collect();
        insta::assert_snapshot!(text);
    }
}

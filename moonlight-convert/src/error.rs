//! What can be wrong with a checkpoint.

use std::fmt;
use std::io;
use std::path::PathBuf;

use moonlight_model::ConfigError;

/// A checkpoint that cannot be opened, does not fit its model, or cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file or directory cannot be read.
    #[error("`{}` cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file or directory cannot be written; what stood there before is untouched.
    #[error("`{}` cannot be written: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory lacks what makes it a checkpoint.
    #[error("`{}` is not a checkpoint: it has no {missing}", dir.display())]
    NotACheckpoint {
        /// The directory.
        dir: PathBuf,
        /// The absent files.
        missing: &'static str,
    },
    /// `config.json` is not a model's.
    #[error("`{}`: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// The index is not one.
    #[error("`{}` is not an index of weights: {problem}", path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The index names a file outside the checkpoint.
    #[error("`{}` places `{tensor}` in `{entry}`, which is outside the checkpoint", path.display())]
    OutsideDirectory {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the index says of it.
        entry: String,
    },
    /// Files that the index names are not there.
    #[error("{} of {total} weight files of `{}` {}: {}", shards.len(), dir.display(),
        if shards.len() == 1 { "is missing" } else { "are missing" }, list(shards))]
    MissingShards {
        /// The directory.
        dir: PathBuf,
        /// The absent files.
        shards: Vec<String>,
        /// Number of files that the index names.
        total: usize,
    },
    /// The header of a safetensors file is broken, or the file is shorter or longer than its header says.
    #[error("`{}` is not a whole safetensors file: {problem}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The tensors are not those of the model that `config.json` describes.
    #[error("{0}")]
    Mismatch(Box<Mismatch>),
    /// Weights that are NaN or infinite.
    #[error("`{tensor}` in `{}` holds values that are not finite numbers", path.display())]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// Its file.
        path: PathBuf,
    },
    /// The target exists.
    #[error("`{}` exists already", .0.display())]
    Exists(PathBuf),
}

/// Everything in which a checkpoint's tensors differ from those of its model.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// The directory.
    pub dir: PathBuf,
    /// Tensors that the model has and no file holds.
    pub missing: Vec<String>,
    /// Tensors that a file holds and the model has not, with the file.
    pub unexpected: Vec<String>,
    /// Tensors of another shape: name, shape in the file, shape in the model.
    pub misshapen: Vec<(String, Vec<usize>, Vec<usize>)>,
    /// Tensors of a dtype that cannot be loaded: name and dtype.
    pub unsupported: Vec<(String, String)>,
}

impl Mismatch {
    pub(crate) fn is_empty(&self) -> bool {
        self.missing.is_empty()
            && self.unexpected.is_empty()
            && self.misshapen.is_empty()
            && self.unsupported.is_empty()
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "the weights of `{}` do not fit its `config.json`", self.dir.display())?;
        let misshapen: Vec<String> = self
            .misshapen
            .iter()
            .map(|(name, found, expected)| format!("{name} is {found:?} and not {expected:?}"))
            .collect();
        let unsupported: Vec<String> =
            self.unsupported.iter().map(|(name, dtype)| format!("{name} is {dtype}")).collect();
        for (what, names) in [
            ("missing", &self.missing),
            ("unexpected", &self.unexpected),
            ("of another shape", &misshapen),
            ("of a dtype that cannot be loaded", &unsupported),
        ] {
            if !names.is_empty() {
                write!(formatter, "; {} {what}: {}", names.len(), list(names))?;
            }
        }
        Ok(())
    }
}

/// Names one after the other; of a long list the first ones, and how many more there are.
fn list(names: &[String]) -> String {
    const SHOWN: usize = 20;
    let mut text = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}

impl CheckpointError {
    /// What to do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::MissingShards { .. } => Some("the download is not complete; fetch the named files".into()),
            Self::NotACheckpoint { .. } => {
                Some("a checkpoint has `config.json` and `model.safetensors` or `model.safetensors.index.json`".into())
            }
            Self::Header { .. } => Some("the file was cut short or changed; fetch it again".into()),
            Self::Mismatch(mismatch) if !mismatch.unsupported.is_empty() => {
                Some("weights are loaded from BF16, F16 and F32".into())
            }
            Self::Mismatch(_) => Some("does `config.json` belong to these weights?".into()),
            Self::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("free some space; the checkpoint that stood there before is whole".into())
            }
            Self::Exists(_) => Some("choose another directory, or pass `--force` to replace it".into()),
            _ => None,
        }
    }

    pub(crate) fn read(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Read { path, source }
    }

    pub(crate) fn write(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Write { path, source }
    }
}

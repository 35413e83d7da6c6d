//! What can go wrong with a checkpoint.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use moonlight_model::ConfigError;

use crate::dtype::conversion::WeightDtype;
use crate::io::file_error::FileError;

use crate::printable::{Printable, printable};
use crate::report::validation::ProblemList;

/// A checkpoint that cannot be opened, loaded or saved.
///
/// The message is one sentence; [`hint`](CheckpointError::hint) says what to do where we know.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The path does not exist.
    #[error("`{}` does not exist", Printable(path.display()))]
    NoSuchDirectory {
        /// The path as given.
        path: PathBuf,
    },
    /// The path is not a directory.
    #[error("`{}` is not a directory", Printable(path.display()))]
    NotADirectory {
        /// The path as given.
        path: PathBuf,
    },
    /// No directory, and no snapshot in the Hub's cache either.
    #[error("`{}` is neither a directory nor a model in the Hub's cache `{}`", Printable(model), Printable(cache.display()))]
    NotCached {
        /// The name as given, `org/name` or `org/name@revision`.
        model: String,
        /// The cache that was looked into.
        cache: PathBuf,
    },
    /// A file that is reached through a symbolic link out of the directory.
    #[error("`{}` is a symbolic link that leads out of the directory", Printable(path.display()))]
    Link {
        /// The link.
        path: PathBuf,
    },
    /// A text file of a checkpoint that is longer than any such file.
    #[error("`{}` has {} bytes; no such file of a checkpoint has more than {most}", Printable(path.display()), bytes)]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The longest that is read.
        most: u64,
    },
    /// The directory has no `config.json`.
    #[error("`{}` has no `config.json`", Printable(dir.display()))]
    NoConfig {
        /// The directory.
        dir: PathBuf,
    },
    /// The `config.json` cannot be read as a model of the family.
    #[error("`{}`: {}", Printable(path.display()), Printable(source))]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// The directory has no `tiktoken.model`.
    #[error("`{}` has no `tiktoken.model`", Printable(dir.display()))]
    NoRanks {
        /// The directory.
        dir: PathBuf,
    },
    /// The tokenizer's files are not what such files must be.
    #[error("the tokenizer `{}` is not sound: {}", Printable(path.display()), Printable(problem))]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The directory has neither `model.safetensors` nor an index of shards nor a burnpack file.
    #[error("`{}` has neither `model.safetensors` nor `model.safetensors.index.json`", Printable(dir.display()))]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// Other files of weights that are there.
        others: Vec<String>,
    },
    /// The index of shards is not what such a file must be.
    #[error("`{}` {}", Printable(path.display()), Printable(problem))]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
    },
    /// A list of digests is not what such a file must be.
    #[error("`{}` {problem}", Printable(path.display()))]
    Digests {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
    },
    /// An entry of the index names a file outside the checkpoint's directory.
    #[error("`{}` puts the tensor `{tensor}` into `{}`, which is not a file of this directory", Printable(path.display()), Printable(entry))]
    OutsideDirectory {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file that the index names.
        entry: String,
    },
    /// The files are broken, or do not hold the model that `config.json` describes. Says all that is wrong.
    #[error("`{}`: {problems}", Printable(dir.display()))]
    Mismatch {
        /// The directory.
        dir: PathBuf,
        /// All that is wrong.
        problems: ProblemList,
    },
    /// A weight that is infinite or NaN.
    #[error("the tensor `{tensor}`{} holds infinite or NaN values", In(file))]
    NonFinite {
        /// The tensor's name in the file.
        tensor: String,
        /// The file, where the tensor comes from one.
        file: Option<PathBuf>,
    },
    /// A weight that is too large for the dtype asked for.
    #[error("the tensor `{tensor}`{} holds values that {dtype} cannot represent", In(file))]
    Overflow {
        /// The tensor's name in the file.
        tensor: String,
        /// The file, where the tensor comes from one.
        file: Option<PathBuf>,
        /// The dtype asked for.
        dtype: WeightDtype,
    },
    /// A dtype that weights cannot be kept in.
    #[error("weights cannot be kept as `{dtype}`")]
    Dtype {
        /// The dtype.
        dtype: String,
    },
    /// A dtype that the device cannot compute with.
    #[error("the device has no {dtype}")]
    DeviceDtype {
        /// The dtype.
        dtype: WeightDtype,
    },
    /// The directory to save into has something in it, and replacing it was not asked for.
    #[error("`{}` exists already", Printable(dir.display()))]
    Exists {
        /// The directory.
        dir: PathBuf,
    },
    /// Another process is saving the directory.
    #[error("`{}` is being saved by another process", dir.display())]
    Busy {
        /// The directory.
        dir: PathBuf,
    },
    /// The directory to save into holds something that is not part of a checkpoint and would be lost.
    #[error("`{}` is not replaced: `{}` in it is not part of a checkpoint", Printable(dir.display()), Printable(entry))]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// The file or folder.
        entry: String,
    },
    /// There is no room for the checkpoint. What stood there before still does.
    #[error("there is no room for `{}`: the checkpoint takes {} and the disk is full", Printable(dir.display()), Bytes(*needed))]
    Full {
        /// The directory that was to be saved.
        dir: PathBuf,
        /// Bytes of the whole checkpoint.
        needed: u64,
    },
    /// There is not enough room for the checkpoint, and nothing has been written.
    #[error("there is no room for `{}`: the checkpoint takes {}, and {} are free", Printable(dir.display()), Bytes(*needed), Bytes(*free))]
    NoRoom {
        /// The directory that was to be saved.
        dir: PathBuf,
        /// Bytes of the whole checkpoint.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The caller ended the work. What was written of it has been removed.
    #[error("interrupted; nothing was left behind")]
    Interrupted,
    /// The model has no parameter at or below a path.
    #[error("the model has no parameter at or below `{}`", Printable(path))]
    NoSuchPart {
        /// The path.
        path: String,
    },
    /// The device could not hand over a parameter.
    #[error("the device cannot hand over `{parameter}`: {problem}")]
    Device {
        /// The parameter's path in the module.
        parameter: String,
        /// Why not.
        problem: String,
    },
    /// A file or directory cannot be read or written; what stood there before is untouched.
    #[error(transparent)]
    File(#[from] FileError),
}

impl CheckpointError {
    /// For `map_err` of what reads `path`.
    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        FileError::read(path)
    }

    /// For `map_err` of what writes `path`.
    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        FileError::write(path)
    }

    /// For a path that should be a directory and is none. Looks at the disk now, so that the message does not.
    pub(crate) fn not_a_directory(path: &Path) -> Self {
        let path = path.to_path_buf();
        if path.exists() { Self::NotADirectory { path } } else { Self::NoSuchDirectory { path } }
    }

    /// The repository and, where one was named, the revision of a model that [`NotCached`](Self::NotCached) is about, so
    /// that a program can name its own way to fetch it.
    pub fn not_cached(&self) -> Option<(&str, Option<&str>)> {
        let Self::NotCached { model, .. } = self else { return None };
        Some(match model.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (model, None),
        })
    }

    /// What to do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotADirectory { .. } => Some("give the directory that holds `config.json` and the weights".into()),
            Self::NotCached { model, .. } => Some(format!("fetch `{}` into the cache first", Printable(model))),
            Self::Link { .. } => Some("copy the file into the directory, if you trust what it leads to".into()),
            Self::NoConfig { .. } => Some(
                "a checkpoint is a directory with `config.json` and safetensors files, as Hugging Face keeps it".into(),
            ),
            Self::NoWeights { others, .. } => match &*printable(others.first()?) {
                shard if shard.ends_with(".safetensors") => {
                    Some(format!("`{shard}` is there: the index that belongs to it is missing; download it too"))
                }
                other => {
                    Some(format!("`{other}` is there: only safetensors files are read; convert it with transformers"))
                }
            },
            Self::Mismatch { problems, .. } => problems.hint(),
            Self::Config { source, .. } => source.hint().map(str::to_owned),
            Self::Overflow { .. } => Some("bf16 and f32 have the range; try one of them".into()),
            Self::DeviceDtype { .. } => Some("load the weights as f32".into()),
            Self::Dtype { .. } => Some("the dtypes of weights are f32, bf16 and f16".into()),
            Self::Exists { .. } => Some("choose another directory, or ask for it to be replaced".into()),
            Self::Busy { .. } => Some("wait for it, or save into another directory".into()),
            Self::Foreign { .. } => Some("save into a new directory".into()),
            Self::Full { .. } | Self::NoRoom { .. } => Some(MAKE_ROOM.into()),
            Self::File(error) if error.is_full() => Some(MAKE_ROOM.into()),
            _ => None,
        }
    }
}

const MAKE_ROOM: &str = "free some space; what was there before is untouched";

/// ` in FILE`, or nothing.
struct In<'a>(&'a Option<PathBuf>);

impl fmt::Display for In<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(file) => write!(formatter, " in `{}`", Printable(file.display())),
            None => Ok(()),
        }
    }
}

/// A number of bytes for people, in powers of 1000 as disks are sold.
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            0..1_000 => write!(formatter, "{} B", self.0),
            1_000..1_000_000 => write!(formatter, "{:.1} kB", bytes / 1e3),
            1_000_000..1_000_000_000 => write!(formatter, "{:.1} MB", bytes / 1e6),
            _ => write!(formatter, "{:.2} GB", bytes / 1e9),
        }
    }
}

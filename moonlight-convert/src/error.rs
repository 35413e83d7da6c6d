//! Errors of opening, loading and saving a checkpoint.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use moonlight_model::ConfigError;

use crate::dtype::conversion::WeightDtype;
use crate::format::gguf::BlockType;
use crate::io::file_error::FileError;

use crate::printable::{Printable, printable};
use crate::report::validation::ProblemList;

/// Why a checkpoint cannot be opened, loaded or saved.
///
/// The message is one sentence; [`hint`](CheckpointError::hint) says what to do, where something helps.
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
    /// The name is neither a directory nor a repository in the Hub's cache.
    #[error("`{}` is neither a directory nor a model in the Hub's cache `{}`", Printable(model), Printable(cache.display()))]
    NotCached {
        /// The name as given, `org/name` or `org/name@revision`.
        model: String,
        /// The cache that was searched.
        cache: PathBuf,
    },
    /// A file of the directory is a symbolic link to a file outside it. Such links are not followed: a checkpoint from
    /// a stranger could expose any file of this machine.
    #[error("`{}` is a symbolic link that leads out of the directory", Printable(path.display()))]
    Link {
        /// The link.
        path: PathBuf,
    },
    /// A text file exceeds the size limit for its kind.
    #[error("`{}` has {bytes} bytes, more than the limit of {most} for such a file", Printable(path.display()))]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
        /// The limit in bytes.
        most: u64,
    },
    /// The directory has no `config.json`.
    #[error("`{}` has no `config.json`", Printable(dir.display()))]
    NoConfig {
        /// The directory.
        dir: PathBuf,
    },
    /// The `config.json` does not describe a supported model.
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
    /// A file of the tokenizer is invalid.
    #[error("the tokenizer file `{}` is invalid: {}", Printable(path.display()), Printable(problem))]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A tokenizer cannot be stored in a GGUF file, or the one in a GGUF file cannot be read.
    #[error("the tokenizer in `{}` {}", Printable(path.display()), Printable(problem))]
    GgufTokenizer {
        /// The directory or the GGUF file.
        path: PathBuf,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
        /// What to do, where something helps.
        hint: Option<String>,
    },
    /// The directory contains neither `model.safetensors` nor an index of shards nor `model.bpk`.
    #[error("`{}` has neither `model.safetensors` nor `model.safetensors.index.json`", Printable(dir.display()))]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// Files of weights in formats that are not read, such as `pytorch_model.bin`.
        others: Vec<String>,
    },
    /// The index of shards is invalid.
    #[error("`{}` {}", Printable(path.display()), Printable(problem))]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
    },
    /// A GGUF file is invalid, or contains something that is not supported.
    #[error("`{}` {}", Printable(path.display()), Printable(problem))]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
    },
    /// A list of digests is invalid.
    #[error("`{}` {problem}", Printable(path.display()))]
    Digests {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, as the rest of a sentence.
        problem: String,
    },
    /// An entry of the index names a file outside the directory.
    #[error("`{}` maps the tensor `{tensor}` to `{}`, which is outside this directory", Printable(path.display()), Printable(entry))]
    OutsideDirectory {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file that the index names.
        entry: String,
    },
    /// The files are damaged, or do not match `config.json`. Lists every problem, not only the first.
    #[error("`{}`: {problems}", Printable(dir.display()))]
    Mismatch {
        /// The directory.
        dir: PathBuf,
        /// Every problem that was found.
        problems: ProblemList,
    },
    /// A weight is NaN or infinite.
    #[error("the tensor `{tensor}`{} contains NaN or infinity", In(file))]
    NonFinite {
        /// The tensor's name in the file.
        tensor: String,
        /// The file, if the tensor comes from one.
        file: Option<PathBuf>,
    },
    /// A weight is too large for the requested dtype.
    #[error("the tensor `{tensor}`{} has values outside the range of {dtype}", In(file))]
    Overflow {
        /// The tensor's name in the file.
        tensor: String,
        /// The file, if the tensor comes from one.
        file: Option<PathBuf>,
        /// The requested dtype.
        dtype: WeightDtype,
    },
    /// A weight is too large for the quantized type of a GGUF file.
    #[error("the tensor `{tensor}`{} has values outside the range of {block_type}", In(file))]
    BlockOverflow {
        /// The tensor's name in the file.
        tensor: String,
        /// The file, if the tensor comes from one.
        file: Option<PathBuf>,
        /// The type.
        block_type: BlockType,
    },
    /// The model cannot be written as GGUF.
    #[error("`{}` cannot be written as GGUF: {}", Printable(dir.display()), Printable(problem))]
    NotInGguf {
        /// The checkpoint.
        dir: PathBuf,
        /// What GGUF or llama.cpp does not have, as a sentence.
        problem: String,
    },
    /// No matrix of the model can be quantized.
    #[error("`{}` has no matrix with rows of a multiple of 32 values, so that nothing can be quantized", Printable(dir.display()))]
    NothingToQuantize {
        /// The checkpoint.
        dir: PathBuf,
    },
    /// A target that is not replaced.
    #[error("`{}` {problem}", Printable(path.display()))]
    Target {
        /// The target.
        path: PathBuf,
        /// Why not, as the rest of a sentence.
        problem: String,
    },
    /// Weights cannot have the requested dtype.
    #[error("weights cannot have the dtype `{dtype}`")]
    Dtype {
        /// The dtype.
        dtype: String,
    },
    /// The device does not support the dtype.
    #[error("the device does not support {dtype}")]
    DeviceDtype {
        /// The dtype.
        dtype: WeightDtype,
    },
    /// The target directory is not empty, and `overwrite` is off.
    #[error("`{}` already exists", Printable(dir.display()))]
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
    /// The target directory contains something that is not part of a checkpoint. Replacing the directory would delete
    /// it.
    #[error("`{}` contains `{}`, which is not part of a checkpoint, and is not replaced", Printable(dir.display()), Printable(entry))]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// The file or folder.
        entry: String,
    },
    /// The disk became full while the checkpoint was written. The new files have been removed, and the previous
    /// checkpoint is unchanged.
    #[error("the disk is full: the checkpoint `{}` takes {}", Printable(dir.display()), Bytes(*needed))]
    Full {
        /// The directory that was to be saved.
        dir: PathBuf,
        /// Bytes of the whole checkpoint.
        needed: u64,
    },
    /// The disk has too little free space. Checked before anything is written.
    #[error("too little disk space for `{}`: the checkpoint takes {}, and {} are free", Printable(dir.display()), Bytes(*needed), Bytes(*free))]
    NoRoom {
        /// The directory that was to be saved.
        dir: PathBuf,
        /// Bytes of the whole checkpoint.
        needed: u64,
        /// Free space in bytes.
        free: u64,
    },
    /// The caller stopped the work. What was written has been removed.
    #[error("interrupted; what was written has been removed")]
    Interrupted,
    /// No parameter of the model is at or below the path.
    #[error("the model has no parameter at or below `{}`", Printable(path))]
    NoSuchPart {
        /// The path.
        path: String,
    },
    /// A parameter cannot be copied from the device to the host.
    #[error("`{parameter}` cannot be copied from the device: {problem}")]
    Device {
        /// The parameter's path in the module.
        parameter: String,
        /// Why not.
        problem: String,
    },
    /// A file or directory cannot be read or written. What existed before is unchanged.
    #[error(transparent)]
    File(#[from] FileError),
}

impl CheckpointError {
    /// For `map_err` after reading `path`.
    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        FileError::read(path)
    }

    /// For `map_err` after writing `path`.
    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        FileError::write(path)
    }

    /// The error for a path that should be a directory: either it does not exist, or it is a file.
    pub(crate) fn not_a_directory(path: &Path) -> Self {
        let path = path.to_path_buf();
        if path.exists() { Self::NotADirectory { path } } else { Self::NoSuchDirectory { path } }
    }

    /// The repository and revision (if one was given) of a [`NotCached`](Self::NotCached) error, so that a program can
    /// name its own command to download it.
    pub fn not_cached(&self) -> Option<(&str, Option<&str>)> {
        let Self::NotCached { model, .. } = self else { return None };
        Some(match model.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (model, None),
        })
    }

    /// What to do, where something helps.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotADirectory { .. } => Some("pass the directory that contains `config.json` and the weights".into()),
            Self::NotCached { model, .. } => Some(format!("download `{}` into the cache first", Printable(model))),
            Self::Link { .. } => Some("replace the link by a copy of the file, if you trust its target".into()),
            Self::NoConfig { dir } if dir.join("checkpoints").is_dir() => Some(format!(
                "it is the folder of a run: pass one of its checkpoints, `{}`",
                Printable(dir.join("checkpoints").join("step-N").display())
            )),
            Self::NoConfig { .. } => {
                Some("pass a directory in the Hugging Face layout, with `config.json` and safetensors files".into())
            }
            Self::NoWeights { others, .. } => match &*printable(others.first()?) {
                shard if shard.ends_with(".safetensors") => {
                    Some(format!("download `model.safetensors.index.json`, the index of `{shard}`, too"))
                }
                file if file.ends_with(".gguf") => Some(format!("name one GGUF file, for example `{file}`")),
                other => Some(format!("only safetensors files are read; convert `{other}` with transformers")),
            },
            Self::GgufTokenizer { hint, .. } => hint.clone(),
            Self::Gguf { problem, .. } if problem.starts_with("is truncated") => {
                Some("download the file again; an interrupted download looks like this".into())
            }
            Self::Gguf { problem, .. } if problem.contains("supported types are") => {
                Some("write it in a supported type, for example with `llama-quantize --allow-requantize`".into())
            }
            Self::Mismatch { problems, .. } => problems.hint(),
            Self::Config { source, .. } => source.hint().map(str::to_owned),
            Self::Overflow { .. } | Self::BlockOverflow { .. } => {
                Some("use bf16 or f32, which have a larger range".into())
            }
            Self::Target { .. } => Some("choose another path, such as `model.gguf`".into()),
            Self::DeviceDtype { .. } => Some("load the weights as f32".into()),
            Self::Dtype { .. } => Some("use f32, bf16 or f16".into()),
            Self::Exists { .. } => Some("choose another directory, or allow it to be replaced".into()),
            Self::Busy { .. } => Some("wait until it has finished, or save to another directory".into()),
            Self::Foreign { .. } => Some("save to a new directory".into()),
            Self::Full { .. } | Self::NoRoom { .. } => Some(MAKE_ROOM.into()),
            Self::File(error) if error.is_full() => Some(MAKE_ROOM.into()),
            _ => None,
        }
    }
}

const MAKE_ROOM: &str = "free some disk space; what existed before is unchanged";

/// ` in FILE`, or nothing without a file.
struct In<'a>(&'a Option<PathBuf>);

impl fmt::Display for In<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(file) => write!(formatter, " in `{}`", Printable(file.display())),
            None => Ok(()),
        }
    }
}

/// A number of bytes as people read it, in powers of 1000 (as the Hub and disk vendors count).
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

/// Examples of an enum from `pattern => [examples]`. The match has no wildcard, so that a new variant does not compile
/// without an example, and with it a message that a reviewer reads in the snapshot.
#[cfg(test)]
macro_rules! every_variant {
    ($enum:ty: $($pattern:pat => [$($example:expr),+ $(,)?]),+ $(,)?) => {{
        let _ = |value: &$enum| match value { $($pattern => (),)+ };
        let examples: Vec<$enum> = vec![$($($example),+),+];
        examples
    }};
}
#[cfg(test)]
pub(crate) use every_variant;

/// An error and its hint as the programs print them.
#[cfg(test)]
pub(crate) fn rendered(error: impl fmt::Display, hint: Option<String>) -> String {
    let hint = hint.map(|hint| format!("hint: {hint}\n")).unwrap_or_default();
    format!("error: {error}\n{hint}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::validation::Problem;

    #[test]
    fn messages_and_hints() {
        use CheckpointError as E;
        let problems = |list: Vec<Problem>| ProblemList { list, quantized: None, gguf: false };
        let examples = every_variant!(CheckpointError:
            E::NoSuchDirectory { .. } => [E::NoSuchDirectory { path: "model".into() }],
            E::NotADirectory { .. } => [E::NotADirectory { path: "model.safetensors".into() }],
            E::NotCached { .. } => [E::NotCached { model: "moonshotai/Kimi@v2".into(), cache: "cache".into() }],
            E::Link { .. } => [E::Link { path: "model/config.json".into() }],
            E::TooLong { .. } => [E::TooLong { path: "model/config.json".into(), bytes: 2_000_000, most: 1_000_000 }],
            E::NoConfig { .. } => [E::NoConfig { dir: "model".into() }],
            E::Config { .. } => [E::Config {
                path: "model/config.json".into(),
                source: ConfigError::Json("it is not UTF-8 text".into()),
            }],
            E::NoRanks { .. } => [E::NoRanks { dir: "model".into() }],
            E::Tokenizer { .. } => [E::Tokenizer {
                path: "model/tiktoken.model".into(),
                problem: "no token stands for the byte 0".into(),
            }],
            E::GgufTokenizer { .. } => [
                E::GgufTokenizer {
                    path: "model.gguf".into(),
                    problem: "has the pre-tokenizer `viking`, which is not known".into(),
                    hint: Some("put the model's `tokenizer.json` and `tokenizer_config.json` next to the file".into()),
                },
                E::GgufTokenizer { path: "model".into(), problem: "has no token for the byte 0x41".into(), hint: None },
            ],
            E::NoWeights { .. } => [
                E::NoWeights { dir: "model".into(), others: vec![] },
                E::NoWeights { dir: "model".into(), others: vec!["pytorch_model.bin".into()] },
                E::NoWeights { dir: "model".into(), others: vec!["model-1-of-2.safetensors".into()] },
                E::NoWeights { dir: "model".into(), others: vec!["a.gguf".into(), "b.gguf".into()] },
            ],
            E::Index { .. } => [E::Index {
                path: "model/model.safetensors.index.json".into(),
                problem: "lists no tensors".into(),
            }],
            E::Gguf { .. } => [E::Gguf {
                path: "model.gguf".into(),
                problem: "has GGUF version 1, which is not supported; versions 2 and 3 are".into(),
            }],
            E::Digests { .. } => [E::Digests { path: "SHA256SUMS".into(), problem: "lists no files".into() }],
            E::OutsideDirectory { .. } => [E::OutsideDirectory {
                path: "model/model.safetensors.index.json".into(),
                tensor: "model.norm.weight".into(),
                entry: "/etc/passwd".into(),
            }],
            E::Mismatch { .. } => [E::Mismatch {
                dir: "model".into(),
                problems: problems(vec![Problem::Missing { tensor: "lm_head.weight".into() }]),
            }],
            E::NonFinite { .. } => [
                E::NonFinite { tensor: "model.norm.weight".into(), file: None },
                E::NonFinite { tensor: "model.norm.weight".into(), file: Some("model.safetensors".into()) },
            ],
            E::Overflow { .. } => [E::Overflow {
                tensor: "model.norm.weight".into(),
                file: Some("model.safetensors".into()),
                dtype: WeightDtype::F16,
            }],
            E::BlockOverflow { .. } => [E::BlockOverflow {
                tensor: "lm_head.weight".into(),
                file: Some("model.safetensors".into()),
                block_type: BlockType::Q8_0,
            }],
            E::NotInGguf { .. } => [E::NotInGguf {
                dir: "model".into(),
                problem: "the architecture `deepseek2` has shared experts, and the model has none".into(),
            }],
            E::NothingToQuantize { .. } => [E::NothingToQuantize { dir: "model".into() }],
            E::Target { .. } => [E::Target {
                path: "notes.txt".into(),
                problem: "is not a GGUF file, and is not replaced".into(),
            }],
            E::Dtype { .. } => [E::Dtype { dtype: "f64".into() }],
            E::DeviceDtype { .. } => [E::DeviceDtype { dtype: WeightDtype::Bf16 }],
            E::Exists { .. } => [E::Exists { dir: "out".into() }],
            E::Busy { .. } => [E::Busy { dir: "out".into() }],
            E::Foreign { .. } => [E::Foreign { dir: "out".into(), entry: "notes.txt".into() }],
            E::Full { .. } => [E::Full { dir: "out".into(), needed: 31_920_223_872 }],
            E::NoRoom { .. } => [E::NoRoom { dir: "out".into(), needed: 31_920_223_872, free: 5_300_000 }],
            E::Interrupted => [E::Interrupted],
            E::NoSuchPart { .. } => [E::NoSuchPart { path: "layers.99".into() }],
            E::Device { .. } => [E::Device { parameter: "norm.weight".into(), problem: "out of memory".into() }],
            E::File(_) => [
                E::read(Path::new("model/config.json"))(io::ErrorKind::PermissionDenied.into()),
                E::write(Path::new("out/config.json"))(io::ErrorKind::StorageFull.into()),
            ],
        );
        let text: String = examples.iter().map(|error| rendered(error, error.hint())).collect();
        insta::assert_snapshot!(text);
    }
}

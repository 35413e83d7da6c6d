//! The contents of a checkpoint, for `moonlight-convert inspect` and for programs (as JSON).

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use crate::checkpoint::{CONFIG, Checkpoint};
use crate::error::CheckpointError;
use crate::format::gguf;
use crate::format::gguf::tokenizer::TokenizerTexts;
use crate::format::index::{INDEX, SINGLE};
use crate::format::sidecars::sidecars_in;
use crate::manifest::MANIFEST;
use crate::report::validation::{Problem, about};

/// Suffixes of files that are still being downloaded: by huggingface_hub, by users of curl and wget, by aria2, by
/// browsers.
const UNFINISHED: [&str; 6] = [".incomplete", ".part", ".partial", ".aria2", ".crdownload", ".download"];

/// Whether a checkpoint can be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointState {
    /// It has no problems.
    Complete,
    /// Files are missing or truncated, and some are still being downloaded.
    Downloading,
    /// It has problems, and no download is in progress that would explain them.
    Broken,
}

/// The contents of a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct CheckpointSummary {
    /// The directory.
    #[serde(serialize_with = "lossy")]
    pub directory: PathBuf,
    /// Whether it can be loaded.
    pub state: CheckpointState,
    /// `safetensors`, `burnpack` or `gguf`.
    pub format: &'static str,
    /// The class name in transformers.
    pub architecture: &'static str,
    /// The config's `model_type`.
    pub model_type: &'static str,
    /// Decoder layers.
    pub layers: usize,
    /// Routed experts per layer, and how many of them each token is routed to. `None` for a dense model.
    pub experts: Option<[usize; 2]>,
    /// Counts of the model's parameters, from the config.
    pub parameters: ParameterCounts,
    /// The config's `quant_method`.
    pub quantization: Option<String>,
    /// Number of tensors in the files.
    pub tensors: usize,
    /// Size of these tensors in bytes.
    pub tensor_bytes: u64,
    /// The tensors, by dtype.
    pub dtypes: Vec<DtypeSummary>,
    /// The weight files.
    pub files: Vec<FileSummary>,
    /// The file of the tokenizer that is used.
    pub tokenizer: Option<String>,
    /// The files that a conversion copies: tokenizer, chat template, generation config, remote code.
    #[serde(rename = "companions")]
    pub sidecars: Vec<String>,
    /// Files and folders of the directory that are not part of the checkpoint, folders with a trailing `/`: weights in
    /// other formats, shards that the index does not list, notes. Hidden ones are not listed.
    pub ignored_files: Vec<String>,
    /// Tensors that loading ignores.
    pub skipped: Vec<SkippedTensors>,
    /// The forms in which matrices are quantized.
    pub quantized_forms: Vec<QuantizedForm>,
    /// The keys of `config.json` that are ignored because they change nothing, by reason.
    #[serde(rename = "keys_passed_over")]
    pub ignored_keys: BTreeMap<&'static str, Vec<String>>,
    /// Remarks on what a reader of `config.json` would not expect.
    pub notes: Vec<String>,
    /// Files that are still being downloaded.
    pub unfinished: Vec<String>,
    /// Everything that is wrong with the checkpoint.
    pub problems: Vec<ReportedProblem>,
}

/// Parameters of a model.
#[derive(Debug, Clone, Serialize)]
pub struct ParameterCounts {
    /// All parameters.
    pub total: u64,
    /// Those that take part in computing one token.
    pub activated: u64,
    /// All except the embedding and the head.
    pub without_embeddings: u64,
    /// Those that take part in computing one token, except the embedding and the head.
    pub activated_without_embeddings: u64,
}

/// The tensors of one dtype.
#[derive(Debug, Clone, Serialize)]
pub struct DtypeSummary {
    /// The dtype in the terms of safetensors.
    pub dtype: String,
    /// Number of tensors.
    pub tensors: usize,
    /// Their size in bytes.
    pub bytes: u64,
}

/// A weight file.
#[derive(Debug, Clone, Serialize)]
pub struct FileSummary {
    /// Its name in the directory.
    pub name: String,
    /// Its size in bytes; `None` if it is missing.
    pub bytes: Option<u64>,
    /// Its number of tensors; `None` if it cannot be read.
    pub tensors: Option<usize>,
}

/// Tensors that loading ignores for one reason.
#[derive(Debug, Clone, Serialize)]
pub struct SkippedTensors {
    /// What they are and why they are ignored.
    pub reason: &'static str,
    /// Their names.
    pub tensors: Vec<String>,
}

/// Matrices that are quantized in one form.
#[derive(Debug, Clone, Serialize)]
pub struct QuantizedForm {
    /// The form, such as `FP8, one scale per row`.
    pub form: String,
    /// Number of matrices.
    pub tensors: usize,
}

/// A problem of a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct ReportedProblem {
    /// The affected file, if it is a single one.
    pub file: Option<String>,
    /// What is wrong, as a sentence.
    pub problem: String,
}

impl Checkpoint {
    /// The contents of the checkpoint, from its config and the headers of its files.
    ///
    /// # Errors
    ///
    /// [`CheckpointError`], if the directory can no longer be read.
    pub fn summary(&self) -> Result<CheckpointSummary, CheckpointError> {
        let config = self.config();
        let count = config.parameter_count();
        let problems = self.problems();
        // Next to a GGUF file can be anything.
        let unfinished = if self.is_gguf() { Vec::new() } else { unfinished_downloads(self.dir()) };
        let mut dtypes: BTreeMap<String, (usize, u64)> = BTreeMap::new();
        for (_, tensor) in self.tensors() {
            let of_dtype = dtypes.entry(tensor.dtype.to_string()).or_default();
            *of_dtype = (of_dtype.0 + 1, of_dtype.1 + tensor.bytes());
        }
        let mut notes = self.notes();
        let sidecars = match self.gguf_metadata() {
            None => sidecars_in(self.dir())?,
            // A tokenizer that is not supported does not prevent that tokens are passed by number.
            Some(metadata) => match gguf::read::sidecars_of(self.dir(), metadata) {
                Ok(TokenizerTexts { files, notes: more }) => {
                    notes.extend(more);
                    files.into_iter().map(|(name, _)| name).collect()
                }
                Err(error) => {
                    notes.push(error.to_string());
                    Vec::new()
                }
            },
        };
        let ignored_files = match (self.is_gguf(), &self.gguf_folder) {
            // Next to a GGUF file can be anything. In a directory that was named as the model, config and tokenizer are
            // those of the metadata.
            (true, None) => Vec::new(),
            (true, Some(folder)) => self.ignored_files(folder, &HashSet::new())?,
            (false, _) => {
                let mut used: HashSet<&str> = HashSet::from([CONFIG, MANIFEST]);
                // transformers, too, reads no index if the single file exists.
                let single = self.files().iter().any(|file| file.name == SINGLE) || self.is_burnpack();
                used.extend((!single).then_some(INDEX));
                used.extend(sidecars.iter().chain(&unfinished).map(String::as_str));
                self.ignored_files(self.dir(), &used)?
            }
        };
        // In the order of preference of this project's readers.
        let tokenizer = ["tokenizer.json", "tiktoken.model", "tokenizer.model", "vocab.json"];
        Ok(CheckpointSummary {
            directory: self.dir().to_path_buf(),
            state: state(&problems, &unfinished),
            format: match () {
                () if self.is_burnpack() => "burnpack",
                () if self.is_gguf() => "gguf",
                () => "safetensors",
            },
            architecture: config.model_type.architecture(),
            model_type: config.model_type.as_str(),
            layers: config.num_hidden_layers,
            experts: config.moe.as_ref().map(|moe| [moe.n_routed_experts, moe.num_experts_per_tok]),
            parameters: ParameterCounts {
                total: count.total,
                activated: count.activated,
                without_embeddings: count.total - count.embeddings,
                activated_without_embeddings: count.activated - count.embeddings,
            },
            quantization: self.quantization(),
            tensors: self.tensor_list().len(),
            tensor_bytes: dtypes.values().map(|(_, bytes)| bytes).sum(),
            dtypes: dtypes
                .into_iter()
                .map(|(dtype, (tensors, bytes))| DtypeSummary { dtype, tensors, bytes })
                .collect(),
            files: self
                .files()
                .iter()
                .map(|file| FileSummary {
                    name: file.name.clone(),
                    bytes: fs::metadata(self.file_path(&file.name)).ok().map(|found| found.len()),
                    tensors: file.tensors,
                })
                .collect(),
            tokenizer: tokenizer
                .iter()
                .find(|name| sidecars.iter().any(|file| file == *name))
                .map(|name| (*name).to_owned()),
            sidecars,
            ignored_files,
            skipped: self
                .skipped()
                .into_iter()
                .map(|(reason, tensors)| SkippedTensors { reason: reason.describe(), tensors })
                .collect(),
            quantized_forms: self
                .quantized_forms()
                .into_iter()
                .map(|(form, tensors)| QuantizedForm { form, tensors })
                .collect(),
            ignored_keys: self.ignored_keys(),
            notes,
            unfinished,
            problems: problems
                .iter()
                .map(|problem| ReportedProblem {
                    file: problem.file().map(str::to_owned),
                    problem: about(self.is_gguf(), problem.to_string()),
                })
                .collect(),
        })
    }
}

impl Checkpoint {
    fn ignored_keys(&self) -> BTreeMap<&'static str, Vec<String>> {
        let mut keys: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
        for (key, reason) in self.config().ignored_keys() {
            keys.entry(reason).or_default().push(key.to_owned());
        }
        if let Some(metadata) = self.gguf_metadata() {
            let ignored = gguf::read::ignored_keys(metadata);
            keys.entry("describe the model or the file").or_default().extend(ignored);
        }
        keys.retain(|_, keys| !keys.is_empty());
        keys
    }

    /// The files and folders that are neither read nor copied; `used` are those that are, in addition to weights.
    fn ignored_files(&self, dir: &Path, used: &HashSet<&str>) -> Result<Vec<String>, CheckpointError> {
        let mut used = used.clone();
        for file in self.files() {
            // A folder that contains a shard is part of the checkpoint.
            used.extend([file.name.as_str(), file.name.split('/').next().unwrap_or_default()]);
        }
        let entries = fs::read_dir(dir).map_err(CheckpointError::read(dir))?;
        let mut ignored: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| !name.starts_with('.') && !used.contains(name.as_str()))
            .map(|name| if dir.join(&name).is_dir() { format!("{name}/") } else { name })
            .collect();
        ignored.sort();
        Ok(ignored)
    }

    /// Remarks on uses of the files that a reader of `config.json` would not expect.
    pub fn notes(&self) -> Vec<String> {
        let head = self.tied_head().describe().map(str::to_owned);
        let training = self.config().training_notes();
        head.into_iter().chain(self.listed_only_note()).chain(self.gguf_notes()).chain(training).collect()
    }
}

impl Checkpoint {
    /// Remarks on what the metadata of a GGUF file lacks.
    pub(crate) fn gguf_notes(&self) -> Vec<String> {
        self.gguf_metadata().map(|metadata| gguf::read::notes(metadata, self.config())).unwrap_or_default()
    }
}

/// Replaces the parts of a path that are not Unicode, as JSON requires.
fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// A damaged file counts as downloading, too: some programs download under the final name, so that the file is
/// truncated until they finish.
fn state(problems: &[Problem], unfinished: &[String]) -> CheckpointState {
    let explained_by_download =
        |problem: &Problem| problem.is_missing() || matches!(problem, Problem::BrokenFile { .. });
    match problems {
        [] => CheckpointState::Complete,
        problems if !unfinished.is_empty() && problems.iter().all(explained_by_download) => {
            CheckpointState::Downloading
        }
        _ => CheckpointState::Broken,
    }
}

/// Files that are still being downloaded: in the directory, where huggingface_hub keeps them below it
/// (`.cache/huggingface/download`), and for a snapshot in the Hub's cache in the `blobs` of the repository.
pub fn unfinished_downloads(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut look = |folder: PathBuf, shown: &str| {
        let Ok(entries) = fs::read_dir(folder) else { return };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        found.extend(
            names.filter(|name| UNFINISHED.iter().any(|end| name.ends_with(end))).map(|name| format!("{shown}{name}")),
        );
    };
    look(dir.to_path_buf(), "");
    look(dir.join(".cache/huggingface/download"), ".cache/huggingface/download/");
    let snapshots = dir.parent().filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"));
    for home in snapshots.and_then(Path::parent).into_iter().chain([dir]) {
        look(home.join("blobs"), "blobs/");
    }
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_download_in_progress_is_distinguished_from_a_broken_checkpoint() {
        let missing = Problem::MissingFile { file: "b".into(), tensors: 3 };
        let short = Problem::BrokenFile { file: "a".into(), problem: "is truncated".into() };
        let wrong = Problem::Unexpected { tensor: "t".into(), file: "a".into() };
        let pending = ["model-2-of-2.safetensors.incomplete".to_owned()];
        assert_eq!(state(&[], &pending), CheckpointState::Complete);
        assert_eq!(state(std::slice::from_ref(&missing), &[]), CheckpointState::Broken);
        assert_eq!(state(&[missing.clone(), short], &pending), CheckpointState::Downloading);
        assert_eq!(state(&[missing, wrong], &pending), CheckpointState::Broken);
    }

    #[test]
    fn unfinished_downloads_are_found_in_every_place() {
        let home = tempfile::tempdir().unwrap();
        let snapshot = home.path().join("models--a--b/snapshots/0123");
        for file in
            ["x.part", "whole.safetensors", ".cache/huggingface/download/y.incomplete", "../../blobs/z.incomplete"]
        {
            let path = snapshot.join(file);
            fs::create_dir_all(&snapshot).unwrap();
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let expected = [".cache/huggingface/download/y.incomplete", "blobs/z.incomplete", "x.part"];
        assert_eq!(unfinished_downloads(&snapshot), expected);
    }
}

//! What is in a checkpoint, for people and for programs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use crate::checkpoint::Checkpoint;
use crate::error::CheckpointError;
use crate::format::sidecars::sidecars_in;
use crate::report::validation::Problem;

/// How the names of files end while they are being fetched: by huggingface_hub, by curl and wget users, by aria2, by
/// browsers.
const UNFINISHED: [&str; 6] = [".incomplete", ".part", ".partial", ".aria2", ".crdownload", ".download"];

/// Whether a checkpoint can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointState {
    /// Nothing is missing and nothing is wrong.
    Complete,
    /// Something is missing, and there are files that are still being fetched.
    Downloading,
    /// Something is missing or wrong, and nothing says that it will get better.
    Broken,
}

/// What is in a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct CheckpointSummary {
    /// The directory.
    #[serde(serialize_with = "lossy")]
    pub directory: PathBuf,
    /// Whether it can be used.
    pub state: CheckpointState,
    /// `safetensors` or `burnpack`.
    pub format: &'static str,
    /// The class name that transformers looks up.
    pub architecture: &'static str,
    /// `model_type` of the configuration.
    pub model_type: &'static str,
    /// Decoder layers.
    pub layers: usize,
    /// Routed experts of a layer, and how many of them a token visits.
    pub experts: Option<[usize; 2]>,
    /// The model's parameters.
    pub parameters: ParameterCounts,
    /// The `quant_method` of the configuration.
    pub quantization: Option<String>,
    /// Tensors in the files.
    pub tensors: usize,
    /// Bytes of these tensors.
    pub tensor_bytes: u64,
    /// The tensors by dtype.
    pub dtypes: Vec<DtypeSummary>,
    /// The files of weights.
    pub files: Vec<FileSummary>,
    /// The tokenizer's file.
    pub tokenizer: Option<String>,
    /// The files beside the weights that are carried along.
    #[serde(rename = "companions")]
    pub sidecars: Vec<String>,
    /// What loading passes over.
    pub skipped: Vec<SkippedTensors>,
    /// The forms that quantized matrices are kept in, and how many of each.
    pub quantized_forms: Vec<QuantizedForm>,
    /// The keys of `config.json` that change nothing and are passed over, by reason.
    pub ignored_keys: BTreeMap<&'static str, Vec<String>>,
    /// What a reader of `config.json` might not expect.
    pub notes: Vec<String>,
    /// Files that are still being fetched.
    pub unfinished: Vec<String>,
    /// Everything that is wrong.
    pub problems: Vec<ReportedProblem>,
}

/// Parameters of a model.
#[derive(Debug, Clone, Serialize)]
pub struct ParameterCounts {
    /// All of them.
    pub total: u64,
    /// Those that one token uses.
    pub activated: u64,
    /// All but the embedding and the head.
    pub without_embeddings: u64,
    /// Those that one token uses, without the embedding and the head.
    pub activated_without_embeddings: u64,
}

/// The tensors of one dtype.
#[derive(Debug, Clone, Serialize)]
pub struct DtypeSummary {
    /// As safetensors spells it.
    pub dtype: String,
    /// How many there are.
    pub tensors: usize,
    /// How long they are.
    pub bytes: u64,
}

/// A file of weights.
#[derive(Debug, Clone, Serialize)]
pub struct FileSummary {
    /// Its name.
    pub name: String,
    /// Its length; `None` where it is absent.
    pub bytes: Option<u64>,
    /// Its tensors; `None` where it cannot be read.
    pub tensors: Option<usize>,
}

/// Tensors that loading passes over for one reason.
#[derive(Debug, Clone, Serialize)]
pub struct SkippedTensors {
    /// What they are.
    pub reason: &'static str,
    /// Their names.
    pub tensors: Vec<String>,
}

/// Quantized matrices that are kept in one form.
#[derive(Debug, Clone, Serialize)]
pub struct QuantizedForm {
    /// The form.
    pub form: String,
    /// How many matrices.
    pub tensors: usize,
}

/// One thing that is wrong.
#[derive(Debug, Clone, Serialize)]
pub struct ReportedProblem {
    /// The file that it is in, where it is in one.
    pub file: Option<String>,
    /// A sentence.
    pub problem: String,
}

impl Checkpoint {
    /// What is in the checkpoint, from its configuration and the headers of its files.
    ///
    /// # Errors
    ///
    /// [`CheckpointError`] where the directory cannot be read any more.
    pub fn summary(&self) -> Result<CheckpointSummary, CheckpointError> {
        let config = self.config();
        let count = config.parameter_count();
        let problems = self.problems();
        let unfinished = unfinished_downloads(self.dir());
        let mut dtypes: BTreeMap<String, (usize, u64)> = BTreeMap::new();
        for (_, tensor) in self.tensors() {
            let of_dtype = dtypes.entry(tensor.dtype.to_string()).or_default();
            *of_dtype = (of_dtype.0 + 1, of_dtype.1 + tensor.bytes());
        }
        let sidecars = sidecars_in(self.dir())?;
        let tokenizer = ["tokenizer.json", "tiktoken.model", "tokenizer.model", "vocab.json"];
        Ok(CheckpointSummary {
            directory: self.dir().to_path_buf(),
            state: state(&problems, &unfinished),
            format: if self.is_burnpack() { "burnpack" } else { "safetensors" },
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
                    bytes: fs::metadata(self.dir().join(&file.name)).ok().map(|found| found.len()),
                    tensors: file.tensors,
                })
                .collect(),
            tokenizer: tokenizer.iter().find(|name| self.dir().join(name).is_file()).map(|name| (*name).to_owned()),
            sidecars,
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
            notes: self.notes(),
            unfinished,
            problems: problems
                .iter()
                .map(|problem| ReportedProblem {
                    file: problem.file().map(str::to_owned),
                    problem: problem.to_string(),
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
        keys
    }

    /// What a reader of `config.json` might not expect of how the checkpoint is used.
    pub fn notes(&self) -> Vec<String> {
        let head = self.tied_head().describe().map(str::to_owned);
        head.into_iter().chain(self.listed_only_note()).chain(self.config().training_notes()).collect()
    }
}

/// A path need not be text, and JSON is.
fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// A file that is being fetched under its own name is too short, and so is a reason to wait, too.
fn state(problems: &[Problem], unfinished: &[String]) -> CheckpointState {
    let waits = |problem: &Problem| problem.is_missing() || matches!(problem, Problem::BrokenFile { .. });
    match problems {
        [] => CheckpointState::Complete,
        problems if !unfinished.is_empty() && problems.iter().all(waits) => CheckpointState::Downloading,
        _ => CheckpointState::Broken,
    }
}

/// Files in and around a directory that are still being fetched: in it, where huggingface_hub keeps them below it
/// (`.cache/huggingface/download`), and for a snapshot of the Hub's cache beside it (`blobs`).
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
    fn a_download_under_way_is_told_from_a_broken_checkpoint() {
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
    fn unfinished_files_are_found_wherever_they_are_kept() {
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

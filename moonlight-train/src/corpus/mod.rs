//! A corpus for studies, from folders of source or text on this machine: `moonlight data corpus`.
//!
//! The unit of the split into training and validation is a *package*, a folder of one of the given folders: no file of a
//! package is in both. By default packages are the crates whose sources cargo has downloaded. [`write_corpus`] writes a
//! folder with
//!
//! | file | what it contains |
//! |---|---|
//! | `train.jsonl`, `valid.jsonl` | the text of each file, and its `path` |
//! | `tokenizer.json`, `tokenizer_config.json` | a byte-level BPE that was trained on the training text |
//! | `choices.jsonl` | multiple-choice questions from the validation text, in HellaSwag's layout |
//! | `conversations/train.jsonl`, `valid.jsonl`, `exact.jsonl` | questions about documented functions in Rust source |
//! | `corpus.json` | the options, what was taken and left out, and hashes: a [`CorpusReport`] |
//!
//! The same files and options give the same bytes.

mod choices;
mod conversations;
mod files;
mod packages;

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use moonlight_convert::{CheckpointError, FileError, replace_directory};
use moonlight_infer::tokenizer::{Tokenizer, train_bpe};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_128};

pub use conversations::ConversationCounts;
pub use files::{LeftOut, SplitCounts};
use files::{SourceFile, collect};
use packages::find_packages;

use crate::error::TrainError;
use crate::output_file::Unfinished;

const REPORT: &str = "corpus.json";

/// Increases when the same options and files give another corpus.
const VERSION: u32 = 1;

/// What a corpus is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CorpusOptions {
    /// Folders whose subfolders are the packages.
    pub from: Vec<PathBuf>,
    /// The extensions of the files, without the dot.
    pub extensions: Vec<String>,
    /// The most bytes of training text.
    pub max_bytes: u64,
    /// The most bytes of one package. It is also limited to a twentieth of its split, so that a split has at least twenty.
    pub max_folder_bytes: u64,
    /// Larger files are left out.
    pub max_file_bytes: u64,
    /// The share of packages in the validation text, and its most bytes as a share of `max_bytes`; between 0 and 1.
    pub valid_fraction: f64,
    /// The most tokens of the tokenizer.
    pub vocab: usize,
    /// The most multiple-choice questions.
    pub choices: usize,
    /// The most conversations for training.
    pub conversations: usize,
    /// Determines the split, the order of packages, and the questions.
    pub seed: u64,
}

/// What a corpus contains: the file `corpus.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CorpusReport {
    version: u32,
    /// The options that it was made with.
    pub options: CorpusOptions,
    /// The training text.
    pub train: SplitCounts,
    /// The validation text.
    pub valid: SplitCounts,
    /// What was not taken.
    pub left_out: LeftOut,
    /// The trained tokenizer.
    pub tokenizer: TokenizerCounts,
    /// The number of multiple-choice questions.
    pub choices: usize,
    /// The numbers of conversations.
    pub conversations: ConversationCounts,
    /// xxh3-128 of the contents of `train.jsonl` and then `valid.jsonl`, in hexadecimal digits.
    pub digest: String,
    /// xxh3-128 of each file of the folder but this one.
    pub files: BTreeMap<String, String>,
}

/// A trained tokenizer in numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenizerCounts {
    /// The tokens of its vocabulary.
    pub vocab: usize,
    /// The tokens of the validation text.
    pub valid_tokens: u64,
    /// Tokens per byte of the validation text.
    pub tokens_per_byte: f64,
}

/// The folders in which cargo keeps the sources of crates: `$CARGO_HOME/registry/src/*`, by default in `~/.cargo`.
///
/// # Errors
///
/// No such folder.
pub fn registry_sources() -> Result<Vec<PathBuf>, TrainError> {
    let home = std::env::var_os("CARGO_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let home = home.or_else(|| Some(std::env::home_dir()?.join(".cargo"))).unwrap_or_default();
    let sources = home.join("registry").join("src");
    let folders = packages::subfolders(&sources).unwrap_or_default();
    match folders.is_empty() {
        true => Err(TrainError::Request {
            problem: format!("there are no sources of crates in `{}`", sources.display()),
            hint: Some("name folders of text with `--from`, or run `cargo fetch` in a Rust project".into()),
        }),
        false => Ok(folders),
    }
}

/// Writes a corpus to `dir`, which is complete or absent at every moment.
///
/// If `dir` contains the same corpus already, nothing is written.
///
/// # Errors
///
/// A `dir` with other files, folders that cannot be read, too little text for a split, and files that cannot be written.
pub fn write_corpus(options: &CorpusOptions, dir: &Path) -> Result<CorpusReport, TrainError> {
    let existing = Existing::read(dir)?;
    let packages = find_packages(&options.from)?;
    tracing::info!("found {} packages", packages.len());
    let collected = collect(&packages, options)?;
    for (split, counts) in [("training", &collected.train_counts), ("validation", &collected.valid_counts)] {
        let SplitCounts { packages, files, bytes } = counts;
        tracing::info!("{split}: {files} files of {packages} packages, {:.2} MB", *bytes as f64 / 1e6);
        if *files == 0 {
            return Err(TrainError::Request {
                problem: format!("there is no {split} text in the {} packages", collected.packages),
                hint: Some(
                    "name more folders with `--from`, or change `--extension`, `--valid-fraction` or a limit".into(),
                ),
            });
        }
    }
    for (reason, count) in collected.left_out.reasons() {
        tracing::info!("left out: {count} {reason}");
    }
    let (train, valid) = (json_lines(&collected.train), json_lines(&collected.valid));
    let digest = digest([&train, &valid]);
    if let Some(existing) = existing {
        return existing.accept(options, &digest);
    }
    let mut files = BTreeMap::from([("train.jsonl", train), ("valid.jsonl", valid)]);

    let texts: Vec<&str> = collected.train.iter().map(|file| file.text.as_str()).collect();
    let tokenizer = train_bpe(&texts, options.vocab)?;
    let saved = tokenizer.files();
    for file in &saved {
        files.insert(&file.name, file.contents.clone());
    }
    let counts = count_tokens(&tokenizer, &collected.valid)?;
    tracing::info!("trained a tokenizer of {} tokens, {:.4} tokens per byte", counts.vocab, counts.tokens_per_byte);

    let questions = choices::questions(&collected.valid, options.choices, options.seed);
    tracing::info!("made {} multiple-choice questions", questions.len());
    let conversations = conversations::make(&collected.train, &collected.valid, options.conversations, options.seed);
    let parts = [
        ("choices.jsonl", lines_of(&questions)),
        ("conversations/train.jsonl", lines_of(&conversations.train)),
        ("conversations/valid.jsonl", lines_of(&conversations.valid)),
        ("conversations/exact.jsonl", lines_of(&conversations.exact)),
    ];
    // A file without records would be refused where it is read.
    files.extend(parts.into_iter().filter(|(_, lines)| !lines.is_empty()));

    let hashed = files.iter().map(|(name, contents)| ((*name).to_owned(), hex(xxh3_128(contents)))).collect();
    let report = CorpusReport {
        version: VERSION,
        options: options.clone(),
        train: collected.train_counts,
        valid: collected.valid_counts,
        left_out: collected.left_out,
        tokenizer: counts,
        choices: questions.len(),
        conversations: conversations.counts(),
        digest,
        files: hashed,
    };
    let mut text = serde_json::to_string_pretty(&report).map_err(|error| TrainError::Internal(error.to_string()))?;
    text.push('\n');
    files.insert(REPORT, text.into_bytes());
    write_files(dir, &files)?;
    tracing::info!("wrote `{}`", dir.display());
    Ok(report)
}

/// Writes the files of a folder at once.
fn write_files(dir: &Path, files: &BTreeMap<&str, Vec<u8>>) -> Result<(), CheckpointError> {
    let mut unfinished = None;
    replace_directory(dir, |new| {
        // From now on, a signal that ends the program removes the new folder.
        unfinished = Some(Unfinished::new(new));
        for (name, contents) in files {
            let path = new.join(name);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(FileError::write::<CheckpointError>(parent))?;
            }
            fs::write(&path, contents).map_err(FileError::write::<CheckpointError>(&path))?;
        }
        Ok(())
    })
}

/// A corpus that is in the output folder already.
struct Existing {
    dir: PathBuf,
    report: CorpusReport,
}

impl Existing {
    /// `None` if the folder is absent or empty.
    ///
    /// # Errors
    ///
    /// A folder with other files, before any work is done.
    fn read(dir: &Path) -> Result<Option<Self>, TrainError> {
        let mut entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(TrainError::read(dir)(error)),
        };
        if entries.next().is_none() {
            return Ok(None);
        }
        let report = fs::read(dir.join(REPORT)).ok().and_then(|text| serde_json::from_slice(&text).ok());
        match report {
            Some(report) => Ok(Some(Self { dir: dir.to_owned(), report })),
            None => Err(refused(dir, "is not empty and contains no corpus")),
        }
    }

    /// The report, if the folder contains the corpus with these options and this text.
    fn accept(self, options: &CorpusOptions, digest: &str) -> Result<CorpusReport, TrainError> {
        // The report was read from JSON, in which a fraction may lose its last digit.
        let json = serde_json::to_string(options).and_then(|json| serde_json::from_str::<CorpusOptions>(&json));
        let json = json.map_err(|error| TrainError::Internal(error.to_string()))?;
        if self.report.version != VERSION || self.report.options != json || self.report.digest != digest {
            return Err(refused(&self.dir, "contains another corpus"));
        }
        for (name, hash) in &self.report.files {
            let path = self.dir.join(name);
            if fs::read(&path).map_err(TrainError::read(&path)).map(|contents| hex(xxh3_128(&contents)))? != *hash {
                return Err(refused(&self.dir, &format!("contains this corpus, but `{name}` was changed")));
            }
        }
        tracing::info!("`{}` contains this corpus already", self.dir.display());
        Ok(self.report)
    }
}

fn refused(dir: &Path, problem: &str) -> TrainError {
    TrainError::Request {
        problem: format!("`{}` {problem}", dir.display()),
        hint: Some("choose another folder for `--output`, or remove this one".into()),
    }
}

fn json_lines(files: &[SourceFile]) -> Vec<u8> {
    lines_of(&files.iter().map(|file| serde_json::json!({"text": file.text, "path": file.path})).collect::<Vec<_>>())
}

fn lines_of(records: &[serde_json::Value]) -> Vec<u8> {
    records.iter().map(|record| format!("{record}\n")).collect::<String>().into_bytes()
}

fn digest(contents: [&[u8]; 2]) -> String {
    let mut hash = Xxh3Default::new();
    contents.iter().for_each(|contents| hash.update(contents));
    hex(hash.digest128())
}

fn hex(hash: u128) -> String {
    format!("{hash:032x}")
}

fn count_tokens(tokenizer: &Tokenizer, files: &[SourceFile]) -> Result<TokenizerCounts, TrainError> {
    let (mut tokens, mut bytes) = (0, 0);
    for file in files {
        tokens += tokenizer.encode(&file.text)?.len() as u64;
        bytes += file.text.len();
    }
    Ok(TokenizerCounts {
        vocab: tokenizer.vocab_size(),
        valid_tokens: tokens,
        tokens_per_byte: tokens as f64 / bytes as f64,
    })
}

#[cfg(test)]
mod tests;

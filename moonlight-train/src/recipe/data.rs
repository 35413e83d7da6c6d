//! `[data]`.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::Check;
use super::run::path;
use moonlight_infer::expand_env;
use moonlight_infer::tokenizer::{AddBos, BYTES_CHAT_TOKENIZER, BYTES_TOKENIZER, Tokenizer, TokenizerError};

/// The value of `tokenizer` that stands for none at all, for data that are tokens already.
pub const NO_TOKENIZER: &str = "none";

/// What the files hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    /// Each file is one document of UTF-8 text; of a file of records (`.jsonl`, `.ndjson`, parquet; `.json` and `.csv` where the first
    /// record has one) each `text`, or else `content`, is one.
    Text,
    /// Each record is one document: `{"tokens": [...]}` (or `input_ids`).
    Tokens,
    /// Each record is one conversation, of which the assistant's words are learned.
    Chat,
}

/// What to do with a record that is longer than `sequence_length` and cannot be cut into sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LongRecords {
    /// Stop, and name the record.
    Error,
    /// Keep its first `sequence_length` tokens.
    Truncate,
    /// Leave it out, count it, and name the first few.
    Skip,
}

/// What to do with a record that is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BrokenRecords {
    /// Stop, and name the record.
    Error,
    /// Leave it out, count it, and name the first few.
    Skip,
}

/// Whether a document of text begins with BOS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Bos {
    /// As the tokenizer's files say: what the post-processor of its `tokenizer.json` puts before a text.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

impl From<Bos> for AddBos {
    fn from(bos: Bos) -> Self {
        match bos {
            Bos::Auto => Self::Auto,
            Bos::Always => Self::Always,
            Bos::Never => Self::Never,
        }
    }
}

/// How text becomes tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub enum TokenizerName {
    /// `bytes`: the 256 bytes.
    Bytes,
    /// `bytes-chat`: the 256 bytes with Moonlight's tokens of a conversation.
    BytesChat,
    /// `none`: the data are tokens already.
    None,
    /// The path of a `tokenizer.json`, a `tiktoken.model` or a folder that has one, or `org/name` in the Hub's cache.
    At(String),
}

impl TokenizerName {
    /// The name as a recipe has it.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Bytes => BYTES_TOKENIZER,
            Self::BytesChat => BYTES_CHAT_TOKENIZER,
            Self::None => NO_TOKENIZER,
            Self::At(path) => path,
        }
    }

    /// Opens the tokenizer; `None` for data that are tokens already.
    ///
    /// # Errors
    ///
    /// [`TokenizerError`] for a path where there is none, and for a file that is not one.
    pub fn open(&self) -> Result<Option<Tokenizer>, TokenizerError> {
        match self {
            Self::None => Ok(None),
            name => Tokenizer::open(name.as_str()).map(Some),
        }
    }

    /// The tokenizer of data in `format` where none is named: that of the weights at `model`, or else the bytes. A folder without a
    /// tokenizer is an error when it is opened, but for data that are tokens already.
    pub(super) fn default_for(format: DataFormat, model: Option<&Path>) -> Self {
        let has_one = |dir: &Path| ["tokenizer.json", "tiktoken.model"].iter().any(|name| dir.join(name).exists());
        match (format, model) {
            (DataFormat::Text | DataFormat::Chat, Some(dir)) => Self::At(dir.to_string_lossy().into_owned()),
            (DataFormat::Tokens, Some(dir)) if has_one(dir) => Self::At(dir.to_string_lossy().into_owned()),
            (DataFormat::Tokens, _) => Self::None,
            (DataFormat::Text, None) => Self::Bytes,
            (DataFormat::Chat, None) => Self::BytesChat,
        }
    }
}

impl TryFrom<String> for TokenizerName {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, &'static str> {
        match name.as_str() {
            "" => Err("is empty; write `bytes`, `none` or a path"),
            BYTES_TOKENIZER => Ok(Self::Bytes),
            BYTES_CHAT_TOKENIZER => Ok(Self::BytesChat),
            NO_TOKENIZER => Ok(Self::None),
            _ => Ok(Self::At(name)),
        }
    }
}

impl From<TokenizerName> for String {
    fn from(name: TokenizerName) -> Self {
        name.as_str().to_owned()
    }
}

/// What the model reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Globs of the training files; `~` and `$NAME` are expanded. Records are read from JSON Lines, JSON arrays, CSV and TSV with a row of
    /// names, and parquet, plain or compressed by gzip or zstd: what a file is its first bytes say. Required.
    pub train: Vec<String>,
    /// Globs of the validation files; a file that `train` matches as well is used for validation.
    pub valid: Vec<String>,
    /// The share of the training documents that is kept for validation, chosen by hash.
    pub valid_fraction: f64,
    /// What the files hold.
    pub format: DataFormat,
    /// With `format = "chat"`, a file with the Jinja template to use in place of the tokenizer's own; empty for the tokenizer's.
    #[serde(deserialize_with = "path")]
    pub chat_template: PathBuf,
    /// `bytes`, `bytes-chat`, `none`, or the path of a `tokenizer.json`, a `tiktoken.model` or a folder that has one. Default: that of
    /// `model.path`; else `bytes` for text, `bytes-chat` for chat and `none` for tokens.
    pub tokenizer: TokenizerName,
    /// Whether a document of `format = "text"`, a row of `eval.tasks` and `sample.prompt` begin with the tokenizer's BOS; a
    /// conversation begins as its template says.
    pub bos: Bos,
    /// Tokens in a sequence. Default: 1024, or the model's longest where that is shorter.
    pub sequence_length: usize,
    /// Whether documents are laid end to end into full sequences, or, with `format = "chat"`, whole conversations together into
    /// sequences that they fill best; otherwise each record is one sequence, padded on the right.
    pub pack: bool,
    /// Whether the sequences of each epoch come in a new order, given by `run.seed`.
    pub shuffle: bool,
    /// What happens, with `pack = false` or `format = "chat"`, to a record longer than `sequence_length`.
    pub too_long: LongRecords,
    /// What happens to a record that is wrong. A file that is of another format, or ends too early, is an error whatever this says.
    pub broken: BrokenRecords,
    /// Bytes of files to take, spread by hash of their path, for training and again for validation; 0 for all.
    pub max_bytes: u64,
    /// Files larger than this many bytes are left out; 0 for no limit.
    pub max_file_bytes: u64,
    /// Stop after the document that reaches this many tokens, for training and again for validation; 0 for all.
    pub max_tokens: u64,
    /// Where tokens are kept for the next run. Default: `{run.dir}/token-cache`.
    #[serde(deserialize_with = "path")]
    pub cache_dir: PathBuf,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            valid: Vec::new(),
            valid_fraction: 0.0,
            format: DataFormat::Text,
            chat_template: PathBuf::new(),
            tokenizer: TokenizerName::Bytes,
            bos: Bos::Auto,
            sequence_length: 1024,
            pack: true,
            shuffle: true,
            too_long: LongRecords::Error,
            broken: BrokenRecords::Error,
            max_bytes: 0,
            max_file_bytes: 0,
            max_tokens: 0,
            cache_dir: PathBuf::new(),
        }
    }
}

impl DataConfig {
    /// The tokenizer, which begins texts as `bos` says; `None` for data that are tokens already.
    ///
    /// # Errors
    ///
    /// Those of [`TokenizerName::open`]; `bos = "always"` for a tokenizer without BOS.
    pub fn open_tokenizer(&self) -> Result<Option<Tokenizer>, TokenizerError> {
        let Some(tokenizer) = self.tokenizer.open()? else { return Ok(None) };
        let is_read = self.format == DataFormat::Text && self.bos == Bos::Auto;
        if let Some(note) = tokenizer.bos_conflict().filter(|_| is_read) {
            tracing::warn!("{note}; `data.bos` decides");
        }
        tokenizer.with_bos(self.bos.into()).map(Some)
    }

    pub(super) fn check(&self, check: &mut Check<'_>) {
        if check.has("data.train") {
            check.require("data.train", !self.train.is_empty(), || "names no files".into());
        } else {
            check.missing("data.train", "the files to train on: train = [\"data/**/*.txt\"]");
        }
        for (key, globs) in [("data.train", &self.train), ("data.valid", &self.valid)] {
            for text in globs {
                // What they expand to belongs to the machine, not to the recipe.
                match expand_env(text).map(|glob| glob::Pattern::new(&glob)) {
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) => check.invalid(key, format!("has `{text}`, which is not a glob: {error}"), None),
                    Err(name) => {
                        check.invalid(key, format!("has `{text}`, but the environment has no `{name}`"), None);
                    }
                }
            }
        }
        let fraction = self.valid_fraction;
        check.require("data.valid_fraction", (0.0..1.0).contains(&fraction), || {
            format!("is {fraction}; it must be from 0 to below 1")
        });
        check.require("data.valid_fraction", fraction == 0.0 || self.valid.is_empty(), || {
            "and `data.valid` exclude each other".into()
        });
        let untokenized = self.tokenizer == TokenizerName::None && self.format != DataFormat::Tokens;
        check.require("data.tokenizer", !untokenized, || "is `none`, but text needs one".into());
        check.require("data.sequence_length", self.sequence_length > 0, || "is 0; it must be at least 1".into());
    }

    /// Against a model that reads at most `longest` tokens.
    pub(super) fn check_length(&self, longest: usize, check: &mut Check<'_>) {
        let length = self.sequence_length;
        check.require("data.sequence_length", length <= longest, || {
            format!("is {length}, longer than the model's `max_position_embeddings` of {longest}")
        });
    }
}

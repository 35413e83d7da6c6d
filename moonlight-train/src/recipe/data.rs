//! `[data]`.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::Check;
use super::run::path;
use moonlight_infer::expand_env;
use moonlight_infer::tokenizer::{AddBos, BYTES_CHAT_TOKENIZER, BYTES_TOKENIZER, Tokenizer, TokenizerError};

/// The value of `data.tokenizer` for data that are tokens already.
pub const NO_TOKENIZER: &str = "none";

/// The kind of data in the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    /// Text, UTF-8: a document for each file, or in a file of records for each record, in its field `text` or else `content`.
    /// Files of records are `.jsonl`, `.ndjson` and parquet, and `.json`, `.csv` and `.tsv` if their first record has such a
    /// field.
    Text,
    /// Token ids: a document for each record, `{"tokens": [...]}` or `{"input_ids": [...]}`.
    Tokens,
    /// Conversations, one for each record; only what the assistant says is learned.
    Chat,
}

/// What to do with a record that is longer than `sequence_length` and may not be cut into several sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LongRecords {
    /// Stop with an error that names the record.
    Error,
    /// Keep the first `sequence_length` tokens of the record.
    Truncate,
    /// Leave the record out. `data.txt` and the log count such records and name the first few.
    Skip,
}

/// What to do with a record that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BrokenRecords {
    /// Stop with an error that names the record.
    Error,
    /// Leave the record out. `data.txt` and the log count such records and name the first few.
    Skip,
}

/// Whether texts start with the tokenizer's BOS token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Bos {
    /// If the tokenizer's files say so, by the post-processor of `tokenizer.json`.
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

/// The tokenizer of the data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub enum TokenizerName {
    /// `bytes`: a token for each of the 256 bytes.
    Bytes,
    /// `bytes-chat`: the 256 bytes and the special tokens of Moonlight's chat template.
    BytesChat,
    /// `none`: no tokenizer, for data that are tokens already.
    None,
    /// The path of a `tokenizer.json`, a `tiktoken.model` or a folder that contains one, or `org/name` in the Hub's cache.
    At(String),
}

impl TokenizerName {
    /// The value as a recipe contains it.
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
    /// [`TokenizerError`] for a path without a tokenizer, and for a file that is not one.
    pub fn open(&self) -> Result<Option<Tokenizer>, TokenizerError> {
        match self {
            Self::None => Ok(None),
            name => Tokenizer::open(name.as_str()).map(Some),
        }
    }

    /// The default for data in `format`: the tokenizer in the folder of the weights `model`, or else bytes. Data that are tokens
    /// need none, so a folder without a tokenizer is accepted for them; for other data, opening it reports the error.
    pub(super) fn default_for(format: DataFormat, model: Option<&Path>) -> Self {
        let has_tokenizer =
            |dir: &Path| ["tokenizer.json", "tiktoken.model"].iter().any(|name| dir.join(name).exists());
        match (format, model) {
            (DataFormat::Text | DataFormat::Chat, Some(dir)) => Self::At(dir.to_string_lossy().into_owned()),
            (DataFormat::Tokens, Some(dir)) if has_tokenizer(dir) => Self::At(dir.to_string_lossy().into_owned()),
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

/// The files that the model learns from, and how they become sequences of tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Globs of the training files, relative to the working directory; `**` matches any number of folders, and `~` and `$NAME`
    /// are expanded. Records are read from JSON Lines, JSON arrays, CSV and TSV with a header row, and parquet (in builds with
    /// that feature), plain or compressed by gzip or zstd, whatever the file's name. Required.
    pub train: Vec<String>,
    /// Globs of the validation files. A file that `train` matches too is used for validation only. Excludes `valid_fraction`.
    pub valid: Vec<String>,
    /// The share of the training tokens to hold out for validation, at least 0 and below 1: whole documents, chosen by a hash,
    /// or the end of the only document. Use it for data without a validation split.
    pub valid_fraction: f64,
    /// The kind of data in the files.
    pub format: DataFormat,
    /// With `format = "chat"`, the file of a Jinja chat template to use instead of the tokenizer's; empty for the tokenizer's.
    #[serde(deserialize_with = "path")]
    pub chat_template: PathBuf,
    /// `bytes`, `bytes-chat`, `none`, or the path of a `tokenizer.json`, a `tiktoken.model` or a folder that contains one, or
    /// `org/name` in the Hub's cache. Default: that of `model.path`; without it `bytes` for text, `bytes-chat` for chat and
    /// `none` for tokens.
    pub tokenizer: TokenizerName,
    /// Whether documents of `format = "text"`, rows of `eval.tasks` and `sample.prompt` start with the tokenizer's BOS token.
    /// Conversations start as their template says.
    pub bos: Bos,
    /// Tokens in a sequence, from 1 to the model's `max_position_embeddings`. Memory and, for attention, time grow with it.
    /// Default: 1024, or the model's maximum if that is smaller.
    pub sequence_length: usize,
    /// Whether several documents share a sequence: texts are concatenated and cut every `sequence_length` tokens;
    /// conversations are combined without cutting any. Attention never crosses documents. With `false` each record becomes one
    /// sequence, padded on the right.
    pub pack: bool,
    /// Whether each epoch has its own order of the sequences, which follows from `run.seed`. With `false` they are in the order
    /// of the files.
    pub shuffle: bool,
    /// What to do, with `pack = false` or `format = "chat"`, with a record longer than `sequence_length`.
    pub too_long: LongRecords,
    /// What to do with a record that cannot be read. A file in another format, or one that is cut off, is always an error.
    pub broken: BrokenRecords,
    /// Bytes of files to read for training, and as many again for validation; 0 for all. The files are chosen by a hash of
    /// their paths, so that a small share has something from every folder.
    pub max_bytes: u64,
    /// Files larger than this many bytes are left out; 0 for no limit.
    pub max_file_bytes: u64,
    /// Tokens to read for training, rounded up to whole documents, and as many again for validation; 0 for all.
    pub max_tokens: u64,
    /// The folder in which tokenized data are kept for later runs. Default: `{run.dir}/token-cache`.
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
    /// The tokenizer, which adds BOS as `bos` says; `None` for data that are tokens already.
    ///
    /// # Errors
    ///
    /// Those of [`TokenizerName::open`]; `bos = "always"` for a tokenizer without BOS.
    pub fn open_tokenizer(&self) -> Result<Option<Tokenizer>, TokenizerError> {
        let Some(tokenizer) = self.tokenizer.open()? else { return Ok(None) };
        let is_read = self.format == DataFormat::Text && self.bos == Bos::Auto;
        if let Some(note) = tokenizer.bos_conflict().filter(|_| is_read) {
            tracing::warn!("{note}; set `data.bos` to decide");
        }
        tokenizer.with_bos(self.bos.into()).map(Some)
    }

    pub(super) fn check(&self, check: &mut Check<'_>) {
        if check.has("data.train") {
            check.require("data.train", !self.train.is_empty(), || "is empty".into());
        } else {
            check.missing("data.train", "name the training files: `train = [\"data/**/*.txt\"]`");
        }
        for (key, globs) in [("data.train", &self.train), ("data.valid", &self.valid)] {
            for text in globs {
                // Only the syntax is checked here; which files match is known when the data are opened.
                match expand_env(text).map(|glob| glob::Pattern::new(&glob)) {
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) => {
                        check.invalid(key, format!("contains `{text}`, which is not a glob: {error}"), None);
                    }
                    Err(name) => {
                        let problem = format!("contains `{text}`, but the environment variable `{name}` is not set");
                        check.invalid(key, problem, None);
                    }
                }
            }
        }
        let fraction = self.valid_fraction;
        check.require("data.valid_fraction", (0.0..1.0).contains(&fraction), || {
            format!("is {fraction}; it must be at least 0 and below 1")
        });
        check.require("data.valid_fraction", fraction == 0.0 || self.valid.is_empty(), || {
            "and `data.valid` exclude each other".into()
        });
        let untokenized = self.tokenizer == TokenizerName::None && self.format != DataFormat::Tokens;
        check.require("data.tokenizer", !untokenized, || "is `none`, but text needs a tokenizer".into());
        check.require("data.sequence_length", self.sequence_length > 0, || "is 0; it must be at least 1".into());
    }

    /// Checks the sequence length for a model that reads at most `longest` tokens, and lowers the default to that.
    pub(super) fn fit_length(&mut self, longest: usize, check: &mut Check<'_>) {
        if !check.has("data.sequence_length") {
            self.sequence_length = self.sequence_length.min(longest);
        }
        let length = self.sequence_length;
        check.require("data.sequence_length", length <= longest, || {
            format!("is {length}, longer than the model's `max_position_embeddings` of {longest}")
        });
    }
}

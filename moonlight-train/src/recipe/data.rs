//! `[data]`.

use std::path::PathBuf;
use std::str::FromStr;

use moonlight_infer::expand;
pub use moonlight_infer::tokenizer::{BYTES_CHAT_TOKENIZER, BYTES_TOKENIZER};
use serde::Serialize;

use super::run::path;
use super::section::Section;
use super::{ModelRecipe, ModelSource, RunConfig};

/// The value of `tokenizer` that stands for none at all, for data that are tokens already.
pub const NO_TOKENIZER: &str = "none";

/// What the files hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    /// Each file is one document of UTF-8 text.
    Text,
    /// Each line is one document: `{"tokens": [...]}`.
    Tokens,
    /// Each record is one conversation, of which the assistant's words are learned.
    Chat,
}

impl FromStr for DataFormat {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "text" => Ok(Self::Text),
            "tokens" => Ok(Self::Tokens),
            "chat" => Ok(Self::Chat),
            _ => Err(()),
        }
    }
}

/// What to do with a record that is longer than `sequence_length` and cannot be cut into sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TooLong {
    /// Stop, and name the record.
    Error,
    /// Keep its first `sequence_length` tokens.
    Truncate,
    /// Leave it out, count it, and name the first few.
    Skip,
}

/// What to do with a record that is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Broken {
    /// Stop, and name the record.
    Error,
    /// Leave it out, count it, and name the first few.
    Skip,
}

impl FromStr for Broken {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "error" => Ok(Self::Error),
            "skip" => Ok(Self::Skip),
            _ => Err(()),
        }
    }
}

impl FromStr for TooLong {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "error" => Ok(Self::Error),
            "truncate" => Ok(Self::Truncate),
            "skip" => Ok(Self::Skip),
            _ => Err(()),
        }
    }
}

/// `[data]`: what the model reads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DataConfig {
    /// `train`: globs of the training files; `~` and `$NAME` are expanded. Required.
    pub train: Vec<String>,
    /// `valid`: globs of the validation files; a file that `train` matches as well is validation's. Default: none.
    pub valid: Vec<String>,
    /// `valid_fraction`: the share of the training documents that is kept for validation, chosen by hash. Default: 0.
    pub valid_fraction: f64,
    /// `format`: `text`, `tokens` or `chat`. Default: `text`.
    pub format: DataFormat,
    /// `chat_template`: for `chat`, a file with the Jinja template to use in place of the tokenizer's own; empty for the
    /// tokenizer's. Default: empty.
    pub chat_template: PathBuf,
    /// `tokenizer`: `bytes`, `bytes-chat`, `none`, or the path of a `tokenizer.json`, a `tiktoken.model` or a folder that has one.
    /// Default: that of `model.path`; else `bytes` for text, `bytes-chat` for chat and `none` for tokens.
    pub tokenizer: String,
    /// `sequence_length`: tokens in a sequence. Default: 1024, or the model's longest where that is shorter.
    pub sequence_length: usize,
    /// `pack`: whether documents are laid end to end into full sequences, or, for `chat`, whole conversations together
    /// into sequences that they fill best; otherwise each record is one sequence, padded on the right. Default: true.
    pub pack: bool,
    /// `shuffle`: whether the sequences of each epoch come in a new order, given by `run.seed`. Default: true.
    pub shuffle: bool,
    /// `too_long`: what happens, with `pack = false` or `format = "chat"`, to a record longer than `sequence_length`:
    /// `error`, `truncate` or `skip`. Default: `error`.
    pub too_long: TooLong,
    /// `broken`: what happens to a line of `tokens` or `chat` that is wrong: `error` or `skip`. Default: `error`.
    pub broken: Broken,
    /// `max_bytes`: take files, spread by hash of their path, until so many bytes are reached, for training and again
    /// for validation; 0 for all. Default: 0.
    pub max_bytes: u64,
    /// `max_file_bytes`: leave out files larger than this; 0 for no limit. Default: 0.
    pub max_file_bytes: u64,
    /// `max_tokens`: stop after the document that reaches so many tokens, for training and again for validation; 0 for
    /// all. Default: 0.
    pub max_tokens: u64,
    /// `cache_dir`: where tokens are kept for the next run. Default: `{run.dir}/token-cache`.
    pub cache_dir: PathBuf,
}

impl DataConfig {
    pub(super) fn read(
        section: &mut Section<'_>,
        run: &RunConfig,
        model: &ModelRecipe,
        max_position_embeddings: Option<usize>,
    ) -> Self {
        let has_train = section.has("train");
        let train = globs(section, "train");
        if has_train {
            section.require("train", !train.is_empty(), || "names no files".into());
        } else {
            section.missing("train", "the files to train on: train = [\"data/**/*.txt\"]");
        }
        let valid = globs(section, "valid");
        let valid_fraction = section.number("valid_fraction").unwrap_or(0.0);
        section.require("valid_fraction", (0.0..1.0).contains(&valid_fraction), || {
            format!("is {valid_fraction}; it must be from 0 to below 1")
        });
        section.require("valid_fraction", valid_fraction == 0.0 || valid.is_empty(), || {
            "and `data.valid` exclude each other".into()
        });
        let format = section.choice("format", &["text", "tokens", "chat"]).unwrap_or(DataFormat::Text);
        let chat_template = path(section, "chat_template", "");
        let tokenizer = read_tokenizer(section, model, format);
        let longest = max_position_embeddings.unwrap_or(usize::MAX);
        let sequence_length = section.whole("sequence_length").map_or(longest.min(1024), |length| length as usize);
        section.require("sequence_length", sequence_length > 0, || "is 0; it must be at least 1".into());
        section.require("sequence_length", sequence_length <= longest, || {
            format!("is {sequence_length}, longer than the model's `max_position_embeddings` of {longest}")
        });
        let pack = section.boolean("pack").unwrap_or(true);
        let shuffle = section.boolean("shuffle").unwrap_or(true);
        let too_long = section.choice("too_long", &["error", "truncate", "skip"]).unwrap_or(TooLong::Error);
        let broken = section.choice("broken", &["error", "skip"]).unwrap_or(Broken::Error);
        let max_bytes = section.whole("max_bytes").unwrap_or(0);
        let max_file_bytes = section.whole("max_file_bytes").unwrap_or(0);
        let max_tokens = section.whole("max_tokens").unwrap_or(0);
        let default = run.dir.join("token-cache").to_string_lossy().into_owned();
        let cache_dir = path(section, "cache_dir", &default);
        Self {
            train,
            valid,
            valid_fraction,
            format,
            chat_template,
            tokenizer,
            sequence_length,
            pack,
            shuffle,
            too_long,
            broken,
            max_bytes,
            max_file_bytes,
            max_tokens,
            cache_dir,
        }
    }
}

/// Globs, left as they were written: what they expand to belongs to the machine, not to the recipe.
fn globs(section: &mut Section<'_>, key: &str) -> Vec<String> {
    let globs = section.strings(key).unwrap_or_default();
    for text in &globs {
        match expand(text) {
            Err(name) => section.invalid(key, format!("has `{text}`, but the environment has no `{name}`"), None),
            Ok(pattern) => {
                if let Err(error) = glob::Pattern::new(&pattern) {
                    section.invalid(key, format!("has `{text}`, which is not a glob: {error}"), None);
                }
            }
        }
    }
    globs
}

fn read_tokenizer(section: &mut Section<'_>, model: &ModelRecipe, format: DataFormat) -> String {
    let tokenizer = section.string("tokenizer").unwrap_or_else(|| match (&model.source, format) {
        (ModelSource::Path(path), DataFormat::Text | DataFormat::Chat) => path.to_string_lossy().into_owned(),
        (ModelSource::Path(path), DataFormat::Tokens)
            if ["tokenizer.json", "tiktoken.model"].iter().any(|name| path.join(name).exists()) =>
        {
            path.to_string_lossy().into_owned()
        }
        (_, DataFormat::Text) => BYTES_TOKENIZER.into(),
        (_, DataFormat::Chat) => BYTES_CHAT_TOKENIZER.into(),
        (_, DataFormat::Tokens) => NO_TOKENIZER.into(),
    });
    section.require("tokenizer", !tokenizer.is_empty(), || "is empty; write `bytes`, `none` or a path".into());
    section.require("tokenizer", tokenizer != NO_TOKENIZER || format == DataFormat::Tokens, || {
        "is `none`, but text needs one".into()
    });
    tokenizer
}

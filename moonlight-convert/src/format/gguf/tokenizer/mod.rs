//! Tokenizer, chat templates and special tokens in a GGUF file, both ways.
//!
//! | GGUF | Hugging Face |
//! |---|---|
//! | `tokenizer.ggml.model` `gpt2` | byte-level BPE: `tokenizer.json`, or one made of `tiktoken.model` |
//! | `tokenizer.ggml.model` `llama` | BPE with byte fallback, of SentencePiece's kind |
//! | `tokens`, `token_type` | vocabulary and added tokens by id; ids without a token are unused, `[PADn]` |
//! | `merges`, for `llama` `scores` | merges |
//! | `pre` | the pre-tokenizer, by the expressions that split a text |
//! | `bos_token_id` and so on | `tokenizer_config.json`, `generation_config.json`, `config.json` |
//! | `add_bos_token`, `add_eos_token` | the post-processor |
//! | `tokenizer.chat_template`, `tokenizer.chat_template.NAME` | `chat_template.jinja`, `chat_template` |
//!
//! What llama.cpp does differently is a note for the user, and what it cannot do is refused.

mod entries;
mod keys;
mod pre;
mod sentence_piece;
mod settings;
mod texts;
mod vocabulary;

use std::path::Path;

use moonlight_model::ModelConfig;

use super::{Metadata, Value};
use crate::error::CheckpointError;
use crate::io::confined_dir::ConfinedDir;
use crate::tokenizer::{BosEos, Ranks, SpecialNames, TIKTOKEN_MODEL, TOKENIZER_JSON, special_tokens, tokenizer_json};
use settings::Settings;
use vocabulary::TokenizerJson;

/// Size limit in bytes of a `tokenizer.json` or `tiktoken.model`, as in the program that reads them.
const LONGEST: u64 = 100_000_000;

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
    let confined = ConfinedDir::new(dir).map_err(CheckpointError::read(dir))?;
    let refused = |problem: String| {
        CheckpointError::GgufTokenizer {
        path: dir.to_path_buf(),
        problem,
        hint: Some(
            "move the tokenizer's files out of the directory to write a GGUF file without a tokenizer, for programs that \
             pass token ids"
                .into(),
        ),
    }
    };
    let names = || SpecialNames::next_to(&dir.join(TOKENIZER_JSON));
    let invalid = |name: &str, problem: String| CheckpointError::Tokenizer { path: dir.join(name), problem };
    if let Some(contents) = confined.read(TOKENIZER_JSON, LONGEST)? {
        let json: TokenizerJson =
            serde_json::from_slice(&contents).map_err(|error| invalid(TOKENIZER_JSON, error.to_string()))?;
        return entries::metadata(json, &names()?, &Settings::read(dir)?, config, false).map_err(refused);
    }
    if let Some(contents) = confined.read(TIKTOKEN_MODEL, LONGEST)? {
        let names = names()?;
        let json = tiktoken_json(&contents, &names).map_err(|problem| invalid(TIKTOKEN_MODEL, problem))?;
        return entries::metadata(json, &names, &Settings::read(dir)?, config, true).map_err(refused);
    }
    let note = match confined.file("tokenizer.model")? {
        Some(_) => {
            "the file has no tokenizer: `tokenizer.model` is not read; save the tokenizer with transformers, which writes \
             `tokenizer.json`"
        }
        None => "the directory has no tokenizer, nor has the file: programs have to pass token ids",
    };
    Ok(TokenizerMetadata { entries: vec![(keys::MODEL.into(), "none".into())], notes: vec![note.into()] })
}

/// The `tokenizer.json` for ranks.
fn tiktoken_json(contents: &[u8], names: &SpecialNames) -> Result<TokenizerJson, String> {
    let ranks = Ranks::parse(contents).map_err(|error| error.to_string())?;
    let special = special_tokens(ranks.count(), &names.added)?;
    let ends = BosEos::new(names, &special)?;
    let json = tokenizer_json(&ranks, &special, &ends)?;
    serde_json::from_value(json).map_err(|error| error.to_string())
}

/// The files of the tokenizer in the metadata of a GGUF file; `None` if the file has no tokenizer. `path` is the file, for
/// messages.
///
/// # Errors
///
/// [`CheckpointError::GgufTokenizer`] for a damaged tokenizer, or one whose kind or pre-tokenizer is not known.
pub fn tokenizer_texts(path: &Path, metadata: &Metadata) -> Result<Option<TokenizerTexts>, CheckpointError> {
    texts::texts(metadata).map_err(|problem| CheckpointError::GgufTokenizer {
        path: path.to_path_buf(),
        problem: problem.text,
        hint: problem
            .is_unknown
            .then(|| "put the model's `tokenizer.json` and `tokenizer_config.json` next to the file".into()),
    })
}

#[cfg(test)]
mod tests;

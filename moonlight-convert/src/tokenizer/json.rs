//! Writing `tokenizer.json`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::alphabet::{byte_to_char, spell};
use super::merges::merges;
use super::{AddedToken, Ranks, SpecialNames, TIKTOKEN_MODEL, TOKENIZER_JSON, pattern, special_tokens};
use crate::error::CheckpointError;
use crate::hub;
use crate::io::confined_dir::ConfinedDir;
use crate::io::temporary::new_file;

/// Size limit of `tiktoken.model` in bytes; the published one has 2,795,286.
const LONGEST: u64 = 50_000_000;

/// Writes `tokenizer.json` into a directory with a `tiktoken.model` (or a model in the Hub's cache), and returns its
/// path. An existing file is replaced only with `overwrite`.
///
/// # Errors
///
/// [`CheckpointError`], if there is no `tiktoken.model`, it or the names of special tokens are invalid, or the file
/// exists or cannot be written.
pub fn write_tokenizer_json(dir: impl AsRef<Path>, overwrite: bool) -> Result<PathBuf, CheckpointError> {
    let dir = hub::resolve(dir)?;
    if !dir.is_dir() {
        return Err(CheckpointError::not_a_directory(&dir));
    }
    let confined = ConfinedDir::new(&dir).map_err(CheckpointError::read(&dir))?;
    let Some(contents) = confined.read(TIKTOKEN_MODEL, LONGEST)? else { return Err(CheckpointError::NoRanks { dir }) };
    let path = dir.join(TOKENIZER_JSON);
    if !overwrite && fs::symlink_metadata(&path).is_ok() {
        return Err(CheckpointError::Exists { dir: path });
    }
    let model = dir.join(TIKTOKEN_MODEL);
    let invalid = |problem: String| CheckpointError::Tokenizer { path: model.clone(), problem };
    let ranks = Ranks::parse(&contents).map_err(|error| invalid(error.to_string()))?;
    let names = SpecialNames::next_to(&model)?;
    let special = special_tokens(ranks.count(), &names.added).map_err(invalid)?;
    let bos_eos = BosEos::new(&names, &special).map_err(invalid)?;
    let json = tokenizer_json(&ranks, &special, &bos_eos).map_err(invalid)?;

    // Written under a temporary name and renamed, so that a crash leaves no partial file. An error removes the
    // temporary file.
    let text = serde_json::to_vec(&json).expect("maps with strings as keys are JSON");
    let written = new_file(&dir, &format!(".{TOKENIZER_JSON}."), "").and_then(|mut partial| {
        partial.write_all(&text)?;
        partial.as_file().sync_all()?;
        partial.persist(&path).map_err(|error| error.error)
    });
    written.map_err(CheckpointError::write(&path))?;
    Ok(path)
}

/// The tokens that are added to each text if `tokenizer_config.json` sets `add_bos_token` or `add_eos_token`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BosEos {
    /// The token before a text.
    pub bos: Option<u32>,
    /// The token after a text.
    pub eos: Option<u32>,
}

impl BosEos {
    /// Determines the tokens from the files next to the tokenizer.
    ///
    /// # Errors
    ///
    /// A sentence, if the files require a token that does not exist.
    pub fn new(names: &SpecialNames, special: &BTreeMap<u32, AddedToken>) -> Result<Self, String> {
        let token_for = |add: Option<bool>, key: &str, name: &Option<String>, default: &str| {
            if add != Some(true) {
                return Ok(None);
            }
            let name = name.as_deref().unwrap_or(default);
            let token = special.iter().find(|(_, token)| token.content == name).map(|(&id, _)| Some(id));
            token.ok_or_else(|| format!("`tokenizer_config.json` sets `{key}`, and the token `{name}` does not exist"))
        };
        Ok(Self {
            bos: token_for(names.add_bos, "add_bos_token", &names.bos, "[BOS]")?,
            eos: token_for(names.add_eos, "add_eos_token", &names.eos, "[EOS]")?,
        })
    }

    /// The post-processor that adds them, in the form written by transformers.
    pub(crate) fn post_processor(self, special: &BTreeMap<u32, AddedToken>) -> Value {
        if self == Self::default() {
            return Value::Null;
        }
        let name = |id: u32| special.get(&id).map_or("", |token| token.content.as_str());
        let piece = |id: u32, text: u8| json!({"SpecialToken": {"id": name(id), "type_id": text}});
        let part = |letter: &str, text: u8| {
            let bos = self.bos.map(|id| piece(id, text));
            let eos = self.eos.map(|id| piece(id, text));
            bos.into_iter().chain([json!({"Sequence": {"id": letter, "type_id": text}})]).chain(eos).collect::<Vec<_>>()
        };
        let ids = [self.bos, self.eos].into_iter().flatten();
        let tokens: Map<String, Value> =
            ids.map(|id| (name(id).to_owned(), json!({"id": name(id), "ids": [id], "tokens": [name(id)]}))).collect();
        let pair = [part("A", 0), part("B", 1)].concat();
        json!({"type": "TemplateProcessing", "single": part("A", 0), "pair": pair, "special_tokens": tokens})
    }
}

/// The contents of `tokenizer.json` for ranks, the added tokens after them, and the tokens around a text.
///
/// # Errors
///
/// A sentence, if two tokens have the same text, or byte-level decoding would change a token's text. In both cases the
/// file would not be equivalent to the ranks.
pub fn tokenizer_json(ranks: &Ranks, special: &BTreeMap<u32, AddedToken>, ends: &BosEos) -> Result<Value, String> {
    let spelled: Vec<String> = ranks.tokens().iter().map(|token| spell(token)).collect();
    let vocab: Map<String, Value> =
        spelled.iter().zip(0..ranks.count()).map(|(token, rank)| (token.clone(), rank.into())).collect();
    let alphabet: HashSet<char> = (0..=u8::MAX).map(byte_to_char).collect();
    let mut contents: HashMap<&str, u32> = HashMap::new();
    for (&id, token) in special {
        let other = contents.insert(&token.content, id);
        let ordinary = vocab.get(&token.content).and_then(Value::as_u64);
        if let Some(other) = other.map(u64::from).or(ordinary) {
            return Err(format!("the tokens {other} and {id} have the same text `{}`", token.content.escape_debug()));
        }
        // If all characters of a token stand for bytes, the decoder replaces them by those bytes. ASCII does not change.
        if !token.content.is_ascii() && token.content.chars().all(|character| alphabet.contains(&character)) {
            let content = token.content.escape_debug();
            return Err(format!("the token {id}, `{content}`, would be decoded as other bytes"));
        }
    }
    let added: Vec<Value> = special.iter().map(|(&id, token)| token.to_json(id)).collect();
    // Older versions of `tokenizers` require one string for each pair. No spelled token contains a space.
    let merges: Vec<String> = merges(ranks)
        .into_iter()
        .map(|(left, right)| format!("{} {}", spelled[left as usize], spelled[right as usize]))
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern()}, "behavior": "Isolated", "invert": false},
                byte_level,
            ],
        },
        "post_processor": ends.post_processor(special),
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
            "vocab": vocab, "merges": merges,
        },
    }))
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;

    use super::*;

    fn directory() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let lines: String = (0..=u8::MAX).map(|byte| format!("{} {byte}\n", STANDARD.encode([byte]))).collect();
        fs::write(dir.path().join(TIKTOKEN_MODEL), lines).unwrap();
        dir
    }

    #[test]
    fn it_is_replaced_only_if_asked_to() {
        let dir = directory();
        let path = write_tokenizer_json(dir.path(), false).unwrap();
        let value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(
            (&value["added_tokens"][0]["id"], &value["added_tokens"][0]["content"]),
            (&json!(256), &json!("[BOS]"))
        );
        assert_eq!(value["added_tokens"].as_array().unwrap().len(), 256);
        assert!(matches!(write_tokenizer_json(dir.path(), false), Err(CheckpointError::Exists { .. })));
        write_tokenizer_json(dir.path(), true).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");
    }

    #[test]
    fn bos_and_eos_are_added_by_the_post_processor() {
        let dir = directory();
        let written = |config: &str| {
            fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
            let path = write_tokenizer_json(dir.path(), true).map_err(|error| error.to_string())?;
            Ok::<Value, String>(serde_json::from_slice(&fs::read(path).unwrap()).unwrap())
        };
        assert_eq!(written(r#"{"add_bos_token": false}"#).unwrap()["post_processor"], Value::Null);
        let processor = written(r#"{"add_bos_token": true, "add_eos_token": true}"#).unwrap()["post_processor"].take();
        // As transformers 5.24 saves it.
        let piece = |name: &str, text: u8| json!({"SpecialToken": {"id": name, "type_id": text}});
        let text = |letter: &str, text: u8| json!({"Sequence": {"id": letter, "type_id": text}});
        let single = [piece("[BOS]", 0), text("A", 0), piece("[EOS]", 0)];
        let pair = [&single[..], &[piece("[BOS]", 1), text("B", 1), piece("[EOS]", 1)]].concat();
        assert_eq!((&processor["single"], &processor["pair"]), (&json!(single), &json!(pair)));
        assert_eq!(processor["special_tokens"]["[EOS]"], json!({"id": "[EOS]", "ids": [257], "tokens": ["[EOS]"]}));
        let error = written(r#"{"add_bos_token": true, "bos_token": "<s>"}"#).unwrap_err();
        assert!(error.contains("sets `add_bos_token`, and the token `<s>` does not exist"), "{error}");
    }

    #[test]
    fn tokens_that_would_change_are_refused() {
        let dir = directory();
        let named = |text: &str| {
            fs::write(dir.path().join("tokenizer_config.json"), text).unwrap();
            write_tokenizer_json(dir.path(), false).unwrap_err().to_string()
        };
        let twice = named(r#"{"added_tokens_decoder": {"300": {"content": "[EOS]"}}}"#);
        assert!(twice.contains("the tokens 257 and 300 have the same text `[EOS]`"), "{twice}");
        let latin = named(r#"{"added_tokens_decoder": {"300": {"content": "éé"}}}"#);
        assert!(latin.contains("the token 300, `éé`, would be decoded as other bytes"), "{latin}");
        let byte = named(r#"{"added_tokens_decoder": {"300": {"content": "a"}}}"#);
        assert!(byte.contains("the tokens 97 and 300 have the same text `a`"), "{byte}");
        fs::write(dir.path().join(TIKTOKEN_MODEL), "YQ== 0\n").unwrap();
        assert!(named("{}").contains("no token stands for the byte 0"));
        fs::remove_file(dir.path().join(TIKTOKEN_MODEL)).unwrap();
        assert!(named("{}").contains("has no `tiktoken.model`"));
    }
}

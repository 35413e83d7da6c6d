//! The special tokens: what the files beside a tokenizer say of them, and the names that those leave out.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::io::confined_dir::ConfinedDir;

/// Special ids that follow the ranks. The published code names 258, of which the last two have no row in the embedding
/// of 163,840; nobody needs those.
pub const SPECIALS: u32 = 256;

/// The names that the published tokenizer gives to the first specials, by their distance from the last rank; all
/// others are `<|reserved_token_ID|>`. `tokenizer_config.json` has the last word.
const NAMES: [(u32, &str); 7] = [
    (0, "[BOS]"),
    (1, "[EOS]"),
    (2, "<|im_end|>"),
    (3, "<|im_user|>"),
    (4, "<|im_assistant|>"),
    (10, "<|im_system|>"),
    (17, "<|im_middle|>"),
];

/// Longer than any file of settings; the published ones have a few kB.
const LONGEST: u64 = 10_000_000;

/// A token that is not made of merged bytes, as `added_tokens_decoder` describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedToken {
    /// Its text.
    pub content: String,
    /// Left out of decoded text, and of text that others wrote never read as this token.
    pub special: bool,
    /// Matched between word boundaries only.
    pub single_word: bool,
    /// Takes the white space before it along.
    pub lstrip: bool,
    /// Takes the white space behind it along.
    pub rstrip: bool,
}

impl AddedToken {
    fn named(content: impl Into<String>) -> Self {
        Self { content: content.into(), special: true, single_word: false, lstrip: false, rstrip: false }
    }

    /// An entry of `added_tokens_decoder`: an object, or the text alone.
    fn read(value: &Value) -> Option<Self> {
        let flag = |key: &str, otherwise: bool| value[key].as_bool().unwrap_or(otherwise);
        // A token without a text stands for nothing, and would be found everywhere.
        Some(Self {
            content: text_of(value).filter(|text| !text.is_empty())?,
            special: flag("special", true),
            single_word: flag("single_word", false),
            lstrip: flag("lstrip", false),
            rstrip: flag("rstrip", false),
        })
    }
}

/// The names and ids that the files beside a tokenizer give; all of them may be absent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialNames {
    /// `bos_token` of `tokenizer_config.json`.
    pub bos: Option<String>,
    /// `eos_token` of `tokenizer_config.json`.
    pub eos: Option<String>,
    /// `bos_token_id` of `config.json`.
    pub bos_id: Option<u32>,
    /// `eos_token_id` of `config.json`, the first of a list.
    pub eos_id: Option<u32>,
    /// `added_tokens_decoder` of `tokenizer_config.json`.
    pub added: BTreeMap<u32, AddedToken>,
}

impl SpecialNames {
    /// Reads the files beside a tokenizer; one that is absent, not JSON or no plain file of the directory says nothing.
    pub fn beside(path: &Path) -> Self {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let confined = ConfinedDir::new(dir).ok();
        let read = |name: &str| confined.as_ref().and_then(|dir| dir.read(name, LONGEST).ok().flatten());
        let read = |name: &str| read(name).unwrap_or_default();
        Self::parse(&read("tokenizer_config.json"), &read("special_tokens_map.json"), &read("config.json"))
    }

    /// What the contents of `tokenizer_config.json`, `special_tokens_map.json` and `config.json` say.
    pub(crate) fn parse(config: &[u8], map: &[u8], model: &[u8]) -> Self {
        let [config, map, model] =
            [config, map, model].map(|text| serde_json::from_slice::<Value>(text).unwrap_or(Value::Null));
        let name = |key: &str| {
            [&config, &map].into_iter().find_map(|file| text_of(&file[key]).filter(|text| !text.is_empty()))
        };
        let id = |key: &str| {
            let value = &model[key];
            value.as_u64().or_else(|| value.get(0)?.as_u64()).and_then(|id| u32::try_from(id).ok())
        };
        let added = config["added_tokens_decoder"].as_object().map(|tokens| {
            tokens.iter().filter_map(|(id, token)| Some((id.parse().ok()?, AddedToken::read(token)?))).collect()
        });
        Self {
            bos: name("bos_token"),
            eos: name("eos_token"),
            bos_id: id("bos_token_id"),
            eos_id: id("eos_token_id"),
            added: added.unwrap_or_default(),
        }
    }
}

/// A token is its text, or an object with its text as `content`.
fn text_of(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
}

/// All [`SPECIALS`] tokens behind so many ranks, by their id: as `added` names them, as the published code does, or else
/// `<|reserved_token_ID|>`. What `added` names elsewhere has no row in the embedding and is left out, and so is what it
/// gives no text.
pub fn special_tokens(ranks: u32, added: &BTreeMap<u32, AddedToken>) -> BTreeMap<u32, AddedToken> {
    let ids = ranks..ranks.saturating_add(SPECIALS);
    let mut tokens: BTreeMap<u32, AddedToken> =
        ids.clone().map(|id| (id, AddedToken::named(format!("<|reserved_token_{id}|>")))).collect();
    tokens.extend(NAMES.iter().map(|&(distance, name)| (ranks.saturating_add(distance), AddedToken::named(name))));
    let named = added.iter().filter(|(id, token)| ids.contains(id) && !token.content.is_empty());
    tokens.extend(named.map(|(&id, token)| (id, token.clone())));
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_has_the_last_word() {
        let dir = tempfile::tempdir().unwrap();
        let config = r#"{"bos_token": "[BOS]", "eos_token": {"content": "<|im_end|>"}, "added_tokens_decoder": {
            "1005": {"content": "<|tool|>", "special": false, "rstrip": true}, "1254": {"content": "[PAD]"},
            "1256": "beyond", "x": "no id", "1007": 3}}"#;
        std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        std::fs::write(dir.path().join("config.json"), r#"{"eos_token_id": [7, 8]}"#).unwrap();
        let names = SpecialNames::beside(&dir.path().join("tiktoken.model"));
        assert_eq!((names.bos.as_deref(), names.eos.as_deref()), (Some("[BOS]"), Some("<|im_end|>")));
        assert_eq!((names.bos_id, names.eos_id), (None, Some(7)));
        let tokens = special_tokens(1000, &names.added);
        assert_eq!(tokens.keys().copied().collect::<Vec<_>>(), (1000..1256).collect::<Vec<_>>());
        for (id, content) in [
            (1000, "[BOS]"),
            (1005, "<|tool|>"),
            (1017, "<|im_middle|>"),
            (1254, "[PAD]"),
            (1255, "<|reserved_token_1255|>"),
        ] {
            assert_eq!(tokens[&id].content, content);
        }
        assert_eq!((tokens[&1005].special, tokens[&1005].rstrip, tokens[&1005].lstrip), (false, true, false));
        assert!(tokens[&1254].special);
    }

    #[test]
    fn a_token_without_a_text_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let config = r#"{"bos_token": "", "eos_token": {"content": ""}, "added_tokens_decoder": {
            "1005": {"content": ""}, "1006": ""}}"#;
        std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        let names = SpecialNames::beside(&dir.path().join("tiktoken.model"));
        assert_eq!(names, SpecialNames::default());
        let added = BTreeMap::from([(1005, AddedToken::named(""))]);
        assert!(special_tokens(1000, &added).values().all(|token| !token.content.is_empty()));
    }

    #[cfg(unix)]
    #[test]
    fn links_that_lead_out_and_pipes_say_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("model");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(dir.path().join("config.json"), r#"{"eos_token_id": 7}"#).unwrap();
        std::os::unix::fs::symlink("../config.json", inside.join("config.json")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", inside.join("special_tokens_map.json")).unwrap();
        let made = std::process::Command::new("mkfifo").arg(inside.join("tokenizer_config.json")).status();
        assert!(made.unwrap().success());
        assert_eq!(SpecialNames::beside(&inside.join("tiktoken.model")), SpecialNames::default());
    }

    #[test]
    fn files_that_are_none_say_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(SpecialNames::beside(&dir.path().join("x")), SpecialNames::default());
        std::fs::write(dir.path().join("tokenizer_config.json"), "[1, 2").unwrap();
        std::fs::write(dir.path().join("config.json"), b"\xFF").unwrap();
        assert_eq!(SpecialNames::beside(&dir.path().join("x")), SpecialNames::default());
    }
}

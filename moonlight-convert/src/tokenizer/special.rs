//! Special tokens: their definitions in the files next to a tokenizer, and default names for the rest.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use serde_json::{Value, json};

use crate::error::CheckpointError;
use crate::io::confined_dir::ConfinedDir;

/// The number of special tokens after the ranks. The published code defines 258. The last two have no row in the
/// embedding of 163,840, and are omitted here.
pub const SPECIAL_COUNT: u32 = 256;

/// The names of special tokens in the published tokenizer, by their distance from the last rank; all others are
/// `<|reserved_token_ID|>`. `tokenizer_config.json` takes precedence.
const NAMES: [(u32, &str); 7] = [
    (0, "[BOS]"),
    (1, "[EOS]"),
    (2, "<|im_end|>"),
    (3, "<|im_user|>"),
    (4, "<|im_assistant|>"),
    (10, "<|im_system|>"),
    (17, "<|im_middle|>"),
];

/// How many ids after those of the published code a `tokenizer_config.json` may define.
const MOST_MORE: u32 = 1 << 16;

/// Size limit of a config file in bytes; the published ones have a few kB.
const LONGEST: u64 = 10_000_000;

/// The files that define tokens.
const FILES: [&str; 4] = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"];

/// A token that is not formed by merges, as described in `added_tokens_decoder`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedToken {
    /// The token's text.
    pub content: String,
    /// Whether it is a control token: omitted from decoded text, and never recognized in the text of users.
    pub special: bool,
    /// Whether it is only matched between word boundaries.
    pub single_word: bool,
    /// Whether it includes preceding white space.
    pub lstrip: bool,
    /// Whether it includes following white space.
    pub rstrip: bool,
    /// Whether it is searched for in the normalized text; tokens that are not are searched for first.
    pub normalized: bool,
}

impl AddedToken {
    /// A special token with this text and default settings.
    pub fn named(content: impl Into<String>) -> Self {
        Self::with_defaults(content.into(), true)
    }

    fn with_defaults(content: String, special: bool) -> Self {
        Self { content, special, single_word: false, lstrip: false, rstrip: false, normalized: !special }
    }

    /// The entry of `added_tokens` in a `tokenizer.json`.
    pub(crate) fn to_json(&self, id: u32) -> Value {
        json!({
            "id": id, "content": self.content, "single_word": self.single_word, "lstrip": self.lstrip,
            "rstrip": self.rstrip, "normalized": self.normalized, "special": self.special,
        })
    }

    /// Reads an entry of `added_tokens_decoder`: an object, or only the text. Defaults are those of Hugging Face's
    /// `AddedToken`: not special, and normalized unless special.
    fn read(value: &Value) -> Option<Self> {
        // A token with an empty text would match everywhere.
        let content = text_of(value).filter(|text| !text.is_empty())?;
        if value.is_string() {
            return Some(Self::named(content));
        }
        let flag = |key: &str, default: bool| value[key].as_bool().unwrap_or(default);
        let token = Self::with_defaults(content, flag("special", false));
        Some(Self {
            single_word: flag("single_word", false),
            lstrip: flag("lstrip", false),
            rstrip: flag("rstrip", false),
            normalized: flag("normalized", token.normalized),
            ..token
        })
    }
}

/// The names and ids in the files next to a tokenizer; any may be missing.
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
    /// `add_bos_token` of `tokenizer_config.json`.
    pub add_bos: Option<bool>,
    /// `add_eos_token` of `tokenizer_config.json`.
    pub add_eos: Option<bool>,
    /// `added_tokens_decoder` of `tokenizer_config.json`, or without it the tokens of `added_tokens.json`. As in
    /// transformers, tokens that a key such as `eos_token` names are special, whatever their entry says.
    pub added: BTreeMap<u32, AddedToken>,
    /// Whether `added` was read from `added_tokens.json`.
    pub from_added_tokens_json: bool,
    /// The texts of keys such as `eos_token`, `pad_token` or `image_token`; these tokens are special.
    pub named: BTreeSet<String>,
    /// The texts of `additional_special_tokens` and `extra_special_tokens`.
    pub additional: BTreeSet<String>,
}

impl SpecialNames {
    /// Reads the files next to a tokenizer: `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`,
    /// `config.json`. A missing file is treated as empty.
    ///
    /// `special_tokens_map.json` and `added_tokens.json` are from earlier versions of transformers, which reads them
    /// only if `tokenizer_config.json` has no `added_tokens_decoder`. So does this function, and then the map takes
    /// precedence.
    ///
    /// # Errors
    ///
    /// A file that exists and cannot be read, or is not JSON.
    pub fn next_to(path: &Path) -> Result<Self, CheckpointError> {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let confined = ConfinedDir::new(dir).map_err(CheckpointError::read(dir))?;
        let mut texts: [Option<Vec<u8>>; 4] = Default::default();
        for (text, name) in texts.iter_mut().zip(FILES) {
            *text = confined.read(name, LONGEST)?;
        }
        Self::parse(texts.each_ref().map(Option::as_deref))
            .map_err(|(name, problem)| CheckpointError::Tokenizer { path: dir.join(name), problem })
    }

    /// Parses the contents of [`FILES`]; the error is a file's name and what is wrong with it.
    pub(crate) fn parse(texts: [Option<&[u8]>; 4]) -> Result<Self, (&'static str, String)> {
        let mut files: [Value; 4] = Default::default();
        for ((file, text), name) in files.iter_mut().zip(texts).zip(FILES) {
            if let Some(text) = text {
                *file = serde_json::from_slice(text).map_err(|error| (name, format!("it is not JSON: {error}")))?;
            }
        }
        let [config, map, added, model] = &files;
        let decoder = &config["added_tokens_decoder"];
        let order = if decoder.is_object() { [config, map] } else { [map, config] };
        let name = |key: &str| order.iter().find_map(|file| text_of(&file[key]).filter(|text| !text.is_empty()));
        let id = |key: &str| {
            let value = &model[key];
            value.as_u64().or_else(|| value.get(0)?.as_u64()).and_then(|id| u32::try_from(id).ok())
        };
        let entries = || order.iter().filter_map(|file| file.as_object()).flatten();
        let named: BTreeSet<String> = entries()
            .filter(|(key, _)| key.ends_with("_token"))
            .filter_map(|(_, value)| text_of(value).filter(|text| !text.is_empty()))
            .collect();
        let additional = entries()
            .filter(|(key, _)| ["additional_special_tokens", "extra_special_tokens"].contains(&key.as_str()))
            .flat_map(|(_, value)| match value {
                Value::Array(tokens) => tokens.iter().filter_map(text_of).collect(),
                Value::Object(tokens) => tokens.values().filter_map(text_of).collect(),
                _ => Vec::new(),
            })
            .filter(|text| !text.is_empty())
            .collect();
        let tokens: Vec<(u32, AddedToken)> = match (decoder.as_object(), added.as_object()) {
            (Some(tokens), _) => {
                tokens.iter().filter_map(|(id, token)| Some((id.parse().ok()?, AddedToken::read(token)?))).collect()
            }
            (None, Some(tokens)) => {
                let token = |(content, id): (&String, &Value)| {
                    let id = id.as_u64().and_then(|id| u32::try_from(id).ok())?;
                    (!content.is_empty()).then(|| (id, AddedToken::with_defaults(content.clone(), false)))
                };
                tokens.iter().filter_map(token).collect()
            }
            (None, None) => Vec::new(),
        };
        let special = |(id, token): (u32, AddedToken)| {
            let special = token.special || named.contains(&token.content);
            (id, AddedToken { special, ..token })
        };
        Ok(Self {
            bos: name("bos_token"),
            eos: name("eos_token"),
            bos_id: id("bos_token_id"),
            eos_id: id("eos_token_id"),
            add_bos: config["add_bos_token"].as_bool(),
            add_eos: config["add_eos_token"].as_bool(),
            from_added_tokens_json: !decoder.is_object() && !tokens.is_empty(),
            added: tokens.into_iter().map(special).collect(),
            named,
            additional,
        })
    }
}

/// The text of a token, which is a string or an object with `content`.
fn text_of(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
}

/// The tokens after `ranks` ranks, by id: named as in `added`, or as in the published code, or else
/// `<|reserved_token_ID|>`. There are at least [`SPECIAL_COUNT`] of them without a gap, and more if `added` has higher
/// ids. Reserved tokens after those have no row in the embedding of the published models and are omitted.
///
/// # Errors
///
/// A sentence, if `added` contains an id of a rank or one far above them, or two tokens have the same text.
pub fn special_tokens(ranks: u32, added: &BTreeMap<u32, AddedToken>) -> Result<BTreeMap<u32, AddedToken>, String> {
    let reserved = |id: u32| AddedToken::named(format!("<|reserved_token_{id}|>"));
    // `saturating`: both numbers come from files.
    let first_more = ranks.saturating_add(SPECIAL_COUNT);
    let known = added.iter().filter(|(id, token)| {
        !token.content.is_empty() && (**id < first_more || token.content != reserved(**id).content)
    });
    let known: BTreeMap<u32, AddedToken> = known.map(|(&id, token)| (id, token.clone())).collect();
    let describe = |id: u32| format!("the token {id}, `{}`", known[&id].content.escape_debug());
    if let Some((&id, _)) = known.first_key_value().filter(|(id, _)| **id < ranks) {
        return Err(format!(
            "`tokenizer_config.json` defines {}, and `tiktoken.model` contains a token {id}, too",
            describe(id)
        ));
    }
    let last = known.last_key_value().map_or(0, |(&id, _)| id);
    if last >= first_more.saturating_add(MOST_MORE) {
        return Err(format!("`tokenizer_config.json` defines {}, and there are only {ranks} ranks", describe(last)));
    }
    let ids = ranks..first_more.max(last.saturating_add(1));
    let mut tokens: BTreeMap<u32, AddedToken> = ids.map(|id| (id, reserved(id))).collect();
    tokens.extend(NAMES.iter().map(|&(distance, name)| (ranks.saturating_add(distance), AddedToken::named(name))));
    tokens.extend(known);
    let mut ids: HashMap<&str, u32> = HashMap::new();
    for (&id, token) in &tokens {
        if let Some(other) = ids.insert(&token.content, id) {
            return Err(format!("the tokens {other} and {id} have the same text `{}`", token.content.escape_debug()));
        }
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_next_to(files: &[(&str, &str)]) -> SpecialNames {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        SpecialNames::next_to(&dir.path().join("tiktoken.model")).unwrap()
    }

    #[test]
    fn tokenizer_config_takes_precedence() {
        let config = r#"{"bos_token": "[BOS]", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": true,
            "added_tokens_decoder": {
            "1005": {"content": "<|tool|>", "special": false, "rstrip": true}, "1254": {"content": "[PAD]", "special": true},
            "1256": "beyond", "x": "no id", "1007": 3}}"#;
        let names = names_next_to(&[
            ("tokenizer_config.json", config),
            ("config.json", r#"{"eos_token_id": [7, 8]}"#),
            ("special_tokens_map.json", r#"{"eos_token": "[EOS]", "pad_token": "[PAD]"}"#),
        ]);
        assert_eq!((names.bos.as_deref(), names.eos.as_deref()), (Some("[BOS]"), Some("<|im_end|>")));
        assert_eq!((names.bos_id, names.eos_id), (None, Some(7)));
        assert_eq!((names.add_bos, names.add_eos), (Some(true), None));
        let tokens = special_tokens(1000, &names.added).unwrap();
        assert_eq!(tokens.keys().copied().collect::<Vec<_>>(), (1000..1257).collect::<Vec<_>>());
        for (id, content) in [
            (1000, "[BOS]"),
            (1005, "<|tool|>"),
            (1017, "<|im_middle|>"),
            (1254, "[PAD]"),
            (1255, "<|reserved_token_1255|>"),
            (1256, "beyond"),
        ] {
            assert_eq!(tokens[&id].content, content);
        }
        assert_eq!((tokens[&1005].special, tokens[&1005].rstrip, tokens[&1005].lstrip), (false, true, false));
        assert_eq!((tokens[&1005].normalized, tokens[&1254].normalized), (true, false));
        assert!(tokens[&1254].special);
    }

    /// As in transformers 5.24: a token named by `eos_token` is special, one listed as additional need not be.
    #[test]
    fn a_named_token_is_special() {
        let config = r#"{"eos_token": "<end>", "image_token": "<img>", "additional_special_tokens": ["<think>"],
            "added_tokens_decoder": {"1005": {"content": "<end>", "special": false},
            "1006": {"content": "<think>", "special": false}, "1007": {"content": "<img>", "special": false}}}"#;
        let names = names_next_to(&[("tokenizer_config.json", config)]);
        let special = |id: u32| names.added[&id].special;
        assert_eq!((special(1005), special(1006), special(1007)), (true, false, true));
    }

    #[test]
    fn files_of_earlier_versions_are_read_if_the_config_has_no_tokens() {
        let config = ("tokenizer_config.json", r#"{"eos_token": "a"}"#);
        let map = ("special_tokens_map.json", r#"{"eos_token": "b", "additional_special_tokens": [{"content": "c"}]}"#);
        let names = names_next_to(&[config, map, ("added_tokens.json", r#"{"b": 1003, "<x>": 1004}"#)]);
        assert_eq!(names.eos.as_deref(), Some("b"));
        assert_eq!(names.additional.first().unwrap(), "c");
        let special = names.added.iter().map(|(&id, token)| (id, token.content.as_str(), token.special));
        assert_eq!(special.collect::<Vec<_>>(), [(1003, "b", true), (1004, "<x>", false)]);
    }

    #[test]
    fn reserved_tokens_without_a_row_are_omitted_and_gaps_are_filled() {
        let added = |tokens: &[(u32, &str)]| {
            tokens.iter().map(|&(id, name)| (id, AddedToken::named(name))).collect::<BTreeMap<_, _>>()
        };
        // As listed in a copy saved by transformers.
        let names = added(&[(1256, "<|reserved_token_1256|>"), (1257, "<|reserved_token_1257|>")]);
        assert_eq!(special_tokens(1000, &names).unwrap().len(), 256);
        let tokens = special_tokens(1000, &added(&[(1300, "<new>")])).unwrap();
        assert_eq!((tokens.len(), tokens[&1299].content.as_str()), (301, "<|reserved_token_1299|>"));
        let error = special_tokens(1000, &added(&[(4_000_000_000, "<far>")])).unwrap_err();
        assert!(error.contains("the token 4000000000, `<far>`, and there are only 1000 ranks"), "{error}");
        let error = special_tokens(1000, &added(&[(7, "<x>")])).unwrap_err();
        assert!(error.contains("defines the token 7, `<x>`, and `tiktoken.model` contains a token 7, too"), "{error}");
        let error = special_tokens(1000, &added(&[(1100, "[EOS]")])).unwrap_err();
        assert!(error.contains("the tokens 1001 and 1100 have the same text `[EOS]`"), "{error}");
    }

    #[test]
    fn a_token_without_a_text_is_ignored() {
        let config = r#"{"bos_token": "", "eos_token": {"content": ""}, "added_tokens_decoder": {
            "1005": {"content": ""}, "1006": ""}}"#;
        assert_eq!(names_next_to(&[("tokenizer_config.json", config)]), SpecialNames::default());
        let added = BTreeMap::from([(1005, AddedToken::named(""))]);
        assert!(special_tokens(1000, &added).unwrap().values().all(|token| !token.content.is_empty()));
    }

    #[cfg(unix)]
    #[test]
    fn links_out_of_the_directory_and_pipes_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("model");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(dir.path().join("config.json"), r#"{"eos_token_id": 7}"#).unwrap();
        let error = || SpecialNames::next_to(&inside.join("tiktoken.model")).unwrap_err().to_string();
        std::os::unix::fs::symlink("../config.json", inside.join("config.json")).unwrap();
        assert!(error().contains("config.json"), "{}", error());
        std::os::unix::fs::symlink("/dev/zero", inside.join("special_tokens_map.json")).unwrap();
        assert!(error().contains("special_tokens_map.json"), "{}", error());
        let made = std::process::Command::new("mkfifo").arg(inside.join("tokenizer_config.json")).status();
        assert!(made.unwrap().success());
        assert!(error().contains("tokenizer_config.json"), "{}", error());
    }

    #[test]
    fn a_file_that_is_not_json_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(SpecialNames::next_to(&dir.path().join("x")).unwrap(), SpecialNames::default());
        for name in FILES {
            let path = dir.path().join(name);
            std::fs::write(&path, "[1, 2").unwrap();
            let error = SpecialNames::next_to(&dir.path().join("x")).unwrap_err().to_string();
            assert!(error.contains(&format!("{name}` is invalid: it is not JSON")), "{error}");
            std::fs::remove_file(path).unwrap();
        }
    }
}

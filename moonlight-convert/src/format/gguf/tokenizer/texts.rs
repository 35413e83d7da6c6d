//! Metadata as the files that Hugging Face's `tokenizers` and transformers read.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::{Map, Value as Json, json};

use super::pre::{PreTokenizer, WITHOUT_MERGES};
use super::vocabulary::{LONGEST_TOKEN, MOST_TOKENS, TokenType, check_lengths};
use super::{TokenizerTexts, keys, sentence_piece};
use crate::format::gguf::{Array, Metadata, Value};
use crate::printable::printable;
use crate::tokenizer::{AddedToken, BosEos, TOKENIZER_JSON};

/// Keys that have no effect on the tokens of a text: other roles of tokens, and what is only for models of other kinds.
const WITHOUT_EFFECT: [&str; 15] = [
    "tokenizer.ggml.cls_token_id",
    "tokenizer.ggml.fim_mid_token_id",
    "tokenizer.ggml.fim_pad_token_id",
    "tokenizer.ggml.fim_pre_token_id",
    "tokenizer.ggml.fim_rep_token_id",
    "tokenizer.ggml.fim_sep_token_id",
    "tokenizer.ggml.fim_suf_token_id",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.middle_token_id",
    "tokenizer.ggml.prefix_token_id",
    "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.suffix_token_id",
    "tokenizer.ggml.suppress_tokens",
    "tokenizer.ggml.token_type_count",
    "tokenizer.huggingface.json",
];
/// The most merges that are derived; those of a vocabulary of 256,000 tokens are some 600,000.
const MOST_MERGES: usize = 1 << 22;
/// The most named templates.
const MOST_TEMPLATES: usize = 64;
/// The tokens that llama.cpp takes for BOS, EOS and the unknown token of a `llama` tokenizer without the keys.
const SENTENCE_PIECE_DEFAULTS: [u32; 3] = [1, 2, 0];

/// A problem as the rest of a sentence that begins with the tokenizer, and whether a `tokenizer.json` next to the file would
/// help.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) text: String,
    pub(super) is_unknown: bool,
}

impl From<String> for Problem {
    fn from(text: String) -> Self {
        Self { text, is_unknown: false }
    }
}

fn unknown(text: String) -> Problem {
    Problem { text, is_unknown: true }
}

/// The tokens of a file, by id.
struct Tokens<'a> {
    texts: &'a [String],
    types: Vec<TokenType>,
}

impl<'a> Tokens<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self, String> {
        let texts = metadata.get(keys::TOKENS).and_then(Value::as_strings);
        let texts = texts.ok_or_else(|| format!("has no list of strings `{}`", keys::TOKENS))?;
        if texts.len() > MOST_TOKENS {
            return Err(format!("has {} tokens; the limit is {MOST_TOKENS}", texts.len()));
        }
        let types = match metadata.get(keys::TYPES) {
            None => vec![TokenType::Normal; texts.len()],
            Some(value) => {
                let numbers = value.as_array().and_then(integers);
                let types = numbers.and_then(|list| list.into_iter().map(TokenType::from_number).collect());
                types.ok_or_else(|| format!("has `{}` with a type that is not known", keys::TYPES))?
            }
        };
        if types.len() != texts.len() {
            return Err(format!("has {} tokens and {} types of tokens", texts.len(), types.len()));
        }
        let tokens = Self { texts, types };
        check_lengths(tokens.used().map(|(_, text)| text))?;
        let mut known = HashSet::with_capacity(texts.len());
        if let Some((_, text)) = tokens.used().find(|(_, text)| !known.insert(*text)) {
            return Err(format!("has two tokens with the text `{}`", printable(text)));
        }
        Ok(tokens)
    }

    /// All but the unused, by id.
    fn used(&self) -> impl Iterator<Item = (u32, &'a str)> + '_ {
        let all = self.texts.iter().zip(&self.types).zip(0..);
        let used = all.filter(|((text, kind), _)| **kind != TokenType::Unused && !text.is_empty());
        used.map(|((text, _), id)| (id, text.as_str()))
    }

    fn kind(&self, id: u32) -> TokenType {
        self.types.get(id as usize).copied().unwrap_or(TokenType::Unused)
    }

    fn text(&self, id: u32) -> Option<&'a str> {
        self.texts.get(id as usize).map(String::as_str)
    }

    /// Special tokens and those that are found in a text before it is split.
    fn added(&self) -> BTreeMap<u32, AddedToken> {
        let added = self.used().filter_map(|(id, text)| {
            let special = match self.kind(id) {
                TokenType::Control | TokenType::Unknown => true,
                TokenType::UserDefined => false,
                _ => return None,
            };
            Some((id, AddedToken { special, normalized: false, ..AddedToken::named(text) }))
        });
        added.collect()
    }
}

/// The numbers of an array of any type of integers.
fn integers(array: &Array) -> Option<Vec<i64>> {
    Some(match array {
        Array::U8(list) => list.iter().map(|&value| value.into()).collect(),
        Array::I8(list) => list.iter().map(|&value| value.into()).collect(),
        Array::U16(list) => list.iter().map(|&value| value.into()).collect(),
        Array::I16(list) => list.iter().map(|&value| value.into()).collect(),
        Array::U32(list) => list.iter().map(|&value| value.into()).collect(),
        Array::I32(list) => list.iter().map(|&value| value.into()).collect(),
        Array::I64(list) => list.clone(),
        _ => return None,
    })
}

/// The files of a tokenizer; `None` if the metadata has none.
pub(super) fn texts(metadata: &Metadata) -> Result<Option<TokenizerTexts>, Problem> {
    let model = match metadata.get(keys::MODEL) {
        None => return Ok(None),
        Some(value) => value.as_str().ok_or_else(|| format!("has a `{}` that is not a string", keys::MODEL))?,
    };
    let is_sentence_piece = match model {
        "none" | "no_vocab" => return Ok(None),
        "gpt2" => false,
        "llama" => true,
        other => return Err(unknown(format!("is of the kind `{}`, which is not known", printable(other)))),
    };
    let flag = |key: &str| match metadata.get(key) {
        None => Ok(None),
        Some(value) => value.as_bool().map(Some).ok_or_else(|| format!("has a `{key}` that is not a boolean")),
    };
    for key in [keys::ADD_SEPARATOR, keys::REMOVE_SPACES] {
        if flag(key)? == Some(true) {
            return Err(unknown(format!("has `{key}`, which is not supported")));
        }
    }
    if metadata.get(keys::CHARACTERS).is_some() {
        return Err(unknown(format!("has `{}`, which is not supported", keys::CHARACTERS)));
    }
    let tokens = Tokens::read(metadata)?;
    let id = |key: &str, default: u32| {
        let in_range = |id: &u32| (*id as usize) < tokens.texts.len();
        match metadata.get(key) {
            None => Ok(is_sentence_piece.then_some(default).filter(in_range)),
            Some(value) => match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
                // Both -1 and the largest number are written for none.
                Some(u32::MAX) => Ok(None),
                Some(id) if in_range(&id) => Ok(Some(id)),
                _ => Err(format!("has a `{key}` that is not one of its {} tokens", tokens.texts.len())),
            },
        }
    };
    let [bos, eos, unknown_token] = SENTENCE_PIECE_DEFAULTS;
    let (bos, eos) = (id(keys::BOS, bos)?, id(keys::EOS, eos)?);
    let unknown_token = id(keys::UNKNOWN, unknown_token)?;
    let other = |key: &str| metadata.get(key).map_or(Ok(None), |_| id(key, 0));
    let [pad, eot, eom] = [other(keys::PAD)?, other(keys::EOT)?, other(keys::EOM)?];

    let mut added = tokens.added();
    let (json, adds_bos) = match is_sentence_piece {
        true => {
            let adds_space = flag(keys::ADD_SPACE)?.unwrap_or(true);
            (sentence_piece_json(metadata, &tokens, unknown_token, adds_space)?, true)
        }
        false => {
            let known = pre_tokenizer(metadata)?;
            (byte_level_json(metadata, &tokens, known)?, known.adds_bos)
        }
    };
    let adds_bos = flag(keys::ADD_BOS)?.unwrap_or(adds_bos);
    let adds_eos = flag(keys::ADD_EOS)?.unwrap_or(false);
    let ends = BosEos { bos: bos.filter(|_| adds_bos), eos: eos.filter(|_| adds_eos) };
    // The post-processor names the tokens that it adds, which are special in every published tokenizer.
    for id in [ends.bos, ends.eos].into_iter().flatten() {
        let text = tokens.text(id).unwrap_or_default();
        added.entry(id).or_insert_with(|| AddedToken::named(text));
    }
    let mut json = json;
    json["added_tokens"] = added.iter().map(|(&id, token)| token.to_json(id)).collect();
    json["post_processor"] = ends.post_processor(&added);

    let mut config = Map::new();
    let mut put = |key: &str, value: Json| drop(config.insert(key.into(), value));
    put("tokenizer_class", "PreTrainedTokenizerFast".into());
    put("clean_up_tokenization_spaces", false.into());
    put("add_bos_token", adds_bos.into());
    put("add_eos_token", adds_eos.into());
    for (key, id) in [("bos_token", bos), ("eos_token", eos), ("unk_token", unknown_token), ("pad_token", pad)] {
        if let Some(text) = id.and_then(|id| tokens.text(id)) {
            put(key, text.into());
        }
    }
    if let Some(template) = templates(metadata)? {
        put("chat_template", template);
    }
    let mut generation = Map::new();
    let mut all_ends: Vec<u32> = Vec::new();
    for end in [eos, eot, eom].into_iter().flatten() {
        if !all_ends.contains(&end) {
            all_ends.push(end);
        }
    }
    for (key, id) in [("bos_token_id", bos), ("pad_token_id", pad)] {
        generation.extend(id.map(|id| (key.to_owned(), id.into())));
    }
    match *all_ends {
        [] => {}
        [end] => drop(generation.insert("eos_token_id".into(), end.into())),
        _ => drop(generation.insert("eos_token_id".into(), all_ends.into())),
    }
    let file = |name: &str, value: Json| {
        let text = serde_json::to_vec_pretty(&value).expect("maps with strings as keys are JSON");
        (name.to_owned(), text)
    };
    let json_text = serde_json::to_vec(&json).expect("maps with strings as keys are JSON");
    let files = vec![
        (TOKENIZER_JSON.to_owned(), json_text),
        file("tokenizer_config.json", Json::Object(config)),
        file("generation_config.json", Json::Object(generation)),
    ];
    Ok(Some(TokenizerTexts { files, notes: ignored(metadata) }))
}

/// Sentences on the keys of the tokenizer that were not used.
fn ignored(metadata: &Metadata) -> Vec<String> {
    let used = [
        keys::MODEL,
        keys::PRE,
        keys::TOKENS,
        keys::TYPES,
        keys::SCORES,
        keys::MERGES,
        keys::BOS,
        keys::EOS,
        keys::EOT,
        keys::EOM,
        keys::UNKNOWN,
        keys::PAD,
        keys::ADD_BOS,
        keys::ADD_EOS,
        keys::ADD_SEPARATOR,
        keys::ADD_SPACE,
        keys::REMOVE_SPACES,
        keys::TEMPLATE,
        keys::TEMPLATES,
    ];
    let keys = metadata.iter().map(|(key, _)| key);
    let rest = keys.filter(|key: &&str| {
        key.starts_with(keys::PREFIX)
            && !used.contains(key)
            && !WITHOUT_EFFECT.contains(key)
            && !key.starts_with(&format!("{}.", keys::TEMPLATE))
    });
    rest.map(|key| format!("the key `{}` is not known and was ignored", printable(key))).collect()
}

/// The value of `chat_template`: a text, or a list of named ones.
fn templates(metadata: &Metadata) -> Result<Option<Json>, String> {
    let text = |key: &str| match metadata.get(key) {
        None => Ok(None),
        Some(value) => {
            value.as_str().map(Some).ok_or_else(|| format!("has a `{}` that is not a string", printable(key)))
        }
    };
    let default = text(keys::TEMPLATE)?;
    let names = match metadata.get(keys::TEMPLATES) {
        None => &[],
        Some(value) => {
            value.as_strings().ok_or_else(|| format!("has a `{}` that is no list of names", keys::TEMPLATES))?
        }
    };
    if names.len() > MOST_TEMPLATES {
        return Err(format!("has {} named chat templates; the limit is {MOST_TEMPLATES}", names.len()));
    }
    let mut list = Vec::new();
    for name in names {
        if let Some(text) = text(&format!("{}.{name}", keys::TEMPLATE))? {
            list.push(json!({"name": name, "template": text}));
        }
    }
    if list.is_empty() {
        return Ok(default.map(Json::from));
    }
    if let Some(text) = default {
        list.insert(0, json!({"name": "default", "template": text}));
    }
    Ok(Some(list.into()))
}

fn pre_tokenizer(metadata: &Metadata) -> Result<&'static PreTokenizer, Problem> {
    let name = match metadata.get(keys::PRE) {
        None => return Err(unknown("does not name its pre-tokenizer".into())),
        Some(value) => value.as_str().ok_or_else(|| format!("has a `{}` that is not a string", keys::PRE))?,
    };
    PreTokenizer::named(name)
        .ok_or_else(|| unknown(format!("has the pre-tokenizer `{}`, which is not known", printable(name))))
}

/// The vocabulary of the model. Added tokens are only in the list of added tokens, as in most published files, if
/// `tokenizers` then gives them their ids: if they come after all others without a gap.
fn vocab(tokens: &Tokens<'_>, all: bool) -> Map<String, Json> {
    let is_added = |id: u32| !matches!(tokens.kind(id), TokenType::Normal | TokenType::Byte);
    let normal: Vec<(u32, &str)> = tokens.used().filter(|(id, _)| !is_added(*id)).collect();
    let added = tokens.used().filter(|(id, _)| is_added(*id));
    let follow = added.zip(normal.len() as u32..).all(|((id, _), next)| id == next)
        && normal.iter().zip(0..).all(|((id, _), place)| *id == place);
    match all || !follow {
        true => tokens.used().map(|(id, text)| (text.to_owned(), id.into())).collect(),
        false => normal.into_iter().map(|(id, text)| (text.to_owned(), id.into())).collect(),
    }
}

fn byte_level_json(metadata: &Metadata, tokens: &Tokens<'_>, known: &PreTokenizer) -> Result<Json, String> {
    let mut by_text: HashMap<&str, u32> = HashMap::with_capacity(tokens.texts.len());
    by_text.extend(tokens.used().map(|(id, text)| (text, id)));
    let is_moonlights = known.names[0] == "kimi-k2";
    let merges: Vec<String> = match metadata.get(keys::MERGES) {
        // llama.cpp opens such files, too. Moonlight's ranks are its ids.
        None if is_moonlights => {
            let normal: Vec<(u32, &str)> =
                tokens.used().filter(|(id, _)| tokens.kind(*id) == TokenType::Normal).collect();
            let by_text: HashMap<&str, u32> = normal.iter().map(|&(id, text)| (text, id)).collect();
            let text = |id: u32| tokens.text(id).unwrap_or_default();
            let pairs = derived(&normal, &by_text)?;
            pairs.into_iter().map(|(left, right)| format!("{} {}", text(left), text(right))).collect()
        }
        None => return Err(format!("has no `{}`", keys::MERGES)),
        Some(value) => {
            let list = value.as_strings();
            list.ok_or_else(|| format!("has `{}` that are not strings", keys::MERGES))?.to_vec()
        }
    };
    for merge in &merges {
        let whole = merge.split_once(' ').filter(|(left, right)| {
            by_text.contains_key(left)
                && by_text.contains_key(right)
                && by_text.contains_key(&*format!("{left}{right}"))
        });
        if whole.is_none() {
            return Err(format!("has the merge `{}`, which does not form a token from two", printable(merge)));
        }
    }
    // Without merges complete pieces matter only if llama.cpp's pre-tokenizer looks for them.
    let ignore_merges = is_moonlights || (known.ignore_merges && known.names[0] != WITHOUT_MERGES);
    let by_bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": if known.nfc { json!({"type": "NFC"}) } else { Json::Null },
        "pre_tokenizer": known.to_json(),
        "post_processor": null,
        "decoder": by_bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges,
            "vocab": vocab(tokens, false), "merges": merges,
        },
    }))
}

/// All pairs of tokens that form a token, in the order of the tokens.
fn derived(tokens: &[(u32, &str)], by_text: &HashMap<&str, u32>) -> Result<Vec<(u32, u32)>, String> {
    let pairs = tokens.iter().flat_map(|(_, text)| sentence_piece::pairs(text, by_text));
    let pairs: Vec<(u32, u32)> = pairs.take(MOST_MERGES + 1).collect();
    match pairs.len() > MOST_MERGES {
        true => Err(format!("has tokens with more than {MOST_MERGES} pairs")),
        false => Ok(pairs),
    }
}

fn sentence_piece_json(
    metadata: &Metadata,
    tokens: &Tokens<'_>,
    unknown_token: Option<u32>,
    adds_space: bool,
) -> Result<Json, String> {
    let scores: Vec<f64> = match metadata.get(keys::SCORES).and_then(Value::as_array) {
        Some(Array::F32(list)) => list.iter().map(|&score| score.into()).collect(),
        Some(Array::F64(list)) => list.clone(),
        Some(Array::I32(list)) => list.iter().map(|&score| score.into()).collect(),
        _ => return Err(format!("has no numbers `{}`", keys::SCORES)),
    };
    if scores.len() != tokens.texts.len() {
        return Err(format!("has {} tokens and {} scores", tokens.texts.len(), scores.len()));
    }
    let mut normal: Vec<(u32, &str)> = tokens.used().filter(|(id, _)| tokens.kind(*id) == TokenType::Normal).collect();
    if let Some((id, _)) = normal.iter().find(|(id, _)| scores[*id as usize].is_nan()) {
        return Err(format!("has the score NaN for the token {id}"));
    }
    if let Some((id, text)) = normal.iter().find(|(_, text)| text.len() > LONGEST_TOKEN) {
        return Err(format!("has the token {id} of {} bytes; the limit is {LONGEST_TOKEN}", text.len()));
    }
    let by_text: HashMap<&str, u32> = normal.iter().map(|&(id, text)| (text, id)).collect();
    // The highest score first; of equal scores the lower id, as in transformers.
    normal.sort_by(|(a, _), (b, _)| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b)));
    let text = |id: u32| tokens.text(id).unwrap_or_default();
    let pairs = derived(&normal, &by_text)?;
    let merges: Vec<Json> = pairs.into_iter().map(|(left, right)| json!([text(left), text(right)])).collect();
    let (normalizer, decoder) = sentence_piece::sections(adds_space);
    let unknown_text = unknown_token.filter(|&id| tokens.kind(id) != TokenType::Unused).map(text);
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": decoder,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown_text, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab(tokens, true), "merges": merges,
        },
    }))
}

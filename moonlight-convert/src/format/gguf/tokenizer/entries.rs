//! A `tokenizer.json` as metadata.

use std::collections::HashSet;

use moonlight_model::ModelConfig;
use serde_json::Value as Json;

use super::pre::{self, PreTokenizer};
use super::sentence_piece::{self, SpacePrefix};
use super::settings::{self, Affixes, Settings, SpecialIds};
use super::vocabulary::{self, MOST_TOKENS, TokenType, TokenizerJson, Vocabulary};
use super::{TokenizerMetadata, keys};
use crate::format::gguf::{Array, Value};
use crate::printable::printable;
use crate::tokenizer::{AddedToken, SpecialNames};

/// The tokens that llama.cpp takes for BOS and EOS of a byte-level tokenizer without the keys.
const DEFAULT_EOS: u32 = 11;
/// How many tokens a note lists.
const LISTED: usize = 3;

/// Collects the entries and the notes.
#[derive(Default)]
struct Entries {
    list: Vec<(String, Value)>,
    notes: Vec<String>,
}

impl Entries {
    fn put(&mut self, key: &str, value: impl Into<Value>) {
        self.list.push((key.into(), value.into()));
    }
}

/// The metadata of a parsed `tokenizer.json` and the settings next to it.
///
/// # Errors
///
/// The rest of a sentence that begins with the tokenizer.
pub(super) fn metadata(
    mut json: TokenizerJson,
    names: &SpecialNames,
    settings: &Settings,
    model: &ModelConfig,
    from_tiktoken: bool,
) -> Result<TokenizerMetadata, String> {
    if model.vocab_size > MOST_TOKENS {
        return Err(format!("is of a model with a vocabulary of {}; the limit is {MOST_TOKENS}", model.vocab_size));
    }
    let vocabulary = Vocabulary::read(&mut json, names)?;
    let last = vocabulary.tokens.keys().chain(vocabulary.added.keys()).max().copied().unwrap_or_default();
    if last as usize >= model.vocab_size {
        return Err(format!("has the token {last}, but the model has a vocabulary of {}", model.vocab_size));
    }
    let mut entries = Entries::default();
    entries.notes.extend(vocabulary::moved_ids(&json, &vocabulary.added));
    if vocabulary.byte_fallback {
        sentence_piece_entries(&mut entries, &json, &vocabulary, model.vocab_size)?;
    } else {
        byte_level_entries(&mut entries, &json, &vocabulary, model.vocab_size)?;
    }
    note_flags(&mut entries, &vocabulary);
    let affixes = settings::affixes(&json.post_processor)?;
    let ids = SpecialIds::new(settings, names, &vocabulary, model, from_tiktoken);
    special_entries(&mut entries, ids, &affixes, &vocabulary, model.vocab_size);
    template_entries(&mut entries, settings);
    Ok(TokenizerMetadata { entries: entries.list, notes: entries.notes })
}

fn byte_level_entries(
    entries: &mut Entries,
    json: &TokenizerJson,
    vocabulary: &Vocabulary,
    vocab_size: usize,
) -> Result<(), String> {
    let nfc = nfc(&json.normalizer)?;
    let name = if vocabulary.merges.is_empty() && !vocabulary.ignore_merges {
        pre::WITHOUT_MERGES
    } else {
        let known = PreTokenizer::of(&json.pre_tokenizer, vocabulary.ignore_merges, nfc)?;
        entries.notes.extend(known.difference.map(str::to_owned));
        if known.ignore_merges != vocabulary.ignore_merges
            && let not_formed = vocabulary.not_formed()
            && let Some(&first) = not_formed.first()
        {
            let text = vocabulary.text(first).unwrap_or_default();
            entries.notes.push(format!(
                "{} tokens that no merges form, such as `{}`, are treated otherwise by llama.cpp's pre-tokenizer `{}`",
                not_formed.len(),
                printable(text),
                known.names[0]
            ));
        }
        known.names[0]
    };
    if nfc {
        entries.notes.push(
            "llama.cpp does not normalize texts to NFC, as the model's tokenizer does: decomposed accents get other tokens"
                .into(),
        );
    }
    if pre::adds_space(&json.pre_tokenizer) {
        entries.notes.push("llama.cpp does not add a space before a text, as the model's tokenizer does".into());
    }
    let (tokens, types) = tokens(vocabulary, vocab_size, |_, _| TokenType::Normal)?;
    entries.put(keys::MODEL, "gpt2");
    entries.put(keys::PRE, name);
    entries.put(keys::TOKENS, tokens);
    entries.put(keys::TYPES, Value::Array(Array::I32(types.into_iter().map(|kind| kind as i32).collect())));
    let text = |id: u32| vocabulary.tokens.get(&id).map_or("", String::as_str);
    let merges: Vec<String> =
        vocabulary.merges.iter().map(|&[left, right, _]| format!("{} {}", text(left), text(right))).collect();
    if let Some(merge) = merges.iter().find(|merge| merge.matches(' ').count() != 1) {
        return Err(format!("has the merge `{}`, with a space in a token", printable(merge)));
    }
    entries.put(keys::MERGES, merges);
    Ok(())
}

/// Whether a normalizer is NFC; another one is an error.
fn nfc(normalizer: &Json) -> Result<bool, String> {
    let steps = match normalizer["type"].as_str() {
        Some("Sequence") => normalizer["normalizers"].as_array().map(Vec::as_slice).unwrap_or_default(),
        _ if normalizer.is_null() => &[],
        _ => std::slice::from_ref(normalizer),
    };
    match steps.iter().find(|step| step["type"] != "NFC") {
        None => Ok(!steps.is_empty()),
        Some(step) => {
            let kind = printable(step["type"].as_str().unwrap_or_default()).into_owned();
            Err(format!("has the normalizer `{kind}`, which llama.cpp does not have"))
        }
    }
}

fn sentence_piece_entries(
    entries: &mut Entries,
    json: &TokenizerJson,
    vocabulary: &Vocabulary,
    vocab_size: usize,
) -> Result<(), String> {
    let (prefix, splits_words) = SpacePrefix::read(&json.normalizer, &json.pre_tokenizer)?;
    if splits_words && !sentence_piece::no_token_crosses_words(vocabulary) {
        return Err(
            "splits words before pairs are joined, which llama.cpp does not, and has tokens of several words".into()
        );
    }
    entries.notes.extend(prefix.difference().map(str::to_owned));
    let mut bytes: HashSet<u8> = HashSet::new();
    bytes.extend(vocabulary.tokens.values().filter_map(|text| sentence_piece::byte_of(text)));
    if let Some(byte) = (0..=u8::MAX).find(|byte| !bytes.contains(byte)) {
        return Err(format!("has no token for the byte {byte:#04x}"));
    }
    let (scores, equivalent) = sentence_piece::scores(vocabulary);
    if !equivalent || vocabulary.ignore_merges {
        entries.notes.push(
            "llama.cpp joins pairs by the scores of tokens, which do not express the order of this tokenizer's merges \
             exactly: some texts may get other tokens there"
                .into(),
        );
    }
    let kind = |id: u32, text: &str| match text {
        _ if vocabulary.unknown == Some(id) => TokenType::Unknown,
        text if sentence_piece::byte_of(text).is_some() => TokenType::Byte,
        _ => TokenType::Normal,
    };
    let (tokens, types) = tokens(vocabulary, vocab_size, kind)?;
    let scores = types.iter().zip(0..).map(|(kind, id)| match kind {
        TokenType::Normal => scores.get(&id).copied().unwrap_or_else(|| sentence_piece::other_score(*kind)),
        kind => sentence_piece::other_score(*kind),
    });
    let scores = Value::Array(Array::F32(scores.collect()));
    entries.put(keys::MODEL, "llama");
    entries.put(keys::PRE, "default");
    entries.put(keys::TOKENS, tokens);
    entries.put(keys::SCORES, scores);
    entries.put(keys::TYPES, Value::Array(Array::I32(types.into_iter().map(|kind| kind as i32).collect())));
    entries.put(keys::ADD_SPACE, prefix != SpacePrefix::Never);
    Ok(())
}

/// Texts and types of all ids of the model. Ids without a token are `[PADn]`, as in llama.cpp's converter.
fn tokens(
    vocabulary: &Vocabulary,
    vocab_size: usize,
    kind_of: impl Fn(u32, &str) -> TokenType,
) -> Result<(Vec<String>, Vec<TokenType>), String> {
    let mut types = Vec::with_capacity(vocab_size);
    let mut texts: Vec<String> = Vec::with_capacity(vocab_size);
    for id in (0..).take(vocab_size) {
        let (text, kind) = match (vocabulary.added.get(&id), vocabulary.tokens.get(&id)) {
            (Some(AddedToken { content, special: true, .. }), _) => match kind_of(id, content) {
                TokenType::Unknown => (content.clone(), TokenType::Unknown),
                _ => (content.clone(), TokenType::Control),
            },
            // llama.cpp looks for these in the text itself, before spaces are replaced.
            (Some(token), _) if vocabulary.byte_fallback => {
                (sentence_piece::with_spaces(&token.content), TokenType::UserDefined)
            }
            (Some(token), _) => (token.content.clone(), TokenType::UserDefined),
            (None, Some(text)) => (text.clone(), kind_of(id, text)),
            (None, None) => (String::new(), TokenType::Unused),
        };
        texts.push(text);
        types.push(kind);
    }
    // llama.cpp stops the whole program if two tokens have the same text.
    let mut known: HashSet<&str> = HashSet::with_capacity(vocab_size);
    for (text, kind) in texts.iter().zip(&types) {
        if *kind != TokenType::Unused && !known.insert(text) {
            return Err(format!("has two tokens with the text `{}`", printable(text)));
        }
    }
    let names: Vec<(usize, String)> = (0..texts.len())
        .filter(|&id| types[id] == TokenType::Unused)
        .map(|id| {
            let mut name = format!("[PAD{id}]");
            while known.contains(name.as_str()) {
                name.push('_');
            }
            (id, name)
        })
        .collect();
    for (id, name) in names {
        texts[id] = name;
    }
    Ok((texts, types))
}

/// Notes on properties of added tokens that llama.cpp does not have.
fn note_flags(entries: &mut Entries, vocabulary: &Vocabulary) {
    let mut list = |what: &str, has: fn(&AddedToken) -> bool| {
        let texts: Vec<&str> =
            vocabulary.added.values().filter(|token| has(token)).map(|token| token.content.as_str()).collect();
        if !texts.is_empty() {
            let first: Vec<String> = texts.iter().take(LISTED).map(|text| format!("`{}`", printable(text))).collect();
            let more = if texts.len() > LISTED { format!(" and {} more", texts.len() - LISTED) } else { String::new() };
            entries.notes.push(format!("llama.cpp {what} {}{more}", first.join(", ")));
        }
    };
    list("does not remove the white space that belongs to", |token| token.lstrip || token.rstrip);
    list("also finds within words the added tokens", |token| token.single_word);
}

fn special_entries(
    entries: &mut Entries,
    mut ids: SpecialIds,
    affixes: &Affixes,
    vocabulary: &Vocabulary,
    vocab_size: usize,
) {
    let in_range = |id: &u32| (*id as usize) < vocab_size;
    let text = |id: u32| printable(vocabulary.text(id).unwrap_or_default()).into_owned();
    // What is added to a text is exactly the token of the key, whatever the files call BOS and EOS.
    let mut replace = |added: &[u32], id: &mut Option<u32>, name: &str| {
        let &token = added.first().filter(|&&token| *id != Some(token))?;
        let other = id.replace(token)?;
        let (token, other_text) = (text(token), text(other));
        entries.notes.push(format!("{name} is `{token}`, which is added to texts, and not `{other_text}`"));
        Some(other)
    };
    replace(&affixes.prefix, &mut ids.bos, "BOS");
    let named_eos = replace(&affixes.suffix, &mut ids.eos, "EOS");
    ids.more_ends.retain(|&end| Some(end) != ids.eos && Some(end) != named_eos);
    ids.more_ends.splice(0..0, named_eos);
    if ids.eos.is_none() && !vocabulary.byte_fallback && vocab_size > DEFAULT_EOS as usize {
        entries.notes.push(format!(
            "the model names no EOS, so that llama.cpp ends texts at its default, the token {DEFAULT_EOS} (`{}`)",
            text(DEFAULT_EOS)
        ));
    }
    for (key, id) in [(keys::BOS, ids.bos), (keys::EOS, ids.eos), (keys::UNKNOWN, ids.unknown), (keys::PAD, ids.pad)] {
        if let Some(id) = id.filter(in_range) {
            entries.put(key, id);
        }
    }
    let mut ends = ids.more_ends.into_iter().filter(in_range);
    for key in [keys::EOT, keys::EOM] {
        if let Some(id) = ends.next() {
            entries.put(key, id);
        }
    }
    let rest: Vec<String> = ends.map(|id| format!("`{}`", text(id))).collect();
    if !rest.is_empty() {
        entries
            .notes
            .push(format!("a GGUF file has room for three tokens that end a text; left out: {}", rest.join(", ")));
    }
    // Always written, because llama.cpp's defaults depend on the kind of tokenizer.
    entries.put(keys::ADD_BOS, !affixes.prefix.is_empty());
    entries.put(keys::ADD_EOS, !affixes.suffix.is_empty());
}

fn template_entries(entries: &mut Entries, settings: &Settings) {
    let mut names = Vec::new();
    for (name, text) in &settings.named_templates {
        let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        if !names.contains(&name) {
            entries.put(&format!("{}.{name}", keys::TEMPLATE), text.as_str());
            names.push(name);
        }
    }
    if !names.is_empty() {
        entries.put(keys::TEMPLATES, names);
    }
    if let Some(text) = &settings.template {
        entries.put(keys::TEMPLATE, text.as_str());
    }
}

//! The 256 bytes and three specials, as a tokenizer that transformers opens too.

use moonlight_convert::tokenizer::{TOKENIZER_JSON, byte_to_char};
use serde_json::{Map, Value, json};

use super::Companion;

/// Begins a text, where a model wants that.
pub const BOS: u32 = 256;
/// Ends a document.
pub const EOS: u32 = 257;
/// Fills a row; never predicted, never looked at.
pub const PAD: u32 = 258;
/// 256 bytes and the specials.
pub(super) const VOCAB_SIZE: usize = 259;

const SPECIALS: [(u32, &str); 3] = [(BOS, "<|bos|>"), (EOS, "<|eos|>"), (PAD, "<|pad|>")];

/// The bytes of the tokens; specials and ids that there are not have none.
pub(super) fn bytes(tokens: &[u32]) -> Vec<u8> {
    tokens.iter().filter_map(|&token| u8::try_from(token).ok()).collect()
}

/// The id of a special token.
pub(super) fn special(text: &str) -> Option<u32> {
    SPECIALS.iter().find(|(_, name)| *name == text).map(|(id, _)| *id)
}

pub(super) fn specials() -> Vec<(String, u32)> {
    SPECIALS.iter().map(|&(id, name)| (name.to_owned(), id)).collect()
}

/// `tokenizer.json` (byte-level BPE without merges, so that every byte is its own token) and `tokenizer_config.json`.
pub(super) fn companions() -> Vec<Companion> {
    let file = |name: &str, value: &Value| Companion {
        name: name.into(),
        // Pretty printing of plain values cannot fail.
        contents: serde_json::to_vec_pretty(value).unwrap_or_default(),
    };
    vec![file(TOKENIZER_JSON, &tokenizer_json()), file("tokenizer_config.json", &tokenizer_config())]
}

fn tokenizer_json() -> Value {
    let mut vocab = Map::new();
    for byte in 0..=u8::MAX {
        vocab.insert(byte_to_char(byte).into(), byte.into());
    }
    let added: Vec<Value> = SPECIALS
        .iter()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []},
    })
}

fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>",
        "pad_token": "<|pad|>", "clean_up_tokenization_spaces": false, "add_prefix_space": false,
        "model_input_names": ["input_ids", "attention_mask"],
    })
}

//! The built-in tokenizers `bytes` and `bytes-chat`: 256 bytes and three special tokens. They are saved as files that
//! transformers can open.
//!
//! In `bytes-chat` five of the bytes that never occur in UTF-8 (0xF5 to 0xF9) are the special tokens of Moonlight's chat
//! template. All other tokens are those of `bytes`, so that a model that was pre-trained with `bytes` can be fine-tuned to
//! chat with `bytes-chat`.

use moonlight_convert::tokenizer::{TOKENIZER_JSON, byte_to_char};
use serde_json::{Map, Value, json};

use super::{Piece, TokenizerFile};
use crate::moonlight_template::MOONLIGHT_TEMPLATE;

/// The token that starts a text. It is not added by default.
pub const BOS: u32 = 256;
/// The token that ends a document.
pub const EOS: u32 = 257;
/// Padding.
pub const PAD: u32 = 258;
/// 256 bytes and three special tokens.
pub(super) const VOCAB_SIZE: usize = 259;

const SPECIALS: [(u32, &str); 3] = [(BOS, "<|bos|>"), (EOS, "<|eos|>"), (PAD, "<|pad|>")];
const CHAT_SPECIALS: [(u32, &str); 8] = [
    (0xF5, "<|im_end|>"),
    (0xF6, "<|im_user|>"),
    (0xF7, "<|im_assistant|>"),
    (0xF8, "<|im_system|>"),
    (0xF9, "<|im_middle|>"),
    SPECIALS[0],
    SPECIALS[1],
    SPECIALS[2],
];

/// One of the two tokenizers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ByteTokenizer {
    /// `bytes`.
    Plain,
    /// `bytes-chat`.
    Chat,
}

impl ByteTokenizer {
    /// The special tokens, by id.
    pub(super) fn names(self) -> &'static [(u32, &'static str)] {
        self.table()
    }

    fn table(self) -> &'static [(u32, &'static str)] {
        match self {
            Self::Plain => &SPECIALS,
            Self::Chat => &CHAT_SPECIALS,
        }
    }

    pub(super) fn is_special(self, token: u32) -> bool {
        self.name(token).is_some()
    }

    fn name(self, token: u32) -> Option<&'static str> {
        self.table().iter().find(|(id, _)| *id == token).map(|(_, name)| *name)
    }

    /// The tokens of a text, with special tokens parsed if `parse_special`.
    pub(super) fn encode(self, text: &str, parse_special: bool) -> Vec<u32> {
        let pieces = if parse_special { self.split(text) } else { vec![Piece::Text(text)] };
        let mut tokens = Vec::with_capacity(text.len());
        for piece in pieces {
            match piece {
                Piece::Text(text) => tokens.extend(text.bytes().map(u32::from)),
                Piece::Token(token) => tokens.push(token),
            }
        }
        tokens
    }

    /// Splits a text into its special tokens and the text between them. No special token is a prefix of another, so the first
    /// match is the only one.
    pub(super) fn split(self, text: &str) -> Vec<Piece<'_>> {
        let mut pieces = Vec::new();
        let (mut end, mut at) = (0, 0);
        while let Some(found) = text[at..].find("<|") {
            let start = at + found;
            match self.table().iter().find(|(_, name)| text[start..].starts_with(name)) {
                Some((id, name)) => {
                    if end < start {
                        pieces.push(Piece::Text(&text[end..start]));
                    }
                    pieces.push(Piece::Token(*id));
                    at = start + name.len();
                    end = at;
                }
                // A name may start within the text that was just compared: `<|<|eos|>`.
                None => at = start + 1,
            }
        }
        if end < text.len() {
            pieces.push(Piece::Text(&text[end..]));
        }
        pieces
    }

    /// The bytes of tokens. A special token has the bytes of its name if `with_special`, otherwise none; an unknown token has
    /// none.
    pub(super) fn bytes(self, tokens: &[u32], with_special: bool) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(tokens.len());
        for &token in tokens {
            match self.name(token) {
                Some(name) if with_special => bytes.extend_from_slice(name.as_bytes()),
                Some(_) => {}
                None => bytes.extend(u8::try_from(token)),
            }
        }
        bytes
    }

    /// The id of a special token.
    pub(super) fn special(self, text: &str) -> Option<u32> {
        self.table().iter().find(|(_, name)| *name == text).map(|(id, _)| *id)
    }

    pub(super) fn specials(self) -> Vec<(String, u32)> {
        self.table().iter().map(|&(id, name)| (name.to_owned(), id)).collect()
    }

    /// `tokenizer.json` (byte-level BPE without merges, so that every byte is its own token) and
    /// `tokenizer_config.json`, for `bytes-chat` with Moonlight's chat template.
    pub(super) fn files(self) -> Vec<TokenizerFile> {
        let file = |name: &str, value: &Value| TokenizerFile {
            name: name.into(),
            // Serializing a `Value` does not fail.
            contents: serde_json::to_vec_pretty(value).unwrap_or_default(),
        };
        let mut config = tokenizer_config();
        if self == Self::Chat {
            config["chat_template"] = MOONLIGHT_TEMPLATE.into();
        }
        vec![file(TOKENIZER_JSON, &self.tokenizer_json()), file("tokenizer_config.json", &config)]
    }

    fn tokenizer_json(self) -> Value {
        let mut vocab = Map::new();
        for byte in 0..=u8::MAX {
            let special = self.table().iter().find(|(id, _)| *id == u32::from(byte));
            let name = special.map_or_else(|| byte_to_char(byte).into(), |(_, name)| (*name).to_owned());
            vocab.insert(name, byte.into());
        }
        let added: Vec<Value> = self
            .table()
            .iter()
            .map(|(id, content)| {
                json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true})
            })
            .collect();
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
            // Without merges, splitting a text into words (`use_regex`) would not change the tokens.
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": []},
        })
    }
}

fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>",
        "pad_token": "<|pad|>", "clean_up_tokenization_spaces": false, "add_prefix_space": false,
        "model_input_names": ["input_ids", "attention_mask"],
    })
}

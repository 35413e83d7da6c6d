//! Converting Moonlight's `tiktoken.model` to an equivalent `tokenizer.json`.
//!
//! The published repositories contain ranks for tiktoken and Python code, but no `tokenizer.json`, which transformers'
//! fast tokenizers, vLLM, SGLang and the `tokenizers` crate read without running that code. [`write_tokenizer_json`]
//! writes one:
//!
//! | tiktoken | `tokenizer.json` |
//! |---|---|
//! | bytes | GPT-2's [byte alphabet](byte_to_char) |
//! | ranks | the vocabulary, and [merges] recovered from them |
//! | a piece that is a token as a whole becomes that token | `ignore_merges` |
//! | the [`pattern`] | `Split`, with each match as a piece |
//! | special tokens | `added_tokens`, with the names in `tokenizer_config.json`, each special or not as declared there |
//! | `add_bos_token`, `add_eos_token` | a `TemplateProcessing` |
//!
//! One thing has no counterpart: the published code splits a text every 400,000 characters, and in runs of more than
//! 25,000 characters with or without white space, and encodes the parts separately. Texts that are not split in this way
//! have equal tokens.

mod alphabet;
mod json;
pub mod merges;
mod ranks;
mod special;

pub use alphabet::byte_to_char;
pub use json::{BosEos, tokenizer_json, write_tokenizer_json};
pub use ranks::{Ranks, TokenRankError};
pub use special::{AddedToken, SPECIAL_COUNT, SpecialNames, special_tokens};

/// The file name of tiktoken's ranks.
pub const TIKTOKEN_MODEL: &str = "tiktoken.model";
/// The file name of Hugging Face's `tokenizers`.
pub const TOKENIZER_JSON: &str = "tokenizer.json";

/// The patterns that split a text into pieces before pairs are merged; `tokenization_moonshot.py` joins the eight by
/// `|`.
const PATTERNS: [&str; 8] = [
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
];

/// The regular expression whose matches are the pieces of a text. It needs class intersection and look-ahead, which
/// `fancy-regex` and `onig` support with equal results.
pub fn pattern() -> String {
    PATTERNS.join("|")
}

//! Moonlight's `tiktoken.model`, and the `tokenizer.json` that means the same.
//!
//! The published repositories hold ranks for tiktoken and Python code bos_eos them; nobody publishes a `tokenizer.json`,
//! which is what transformers' fast tokenizers, vLLM, SGLang and the `tokenizers` crate read without running that code.
//! [`write_tokenizer_json`] makes one:
//!
//! | of tiktoken | in `tokenizer.json` |
//! |---|---|
//! | bytes | GPT-2's [alphabet](byte_to_char) |
//! | ranks | vocabulary, and [merges] recovered from them |
//! | a piece that is a token as a whole is that token | `ignore_merges` |
//! | the [`pattern`] | `Split`, each match a piece |
//! | special tokens | `added_tokens`, by the names of `tokenizer_config.json`, each special or not as it says |
//! | `add_bos_token`, `add_eos_token` | a `TemplateProcessing` |
//!
//! What has no counterpart: the published code cuts a text every 400,000 characters and in runs of more than 25,000
//! characters of (or without) white space, and encodes the parts for themselves. Without such lengths the tokens are the
//! same.

mod alphabet;
mod json;
pub mod merges;
mod ranks;
mod special;

pub use alphabet::byte_to_char;
pub use json::{BosEos, tokenizer_json, write_tokenizer_json};
pub use ranks::{Ranks, TokenRankError};
pub use special::{AddedToken, SPECIAL_COUNT, SpecialNames, special_tokens};

/// The ranks' file name.
pub const TIKTOKEN_MODEL: &str = "tiktoken.model";
/// The file name of Hugging Face's `tokenizers`.
pub const TOKENIZER_JSON: &str = "tokenizer.json";

/// How text falls into pieces before pairs are merged; `tokenization_moonshot.py` joins the eight by `|`.
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

/// The regular expression whose matches are the pieces of a text. Needs class intersection and look-ahead:
/// `fancy-regex` and `onig` have both, with the same matches.
pub fn pattern() -> String {
    PATTERNS.join("|")
}

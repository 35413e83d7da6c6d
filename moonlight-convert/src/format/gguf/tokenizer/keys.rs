//! The keys of a tokenizer.

pub(super) const MODEL: &str = "tokenizer.ggml.model";
pub(super) const PRE: &str = "tokenizer.ggml.pre";
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
pub(super) const TYPES: &str = "tokenizer.ggml.token_type";
pub(super) const SCORES: &str = "tokenizer.ggml.scores";
pub(super) const MERGES: &str = "tokenizer.ggml.merges";
pub(super) const BOS: &str = "tokenizer.ggml.bos_token_id";
pub(super) const EOS: &str = "tokenizer.ggml.eos_token_id";
/// The token that ends a turn.
pub(super) const EOT: &str = "tokenizer.ggml.eot_token_id";
/// The token that ends a message.
pub(super) const EOM: &str = "tokenizer.ggml.eom_token_id";
pub(super) const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
pub(super) const PAD: &str = "tokenizer.ggml.padding_token_id";
pub(super) const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
pub(super) const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
pub(super) const ADD_SEPARATOR: &str = "tokenizer.ggml.add_sep_token";
pub(super) const ADD_SPACE: &str = "tokenizer.ggml.add_space_prefix";
pub(super) const REMOVE_SPACES: &str = "tokenizer.ggml.remove_extra_whitespaces";
pub(super) const CHARACTERS: &str = "tokenizer.ggml.precompiled_charsmap";
pub(super) const TEMPLATE: &str = "tokenizer.chat_template";
/// The names of templates other than the default.
pub(super) const TEMPLATES: &str = "tokenizer.chat_templates";
/// The beginning of the keys of a tokenizer.
pub(super) const PREFIX: &str = "tokenizer.";

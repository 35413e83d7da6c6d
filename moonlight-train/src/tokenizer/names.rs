//! What `tokenizer_config.json` and `config.json` say of special tokens.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

/// The names and ids that were found; all of them may be absent.
#[derive(Debug, Default)]
pub(super) struct SpecialNames {
    /// `bos_token` of `tokenizer_config.json`.
    pub(super) bos: Option<String>,
    /// `eos_token` of `tokenizer_config.json`.
    pub(super) eos: Option<String>,
    /// `bos_token_id` of `config.json`.
    pub(super) bos_id: Option<u32>,
    /// `eos_token_id` of `config.json`, the first of a list.
    pub(super) eos_id: Option<u32>,
    /// `added_tokens_decoder` of `tokenizer_config.json`.
    pub(super) added: BTreeMap<u32, String>,
}

impl SpecialNames {
    /// Reads the files beside a tokenizer; one that is absent or not JSON says nothing.
    pub(super) fn beside(path: &Path) -> Self {
        let json = |name: &str| -> Value {
            let text = std::fs::read_to_string(path.with_file_name(name)).unwrap_or_default();
            serde_json::from_str(&text).unwrap_or(Value::Null)
        };
        let config = json("tokenizer_config.json");
        let map = json("special_tokens_map.json");
        let model = json("config.json");
        let name = |key: &str| text_of(&config[key]).or_else(|| text_of(&map[key]));
        let id = |key: &str| {
            let value = &model[key];
            value.as_u64().or_else(|| value.get(0)?.as_u64()).and_then(|id| u32::try_from(id).ok())
        };
        let added = config["added_tokens_decoder"]
            .as_object()
            .map(|tokens| tokens.iter().filter_map(|(id, token)| Some((id.parse().ok()?, text_of(token)?))).collect());
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

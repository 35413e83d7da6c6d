//! Parsers of untrusted bytes, for fuzzing: for any bytes, each returns a value or an error, quickly and in little
//! memory. Not part of the library's interface. [`crate::tokenizer::Ranks::parse`] and
//! [`crate::adapter::read_adapter_config`] are further targets.

use std::path::PathBuf;

use crate::format::index::Index;
use crate::format::shard;
use crate::tokenizer::{BosEos, Ranks, SpecialNames, special_tokens, tokenizer_json};

/// The number of tensors in a safetensors header that is followed by `held` bytes.
pub fn safetensors_header(header: &[u8], held: u64) -> Result<usize, String> {
    shard::read_header(header, held).map(|(tensors, _)| tensors.len())
}

/// The number of tensors in an index of shards.
pub fn index(text: &[u8]) -> Result<usize, String> {
    Index::parse(text, PathBuf::from("index")).map(|index| index.weight_map.len()).map_err(|error| error.to_string())
}

/// The length of the `tokenizer.json` made from a `tiktoken.model` and a `tokenizer_config.json`.
pub fn tiktoken(ranks: &[u8], config: &[u8]) -> Result<usize, String> {
    let ranks = Ranks::parse(ranks).map_err(|error| error.to_string())?;
    let names = SpecialNames::parse([Some(config); 4]).map_err(|(_, problem)| problem)?;
    let special = special_tokens(ranks.count(), &names.added)?;
    tokenizer_json(&ranks, &special, &BosEos::new(&names, &special)?).map(|json| json.to_string().len())
}

/// The number of checkpoint files in the Hub's list of a repository.
#[cfg(feature = "download")]
pub fn hub_list(answer: &[u8]) -> Result<usize, String> {
    crate::hub::parse_list(answer)
}

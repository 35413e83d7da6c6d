//! Readers of what others made, from bytes: each gives what it found or the rest of a sentence, soon and in little memory,
//! whatever the bytes are. No part of the library's interface; [`crate::tokenizer::Ranks::parse`] and
//! [`crate::adapter::read_adapter_config`] are others.

use std::path::PathBuf;

use crate::format::index::Index;
use crate::format::shard;
use crate::tokenizer::{BosEos, Ranks, SpecialNames, special_tokens, tokenizer_json};

/// A header of a safetensors file, which `held` bytes follow: how many tensors it has.
pub fn safetensors_header(header: &[u8], held: u64) -> Result<usize, String> {
    shard::read_header(header, held).map(|(tensors, _)| tensors.len())
}

/// An index of shards: how many tensors it has.
pub fn index(text: &[u8]) -> Result<usize, String> {
    Index::parse(text, PathBuf::from("index")).map(|index| index.weight_map.len()).map_err(|error| error.to_string())
}

/// A `tiktoken.model` and the `tokenizer_config.json` beside it: the length of the `tokenizer.json` that they make.
pub fn tiktoken(ranks: &[u8], config: &[u8]) -> Result<usize, String> {
    let ranks = Ranks::parse(ranks).map_err(|error| error.to_string())?;
    let names = SpecialNames::parse([Some(config); 4]).map_err(|(_, problem)| problem)?;
    let special = special_tokens(ranks.count(), &names.added)?;
    tokenizer_json(&ranks, &special, &BosEos::new(&names, &special)?).map(|json| json.to_string().len())
}

/// The Hub's list of a repository's files: how many of them a checkpoint is made of.
#[cfg(feature = "download")]
pub fn hub_list(answer: &[u8]) -> Result<usize, String> {
    crate::hub::parse_list(answer)
}

//! The files that a checkpoint is made of: safetensors shards and their index, Burn's burnpack, and what lies beside the
//! weights.

pub(crate) mod burnpack;
pub(crate) mod index;
pub(crate) mod shard;
pub(crate) mod sidecars;

//! The files of a checkpoint: safetensors shards and their index, also with packed integers, Burn's burnpack, llama.cpp's GGUF,
//! and the sidecars (tokenizer, configs). To add a format:
//!
//! 1. `format/NAME.rs`: its header, read into [`TensorEntry`](tensor_entry::TensorEntry)s and laid out for writing.
//! 2. `format/shard.rs`, `checkpoint.rs`: open such a file, and find it in a directory.
//! 3. `mapping/names.rs`, `mapping/load_plan.rs`: the names of its tensors, and the orientation of its matrices.
//! 4. `io/writer.rs`, `save.rs`: a constructor of `Output`, and a variant of `Format`.
//! 5. `format/sidecars.rs`, `report/summary.rs`: that the file belongs to a checkpoint, and the name in reports.
//! 6. `cli/convert.rs`: the value of `--format`.
//!
//! A read-only format needs 1 to 3 and 5, a write-only one 1 and 4 to 6.

pub(crate) mod burnpack;
pub mod gguf;
pub(crate) mod index;
pub(crate) mod pack_quantized;
pub(crate) mod shard;
pub(crate) mod sidecars;
pub(crate) mod tensor_entry;

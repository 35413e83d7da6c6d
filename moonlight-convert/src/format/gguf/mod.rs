//! GGUF, the file format of llama.cpp: metadata with tokenizer and template, and tensors in blocks.
//!
//! The container is described at <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Versions 2 and 3, which
//! are the same byte for byte in little-endian files, are read; version 3 is written.

pub mod adapter;
mod block;
pub(crate) mod dequantize;
mod header;
pub(crate) mod metadata;
mod mixture;
pub(crate) mod names;
pub(crate) mod quantize;
mod quantize_k;
pub(crate) mod read;
pub mod tokenizer;
mod value;
mod write;

pub use block::BlockType;
pub use header::{GgufHeader, TensorInfo, write_header};
pub use read::{gguf_file, is_gguf, read_header, sidecar_files};
pub use value::{Array, Metadata, Value};
pub use write::{GgufOptions, GgufReport};

//! A tensor as the header of a file of weights describes it.

use std::ops::Range;

use safetensors::Dtype;

/// One tensor of a safetensors or burnpack file.
#[derive(Debug)]
pub(crate) struct TensorEntry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Bytes after the header; in a burnpack file, from the beginning of the file.
    pub(crate) range: Range<usize>,
}

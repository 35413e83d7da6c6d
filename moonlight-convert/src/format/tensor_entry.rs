//! A tensor as described in the header of a weight file.

use std::ops::Range;

use safetensors::Dtype;

/// A tensor of a safetensors or burnpack file.
#[derive(Debug)]
pub(crate) struct TensorEntry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Byte range in the data section; in a burnpack file, in the whole file.
    pub(crate) range: Range<usize>,
}

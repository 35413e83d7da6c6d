//! A tensor as described in the header of a weight file.

use std::fmt;
use std::ops::Range;

use safetensors::Dtype;

use crate::dtype::conversion::WeightDtype;
use crate::format::gguf::BlockType;

/// A tensor of a weight file.
#[derive(Debug)]
pub(crate) struct TensorEntry {
    pub(crate) name: String,
    pub(crate) dtype: StoredDtype,
    pub(crate) shape: Vec<usize>,
    /// Byte range in the data section; in a burnpack file, in the whole file.
    pub(crate) range: Range<usize>,
}

/// How the values of a stored tensor are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDtype {
    /// One number after the other, in a dtype of safetensors.
    Plain(Dtype),
    /// The blocks of a quantized tensor in a GGUF file.
    Blocks(BlockType),
}

impl StoredDtype {
    /// The dtype in the terms of safetensors; `None` for the blocks of a GGUF file.
    pub fn safetensors(self) -> Option<Dtype> {
        match self {
            Self::Plain(dtype) => Some(dtype),
            Self::Blocks(_) => None,
        }
    }

    /// The dtype of unquantized weights; `None` for anything else.
    pub(crate) fn weight_dtype(self) -> Option<WeightDtype> {
        match self {
            Self::Plain(dtype) => WeightDtype::from_safetensors(dtype),
            Self::Blocks(_) => None,
        }
    }

    /// The type in a GGUF file; `None` for a dtype that only other formats have.
    pub(crate) fn block_type(self) -> Option<BlockType> {
        match self {
            Self::Plain(Dtype::F32) => Some(BlockType::F32),
            Self::Plain(Dtype::F16) => Some(BlockType::F16),
            Self::Plain(Dtype::BF16) => Some(BlockType::Bf16),
            Self::Plain(_) => None,
            Self::Blocks(block_type) => Some(block_type),
        }
    }
}

impl From<Dtype> for StoredDtype {
    fn from(dtype: Dtype) -> Self {
        Self::Plain(dtype)
    }
}

impl From<BlockType> for StoredDtype {
    fn from(block_type: BlockType) -> Self {
        match block_type {
            BlockType::F32 => Self::Plain(Dtype::F32),
            BlockType::F16 => Self::Plain(Dtype::F16),
            BlockType::Bf16 => Self::Plain(Dtype::BF16),
            quantized => Self::Blocks(quantized),
        }
    }
}

impl PartialEq<Dtype> for StoredDtype {
    fn eq(&self, dtype: &Dtype) -> bool {
        *self == Self::Plain(*dtype)
    }
}

impl fmt::Display for StoredDtype {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => dtype.fmt(formatter),
            Self::Blocks(block_type) => block_type.fmt(formatter),
        }
    }
}

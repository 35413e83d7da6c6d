//! The types of a tensor's values: plain numbers, and blocks of quantized ones.

use std::fmt;

/// How the values of a tensor are stored, one of ggml's types. A row consists of complete blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BlockType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// 4 bits a value; 32 values share a scale.
    Q4_0,
    /// 4 bits a value; 32 values share a scale and a minimum.
    Q4_1,
    /// 5 bits a value; 32 values share a scale.
    Q5_0,
    /// 5 bits a value; 32 values share a scale and a minimum.
    Q5_1,
    /// 8 bits a value; 32 values share a scale.
    Q8_0,
    /// 4 bits a value; 32 values share a scale and a minimum of 6 bits each, 256 values the scales of those.
    Q4K,
    /// 5 bits a value, otherwise as [`Q4K`](Self::Q4K).
    Q5K,
    /// 6 bits a value; 16 values share a scale of 8 bits, 256 values the scale of those.
    Q6K,
    /// bfloat16.
    Bf16,
}

impl BlockType {
    /// Every supported type.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Bf16,
    ];

    /// The number that stands for the type in a file.
    pub fn code(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Bf16 => 30,
        }
    }

    /// The type with this number.
    ///
    /// # Errors
    ///
    /// The name of a type that is not supported, or its number if it has no name.
    pub fn from_code(code: u32) -> Result<Self, String> {
        Self::ALL.into_iter().find(|block_type| block_type.code() == code).ok_or_else(|| {
            unsupported_name(code).map_or_else(|| format!("the unknown type {code}"), |name| name.to_owned())
        })
    }

    /// Number of values in a block.
    pub fn values(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Number of bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 2 + 16,
            Self::Q4_1 => 4 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 4 + 4 + 16,
            Self::Q8_0 => 2 + 32,
            Self::Q4K => 4 + 12 + 128,
            Self::Q5K => 4 + 12 + 32 + 128,
            Self::Q6K => 128 + 64 + 16 + 2,
        }
    }

    /// Whether the values are quantized, with scales.
    pub fn is_quantized(self) -> bool {
        self.values() > 1
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Bf16 => "BF16",
        })
    }
}

/// The names of ggml's other types (`enum ggml_type`), for messages.
fn unsupported_name(code: u32) -> Option<&'static str> {
    Some(match code {
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        40 => "NVFP4",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_known_by_number_and_others_by_name() {
        for block_type in BlockType::ALL {
            assert_eq!(BlockType::from_code(block_type.code()), Ok(block_type));
            assert_eq!(unsupported_name(block_type.code()), None);
        }
        let known: Vec<u32> = (0..100).filter(|code| BlockType::from_code(*code).is_ok()).collect();
        assert_eq!(known, [0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30]);
        assert_eq!(BlockType::from_code(16).unwrap_err(), "IQ2_XXS");
        assert_eq!(BlockType::from_code(999).unwrap_err(), "the unknown type 999");
    }
}

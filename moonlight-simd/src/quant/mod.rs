//! Products by weights of 8 or 4 bits, computed in integers.
//!
//! A weight matrix `[input, output]` is quantized in blocks of [`BLOCK`] consecutive inputs of one output: `w = (value - zero) *
//! scale`, as in GGUF's `Q8_0` and `Q4_0` and in `pack-quantized` checkpoints of compressed-tensors with groups of 32. The rows that
//! it is multiplied by are quantized to 8 bits in the same blocks ([`QuantizedRows`]), so a block's part of a product is an integer
//! sum, which is exact, times the two scales.
//!
//! # Order of the values in memory
//!
//! The values of [`TILE`] outputs and one block of inputs are stored together, in the order in which an instruction such as
//! `vpdpbusd` reads them: for each 4 inputs the outputs one after the other, for each output its 4 inputs. With 4 bits a byte has an
//! input of the first half of the block in its low half, and the same input of the second half in its high half. All blocks of a tile
//! follow one another, then the next tile. The scales are in a second array: for each tile and block those of the 16 outputs. Outputs
//! and inputs that fill the last tile and block have the scale 0 and the value of 0.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dequantize;
mod kernel;
#[cfg(target_arch = "aarch64")]
mod neon;
mod rows;
mod scale;
#[cfg(test)]
mod tests;
mod write;

pub use dequantize::PanelValue;
pub use rows::QuantizedRows;
pub use scale::quantize_block;
pub use write::{CodeOrder, MatrixWriter, quantize_tiles};

use half::{bf16, f16};

/// Consecutive inputs that share a scale.
pub const BLOCK: usize = 32;
/// Outputs that are stored together.
pub const TILE: usize = 16;

/// The number of bits of a quantized value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bits {
    /// Integers from -127 to 127, stored with a zero point of 128.
    Eight,
    /// Integers from -8 to 7, stored with a zero point of 8.
    Four,
}

impl Bits {
    /// The stored value of 0.
    pub const fn zero(self) -> u8 {
        match self {
            Self::Eight => 128,
            Self::Four => 8,
        }
    }

    /// Bytes of the values of one tile and block.
    pub const fn tile_bytes(self) -> usize {
        match self {
            Self::Eight => TILE * BLOCK,
            Self::Four => TILE * BLOCK / 2,
        }
    }
}

/// The type of the scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleType {
    /// As in GGUF.
    F16,
    /// As in most checkpoints.
    Bf16,
}

impl ScaleType {
    /// The value of stored bits.
    #[inline(always)]
    pub fn widen(self, bits: u16) -> f32 {
        match self {
            Self::F16 => f16::from_bits(bits).to_f32(),
            Self::Bf16 => f32::from_bits(u32::from(bits) << 16),
        }
    }

    /// The bits of the nearest value.
    pub fn narrow(self, scale: f32) -> u16 {
        match self {
            Self::F16 => f16::from_f32(scale).to_bits(),
            Self::Bf16 => bf16::from_f32(scale).to_bits(),
        }
    }
}

/// The shape of a quantized matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Bits of a value.
    pub bits: Bits,
    /// Width of the input.
    pub input: usize,
    /// Width of the output.
    pub output: usize,
}

impl Shape {
    /// Blocks of each output; the last may be filled.
    pub const fn blocks(self) -> usize {
        self.input.div_ceil(BLOCK)
    }

    /// Tiles of 16 outputs; the last may be filled.
    pub const fn tiles(self) -> usize {
        self.output.div_ceil(TILE)
    }

    /// Bytes of all values.
    pub const fn value_bytes(self) -> usize {
        self.tiles() * self.blocks() * self.bits.tile_bytes()
    }

    /// Number of scales.
    pub const fn scales(self) -> usize {
        self.tiles() * self.blocks() * TILE
    }

    /// The place of a scale.
    #[inline]
    pub const fn scale_at(self, output: usize, block: usize) -> usize {
        (output / TILE * self.blocks() + block) * TILE + output % TILE
    }

    /// The byte that has a value, and whether the value is in its high half (only with 4 bits).
    #[inline]
    pub const fn value_at(self, output: usize, input: usize) -> (usize, bool) {
        let (tile, lane, block, within) = (output / TILE, output % TILE, input / BLOCK, input % BLOCK);
        let (within, high) = match self.bits {
            Bits::Eight => (within, false),
            Bits::Four => (within % (BLOCK / 2), within >= BLOCK / 2),
        };
        let start = (tile * self.blocks() + block) * self.bits.tile_bytes();
        (start + within / 4 * (4 * TILE) + lane * 4 + within % 4, high)
    }
}

/// A quantized matrix in memory.
#[derive(Debug, Clone, Copy)]
pub struct QuantizedMatrix<'a> {
    shape: Shape,
    scale_type: ScaleType,
    values: &'a [u8],
    scales: &'a [u16],
}

impl<'a> QuantizedMatrix<'a> {
    /// A view of values and scales.
    ///
    /// # Panics
    ///
    /// If their numbers are not those of the shape.
    pub fn new(shape: Shape, scale_type: ScaleType, values: &'a [u8], scales: &'a [u16]) -> Self {
        assert_eq!(values.len(), shape.value_bytes(), "the bytes of the values must fit the shape");
        assert_eq!(scales.len(), shape.scales(), "the number of scales must fit the shape");
        Self { shape, scale_type, values, scales }
    }

    /// The shape.
    pub fn shape(self) -> Shape {
        self.shape
    }

    /// One weight: `(value - zero) * scale`. Slow: for tests and single values.
    pub fn get(self, input: usize, output: usize) -> f32 {
        let (byte, high) = self.shape.value_at(output, input);
        let byte = self.values[byte];
        let value = match (self.shape.bits, high) {
            (Bits::Eight, _) => byte,
            (Bits::Four, false) => byte & 15,
            (Bits::Four, true) => byte >> 4,
        };
        let scale = self.scale_type.widen(self.scales[self.shape.scale_at(output, input / BLOCK)]);
        (f32::from(value) - f32::from(self.shape.bits.zero())) * scale
    }
}

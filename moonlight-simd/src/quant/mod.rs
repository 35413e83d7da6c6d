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
mod codes;
mod kernel;
mod rows;
#[cfg(test)]
mod tests;

pub use codes::CodeOrder;
pub use rows::QuantizedRows;

use std::ops::Range;

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

    /// Dequantizes a panel: the inputs of some blocks and the outputs of some tiles, `[32 * blocks, 16 * tiles]`, from the start of
    /// `panel`. Inputs and outputs that fill the last block and tile are 0.
    ///
    /// # Panics
    ///
    /// If a range exceeds what there is, or `panel` is too short.
    pub fn dequantize(self, tiles: Range<usize>, blocks: Range<usize>, panel: &mut [f32]) {
        let all = self.shape.blocks();
        assert!(tiles.end <= self.shape.tiles() && blocks.end <= all, "tiles and blocks must exist");
        let (size, width) = (self.shape.bits.tile_bytes(), tiles.len() * TILE);
        for (column, tile) in tiles.enumerate() {
            for (row, block) in blocks.clone().enumerate() {
                let at = tile * all + block;
                let mut scales = [0.0; TILE];
                for (scale, &bits) in scales.iter_mut().zip(&self.scales[at * TILE..][..TILE]) {
                    *scale = self.scale_type.widen(bits);
                }
                let panel = &mut panel[row * BLOCK * width + column * TILE..];
                dequantize_block(self.shape.bits, &self.values[at * size..][..size], &scales, panel, width);
            }
        }
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

crate::by_level! {
    /// Writes the weights of one tile and block to `panel`, `[32, 16]` with rows `width` values apart.
    fn dequantize_block[](bits: Bits, values: &[u8], scales: &[f32; TILE], panel: &mut [f32], width: usize) {
        let zero = i32::from(bits.zero());
        let (mask, halves) = match bits {
            Bits::Eight => (255, 1),
            Bits::Four => (15, 2),
        };
        for (quad, bytes) in values.as_chunks::<{ 4 * TILE }>().0.iter().enumerate() {
            // The 4 bytes of each output as one number, so that all outputs are shifted at once.
            let mut words = [0; TILE];
            for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *word = u32::from_le_bytes(*bytes);
            }
            for half in 0..halves {
                for input in 0..4 {
                    let row = half * (BLOCK / 2) + quad * 4 + input;
                    let target: &mut [f32; TILE] = panel[row * width..].first_chunk_mut().expect("the panel has the row");
                    let shift = 8 * input + 4 * half;
                    for ((target, word), scale) in target.iter_mut().zip(words).zip(scales) {
                        *target = (((word >> shift) & mask) as i32 - zero) as f32 * scale;
                    }
                }
            }
        }
    }
}

/// A quantized matrix while it is written. A writer may be given some tiles only, so that threads can share a matrix.
#[derive(Debug)]
pub struct MatrixWriter<'a> {
    shape: Shape,
    first_tile: usize,
    values: &'a mut [u8],
    scales: &'a mut [u16],
}

impl<'a> MatrixWriter<'a> {
    /// A writer of the tiles from `first_tile` on whose values and scales the slices have. The slices may be uninitialized before in
    /// the sense that every output of these tiles must be written by [`write`](Self::write) or [`fill`](Self::fill).
    ///
    /// # Panics
    ///
    /// If the slices are not those of a number of whole tiles.
    pub fn new(shape: Shape, first_tile: usize, values: &'a mut [u8], scales: &'a mut [u16]) -> Self {
        let tiles = scales.len() / (shape.blocks() * TILE);
        assert_eq!(scales.len(), tiles * shape.blocks() * TILE, "scales are those of whole tiles");
        assert_eq!(
            values.len(),
            tiles * shape.blocks() * shape.bits.tile_bytes(),
            "values are those of the same tiles"
        );
        Self { shape, first_tile, values, scales }
    }

    /// Sets all outputs to 0.
    pub fn fill(&mut self) {
        let zero = match self.shape.bits {
            Bits::Eight => 128,
            Bits::Four => 0x88,
        };
        self.values.fill(zero);
        self.scales.fill(0);
    }

    /// Writes one output: its stored values (with the zero point, 1 a byte), one for each input, and the bits of its scales, one a block.
    ///
    /// # Panics
    ///
    /// If the output is not one of the writer's tiles, or the numbers are not those of the shape.
    pub fn write(&mut self, output: usize, values: &[u8], scales: &[u16]) {
        let Shape { bits, input, .. } = self.shape;
        assert!(values.len() == input && scales.len() == self.shape.blocks(), "one value an input, one scale a block");
        let local = output - self.first_tile * TILE;
        for (block, (values, &scale)) in values.chunks(BLOCK).zip(scales).enumerate() {
            self.scales[self.shape.scale_at(local, block)] = scale;
            let (start, _) = self.shape.value_at(local, block * BLOCK);
            let mut whole = [bits.zero(); BLOCK];
            whole[..values.len()].copy_from_slice(values);
            match bits {
                Bits::Eight => {
                    for (quad, values) in whole.chunks_exact(4).enumerate() {
                        self.values[start + quad * 4 * TILE..][..4].copy_from_slice(values);
                    }
                }
                Bits::Four => {
                    let (low, high) = whole.split_at(BLOCK / 2);
                    for (quad, (low, high)) in low.chunks_exact(4).zip(high.chunks_exact(4)).enumerate() {
                        let target = &mut self.values[start + quad * 4 * TILE..][..4];
                        for ((target, low), high) in target.iter_mut().zip(low).zip(high) {
                            *target = low | high << 4;
                        }
                    }
                }
            }
        }
    }
}

/// Quantizes the tiles from `first_tile` on whose values and scales the slices have, from a matrix `[input, output]`. The slices may
/// be those of some tiles, so that threads can share a matrix.
///
/// # Panics
///
/// If the slices are not those of whole tiles, or the matrix is not that of the shape.
pub fn quantize_tiles(
    weights: &[f32],
    shape: Shape,
    scale_type: ScaleType,
    first_tile: usize,
    values: &mut [u8],
    scales: &mut [u16],
) {
    let Shape { bits, input, output } = shape;
    assert_eq!(weights.len(), input * output, "the matrix must have the shape");
    let mut writer = MatrixWriter::new(shape, first_tile, values, scales);
    writer.fill();
    let tiles = writer.scales.len() / (shape.blocks() * TILE);
    let outputs = first_tile * TILE..output.min((first_tile + tiles) * TILE);
    let mut columns = vec![0.0; TILE * input];
    let (mut codes, mut stored) = (vec![0; input], vec![0; shape.blocks()]);
    for first in outputs.clone().step_by(TILE) {
        let count = TILE.min(outputs.end - first);
        for (index, row) in weights.chunks_exact(output).enumerate() {
            for (lane, &weight) in row[first..first + count].iter().enumerate() {
                columns[lane * input + index] = weight;
            }
        }
        for (lane, column) in columns.chunks_exact(input).take(count).enumerate() {
            let blocks = column.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).zip(&mut stored);
            for ((weights, codes), stored) in blocks {
                *stored = quantize_block(weights, bits, scale_type, codes);
            }
            writer.write(first + lane, &codes, &stored);
        }
    }
}

/// Quantizes a block of up to 32 weights: writes the stored values and returns the scale, rounded to `scale_type`.
///
/// 8 bits: the scale is the largest magnitude divided by 127, as in `Q8_0`. 4 bits: as in `Q4_0`, the value of the largest magnitude
/// becomes -8, so that the range is used whole.
pub fn quantize_block(weights: &[f32], bits: Bits, scale_type: ScaleType, values: &mut [u8]) -> u16 {
    let largest =
        weights.iter().copied().fold(0.0_f32, |most, weight| if weight.abs() > most.abs() { weight } else { most });
    let scale = match bits {
        Bits::Eight => largest.abs() / 127.0,
        Bits::Four => largest / -8.0,
    };
    let stored = scale_type.narrow(scale);
    let scale = scale_type.widen(stored);
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let (zero, least, most) = match bits {
        Bits::Eight => (128.0, 1.0, 255.0),
        Bits::Four => (8.0, 0.0, 15.0),
    };
    for (value, weight) in values.iter_mut().zip(weights) {
        *value = (weight * inverse + zero).round_ties_even().clamp(least, most) as u8;
    }
    stored
}

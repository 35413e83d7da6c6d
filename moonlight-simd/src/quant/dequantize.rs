//! Panels of a quantized matrix as floats, for products with other floats.

use std::ops::Range;

use half::bf16;

use super::{BLOCK, Bits, QuantizedMatrix, TILE};
use crate::round_to_bf16;

/// A type of the values of a panel.
pub trait PanelValue: Copy {
    /// The nearest value, ties to even.
    fn rounded(value: f32) -> Self;
}

impl PanelValue for f32 {
    #[inline(always)]
    fn rounded(value: f32) -> Self {
        value
    }
}

impl PanelValue for bf16 {
    #[inline(always)]
    fn rounded(value: f32) -> Self {
        round_to_bf16(value)
    }
}

impl QuantizedMatrix<'_> {
    /// Dequantizes a panel: the inputs of some blocks and the outputs of some tiles, `[32 * blocks, 16 * tiles]`, from the start of
    /// `panel`. Inputs and outputs that fill the last block and tile are 0.
    ///
    /// # Panics
    ///
    /// If a range exceeds what there is, or `panel` is too short.
    pub fn dequantize<T: PanelValue>(self, tiles: Range<usize>, blocks: Range<usize>, panel: &mut [T]) {
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
}

crate::by_level! {
    /// Writes the weights of one tile and block to `panel`, `[32, 16]` with rows `width` values apart.
    fn dequantize_block[T: PanelValue](bits: Bits, values: &[u8], scales: &[f32; TILE], panel: &mut [T], width: usize) {
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
                    let target: &mut [T; TILE] = panel[row * width..].first_chunk_mut().expect("the panel has the row");
                    let shift = 8 * input + 4 * half;
                    for ((target, word), scale) in target.iter_mut().zip(words).zip(scales) {
                        *target = T::rounded((((word >> shift) & mask) as i32 - zero) as f32 * scale);
                    }
                }
            }
        }
    }
}

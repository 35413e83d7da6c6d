//! Writing the values of files, which are packed in other orders, without unpacking them.

use super::MatrixWriter;
use crate::quant::{BLOCK, Bits, TILE};

/// The order of the values of a block in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodeOrder {
    /// One after the other, without sign (`pack-quantized`): of 4 bits a byte has two neighbors, the first in its low half.
    Sequential,
    /// As ggml: of 4 bits a byte has an input of the first half of the block in its low half, and the same input of the second
    /// half in its high half (`Q4_0`); those of 8 bits are signed (`Q8_0`).
    Ggml,
}

impl Bits {
    /// Bytes of the values of one output and block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Eight => BLOCK,
            Self::Four => BLOCK / 2,
        }
    }
}

impl MatrixWriter<'_> {
    /// Writes a whole block of one output, given as in a file, and the bits of its scale.
    ///
    /// # Panics
    ///
    /// If the output is not one of the writer's tiles, the matrix has no such block, or `codes` has not
    /// [`Bits::block_bytes`] bytes.
    #[inline]
    pub fn write_codes(&mut self, output: usize, block: usize, codes: &[u8], order: CodeOrder, scale: u16) {
        let bits = self.shape.bits;
        let local = output - self.first_tile * TILE;
        assert!(block < self.shape.blocks() && codes.len() == bits.block_bytes(), "one whole block");
        self.scales[self.shape.scale_at(local, block)] = scale;
        let (start, _) = self.shape.value_at(local, block * BLOCK);
        // Of each 4 inputs, the bytes of this output; those of the other 15 are between them.
        let target = &mut self.values[start..start + bits.tile_bytes() - local % TILE * 4];
        let mut write = |quad: usize, bytes: u32| {
            target[quad * 4 * TILE..][..4].copy_from_slice(&bytes.to_le_bytes());
        };
        let word = |at: usize| u32::from_le_bytes([codes[at], codes[at + 1], codes[at + 2], codes[at + 3]]);
        match (bits, order) {
            (Bits::Eight, CodeOrder::Sequential) => (0..8).for_each(|quad| write(quad, word(quad * 4))),
            // Adding the zero point, 128, flips the highest bit.
            (Bits::Eight, CodeOrder::Ggml) => (0..8).for_each(|quad| write(quad, word(quad * 4) ^ 0x8080_8080)),
            // The order is that of a tile.
            (Bits::Four, CodeOrder::Ggml) => (0..4).for_each(|quad| write(quad, word(quad * 4))),
            (Bits::Four, CodeOrder::Sequential) => {
                for pair in 0..2 {
                    let (low, high) = (spread(word(pair * 4)), spread(word(8 + pair * 4)));
                    let both = low | high << 4;
                    write(pair * 2, both as u32);
                    write(pair * 2 + 1, (both >> 32) as u32);
                }
            }
        }
    }
}

/// Each of eight values of 4 bits in a byte of its own, in the same order.
const fn spread(values: u32) -> u64 {
    let values = values as u64;
    let values = (values | values << 16) & 0x0000_ffff_0000_ffff;
    let values = (values | values << 8) & 0x00ff_00ff_00ff_00ff;
    (values | values << 4) & 0x0f0f_0f0f_0f0f_0f0f
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quant::Shape;

    /// The codes of a block in each order, from its stored values.
    fn codes(values: &[u8], bits: Bits, order: CodeOrder) -> Vec<u8> {
        let (low, high) = values.split_at(BLOCK / 2);
        match (bits, order) {
            (Bits::Eight, CodeOrder::Sequential) => values.to_vec(),
            (Bits::Eight, CodeOrder::Ggml) => values.iter().map(|value| value.wrapping_sub(128)).collect(),
            (Bits::Four, CodeOrder::Sequential) => values.chunks(2).map(|pair| pair[0] | pair[1] << 4).collect(),
            (Bits::Four, CodeOrder::Ggml) => low.iter().zip(high).map(|(low, high)| low | high << 4).collect(),
        }
    }

    proptest! {
        #[test]
        fn codes_are_written_as_values(
            output in 1usize..40,
            blocks in 1usize..4,
            eight: bool,
            ggml: bool,
            seed: u64,
        ) {
            let bits = if eight { Bits::Eight } else { Bits::Four };
            let order = if ggml { CodeOrder::Ggml } else { CodeOrder::Sequential };
            let shape = Shape { bits, input: blocks * BLOCK, output };
            let buffers = || (vec![0; shape.value_bytes()], vec![0; shape.scales()]);
            let (mut values, mut scales) = buffers();
            let (mut expected_values, mut expected_scales) = buffers();
            let mut state = seed | 1;
            let mut random = || {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                (state >> 40) as u16
            };
            let mut writer = MatrixWriter::new(shape, 0, &mut values, &mut scales);
            let mut reference = MatrixWriter::new(shape, 0, &mut expected_values, &mut expected_scales);
            writer.fill();
            reference.fill();
            for output in 0..output {
                let most = if eight { 255 } else { 15 };
                let row: Vec<u8> = (0..shape.input).map(|_| (random() & most) as u8).collect();
                let row_scales: Vec<u16> = (0..blocks).map(|_| random()).collect();
                reference.write(output, &row, &row_scales);
                for (block, (values, scale)) in row.chunks(BLOCK).zip(&row_scales).enumerate() {
                    writer.write_codes(output, block, &codes(values, bits, order), order, *scale);
                }
            }
            prop_assert_eq!(values, expected_values);
            prop_assert_eq!(scales, expected_scales);
        }
    }
}

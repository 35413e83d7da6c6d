//! Rows quantized to 8 bits.

use super::BLOCK;

/// Rows of activations, quantized to integers from -127 to 127 in blocks of 32: `x = value * scale`.
///
/// Widths that are not a multiple of 32 are filled with zeros.
#[derive(Debug, Clone, Default)]
pub struct QuantizedRows {
    pub(super) blocks: usize,
    /// `[rows, blocks, 32]`.
    pub(super) values: Vec<i8>,
    /// `[rows, blocks]`.
    pub(super) scales: Vec<f32>,
    /// `[rows, blocks]`: the sum of a block's values.
    pub(super) sums: Vec<i32>,
}

impl QuantizedRows {
    /// Quantizes `rows`, `[rows, width]`.
    ///
    /// # Panics
    ///
    /// If `rows` is not a number of whole rows.
    pub fn new(rows: &[f32], width: usize) -> Self {
        let mut quantized = Self::default();
        quantized.set(rows, width);
        quantized
    }

    /// [`new`](Self::new) into the memory of `self`.
    ///
    /// # Panics
    ///
    /// If `rows` is not a number of whole rows.
    pub fn set(&mut self, rows: &[f32], width: usize) {
        assert!(rows.len().is_multiple_of(width), "rows must be whole");
        self.blocks = width.div_ceil(BLOCK);
        let count = rows.len() / width * self.blocks;
        self.values.clear();
        self.values.resize(count * BLOCK, 0);
        self.scales.clear();
        self.scales.resize(count, 0.0);
        self.sums.clear();
        self.sums.resize(count, 0);
        for (row, x) in rows.chunks_exact(width).enumerate() {
            quantize_row(
                x,
                &mut self.values[row * self.blocks * BLOCK..][..self.blocks * BLOCK],
                &mut self.scales[row * self.blocks..][..self.blocks],
                &mut self.sums[row * self.blocks..][..self.blocks],
            );
        }
    }

    /// All rows of several, one after the other.
    ///
    /// # Panics
    ///
    /// If they differ in width.
    pub fn joined(parts: Vec<Self>) -> Self {
        let mut parts = parts.into_iter();
        let mut all = parts.next().unwrap_or_default();
        for part in parts {
            assert_eq!(part.blocks, all.blocks, "rows must have one width");
            all.values.extend_from_slice(&part.values);
            all.scales.extend_from_slice(&part.scales);
            all.sums.extend_from_slice(&part.sums);
        }
        all
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.scales.len() / self.blocks.max(1)
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.scales.is_empty()
    }

    /// Blocks of a row.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// One value, dequantized. Slow: for tests.
    pub fn get(&self, row: usize, column: usize) -> f32 {
        let block = row * self.blocks + column / BLOCK;
        f32::from(self.values[block * BLOCK + column % BLOCK]) * self.scales[block]
    }
}

crate::by_level! {
    fn quantize_row[](row: &[f32], values: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
        for (((x, values), scale), sum) in
            row.chunks(BLOCK).zip(values.chunks_exact_mut(BLOCK)).zip(scales).zip(sums)
        {
            let mut whole = [0.0_f32; BLOCK];
            whole[..x.len()].copy_from_slice(x);
            // As integers, whose order is that of magnitudes: a maximum of floats is not vectorized.
            let largest = whole.iter().fold(0, |most, x| (x.to_bits() & 0x7fff_ffff).max(most));
            let largest = f32::from_bits(largest);
            // Below this the inverse is infinite; such a block is 0.
            let is_zero = largest < 128.0 * f32::MIN_POSITIVE;
            *scale = if is_zero { 0.0 } else { largest / 127.0 };
            let inverse = if is_zero { 0.0 } else { 127.0 / largest };
            let mut total = 0;
            for (value, x) in values.iter_mut().zip(whole) {
                let integer = (x * inverse).round_ties_even() as i32;
                *value = integer as i8;
                total += integer;
            }
            *sum = total;
        }
    }
}

//! Products of quantized rows and a quantized matrix.

use std::ops::Range;

use super::{BLOCK, Bits, QuantizedMatrix, QuantizedRows, TILE};

impl QuantizedMatrix<'_> {
    /// The product of some rows and the outputs of some tiles: `out[row - rows.start, output - 16 * tiles.start]`, rows `stride` values
    /// apart. Outputs that fill the last tile are not written.
    ///
    /// # Panics
    ///
    /// If rows and matrix differ in width, a range exceeds what there is, or `out` is too short.
    pub fn multiply(
        self,
        rows: &QuantizedRows,
        range: Range<usize>,
        tiles: Range<usize>,
        out: &mut [f32],
        stride: usize,
    ) {
        assert_eq!(rows.blocks, self.shape.blocks(), "rows and matrix must have one width");
        assert!(range.end <= rows.len() && tiles.end <= self.shape.tiles(), "rows and tiles must exist");
        self.reference(rows, range, tiles, out, stride);
    }

    fn reference(self, rows: &QuantizedRows, range: Range<usize>, tiles: Range<usize>, out: &mut [f32], stride: usize) {
        let blocks = self.shape.blocks();
        let (size, zero) = (self.shape.bits.tile_bytes(), i32::from(self.shape.bits.zero()));
        for (out, row) in out.chunks_mut(stride).zip(range) {
            for tile in tiles.clone() {
                let mut sums = [0.0_f32; TILE];
                for block in 0..blocks {
                    let at = tile * blocks + block;
                    let values = &self.values[at * size..][..size];
                    let scales = &self.scales[at * TILE..][..TILE];
                    let x = &rows.values[(row * blocks + block) * BLOCK..][..BLOCK];
                    let (x_scale, x_sum) = (rows.scales[row * blocks + block], rows.sums[row * blocks + block]);
                    for (lane, (sum, &scale)) in sums.iter_mut().zip(scales).enumerate() {
                        let dot: i32 = (0..BLOCK)
                            .map(|k| {
                                let value = match self.shape.bits {
                                    Bits::Eight => values[k / 4 * (4 * TILE) + lane * 4 + k % 4],
                                    Bits::Four => {
                                        let byte = values[k % 16 / 4 * (4 * TILE) + lane * 4 + k % 4];
                                        if k < 16 { byte & 15 } else { byte >> 4 }
                                    }
                                };
                                i32::from(value) * i32::from(x[k])
                            })
                            .sum();
                        *sum += (dot - zero * x_sum) as f32 * (self.scale_type.widen(scale) * x_scale);
                    }
                }
                let first = tile * TILE;
                let count = TILE.min(self.shape.output - first);
                let place = (tile - tiles.start) * TILE;
                out[place..place + count].copy_from_slice(&sums[..count]);
            }
        }
    }
}

//! Products of quantized rows and a quantized matrix.

use std::ops::Range;

#[cfg(target_arch = "aarch64")]
use super::neon;
use super::{BLOCK, Bits, QuantizedMatrix, QuantizedRows, ScaleType, TILE};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::{Level, level};

/// The operands of a kernel: some rows and tiles, each with all blocks.
#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    expect(dead_code, reason = "only kernels with intrinsics need it")
)]
pub(super) struct Part<'a> {
    pub(super) bits: Bits,
    pub(super) scale_type: ScaleType,
    pub(super) blocks: usize,
    /// Blocks between the tiles of a call.
    pub(super) tile_step: usize,
    /// `[tiles, blocks, bytes]`.
    pub(super) values: *const u8,
    /// `[tiles, blocks, 16]`.
    pub(super) scales: *const u16,
    /// `[rows, blocks, 32]`.
    pub(super) x: *const i8,
    /// `[rows, blocks]`.
    pub(super) x_scales: *const f32,
    /// `[rows, blocks]`.
    pub(super) x_sums: *const i32,
    pub(super) lifetime: std::marker::PhantomData<&'a u8>,
}

/// The sums of one call of a kernel: 6 rows and 2 tiles at most.
type Sums = [f32; 6 * 2 * TILE];

impl QuantizedMatrix<'_> {
    /// The product of some rows and the outputs of some tiles: `out[row - rows.start, output - 16 * tiles.start]`, rows `stride` values
    /// apart. Outputs that fill the last tile are not written.
    ///
    /// A result does not depend on which other rows and tiles a call computes. Levels differ in rounding: the sums of integers are
    /// exact, and of the two products of scales and their sum over blocks some are fused.
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
        let blocks = self.shape.blocks();
        assert_eq!(rows.blocks, blocks, "rows and matrix must have one width");
        assert!(range.end <= rows.len() && tiles.end <= self.shape.tiles(), "rows and tiles must exist");
        let kernel = kernel();
        let size = self.shape.bits.tile_bytes();
        // The tiles of a call are far apart. Few rows are bound by memory, and a processor that reads several stretches of it does not
        // wait at the end of each page, up to which it reads ahead.
        let step = tiles.len().div_ceil(kernel.tiles());
        let mut all_sums: Sums = [0.0; 6 * 2 * TILE];
        for first_tile in tiles.start..tiles.start + step {
            let tile_count = (tiles.end - first_tile).div_ceil(step);
            for first_row in range.clone().step_by(kernel.rows()) {
                let row_count = kernel.rows().min(range.end - first_row);
                let part = Part {
                    bits: self.shape.bits,
                    scale_type: self.scale_type,
                    blocks,
                    tile_step: step * blocks,
                    values: self.values[first_tile * blocks * size..].as_ptr(),
                    scales: self.scales[first_tile * blocks * TILE..].as_ptr(),
                    x: rows.values[first_row * blocks * BLOCK..].as_ptr(),
                    x_scales: rows.scales[first_row * blocks..].as_ptr(),
                    x_sums: rows.sums[first_row * blocks..].as_ptr(),
                    lifetime: std::marker::PhantomData,
                };
                let sums = &mut all_sums[..row_count * tile_count * TILE];
                // SAFETY: `new` and `set` made all arrays whole, and rows and tiles exist by the assertion. The numbers of rows and
                // tiles are those of the kernel, which `kernel` chose among those of the processor.
                match kernel {
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx512 => unsafe { avx512::multiply(&part, row_count, tile_count, sums) },
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx2 => unsafe { avx2::multiply(&part, row_count, sums) },
                    #[cfg(target_arch = "aarch64")]
                    Kernel::Neon => unsafe { neon::multiply(&part, row_count, sums) },
                    Kernel::Plain => {
                        for (row, sums) in sums.chunks_exact_mut(tile_count * TILE).enumerate() {
                            for (tile, sums) in sums.as_chunks_mut().0.iter_mut().enumerate() {
                                *sums = self.tile_sums(rows, first_row + row, first_tile + tile * step);
                            }
                        }
                    }
                }
                for (row, sums) in sums.chunks_exact(tile_count * TILE).enumerate() {
                    for (tile, sums) in sums.chunks_exact(TILE).enumerate() {
                        let tile = first_tile + tile * step;
                        let count = TILE.min(self.shape.output - tile * TILE);
                        let at = (first_row - range.start + row) * stride + (tile - tiles.start) * TILE;
                        out[at..at + count].copy_from_slice(&sums[..count]);
                    }
                }
            }
        }
    }

    /// The reference of all kernels, and the kernel of processors without one: one row by one tile.
    fn tile_sums(self, rows: &QuantizedRows, row: usize, tile: usize) -> [f32; TILE] {
        let blocks = self.shape.blocks();
        let size = self.shape.bits.tile_bytes();
        let mut sums = [0.0_f32; TILE];
        for block in 0..blocks {
            let at = tile * blocks + block;
            let values = &self.values[at * size..][..size];
            let x = &rows.values[(row * blocks + block) * BLOCK..][..BLOCK];
            let mut dots = [0_i32; TILE];
            match self.shape.bits {
                Bits::Eight => add_dots(&mut dots, values, x, |byte| byte),
                Bits::Four => {
                    add_dots(&mut dots, values, &x[..BLOCK / 2], |byte| byte & 15);
                    add_dots(&mut dots, values, &x[BLOCK / 2..], |byte| byte >> 4);
                }
            }
            let (x_scale, x_sum) = (rows.scales[row * blocks + block], rows.sums[row * blocks + block]);
            let correction = i32::from(self.shape.bits.zero()) * x_sum;
            for ((sum, dot), &scale) in sums.iter_mut().zip(dots).zip(&self.scales[at * TILE..][..TILE]) {
                *sum += (dot - correction) as f32 * (self.scale_type.widen(scale) * x_scale);
            }
        }
        sums
    }
}

/// Adds to the sum of each output its products: `values` is `[inputs / 4, 16, 4]`.
#[inline(always)]
fn add_dots(dots: &mut [i32; TILE], values: &[u8], x: &[i8], value: impl Fn(u8) -> u8) {
    for (values, x) in values.chunks_exact(4 * TILE).zip(x.chunks_exact(4)) {
        for (dot, values) in dots.iter_mut().zip(values.chunks_exact(4)) {
            *dot += values.iter().zip(x).map(|(&byte, &x)| i32::from(value(byte)) * i32::from(x)).sum::<i32>();
        }
    }
}

#[derive(Clone, Copy)]
enum Kernel {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Plain,
}

impl Kernel {
    /// Rows of a call.
    fn rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::MAX_ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::MAX_ROWS,
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::MAX_ROWS,
            Self::Plain => 1,
        }
    }

    /// Tiles of a call.
    fn tiles(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => 2,
            _ => 1,
        }
    }
}

/// The kernel of the current level.
fn kernel() -> Kernel {
    match level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 if avx512::is_available() => Kernel::Avx512,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512F | Level::Avx512 if avx2::is_available() => Kernel::Avx2,
        #[cfg(target_arch = "aarch64")]
        Level::Neon => Kernel::Neon,
        _ => Kernel::Plain,
    }
}

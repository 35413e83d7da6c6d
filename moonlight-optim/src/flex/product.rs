//! The matrix products of a Newton-Schulz step, in blocks of rows by `gemm`, or in tiles on processors with AVX512.

use moonlight_simd::gemm::{self, Operand};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::tiles;

/// Rows of a block, a compromise. `gemm` packs the right operand again for each block, which pays off only over many rows; a
/// symmetric product skips what is right of a block's diagonal, which is more with few rows.
const BLOCK_ROWS: usize = 96;

/// The side of `X` that the polynomial is multiplied from: left for a wide matrix, right for a tall one.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Side {
    Left,
    Right,
}

/// The kernel of the matrix products.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Kernel {
    /// `gemm`, on the row-major matrix.
    Blocks,
    /// [`tiles`], on the matrix transposed to be tall and padded to whole tiles.
    #[cfg(target_arch = "x86_64")]
    Tiles,
}

/// A symmetric matrix `[size, size]`. Only the lower half is computed; the upper half is copied from it.
pub(super) struct Symmetric {
    size: usize,
    values: Vec<f32>,
    kernel: Kernel,
}

/// A strided matrix: element `(i, j)` is at `i * row_stride + j * column_stride`.
#[derive(Clone, Copy)]
struct View<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self { values, rows, columns, row_stride: columns, column_stride: 1 }
    }

    fn operand(self) -> Operand {
        let Self { values, row_stride, column_stride, .. } = self;
        Operand { values: values.as_ptr(), row_stride, column_stride }
    }

    fn transposed(self) -> Self {
        let Self { values, rows, columns, row_stride, column_stride } = self;
        Self { values, rows: columns, columns: rows, row_stride: column_stride, column_stride: row_stride }
    }

    fn rows(self, start: usize, count: usize) -> Self {
        Self { values: &self.values[start * self.row_stride..], rows: count, ..self }
    }

    fn first_columns(self, count: usize) -> Self {
        Self { columns: count, ..self }
    }
}

/// `out = keep * out + factor * lhs * rhs` on the calling thread; `out` has `stride` values a row. With a `keep` of 0, `out` is
/// not read.
fn multiply(out: &mut [f32], stride: usize, lhs: View<'_>, rhs: View<'_>, keep: f32, factor: f32) {
    let reach = |view: View<'_>| (view.rows - 1) * view.row_stride + (view.columns - 1) * view.column_stride;
    assert!(lhs.columns == rhs.rows, "inner dimensions agree");
    assert!(lhs.rows > 0 && lhs.columns > 0 && rhs.columns > 0, "no operand is empty");
    assert!(reach(lhs) < lhs.values.len() && reach(rhs) < rhs.values.len(), "operands are within their slices");
    assert!(
        rhs.columns <= stride && (lhs.rows - 1) * stride + rhs.columns <= out.len(),
        "the result is within its slice"
    );
    // SAFETY: the first assertion makes the shapes fit. By the third and fourth, the last element that each of the three
    // matrices reaches is in its slice; by the second, none is empty. `out` is borrowed mutably, so it overlaps no operand.
    unsafe {
        let shape = [lhs.rows, lhs.columns, rhs.columns];
        gemm::multiply(shape, out.as_mut_ptr(), stride, lhs.operand(), rhs.operand(), keep, factor);
    }
}

/// Runs `task` on each block of rows of `out`, with the index of its first row. The blocks do not depend on `parallel`, so
/// neither does the result.
fn for_each_block(out: &mut [f32], stride: usize, parallel: bool, task: impl Fn(usize, &mut [f32]) + Sync) {
    let block = BLOCK_ROWS * stride;
    if parallel {
        out.par_chunks_mut(block).enumerate().for_each(|(index, out)| task(index * BLOCK_ROWS, out));
    } else {
        out.chunks_mut(block).enumerate().for_each(|(index, out)| task(index * BLOCK_ROWS, out));
    }
}

impl Symmetric {
    pub(super) fn new(size: usize, kernel: Kernel) -> Self {
        Self { size, values: vec![0.0; size * size], kernel }
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// `[size, size]`, row-major.
    pub(super) fn values(&self) -> &[f32] {
        &self.values
    }

    /// Lets `write` write the lower half, and mirrors it.
    pub(super) fn set_lower(&mut self, write: impl FnOnce(&mut [f32])) {
        write(&mut self.values);
        self.mirror();
    }

    fn view(&self) -> View<'_> {
        View::new(&self.values, self.size, self.size)
    }

    /// `X X^T` for a wide `x` `[rows, columns]`, `X^T X` for a tall one.
    pub(super) fn set_gram(&mut self, x: &[f32], rows: usize, columns: usize, side: Side, parallel: bool) {
        #[cfg(target_arch = "x86_64")]
        if self.kernel == Kernel::Tiles {
            return tiles::symmetric(&mut self.values, x, x, self.size, None, 1.0, parallel);
        }
        let x = View::new(x, rows, columns);
        let (lhs, rhs) = if side == Side::Left { (x, x.transposed()) } else { (x.transposed(), x) };
        let size = self.size;
        for_each_block(&mut self.values, size, parallel, |start, out| {
            let count = out.len() / size;
            // Columns up to the block's last row: the lower half, and the block's own triangle above the diagonal.
            multiply(out, size, lhs.rows(start, count), rhs.first_columns(start + count), 0.0, 1.0);
        });
        self.mirror();
    }

    /// `a I + b G + c G^2`.
    pub(super) fn set_polynomial(&mut self, gram: &Symmetric, [a, b, c]: [f32; 3], parallel: bool) {
        let size = self.size;
        #[cfg(target_arch = "x86_64")]
        if self.kernel == Kernel::Tiles {
            tiles::symmetric(&mut self.values, &gram.values, &gram.values, size, Some((&gram.values, b)), c, parallel);
            self.values.iter_mut().step_by(size + 1).for_each(|value| *value += a);
            return;
        }
        let whole = gram.view();
        for_each_block(&mut self.values, size, parallel, |start, out| {
            let count = out.len() / size;
            out.copy_from_slice(&gram.values[start * size..][..out.len()]);
            multiply(out, size, whole.rows(start, count), whole.first_columns(start + count), b, c);
            for row in 0..count {
                out[row * size + start + row] += a;
            }
        });
        self.mirror();
    }

    /// `left * right`, for operands that commute, whose product is symmetric.
    pub(super) fn set_product(&mut self, left: &Symmetric, right: &Symmetric, parallel: bool) {
        let size = self.size;
        #[cfg(target_arch = "x86_64")]
        if self.kernel == Kernel::Tiles {
            return tiles::symmetric(&mut self.values, &left.values, &right.values, size, None, 1.0, parallel);
        }
        for_each_block(&mut self.values, size, parallel, |start, out| {
            let count = out.len() / size;
            let (left, right) = (left.view().rows(start, count), right.view().first_columns(start + count));
            multiply(out, size, left, right, 0.0, 1.0);
        });
        self.mirror();
    }

    /// AOL: multiplies row and column `i` by `1 / sqrt(sum_j |value(i, j)|)`, and returns these factors. The result is the Gram
    /// matrix of the rescaled `X`, so that the first step does not compute it again.
    pub(super) fn rescale(&mut self) -> Vec<f32> {
        let factors: Vec<f32> = self
            .values
            .chunks(self.size)
            .map(|row| {
                let sum: f64 = row.iter().map(|value| f64::from(value.abs())).sum();
                // Without the smallest f32, a row of zeros would be multiplied by infinity and become NaN.
                (1.0 / (sum + f64::from(f32::MIN_POSITIVE)).sqrt()) as f32
            })
            .collect();
        for (row, factor) in self.values.chunks_mut(self.size).zip(&factors) {
            row.iter_mut().zip(&factors).for_each(|(value, other)| *value *= factor * other);
        }
        factors
    }

    /// Copies the lower half to the upper one, in tiles, so that the cache lines of the strided side stay in cache.
    fn mirror(&mut self) {
        const TILE: usize = 32;
        let size = self.size;
        for first in (0..size).step_by(TILE) {
            for second in (0..=first).step_by(TILE) {
                for row in first..(first + TILE).min(size) {
                    for column in second..(second + TILE).min(row) {
                        self.values[column * size + row] = self.values[row * size + column];
                    }
                }
            }
        }
    }
}

/// `out = P X` for a wide `x` `[rows, columns]`, `X P` for a tall one.
pub(super) fn product(
    out: &mut [f32],
    polynomial: &Symmetric,
    x: &[f32],
    rows: usize,
    columns: usize,
    side: Side,
    parallel: bool,
) {
    #[cfg(target_arch = "x86_64")]
    if polynomial.kernel == Kernel::Tiles {
        return tiles::product(out, x, &polynomial.values, polynomial.size, parallel);
    }
    let x = View::new(x, rows, columns);
    let (lhs, rhs) = if side == Side::Left { (polynomial.view(), x) } else { (x, polynomial.view()) };
    for_each_block(out, columns, parallel, |start, out| {
        multiply(out, columns, lhs.rows(start, out.len() / columns), rhs, 0.0, 1.0);
    });
}

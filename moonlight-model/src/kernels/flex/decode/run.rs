//! What the parts of a token's computation share: the new tokens, the threads, and steps between products.

use std::ops::Range;

use moonlight_simd::by_level;

use super::super::math::dot;
use super::product::{Product, Rows, Sums, multiply};
use super::team::Team;
use super::weights::Matrix;
use crate::disjoint::DisjointMut;
use crate::kernels::CacheSpan;

/// Values that a chunk of [`fill`] writes.
const FILL_COLUMNS: usize = 512;
/// Up to this number of values that are read, [`fill`] uses no other threads.
const FILL_ALONE: usize = 24 * 1024;

/// Where new tokens belong.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Positions<'a> {
    /// The new tokens of each sequence.
    pub(crate) spans: &'a [CacheSpan],
    /// Cos and sin of each token, `[tokens, rotated / 2]`.
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    /// Whether the dimensions of a rotated pair are adjacent.
    pub(crate) interleave: bool,
}

/// The computation of some new tokens.
pub(super) struct Run<'a> {
    pub(super) team: &'a mut Team,
    pub(super) positions: Positions<'a>,
    /// The number of new tokens.
    pub(super) tokens: usize,
    /// 0, 1, 2, ...: at least as many as rows of any product.
    pub(super) indices: &'a [u32],
    /// The results of the last phase.
    pub(super) sums: Sums,
    /// The residual stream, `[tokens, hidden]`.
    pub(super) hidden: Rows,
}

/// An RMSNorm.
#[derive(Debug)]
pub(crate) struct Norm {
    /// `[width]`.
    pub(crate) gain: Vec<f32>,
    pub(crate) epsilon: f32,
}

impl Norm {
    pub(super) fn apply(&self, row: &mut [f32]) {
        assert_eq!(row.len(), self.gain.len(), "the gain must have the width of the row");
        let inverse = 1.0 / (dot(row, row) / row.len() as f32 + self.epsilon).sqrt();
        scale(row, inverse, &self.gain);
    }
}

by_level! {
    fn scale[](row: &mut [f32], inverse: f32, gain: &[f32]) {
        for (value, gain) in row.iter_mut().zip(gain) {
            *value = *value * inverse * gain;
        }
    }
}

/// One summand of the residual stream: a row of a product times a factor.
pub(super) struct Term {
    pub(super) token: usize,
    pub(super) product: usize,
    pub(super) row: usize,
    pub(super) factor: f32,
}

impl<'a> Run<'a> {
    /// The residual stream, normalized.
    pub(super) fn normalized(&self, norm: &Norm) -> Rows {
        let mut rows = Rows::new(self.hidden.values.clone(), self.hidden.width);
        rows.values.chunks_exact_mut(rows.width).for_each(|row| norm.apply(row));
        rows
    }

    /// The index of every token.
    pub(super) fn all(&self) -> &'a [u32] {
        &self.indices[..self.tokens]
    }

    /// Computes products into `sums`.
    pub(super) fn multiply(&mut self, products: &[Product<'_>]) {
        multiply(self.team, products, &mut self.sums);
    }

    /// Reads the rows of a product, with the bias of its matrix.
    pub(super) fn read(&mut self, product: usize, rows: usize, matrix: &Matrix) -> Rows {
        let mut out = Rows::default();
        out.resize(rows, matrix.output);
        let cost = out.values.len() * self.sums.parts(product);
        let sums = &self.sums;
        fill(self.team, &mut out, cost, &|row, range, out| {
            sums.read(product, row, range.clone(), out);
            add_bias(out, matrix, range);
        });
        out
    }

    /// Adds products to the residual stream, for each token in the order of `terms`.
    pub(super) fn add(&mut self, terms: &[Term], biases: &[&Matrix]) {
        let (sums, hidden) = (&self.sums, &mut self.hidden);
        let cost = terms.iter().map(|term| hidden.width * sums.parts(term.product)).sum();
        fill(self.team, hidden, cost, &|row, range, out| {
            for term in terms.iter().filter(|term| term.token == row) {
                sums.add(term.product, term.row, range.clone(), term.factor, out);
            }
            biases.iter().for_each(|matrix| add_bias(out, matrix, range.clone()));
        });
    }

    /// Rotates the part of a head that has a position.
    pub(super) fn rotate(&self, token: usize, x: &mut [f32]) {
        let pairs = x.len() / 2;
        let Positions { cos, sin, interleave, .. } = self.positions;
        for pair in 0..pairs {
            let (cos, sin) = (cos[token * pairs + pair], sin[token * pairs + pair]);
            let (i, j) = if interleave { (2 * pair, 2 * pair + 1) } else { (pair, pair + pairs) };
            (x[i], x[j]) = (x[i] * cos - x[j] * sin, x[j] * cos + x[i] * sin);
        }
    }
}

/// What [`fill`] calls with a row, a range of its columns and their values.
pub(super) type FillWork<'a> = dyn Fn(usize, Range<usize>, &mut [f32]) + Sync + 'a;

/// Calls `work` with a row, a range of its columns and these values of `rows`, for all of them; on all threads if the `cost`, the
/// number of values that are read, is high.
pub(super) fn fill(team: &mut Team, rows: &mut Rows, cost: usize, work: &FillWork<'_>) {
    let width = rows.width;
    if cost <= FILL_ALONE {
        rows.values.chunks_exact_mut(width).enumerate().for_each(|(row, out)| work(row, 0..width, out));
        return;
    }
    let count = rows.values.len() / width;
    let blocks = width.div_ceil(FILL_COLUMNS);
    let target = DisjointMut::new(&mut rows.values);
    team.run(count * blocks, &|chunk| {
        let (row, first) = (chunk / blocks, chunk % blocks * FILL_COLUMNS);
        let range = first..width.min(first + FILL_COLUMNS);
        // SAFETY: each chunk has its own part of a row.
        let out = unsafe { target.row(row * width + range.start..row * width + range.end) };
        work(row, range, out);
    });
    target.finish();
}

/// Adds the part of a matrix's bias for some outputs.
pub(super) fn add_bias(out: &mut [f32], matrix: &Matrix, range: Range<usize>) {
    if let Some(bias) = &matrix.bias {
        out.iter_mut().zip(&bias[range]).for_each(|(out, bias)| *out += bias);
    }
}

/// The product of all rows of `x` and expert `expert` of `matrix`.
pub(super) fn product<'a>(matrix: &'a Matrix, expert: usize, x: &'a Rows, rows: &'a [u32]) -> Product<'a> {
    Product { weight: matrix.view(expert), shape: [matrix.input, matrix.output], x, rows }
}

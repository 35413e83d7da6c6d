//! Newton-Schulz on the CPU backend `flex`, for f32.
//!
//! What Burn's own operations do in passes over the whole stack, this does matrix by matrix in memory that stays in
//! cache: both symmetric products are computed by their lower half only, and `a X + (b G + c G^2) X` is one product.
//! The same input gives the same bits whatever the number of threads and whatever else is in the stack.
//! [`NewtonSchulz::apply_plain`](crate::NewtonSchulz::apply_plain) is the same computation in Burn's operations; a test
//! holds the two together.

mod product;

use burn::backend::Flex;
use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape, Tensor};
use rayon::prelude::*;

use product::{Side, Symmetric, product};

/// The result for a stack `[batch, rows, columns]` that is f32 and on this backend; `None` for any other.
pub(crate) fn newton_schulz(x: &Tensor<3>, schedule: &[[f64; 3]], epsilon: f64) -> Option<Tensor<3>> {
    if x.dtype() != DType::F32 {
        return None;
    }
    let shape = x.dims();
    let input = x.clone().try_into_primitive::<Flex>().ok()?.to_contiguous();
    let output = orthogonalise(input.as_slice()?, shape, schedule, epsilon);
    let output = FlexTensor::new(Bytes::from_elems(output), Layout::contiguous(Shape::new(shape)), DType::F32);
    Some(Tensor::from_primitive::<Flex>(output))
}

fn orthogonalise(input: &[f32], shape: [usize; 3], schedule: &[[f64; 3]], epsilon: f64) -> Vec<f32> {
    let [batch, rows, columns] = shape;
    let mut output = vec![0.0; input.len()];
    if output.is_empty() {
        return output;
    }
    let size = rows * columns;
    let work = || Workspace::new(rows, columns);
    // Enough matrices keep all threads busy by themselves; of few, each is shared out.
    if batch >= 2 * rayon::current_num_threads() {
        let matrices = output.par_chunks_mut(size).zip(input.par_chunks(size));
        matrices.for_each_init(work, |work, (output, input)| work.run(output, input, schedule, epsilon, false));
    } else {
        let mut work = work();
        for (output, input) in output.chunks_mut(size).zip(input.chunks(size)) {
            work.run(output, input, schedule, epsilon, true);
        }
    }
    output
}

/// The memory of one matrix under iteration.
struct Workspace {
    rows: usize,
    columns: usize,
    /// `X X^T` or `X^T X`, on the shorter side.
    gram: Symmetric,
    /// `a I + b G + c G^2`.
    polynomial: Symmetric,
    /// The next `X`.
    next: Vec<f32>,
}

impl Workspace {
    fn new(rows: usize, columns: usize) -> Self {
        let short = rows.min(columns);
        Self {
            rows,
            columns,
            gram: Symmetric::new(short),
            polynomial: Symmetric::new(short),
            next: vec![0.0; rows * columns],
        }
    }

    fn run(&mut self, output: &mut [f32], input: &[f32], schedule: &[[f64; 3]], epsilon: f64, parallel: bool) {
        let (rows, columns) = (self.rows, self.columns);
        let side = if rows <= columns { Side::Left } else { Side::Right };
        normalise(output, input, epsilon);
        for &[a, b, c] in schedule {
            self.gram.set_gram(output, rows, columns, side, parallel);
            self.polynomial.set_polynomial(&self.gram, [a as f32, b as f32, c as f32], parallel);
            product(&mut self.next, &self.polynomial, output, rows, columns, side, parallel);
            output.copy_from_slice(&self.next);
        }
    }
}

/// `output = input / (||input|| + epsilon)`, the elements divided by the largest of them first so that no square
/// overflows or vanishes. Zeros stay zeros; a NaN or an infinity makes all elements NaN.
fn normalise(output: &mut [f32], input: &[f32], epsilon: f64) {
    const LANES: usize = 16;
    let largest = input.iter().fold(0.0_f32, |largest, value| largest.max(value.abs())).max(f32::MIN_POSITIVE);
    let mut sums = [0.0_f32; LANES];
    let mut squares = 0.0_f64;
    // Partial sums of a bounded number of terms each, then f64, so that large matrices lose no digits.
    for (output, input) in output.chunks_mut(64 * LANES).zip(input.chunks(64 * LANES)) {
        sums.fill(0.0);
        for (output, input) in output.chunks_mut(LANES).zip(input.chunks(LANES)) {
            for ((output, input), sum) in output.iter_mut().zip(input).zip(&mut sums) {
                let value = input / largest;
                *sum += value * value;
                *output = value;
            }
        }
        squares += sums.iter().map(|sum| f64::from(*sum)).sum::<f64>();
    }
    let divisor = squares.sqrt() + epsilon / f64::from(largest) + f64::from(f32::MIN_POSITIVE);
    let factor = (1.0 / divisor) as f32;
    // Of a matrix of zeros the factor is the largest of all, and 0 times it 0.
    output.iter_mut().for_each(|value| *value *= factor);
}

//! Newton-Schulz and the Muon step on the CPU backend `flex`: in f32, and in bf16 where the processor has AVX512-BF16.
//!
//! Each of Burn's operations passes over the whole stack. These kernels take one matrix at a time, in a workspace that stays in
//! cache, compute only the lower half of symmetric products, and compute `a X + (b R + c R^2) X` as one product.
//!
//! The same input gives the same bits for any number of threads and any other matrices in the stack.
//! [`NewtonSchulz::apply_plain`](crate::NewtonSchulz::apply_plain) is the same computation in Burn's operations; the tests of
//! `newton_schulz` compare both with the reference.

#[cfg(target_arch = "x86_64")]
mod bf16;
mod product;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape, Tensor};
use rayon::prelude::*;

use crate::{NewtonSchulz, Preconditioning};
use product::{Kernel, Side, Symmetric, product};

/// [`NewtonSchulz::apply`] of a stack `[batch, rows, columns]`. `None` if the stack is not f32 or not on this backend, or if
/// there is no kernel for the dtype of the products.
pub(crate) fn newton_schulz(iteration: &NewtonSchulz, x: &Tensor<3>) -> Option<Tensor<3>> {
    let shape = x.dims();
    if x.dtype() != DType::F32 || !has_kernel(iteration, shape) {
        return None;
    }
    let input = x.clone().try_into_primitive::<Flex>().ok()?.to_contiguous();
    let output = orthogonalize(iteration, input.as_slice()?, shape);
    let output = FlexTensor::new(Bytes::from_elems(output), Layout::contiguous(Shape::new(shape)), DType::F32);
    Some(Tensor::from_primitive::<Flex>(output))
}

/// Whether there is a kernel for the dtype of the products. The one for bf16 has the direct form only.
fn has_kernel(iteration: &NewtonSchulz, [_, rows, columns]: [usize; 3]) -> bool {
    match iteration.dtype {
        None | Some(DType::F32) => true,
        Some(DType::BF16) => {
            #[cfg(target_arch = "x86_64")]
            let available = bf16::is_available();
            #[cfg(not(target_arch = "x86_64"))]
            let available = false;
            available && iteration.plan(rows, columns, true).iter().all(|steps| steps.len() == 1)
        }
        Some(_) => false,
    }
}

fn orthogonalize(iteration: &NewtonSchulz, input: &[f32], [_, rows, columns]: [usize; 3]) -> Vec<f32> {
    let mut output = vec![0.0; input.len()];
    if output.is_empty() {
        return output;
    }
    let size = rows * columns;
    let matrices: Vec<_> = output.chunks_mut(size).zip(input.chunks(size)).collect();
    for_each_matrix(iteration, rows, columns, matrices, |work, (output, input), parallel| {
        work.matrix().copy_from_slice(input);
        work.run(parallel);
        output.copy_from_slice(work.matrix());
    });
    output
}

/// Runs `task` for each matrix of `[rows, columns]`, with a workspace, and with `true` if it may use all threads itself.
///
/// Many matrices keep all threads busy, one each. A few large ones are taken one after the other, each by all threads. Small
/// ones are never divided, since that costs more than it gains.
fn for_each_matrix<M: Send>(
    iteration: &NewtonSchulz,
    rows: usize,
    columns: usize,
    matrices: Vec<M>,
    task: impl Fn(&mut Workspace<'_>, M, bool) + Sync,
) {
    /// From this many elements on, a matrix is worth dividing among threads.
    const DIVIDED_ELEMENTS: usize = 1 << 14;
    let work = || Workspace::new(iteration, rows, columns, kernel(iteration));
    if matrices.len() >= 2 * rayon::current_num_threads() || rows * columns < DIVIDED_ELEMENTS {
        matrices.into_par_iter().for_each_init(work, |work, matrix| task(work, matrix, false));
    } else {
        let mut work = work();
        matrices.into_iter().for_each(|matrix| task(&mut work, matrix, true));
    }
}

/// The fastest kernel for the products on this processor. bf16 products pack their operands themselves, so their matrices stay
/// row-major.
fn kernel(iteration: &NewtonSchulz) -> Kernel {
    #[cfg(target_arch = "x86_64")]
    if iteration.dtype != Some(DType::BF16) && tiles::is_available() {
        return Kernel::Tiles;
    }
    let _ = iteration;
    Kernel::Blocks
}

/// The scalars of a plain Muon step.
#[derive(Clone, Copy)]
pub(crate) struct StepScalars {
    /// `mu` of this step.
    pub(crate) momentum: f64,
    pub(crate) nesterov: bool,
    /// What decay leaves of a weight: 1 minus the fraction that it removes.
    pub(crate) kept: f64,
    /// The scale of the orthogonalized update.
    pub(crate) factor: f64,
    pub(crate) learning_rate: f64,
}

/// A stack `[batch, rows, columns]` after its step.
pub(crate) struct Stepped {
    pub(crate) tensor: Tensor<3>,
    pub(crate) momentum: Tensor<3>,
}

/// Whether [`step_many`] can step these tensors.
pub(crate) fn supports_step<'a>(
    iteration: &NewtonSchulz,
    shape: [usize; 3],
    mut tensors: impl Iterator<Item = &'a Tensor<3>>,
) -> bool {
    shape.iter().product::<usize>() > 0
        && has_kernel(iteration, shape)
        && tensors.all(|x| x.dtype() == DType::F32 && x.clone().try_into_primitive::<Flex>().is_ok())
}

/// Plain Muon steps of equal stacks that [`supports_step`] accepted: `(parameter, gradient, momentum)` of each. Momentum,
/// Newton-Schulz, decay and update of a matrix are computed while it is in cache. The result has the same bits as Burn's
/// operations. Parameters and momenta that have no other handle are updated in place.
pub(crate) fn step_many(
    iteration: &NewtonSchulz,
    step: StepScalars,
    members: Vec<(Tensor<3>, Tensor<3>, Option<Tensor<3>>)>,
) -> Vec<Stepped> {
    let Some((first, _, _)) = members.first() else { return Vec::new() };
    let [batch, rows, columns] = first.dims();
    let size = rows * columns;
    // `to_contiguous` copies a tensor that is not contiguous or is a view of a larger one: below, all of its storage is read
    // and written.
    let flex = |tensor: Tensor<3>| match tensor.try_into_primitive::<Flex>() {
        Ok(tensor) => tensor.to_contiguous(),
        Err(_) => unreachable!("the tensors are on this backend"),
    };
    let mut operands: Vec<(FlexTensor, FlexTensor, FlexTensor, bool)> = Vec::with_capacity(members.len());
    for (tensor, gradient, momentum) in members {
        let is_first = momentum.is_none();
        let momentum = momentum.map_or_else(|| FlexTensor::zeros(Shape::new([batch, rows, columns]), DType::F32), flex);
        operands.push((flex(tensor), flex(gradient), momentum, is_first));
    }
    let mut matrices = Vec::with_capacity(operands.len() * batch);
    for (tensor, gradient, momentum, is_first) in &mut operands {
        let gradients = gradient.storage::<f32>().chunks(size);
        let stepped = tensor.storage_mut::<f32>().chunks_mut(size).zip(momentum.storage_mut::<f32>().chunks_mut(size));
        matrices.extend(stepped.zip(gradients).map(|((tensor, momentum), gradient)| Matrix {
            tensor,
            momentum,
            gradient,
            is_first: *is_first,
        }));
    }
    for_each_matrix(iteration, rows, columns, matrices, |work, matrix, parallel| matrix.step(step, work, parallel));
    let tensor = |values: FlexTensor| Tensor::from_primitive::<Flex>(values);
    let stepped = operands.into_iter();
    stepped.map(|(new, _, momentum, _)| Stepped { tensor: tensor(new), momentum: tensor(momentum) }).collect()
}

/// The operands of one matrix's step.
struct Matrix<'a> {
    tensor: &'a mut [f32],
    momentum: &'a mut [f32],
    gradient: &'a [f32],
    /// Whether there was no momentum before.
    is_first: bool,
}

impl Matrix<'_> {
    fn step(self, step: StepScalars, work: &mut Workspace<'_>, parallel: bool) {
        let Self { tensor, momentum, gradient, is_first } = self;
        let (mu, kept) = (step.momentum as f32, step.kept as f32);
        let (factor, learning_rate) = (step.factor as f32, step.learning_rate as f32);
        // A single thread takes the whole matrix as one part.
        let part = if parallel { PART_ELEMENTS } else { gradient.len() };
        let update_momentum = |((input, momentum), gradient): ((&mut [f32], &mut [f32]), &[f32])| {
            // The first momentum is the gradient itself, as in Burn's operations. `0 * mu + gradient` would turn -0 into 0.
            if is_first {
                momentum.copy_from_slice(gradient);
            } else {
                momentum
                    .iter_mut()
                    .zip(gradient)
                    .for_each(|(momentum, gradient)| *momentum = *momentum * mu + gradient);
            }
            if step.nesterov {
                for ((input, momentum), gradient) in input.iter_mut().zip(&*momentum).zip(gradient) {
                    *input = momentum * mu + gradient;
                }
            } else {
                input.copy_from_slice(momentum);
            }
        };
        let input = work.matrix().par_chunks_mut(part).zip(momentum.par_chunks_mut(part));
        input.zip(gradient.par_chunks(part)).for_each(update_momentum);
        work.run(parallel);
        // Rounded as Burn's operations round: `update * factor` before the learning rate, and no fused multiply-add.
        let apply = |(tensor, update): (&mut [f32], &[f32])| {
            for (tensor, update) in tensor.iter_mut().zip(update) {
                *tensor = *tensor * kept - update * factor * learning_rate;
            }
        };
        tensor.par_chunks_mut(part).zip(work.matrix().par_chunks(part)).for_each(apply);
    }
}

/// Elements that a thread takes at a time in elementwise passes over a matrix.
const PART_ELEMENTS: usize = 1 << 16;

/// The buffers of the iteration for one matrix. A thread reuses them for all of its matrices.
struct Workspace<'a> {
    iteration: &'a NewtonSchulz,
    plan: Vec<Range<usize>>,
    kernel: Kernel,
    /// The rows and columns of the matrix itself.
    shape: [usize; 2],
    /// Input and output, row-major. [`Kernel::Blocks`] swaps it with `x` while it iterates.
    matrix: Vec<f32>,
    /// The rows and columns of `x`: those of the matrix, or padded for [`Kernel::Tiles`].
    rows: usize,
    columns: usize,
    side: Side,
    x: Vec<f32>,
    /// `R`, the Gram matrix on the shorter side: `X X^T` or `X^T X`.
    gram: Symmetric,
    /// `P`: `a I + b R + c R^2`.
    polynomial: Symmetric,
    /// Empty except in the Gram form: `Q`, the product of the polynomials since the last restart, and space for two products.
    accumulated: [Symmetric; 3],
    /// The result of a step, swapped with `x`.
    next: Vec<f32>,
    /// The operands of a product in bf16, left and right.
    #[cfg(target_arch = "x86_64")]
    packed: [bf16::PackedOperand; 2],
}

impl<'a> Workspace<'a> {
    fn new(iteration: &'a NewtonSchulz, rows: usize, columns: usize, kernel: Kernel) -> Self {
        let shape = [rows, columns];
        let [rows, columns] = match kernel {
            Kernel::Blocks => shape,
            #[cfg(target_arch = "x86_64")]
            Kernel::Tiles => tiles::padded(rows, columns),
        };
        let plan = iteration.plan(shape[0], shape[1], true);
        let accumulates = plan.iter().any(|steps| steps.len() > 1);
        let short = rows.min(columns);
        let square = |needed: bool| Symmetric::new(if needed { short } else { 0 }, kernel);
        Self {
            iteration,
            plan,
            kernel,
            shape,
            matrix: vec![0.0; shape[0] * shape[1]],
            rows,
            columns,
            side: if rows <= columns && kernel == Kernel::Blocks { Side::Left } else { Side::Right },
            x: if kernel == Kernel::Blocks { Vec::new() } else { vec![0.0; rows * columns] },
            gram: square(true),
            polynomial: square(true),
            accumulated: [square(accumulates), square(accumulates), square(accumulates)],
            next: vec![0.0; rows * columns],
            #[cfg(target_arch = "x86_64")]
            packed: Default::default(),
        }
    }

    /// The matrix, row-major: written before [`Workspace::run`], orthogonalized after it.
    fn matrix(&mut self) -> &mut [f32] {
        &mut self.matrix
    }

    fn run(&mut self, parallel: bool) {
        let aol = self.iteration.preconditioning == Preconditioning::Aol;
        normalize(&mut self.matrix, if aol { 0.0 } else { self.iteration.epsilon });
        match self.kernel {
            Kernel::Blocks => {
                std::mem::swap(&mut self.matrix, &mut self.x);
                self.iterate(aol, parallel);
                std::mem::swap(&mut self.matrix, &mut self.x);
            }
            #[cfg(target_arch = "x86_64")]
            Kernel::Tiles => {
                let [rows, columns] = self.shape;
                tiles::pack(&mut self.x, &self.matrix, rows, columns);
                self.iterate(aol, parallel);
                tiles::unpack(&mut self.matrix, &self.x, rows, columns);
            }
        }
    }

    fn iterate(&mut self, aol: bool, parallel: bool) {
        let (iteration, rows, columns, side) = (self.iteration, self.rows, self.columns, self.side);
        if aol {
            self.gram.set_gram(&self.x, rows, columns, side, parallel);
            self.rescale();
        }
        #[cfg(target_arch = "x86_64")]
        if iteration.dtype == Some(DType::BF16) {
            for coefficients in &iteration.schedule {
                self.bf16_step(coefficients.map(|value| value as f32), parallel);
            }
            return;
        }
        let Self { plan, x, gram, polynomial, accumulated, next, .. } = self;
        for (index, steps) in plan.iter().enumerate() {
            // AOL needed the Gram matrix of the first step and has rescaled it together with `X`.
            if index > 0 || !aol {
                gram.set_gram(x, rows, columns, side, parallel);
            }
            let polynomial = accumulate(gram, polynomial, accumulated, &iteration.schedule[steps.clone()], parallel);
            product(next, polynomial, x, rows, columns, side, parallel);
            std::mem::swap(next, x);
        }
    }

    /// `X <- a X + (b R + c R^2) X` with bf16 products. The polynomial is rounded to bf16, so `a` is not part of it but is
    /// applied to the f32 `X`.
    #[cfg(target_arch = "x86_64")]
    fn bf16_step(&mut self, [a, b, c]: [f32; 3], parallel: bool) {
        use bf16::{Inner, multiply};
        let Self { rows, columns, side, x, gram, polynomial, next, packed: [left, right], .. } = self;
        let (rows, columns, size) = (*rows, *columns, gram.size());
        let inner = if *side == Side::Left { Inner::Columns } else { Inner::Rows };
        left.set_left(x, rows, columns, inner, parallel);
        right.set_right(x, rows, columns, inner, parallel);
        gram.set_lower(|out| multiply(out, left, right, 0.0, 1.0, true, parallel));
        // The Gram matrix and the polynomial are symmetric, so that rows and columns are the same. `Inner::Rows` packs with
        // contiguous writes.
        left.set_left(gram.values(), size, size, Inner::Rows, parallel);
        right.set_right(gram.values(), size, size, Inner::Rows, parallel);
        polynomial.set_lower(|out| {
            out.copy_from_slice(gram.values());
            multiply(out, left, right, b, c, true, parallel);
        });
        if *side == Side::Left {
            left.set_left(polynomial.values(), size, size, Inner::Rows, parallel);
            right.set_right(x, rows, columns, Inner::Rows, parallel);
        } else {
            left.set_left(x, rows, columns, Inner::Columns, parallel);
            right.set_right(polynomial.values(), size, size, Inner::Rows, parallel);
        }
        next.copy_from_slice(x);
        multiply(next, left, right, a, 1.0, false, parallel);
        std::mem::swap(next, x);
    }

    /// AOL, the rescaling of almost orthogonal layers, of `X` and of its Gram matrix.
    fn rescale(&mut self) {
        let Self { x, gram, columns, side, .. } = self;
        let factors = gram.rescale();
        match side {
            Side::Left => x.chunks_mut(*columns).zip(&factors).for_each(|(row, factor)| {
                row.iter_mut().for_each(|value| *value *= factor);
            }),
            Side::Right => x.chunks_mut(*columns).for_each(|row| {
                row.iter_mut().zip(&factors).for_each(|(value, factor)| *value *= factor);
            }),
        }
    }
}

/// The polynomial in the Gram matrix that these steps together multiply `X` by. For a single step it is `P`; of several, each
/// computes `Q <- Q P` and `R <- P R P`. All of these are polynomials in one symmetric matrix, so they commute and their
/// products are symmetric: half of each product is enough.
fn accumulate<'a>(
    gram: &mut Symmetric,
    polynomial: &'a mut Symmetric,
    [q, spare, product]: &'a mut [Symmetric; 3],
    steps: &[[f64; 3]],
    parallel: bool,
) -> &'a Symmetric {
    for (index, coefficients) in steps.iter().enumerate() {
        polynomial.set_polynomial(gram, coefficients.map(|value| value as f32), parallel);
        if steps.len() == 1 {
            return polynomial;
        }
        if index + 1 < steps.len() {
            product.set_product(gram, polynomial, parallel);
            gram.set_product(polynomial, product, parallel);
        }
        if index == 0 {
            std::mem::swap(q, polynomial);
        } else {
            spare.set_product(q, polynomial, parallel);
            std::mem::swap(q, spare);
        }
    }
    q
}

/// `x <- x / (||x|| + epsilon)`. Elements are divided by the largest magnitude first, so that no square overflows or vanishes.
/// Zeros stay zeros; NaN or infinity makes all elements NaN.
fn normalize(x: &mut [f32], epsilon: f64) {
    // Independent partial results let the compiler use vector registers. Their number is fixed, so that every level of vector
    // instructions sums in the same order.
    const LANES: usize = 16;
    let mut lanes = [0.0_f32; LANES];
    for values in x.chunks(LANES) {
        lanes.iter_mut().zip(values).for_each(|(largest, value)| *largest = largest.max(value.abs()));
    }
    // `f32::max` ignores NaN, which reaches every element through the norm below. So does infinity, as infinity / infinity.
    let largest = lanes.into_iter().fold(f32::MIN_POSITIVE, f32::max);
    let mut sums = [0.0_f32; LANES];
    let mut squares = 0.0_f64;
    // f32 sums have 64 terms at most and are added up in f64, so that large matrices lose no digits.
    for values in x.chunks_mut(64 * LANES) {
        sums.fill(0.0);
        for values in values.chunks_mut(LANES) {
            for (value, sum) in values.iter_mut().zip(&mut sums) {
                *value /= largest;
                *sum += *value * *value;
            }
        }
        squares += sums.iter().map(|sum| f64::from(*sum)).sum::<f64>();
    }
    let divisor = squares.sqrt() + epsilon / f64::from(largest) + f64::from(f32::MIN_POSITIVE);
    let factor = (1.0 / divisor) as f32;
    // For a matrix of zeros the factor is at most 1 / f32::MIN_POSITIVE, which is finite, and 0 times it is 0.
    x.iter_mut().for_each(|value| *value *= factor);
}

#[cfg(test)]
mod tests {
    use moonlight_simd::testing;
    use proptest::prelude::*;

    use super::*;
    use crate::Coefficients;
    use crate::reference::{self, Matrix};

    fn orthogonalized(iteration: &NewtonSchulz, matrix: &Matrix, kernel: Kernel, parallel: bool) -> Vec<f32> {
        let mut work = Workspace::new(iteration, matrix.rows, matrix.columns, kernel);
        work.matrix().iter_mut().zip(&matrix.values).for_each(|(place, value)| *place = *value as f32);
        work.run(parallel);
        work.matrix().to_vec()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        /// Every kernel, whichever this processor would choose.
        #[test]
        fn every_kernel_agrees_with_the_plain_reference(
            (rows, columns) in (1_usize..70, 1_usize..70),
            coefficients in prop_oneof![Just(Coefficients::Report), Just(Coefficients::Aol)],
            seed in any::<u32>(),
        ) {
            let noise = |index: usize| ((index + 1) as f64 * f64::from(seed) * 1.618).sin();
            let values = (0..rows * columns).map(|index| f64::from(noise(index) as f32)).collect();
            let matrix = Matrix::new(rows, columns, values);
            let iteration = NewtonSchulz::new(&coefficients, coefficients.default_steps());
            let expected = reference::orthogonalized(&matrix, &iteration).values;
            let norm = expected.iter().map(|value| value * value).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
            testing::at_each_level("Newton-Schulz", |level| {
                let mut kernels = vec![Kernel::Blocks];
                #[cfg(target_arch = "x86_64")]
                if tiles::is_available() {
                    kernels.push(Kernel::Tiles);
                }
                for kernel in kernels {
                    let found = orthogonalized(&iteration, &matrix, kernel, false);
                    assert_eq!(&found, &orthogonalized(&iteration, &matrix, kernel, true));
                    let squares = found.iter().zip(&expected).map(|(x, y)| (f64::from(*x) - y).powi(2));
                    let error = squares.sum::<f64>().sqrt() / norm;
                    assert!(error < 5e-4, "relative error {error} at {level}");
                }
            });
        }
    }
}

//! Newton-Schulz on the CPU backend `flex`, for f32, and for bf16 where the processor has units for it.
//!
//! What Burn's own operations do in passes over the whole stack, this does matrix by matrix in memory that stays in
//! cache: symmetric products are computed by their lower half only, and `a X + (b R + c R^2) X` is one product.
//! The same input gives the same bits whatever the number of threads and whatever else is in the stack.
//! [`NewtonSchulz::apply_plain`](crate::NewtonSchulz::apply_plain) is the same computation in Burn's operations; a test
//! holds the two together.

#[cfg(target_arch = "x86_64")]
mod bf16;
mod product;

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape, Tensor};
use rayon::prelude::*;

use crate::{NewtonSchulz, Preconditioning};
use product::{Side, Symmetric, product};

/// The result for a stack `[batch, rows, columns]` that is f32 and on this backend, if there is a kernel for the type of
/// the products; `None` for any other.
pub(crate) fn newton_schulz(iteration: &NewtonSchulz, x: &Tensor<3>) -> Option<Tensor<3>> {
    let shape = x.dims();
    if x.dtype() != DType::F32 || !has_kernel(iteration, shape) {
        return None;
    }
    let input = x.clone().try_into_primitive::<Flex>().ok()?.to_contiguous();
    let output = orthogonalise(iteration, input.as_slice()?, shape);
    let output = FlexTensor::new(Bytes::from_elems(output), Layout::contiguous(Shape::new(shape)), DType::F32);
    Some(Tensor::from_primitive::<Flex>(output))
}

/// Whether there is a kernel here for the type of the products. That for bf16 knows the direct form only.
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

fn orthogonalise(iteration: &NewtonSchulz, input: &[f32], [batch, rows, columns]: [usize; 3]) -> Vec<f32> {
    let mut output = vec![0.0; input.len()];
    if output.is_empty() {
        return output;
    }
    let size = rows * columns;
    let plan = iteration.plan(rows, columns, true);
    let work = || Workspace::new(rows, columns, plan.iter().any(|steps| steps.len() > 1));
    // Enough matrices keep all threads busy by themselves; of few, each is shared out.
    if batch >= 2 * rayon::current_num_threads() {
        let matrices = output.par_chunks_mut(size).zip(input.par_chunks(size));
        matrices.for_each_init(work, |work, (output, input)| work.run(output, input, iteration, &plan, false));
    } else {
        let mut work = work();
        for (output, input) in output.chunks_mut(size).zip(input.chunks(size)) {
            work.run(output, input, iteration, &plan, true);
        }
    }
    output
}

/// The numbers of a plain Muon step.
#[derive(Clone, Copy)]
pub(crate) struct Step {
    /// `mu`.
    pub(crate) momentum: f64,
    pub(crate) nesterov: bool,
    /// What decay leaves of a weight.
    pub(crate) kept: f64,
    /// The factor on the orthogonalised update.
    pub(crate) factor: f64,
    pub(crate) learning_rate: f64,
}

/// One matrix of a plain step, or a stack of them, `[batch, rows, columns]`.
pub(crate) struct Stepped {
    pub(crate) tensor: Tensor<3>,
    pub(crate) momentum: Tensor<3>,
}

/// Plain steps of many equal stacks, `(parameter, gradient, momentum)` of each, with everything that is done to a matrix
/// done while it is in cache: the same bits as in Burn's operations, without their passes over all of the memory. `None`
/// where there is no kernel, and where there are too few stacks to keep all threads busy.
pub(crate) fn step_many(
    iteration: &NewtonSchulz,
    step: Step,
    members: &[(Tensor<3>, Tensor<3>, Option<Tensor<3>>)],
) -> Option<Vec<Stepped>> {
    let shape = members.first()?.0.dims();
    let [_, rows, columns] = shape;
    let size = rows * columns;
    if size == 0 || members.len() < 2 * rayon::current_num_threads() || !has_kernel(iteration, shape) {
        return None;
    }
    let flex = |tensor: &Tensor<3>| {
        if tensor.dtype() != DType::F32 {
            return None;
        }
        Some(tensor.clone().try_into_primitive::<Flex>().ok()?.to_contiguous())
    };
    let mut operands = Vec::with_capacity(members.len());
    for (tensor, gradient, momentum) in members {
        let momentum = match momentum {
            Some(momentum) => Some(flex(momentum)?),
            None => None,
        };
        operands.push((flex(tensor)?, flex(gradient)?, momentum));
    }
    let mut slices = Vec::with_capacity(operands.len());
    for (tensor, gradient, momentum) in &operands {
        let momentum: Option<&[f32]> = match momentum {
            Some(momentum) => Some(momentum.as_slice()?),
            None => None,
        };
        slices.push((tensor.as_slice::<f32>()?, gradient.as_slice::<f32>()?, momentum));
    }
    let plan = iteration.plan(rows, columns, true);
    let gathers = plan.iter().any(|steps| steps.len() > 1);
    let work = || (Workspace::new(rows, columns, gathers), vec![0.0; size], vec![0.0; size]);
    let (mu, kept) = (step.momentum as f32, step.kept as f32);
    let (factor, learning_rate) = (step.factor as f32, step.learning_rate as f32);
    let stepped = slices.par_iter().map_init(work, |(work, input, update), &(tensor, gradient, momentum)| {
        let new_momentum: Vec<f32> = match momentum {
            Some(momentum) => momentum.iter().zip(gradient).map(|(old, gradient)| old * mu + gradient).collect(),
            None => gradient.to_vec(),
        };
        let mut new_tensor = tensor.to_vec();
        let matrices = new_tensor.chunks_mut(size).zip(new_momentum.chunks(size).zip(gradient.chunks(size)));
        for (tensor, (momentum, gradient)) in matrices {
            if step.nesterov {
                let ahead = momentum.iter().zip(gradient).map(|(momentum, gradient)| momentum * mu + gradient);
                input.iter_mut().zip(ahead).for_each(|(input, value)| *input = value);
                work.run(update, input, iteration, &plan, false);
            } else {
                work.run(update, momentum, iteration, &plan, false);
            }
            for (tensor, update) in tensor.iter_mut().zip(update.iter()) {
                *tensor = *tensor * kept - update * factor * learning_rate;
            }
        }
        (new_tensor, new_momentum)
    });
    let stepped: Vec<(Vec<f32>, Vec<f32>)> = stepped.collect();
    let tensor = |values: Vec<f32>| {
        let layout = Layout::contiguous(Shape::new(shape));
        Tensor::from_primitive::<Flex>(FlexTensor::new(Bytes::from_elems(values), layout, DType::F32))
    };
    let stepped = stepped.into_iter();
    Some(stepped.map(|(new, momentum)| Stepped { tensor: tensor(new), momentum: tensor(momentum) }).collect())
}

/// The memory of one matrix under iteration.
struct Workspace {
    rows: usize,
    columns: usize,
    side: Side,
    /// `R`: `X X^T` or `X^T X`, on the shorter side.
    gram: Symmetric,
    /// `P`: `a I + b R + c R^2`.
    polynomial: Symmetric,
    /// Only in the Gram form: `Q`, the product of the polynomials since the last restart, and room for two products.
    gathered: [Symmetric; 3],
    /// The next `X`.
    next: Vec<f32>,
    /// The operands of a product in bf16, left and right.
    #[cfg(target_arch = "x86_64")]
    packed: [bf16::Packed; 2],
}

impl Workspace {
    fn new(rows: usize, columns: usize, gathers: bool) -> Self {
        let short = rows.min(columns);
        let gathered = || Symmetric::new(if gathers { short } else { 0 });
        Self {
            rows,
            columns,
            side: if rows <= columns { Side::Left } else { Side::Right },
            gram: Symmetric::new(short),
            polynomial: Symmetric::new(short),
            gathered: [gathered(), gathered(), gathered()],
            next: vec![0.0; rows * columns],
            #[cfg(target_arch = "x86_64")]
            packed: Default::default(),
        }
    }

    fn run(
        &mut self,
        output: &mut [f32],
        input: &[f32],
        iteration: &NewtonSchulz,
        plan: &[Range<usize>],
        parallel: bool,
    ) {
        let (rows, columns, side) = (self.rows, self.columns, self.side);
        let aol = iteration.preconditioning == Preconditioning::Aol;
        normalise(output, input, if aol { 0.0 } else { iteration.epsilon });
        if aol {
            self.gram.set_gram(output, rows, columns, side, parallel);
            self.rescale(output);
        }
        #[cfg(target_arch = "x86_64")]
        if iteration.dtype == Some(DType::BF16) {
            for coefficients in &iteration.schedule {
                self.bf16_step(output, coefficients.map(|value| value as f32), parallel);
            }
            return;
        }
        for (index, steps) in plan.iter().enumerate() {
            // Rescaling has left the Gram matrix of the first step.
            if index > 0 || !aol {
                self.gram.set_gram(output, rows, columns, side, parallel);
            }
            let Self { gram, polynomial, gathered, next, .. } = self;
            let polynomial = gather(gram, polynomial, gathered, &iteration.schedule[steps.clone()], parallel);
            product(next, polynomial, output, rows, columns, side, parallel);
            output.copy_from_slice(&self.next);
        }
    }

    /// `X <- a X + (b R + c R^2) X` with products in bf16.
    #[cfg(target_arch = "x86_64")]
    fn bf16_step(&mut self, x: &mut [f32], [a, b, c]: [f32; 3], parallel: bool) {
        use bf16::{Inner, multiply};
        let Self { rows, columns, side, gram, polynomial, next, packed: [left, right], .. } = self;
        let (rows, columns, size) = (*rows, *columns, gram.size());
        let inner = if *side == Side::Left { Inner::Columns } else { Inner::Rows };
        left.set_left(x, rows, columns, inner, parallel);
        right.set_right(x, rows, columns, inner, parallel);
        gram.set_lower(|out| multiply(out, left, right, 0.0, 1.0, true, parallel));
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
        x.copy_from_slice(next);
    }

    /// The rescaling of almost orthogonal layers, of `X` and of its Gram matrix.
    fn rescale(&mut self, x: &mut [f32]) {
        let factors = self.gram.rescale();
        match self.side {
            Side::Left => x.chunks_mut(self.columns).zip(&factors).for_each(|(row, factor)| {
                row.iter_mut().for_each(|value| *value *= factor);
            }),
            Side::Right => x.chunks_mut(self.columns).for_each(|row| {
                row.iter_mut().zip(&factors).for_each(|(value, factor)| *value *= factor);
            }),
        }
    }
}

/// The polynomial of the Gram matrix that these steps come to. A single one is `P`; of several, each takes
/// `Q <- Q P` and `R <- P R P`, all of which commute and are symmetric.
fn gather<'a>(
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

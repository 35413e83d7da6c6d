//! Grouped matrix products: the rows of each group times the matrix of the group. A plain product has one group.

use std::ops::Range;

use crate::disjoint::DisjointVec;
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use rayon::prelude::*;

use super::dtype::Element;
use super::gemv;
use super::matrix::{Matrix, multiply_into};
use super::tensor::{by_dtype, dims, tensor_of, values_of};
use crate::kernels::{GroupLayout, GroupedMatmulKernel, ProjectKernel, reference};

impl ProjectKernel for Flex {
    fn project_forward(rows: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let layout = one_group(&rows);
        by_dtype!(
            [rows, weight],
            E => forward::<E>(&rows, &weight, Offsets(&layout), false),
            reference::project_forward::<Self>(rows, weight)
        )
    }

    fn project_rows_grad(grad: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let layout = one_group(&grad);
        by_dtype!(
            [grad, weight],
            E => forward::<E>(&grad, &weight, Offsets(&layout), true),
            reference::project_rows_grad::<Self>(grad, weight)
        )
    }

    fn project_weight_grad(rows: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let layout = one_group(&rows);
        by_dtype!(
            [rows, grad],
            E => weight_grad::<E>(&rows, &grad, Offsets(&layout), None),
            reference::project_weight_grad::<Self>(rows, grad)
        )
    }
}

impl GroupedMatmulKernel for Flex {
    fn grouped_matmul_forward(
        rows: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        layout: &GroupLayout,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [rows, weight],
            E => forward::<E>(&rows, &weight, Offsets::of(layout), false),
            reference::grouped_matmul_forward::<Self>(rows, weight, layout)
        )
    }

    fn grouped_matmul_rows_grad(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        layout: &GroupLayout,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [grad, weight],
            E => forward::<E>(&grad, &weight, Offsets::of(layout), true),
            reference::grouped_matmul_rows_grad::<Self>(grad, weight, layout)
        )
    }

    fn grouped_matmul_weight_grad(
        rows: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        layout: &GroupLayout,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [rows, grad],
            E => weight_grad::<E>(&rows, &grad, Offsets::of(layout), Some(layout.groups())),
            reference::grouped_matmul_weight_grad::<Self>(rows, grad, layout)
        )
    }
}

/// The first row of each group, followed by the number of rows. The parallel writes below rely on offsets that begin with 0 and
/// never decrease, as those of a [`GroupLayout`] and of [`one_group`] do.
#[derive(Clone, Copy)]
struct Offsets<'a>(&'a [usize]);

impl<'a> Offsets<'a> {
    fn of(layout: &'a GroupLayout) -> Self {
        Self(layout.offsets())
    }

    fn groups(self) -> usize {
        self.0.len() - 1
    }

    fn rows(self) -> usize {
        self.0[self.groups()]
    }

    /// Each group with its range of rows.
    fn iter(self) -> impl Iterator<Item = (usize, Range<usize>)> {
        self.0.windows(2).map(|bounds| bounds[0]..bounds[1]).enumerate()
    }
}

/// The offsets of a single group with all rows.
fn one_group(rows: &FlexTensor) -> [usize; 2] {
    [0, dims::<2>(rows)[0]]
}

/// Rows of a task, which a group with more is divided into.
const ROWS_PER_TASK: usize = 2048;
/// Columns of a task. With fewer, the rows are packed for the product more often than necessary; with more, there are too few tasks
/// to share among threads.
const COLUMNS_PER_TASK: usize = 128;
/// The most columns of a task.
const MAX_COLUMNS: usize = 512;
/// With at least this many groups, the groups alone are enough tasks for the threads, and a task may have more columns.
const MANY_GROUPS: usize = 16;
/// Rows times columns of a task if there are many groups. With few rows most of the time is spent on reading the matrix, and wide
/// tasks read longer runs of memory.
const OUTPUTS_PER_TASK: usize = 128 * 256;

/// The ranges of columns of the tasks of a group with `rows` rows, if there are `groups` groups.
fn blocks(width: usize, rows: usize, groups: usize) -> impl Iterator<Item = Range<usize>> {
    let wide = (OUTPUTS_PER_TASK / rows.max(1)).next_multiple_of(COLUMNS_PER_TASK).clamp(COLUMNS_PER_TASK, MAX_COLUMNS);
    let columns = if groups < MANY_GROUPS { COLUMNS_PER_TASK } else { wide };
    (0..width).step_by(columns).map(move |first| first..width.min(first + columns))
}

/// `out[r] = rows[r] x weight[group of r]`, or with each matrix transposed.
///
/// `rows` is `[rows, in]` (`[rows, out]` if transposed); the last two dimensions of `weight` are `[in, out]`.
fn forward<E: Element>(rows: &FlexTensor, weight: &FlexTensor, offsets: Offsets<'_>, transpose: bool) -> FlexTensor {
    let [count, width] = dims(rows);
    let (input, output) = matrix_dims(weight);
    let (from, to) = if transpose { (output, input) } else { (input, output) };
    assert_eq!(width, from, "the width of the rows must be the input width of the weight");
    assert_eq!(offsets.rows(), count, "the groups must have all rows");
    let (rows, weight) = (values_of::<E>(rows), values_of::<E>(weight));
    if !transpose && gemv::applies(offsets.0) {
        return gemv::forward(rows, weight, offsets.0, (input, output));
    }
    let mut tasks = Vec::new();
    for (group, range) in offsets.iter() {
        for start in range.clone().step_by(ROWS_PER_TASK) {
            let end = range.end.min(start + ROWS_PER_TASK);
            let blocks = blocks(to, end - start, offsets.groups());
            tasks.extend(blocks.map(|columns| (group, start..end, columns)));
        }
    }
    // Not zeroed first: every element is written once.
    let product = DisjointVec::<E>::new(count * to); // [rows, out]
    // `with_max_len(1)` splits down to single tasks, so that threads share groups of unequal size evenly.
    tasks.into_par_iter().with_max_len(1).for_each(|(group, range, columns)| {
        let weight = &weight[group * input * output..][..input * output];
        let rows = &rows[range.start * from..range.end * from];
        // SAFETY: groups share no rows, because offsets never decrease (`GroupLayout`'s constructors); the steps through the rows
        // of a group share none, and blocks share no columns. So no two tasks share an element.
        let target = unsafe { product.block(to, range.clone(), columns.clone()) };
        let weight = if transpose {
            Matrix::strided(&weight[columns.start * output..], columns.len(), output, output).transposed()
        } else {
            Matrix::strided(&weight[columns.start..], input, columns.len(), output)
        };
        multiply_into(target, Matrix::new(rows, range.len(), from), weight);
    });
    // SAFETY: `multiply_into` wrote all of each task's block.
    tensor_of(unsafe { product.finish() }, [count, to])
}

/// `out[g] = rows_g^T x grad_g`, zero for a group without rows: `[groups, in, out]`, or `[in, out]` if `groups` is `None`.
fn weight_grad<E: Element>(
    rows: &FlexTensor,
    grad: &FlexTensor,
    offsets: Offsets<'_>,
    groups: Option<usize>,
) -> FlexTensor {
    let ([count, input], [grad_count, output]) = (dims(rows), dims(grad));
    assert!(count == offsets.rows() && grad_count == count, "the groups must have all rows, and each row a gradient");
    let (rows, grad) = (values_of::<E>(rows), values_of::<E>(grad));
    let tasks: Vec<_> = offsets
        .iter()
        .flat_map(|(group, range)| {
            let blocks = blocks(output, range.len(), offsets.groups());
            blocks.map(move |columns| (group, range.clone(), columns))
        })
        .collect();
    let gradient = DisjointVec::<E>::new(offsets.groups() * input * output); // [groups, input, output]
    tasks.into_par_iter().with_max_len(1).for_each(|(group, range, columns)| {
        // SAFETY: a task has a block of columns of the matrix of one group, and each pair of group and block is one task.
        let target = unsafe { gradient.block(output, group * input..(group + 1) * input, columns.clone()) };
        // The rows of a group are summed by one task, in order: the sum does not depend on the threads. Without rows it is 0.
        let rows = Matrix::new(&rows[range.start * input..range.end * input], range.len(), input);
        let grad = &grad[range.start * output..range.end * output];
        let grad = Matrix::strided(grad.get(columns.start..).unwrap_or(&[]), range.len(), columns.len(), output);
        multiply_into(target, rows.transposed(), grad);
    });
    // SAFETY: `multiply_into` wrote all of each task's block.
    let out = unsafe { gradient.finish() };
    match groups {
        Some(groups) => tensor_of(out, [groups, input, output]),
        None => tensor_of(out, [input, output]),
    }
}

/// The last two dimensions.
fn matrix_dims(tensor: &FlexTensor) -> (usize, usize) {
    let shape = tensor.layout().shape();
    let rank = shape.num_dims();
    (shape[rank - 2], shape[rank - 1])
}

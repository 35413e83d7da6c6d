//! Products of rows with their group's matrix: the experts', or the one matrix of a projection.
//!
//! A task is a block of columns of one group, so that a task packs its part of the matrix once, and one busy expert
//! is shared out. Neither the tasks nor the order of a sum depends on the number of threads.

use std::cell::RefCell;
use std::ops::Range;

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::element::Element;
use super::few_rows;
use super::matrix::{MatrixMut, SharedSlice, Write, multiply, written};
use super::{dims, tensor_of, values_of};

/// Columns of one task: narrower, and the rows are packed more often than need be; wider, and there are too few tasks.
const COLUMNS: usize = 128;
/// Groups from which on there are tasks enough without that.
const MANY: usize = 16;
/// Rows times columns of a task of one of many groups. With few rows the time goes into reading the matrix, and that is
/// quicker straight on.
const PLACES: usize = 128 * 256;

/// The columns of a matrix as the tasks of one of `groups` groups take them, each with so many rows.
fn blocks<E: Element>(width: usize, rows: usize, groups: usize) -> impl Iterator<Item = Range<usize>> {
    let wide = (PLACES / rows.max(1)).next_multiple_of(COLUMNS).clamp(COLUMNS, E::COLUMNS);
    let columns = if groups < MANY { COLUMNS } else { wide };
    (0..width).step_by(columns).map(move |first| first..width.min(first + columns))
}

/// Copies of a task's operands in f32, where they are not f32 themselves. Kept by each thread.
#[derive(Default)]
struct Scratch {
    lhs: Vec<f32>,
    rhs: Vec<f32>,
    out: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `out[r] = rows[r] x weight[group of r]`, or with the transposed weight.
///
/// `rows` is `[rows, in]`; the last two dimensions of `weight` are `[in, out]`; group `g` has the rows
/// `offsets[g]..offsets[g + 1]`.
pub(super) fn forward<E: Element>(
    rows: &FlexTensor,
    weight: &FlexTensor,
    offsets: &[usize],
    transpose: bool,
) -> FlexTensor {
    let [count, width] = dims(rows);
    let (input, output) = matrix_dims(weight);
    let (from, to) = if transpose { (output, input) } else { (input, output) };
    assert_eq!(width, from, "the rows are as wide as the weight's input");
    let (rows, weight) = (values_of::<E>(rows), values_of::<E>(weight));
    if !transpose && few_rows::suits(offsets) {
        return few_rows::forward(rows, weight, offsets, (input, output));
    }
    assert_eq!(offsets.last(), Some(&count), "every row is some group's");
    let mut tasks = Vec::new();
    for (group, bounds) in offsets.windows(2).enumerate() {
        for start in (bounds[0]..bounds[1]).step_by(E::ROWS) {
            let end = bounds[1].min(start + E::ROWS);
            let blocks = blocks::<E>(to, end - start, offsets.len() - 1);
            tasks.extend(blocks.map(|columns| (group, start..end, columns)));
        }
    }
    let fill = |shared: &SharedSlice<E>| {
        tasks.into_par_iter().with_max_len(1).for_each(|(group, places, columns)| {
            let weight = &weight[group * input * output..][..input * output];
            let rows = &rows[places.start * from..places.end * from];
            // SAFETY: no two tasks have an element of the result in common.
            let target = unsafe { shared.at(places.start * to + columns.start) };
            SCRATCH.with_borrow_mut(|Scratch { lhs, rhs, out }| {
                let fill = |out: MatrixMut<'_>| {
                    let rows = E::view(rows, places.len(), from, from, lhs);
                    let weight = if transpose {
                        E::view(&weight[columns.start * output..], columns.len(), output, output, rhs).transposed()
                    } else {
                        E::view(&weight[columns.start..], input, columns.len(), output, rhs)
                    };
                    multiply(out, rows, weight, 1.0, Write::Set);
                };
                // SAFETY: as above.
                unsafe { E::write(target, places.len(), columns.len(), to, out, fill) };
            });
        });
    };
    // SAFETY: the tasks cover every row and every column.
    tensor_of(unsafe { written(count * to, fill) }, [count, to])
}

/// `out[g] = rows of g^T x grad of g`, zero for a group without rows: `[groups, in, out]`, without the groups where
/// `groups` is `None`.
pub(super) fn weight_grad<E: Element>(
    rows: &FlexTensor,
    grad: &FlexTensor,
    offsets: &[usize],
    groups: Option<usize>,
) -> FlexTensor {
    let [_, input] = dims(rows);
    let [_, output] = dims(grad);
    let (rows, grad) = (values_of::<E>(rows), values_of::<E>(grad));
    let tasks: Vec<_> = offsets
        .windows(2)
        .enumerate()
        .flat_map(|(group, bounds)| {
            let blocks = blocks::<E>(output, bounds[1] - bounds[0], offsets.len() - 1);
            blocks.map(move |columns| (group, bounds[0]..bounds[1], columns))
        })
        .collect();
    let fill = |shared: &SharedSlice<E>| {
        tasks.into_par_iter().with_max_len(1).for_each(|(group, places, columns)| {
            // SAFETY: no two tasks have an element of the result in common.
            let target = unsafe { shared.at(group * input * output + columns.start) };
            SCRATCH.with_borrow_mut(|Scratch { lhs, rhs, out }| {
                let fill = |mut out: MatrixMut<'_>| {
                    if places.is_empty() {
                        out.clear();
                    }
                    for start in places.clone().step_by(E::ROWS) {
                        let count = E::ROWS.min(places.end - start);
                        let rows = E::view(&rows[start * input..], count, input, input, lhs);
                        let grad = E::view(&grad[start * output + columns.start..], count, columns.len(), output, rhs);
                        let write = if start == places.start { Write::Set } else { Write::Add };
                        multiply(out.reborrow(), rows.transposed(), grad, 1.0, write);
                    }
                };
                // SAFETY: as above.
                unsafe { E::write(target, input, columns.len(), output, out, fill) };
            });
        });
    };
    // SAFETY: the tasks cover every column of every group, and each writes all of its own.
    let out = unsafe { written((offsets.len() - 1) * input * output, fill) };
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

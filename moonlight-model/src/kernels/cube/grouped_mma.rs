//! The grouped product of experts on matrix units (tensor cores), with its two gradients: in bf16 and f16, and in f32 rounded to TF32.
//! Sums are in f32.
//!
//! A cube computes a tile of [`ROWS`] x [`COLUMNS`] values. Each of its eight planes has [`PART`] x [`PART`] of them, as four fragments.
//! Strips of both factors are in shared memory twice: while the planes multiply one, the values of the next are on their way
//! to registers, so that the planes wait for memory only between two strips. Tiles and layouts are those of
//! `grouped_gemm`.

use burn_cubecl::tensor::CubeTensor;
use cubecl::cmma::{self, MatrixIdent, MatrixLayout};
use cubecl::ir::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

use super::grouped_gemm::Tile;
use super::tensor::{address_type_of, elem_type, layout_section};
#[cfg(all(test, feature = "kernel-text"))]
use super::text::Dialect;
use crate::kernels::GroupLayout;
use crate::kernels::group_layout::{Section, TILE_ROWS, most_tiles};

/// Rows of the tile of a cube.
const ROWS: usize = TILE_ROWS;
/// Columns of the tile of a cube.
const COLUMNS: usize = 128;
const UNITS: usize = 256;
/// Units of a plane.
const PLANE: usize = 32;
/// Rows and columns of the part of a plane.
const PART: usize = 32;
/// Rows and columns of a fragment.
const FRAGMENT: usize = 16;
/// Added to the length of a strip's lines, so that the rows of a fragment are in different banks of shared memory; the address of each
/// fragment stays a multiple of 32 bytes, which the instructions demand.
const PADDING: usize = 8;

/// How a factor, and its strip in shared memory, is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Lines {
    /// A line has the values of one row or column of the result along the depth.
    AlongDepth,
    /// A line has the values of one step of the depth for all rows or columns of the result.
    AcrossDepth,
}

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Plan {
    /// Depth of a fragment.
    step: usize,
    /// Depth of a strip.
    depth: usize,
    left: Lines,
    right: Lines,
}

/// Whether the device has matrix units for the dtype of a tensor; for f32, whether it has them for TF32.
pub(super) fn has_matrix_units(tensor: &CubeTensor) -> bool {
    let Some((stage, step)) = stage_of(tensor) else { return false };
    let (m, n, k) = (FRAGMENT as u32, FRAGMENT as u32, step as u32);
    let wanted = MmaConfig { a_type: stage, b_type: stage, cd_type: ElemType::Float(FloatKind::F32), m, n, k };
    let properties = tensor.client.properties();
    let planes = [properties.hardware.plane_size_min, properties.hardware.plane_size_max];
    properties.features.matmul.cmma.contains(&wanted) && planes == [PLANE as u32; 2]
}

/// The type in which a factor is multiplied, and the depth of a fragment of it.
pub(super) fn stage_of(tensor: &CubeTensor) -> Option<(ElemType, usize)> {
    match elem_type(tensor) {
        half @ ElemType::Float(FloatKind::BF16 | FloatKind::F16) => Some((half, 16)),
        ElemType::Float(FloatKind::F32) => Some((ElemType::Float(FloatKind::TF32), 8)),
        _ => None,
    }
}

impl Plan {
    /// The plan for two factors, and the types of their values in memory and of their fragments.
    fn of(factor: &CubeTensor, left: Lines, right: Lines) -> (Self, [ElemType; 2]) {
        let (stage, step) = stage_of(factor).expect("`has_matrix_units` was asked first");
        // Two fragments, so that the strips, twice, and the planes' results fit in 48 KB.
        (Self { step, depth: 2 * step, left, right }, [elem_type(factor), stage])
    }
}

/// How many values are read at once: 16 bytes where each line of the factors is a multiple of them, otherwise one value.
fn vector_size(factors: [&CubeTensor; 2]) -> usize {
    let widest = 16 / factors[0].dtype.size();
    let fits = |factor: &CubeTensor| {
        let (shape, strides) = (factor.meta.shape(), factor.meta.strides());
        let lines = &strides[..strides.len() - 1];
        shape[shape.num_dims() - 1].is_multiple_of(widest) && lines.iter().all(|line| line.is_multiple_of(widest))
    };
    if factors.into_iter().all(fits) { widest } else { 1 }
}

/// `rows x weight` of each group, or with `transposed` `rows x weight^T`, into `out`.
///
/// # Safety
///
/// The tensors have one dtype, for which [`has_matrix_units`], and the shapes of `grouped_gemm::grouped_product`; the last dimensions
/// are contiguous.
pub(super) unsafe fn grouped_product(
    rows: &CubeTensor,
    weight: &CubeTensor,
    out: &CubeTensor,
    layout: &GroupLayout,
    transposed: bool,
) {
    let right = if transposed { Lines::AlongDepth } else { Lines::AcrossDepth };
    let (plan, types) = Plan::of(rows, Lines::AlongDepth, right);
    let columns = out.meta.shape()[1].div_ceil(COLUMNS);
    let (tiles, first_tile) = layout_section(rows, layout, Section::Tiles);
    // SAFETY: rows stay within the bounds of a tile, and so of a group of the layout; weights are indexed by group; depth and columns
    // stay below the shapes of rows and result, which the caller vouches for. A vector is read where its first value is within the bounds, which are
    // multiples of its size.
    unsafe {
        grouped_product_kernel::launch_unchecked(
            &rows.client,
            CubeCount::Static(columns as u32, most_tiles(layout.groups(), layout.rows()) as u32, 1),
            CubeDim::new_1d(UNITS as u32),
            address_type_of(&[rows, weight, out]),
            vector_size([rows, weight]),
            rows.clone().into_tensor_arg(),
            weight.clone().into_tensor_arg(),
            out.clone().into_tensor_arg(),
            tiles,
            first_tile,
            plan,
            types,
        );
    }
}

/// `rows^T x grad` of each group, into `out`.
///
/// # Safety
///
/// As for [`grouped_product`], with the shapes of `grouped_gemm::weight_grad`.
pub(super) unsafe fn weight_grad(rows: &CubeTensor, grad: &CubeTensor, out: &CubeTensor, layout: &GroupLayout) {
    let (plan, types) = Plan::of(rows, Lines::AcrossDepth, Lines::AcrossDepth);
    let [groups, input, output] = out.meta.shape().dims::<3>();
    let (offsets, first_offset) = layout_section(rows, layout, Section::Offsets);
    let [across, down] = [output.div_ceil(COLUMNS), input.div_ceil(ROWS)].map(|count| count as u32);
    // SAFETY: the kernel indexes rows of both factors from one offset of the layout to the next, which never decrease and end with
    // the number of rows, and columns up to the widths of the factors, which the caller vouches for. Vectors are as in
    // `grouped_product`.
    unsafe {
        weight_grad_kernel::launch_unchecked(
            &rows.client,
            CubeCount::Static(across, down, groups as u32),
            CubeDim::new_1d(UNITS as u32),
            address_type_of(&[rows, grad, out]),
            vector_size([rows, grad]),
            rows.clone().into_tensor_arg(),
            grad.clone().into_tensor_arg(),
            out.clone().into_tensor_arg(),
            offsets,
            first_offset,
            plan,
            types,
        );
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn grouped_product_kernel<F: Numeric, S: Numeric, N: Size>(
    rows: &Tensor<Vector<F, N>>,
    weight: &Tensor<Vector<F, N>>,
    out: &mut Tensor<F>,
    tiles: &[u32],
    first_tile: usize,
    #[comptime] plan: Plan,
    #[define(F, S)] _types: [ElemType; 2],
) {
    let tile = Tile::of_cube(tiles, first_tile, rows.shape(1));
    let first_column = CUBE_POS_X as usize * COLUMNS;
    let left = Factor { base: 0usize.runtime(), line: rows.stride(0), first: tile.first, end: tile.end };
    let base = tile.group * weight.stride(0);
    let right = Factor { base, line: weight.stride(1), first: first_column, end: out.shape(1) };
    let line = out.stride(0);
    product::<F, S, N>(rows, &left, weight, &right, 0usize.runtime(), tile.depth, out, 0usize.runtime(), line, plan);
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn weight_grad_kernel<F: Numeric, S: Numeric, N: Size>(
    rows: &Tensor<Vector<F, N>>,
    grad: &Tensor<Vector<F, N>>,
    out: &mut Tensor<F>,
    offsets: &[u32],
    first_offset: usize,
    #[comptime] plan: Plan,
    #[define(F, S)] _types: [ElemType; 2],
) {
    let expert = CUBE_POS_Z as usize;
    let start = offsets[first_offset + expert] as usize;
    let end = offsets[first_offset + expert + 1] as usize;
    let (first_row, first_column) = (CUBE_POS_Y as usize * ROWS, CUBE_POS_X as usize * COLUMNS);
    let left = Factor { base: 0usize.runtime(), line: rows.stride(0), first: first_row, end: rows.shape(1) };
    let right = Factor { base: 0usize.runtime(), line: grad.stride(0), first: first_column, end: grad.shape(1) };
    let (base, line) = (expert * out.stride(0), out.stride(1));
    product::<F, S, N>(rows, &left, grad, &right, start, end, out, base, line, plan);
}

/// Where the tile's part of a factor is: rows or columns `first..end` of the result, in lines of `line` values from `base`.
#[derive(CubeType)]
struct Factor {
    base: usize,
    line: usize,
    first: usize,
    end: usize,
}

/// The values of a strip that a unit reads, and the length of a line of the strip in shared memory.
fn strip_shape(lines: Lines, across: usize, depth: usize) -> (usize, usize) {
    match lines {
        Lines::AlongDepth => (across, depth),
        Lines::AcrossDepth => (depth, across),
    }
}

/// The tile of the product over the depth `start..end`. All units of a cube call it with the same values.
#[cube]
fn product<F: Numeric, S: Numeric, N: Size>(
    left: &Tensor<Vector<F, N>>,
    left_at: &Factor,
    right: &Tensor<Vector<F, N>>,
    right_at: &Factor,
    start: usize,
    end: usize,
    out: &mut Tensor<F>,
    base: usize,
    line: usize,
    #[comptime] plan: Plan,
) {
    let width = N::value();
    let (left_lines, left_line) = comptime!(strip_shape(plan.left, ROWS, plan.depth));
    let (right_lines, right_line) = comptime!(strip_shape(plan.right, COLUMNS, plan.depth));
    let left_pitch = comptime!(left_line + PADDING);
    let right_pitch = comptime!(right_line + PADDING);
    let left_size = comptime!(left_lines * left_pitch / width);
    let right_size = comptime!(right_lines * right_pitch / width);
    let left_count = comptime!(ROWS * plan.depth / (width * UNITS));
    let right_count = comptime!(COLUMNS * plan.depth / (width * UNITS));

    let mut left_strips = Shared::<[Vector<S, N>]>::new_aligned_slice(comptime!(2 * left_size), 32usize);
    let mut right_strips = Shared::<[Vector<S, N>]>::new_aligned_slice(comptime!(2 * right_size), 32usize);
    let mut results = Shared::<[f32]>::new_aligned_slice(comptime!(UNITS / PLANE * FRAGMENT * FRAGMENT), 32usize);

    let mut next_left = Array::<Vector<F, N>>::new(left_count);
    let mut next_right = Array::<Vector<F, N>>::new(right_count);

    // The part of this plane: two parts down, four across.
    let plane = UNIT_POS as usize / PLANE;
    let row = plane / 4 * PART;
    let column = plane % 4 * PART;
    let sum_00 = accumulator(plan);
    let sum_01 = accumulator(plan);
    let sum_10 = accumulator(plan);
    let sum_11 = accumulator(plan);

    let mut current = 0usize;
    if start < end {
        fetch::<F, N>(left, left_at, start, end, &mut next_left, left_count, left_line, plan.left);
        fetch::<F, N>(right, right_at, start, end, &mut next_right, right_count, right_line, plan.right);
        keep::<F, S, N>(&next_left, &mut left_strips, 0usize.runtime(), left_count, left_line, left_pitch);
        keep::<F, S, N>(&next_right, &mut right_strips, 0usize.runtime(), right_count, right_line, right_pitch);
    }
    sync_cube();
    let mut at = start;
    while at < end {
        let next = at + plan.depth;
        if next < end {
            fetch::<F, N>(left, left_at, next, end, &mut next_left, left_count, left_line, plan.left);
            fetch::<F, N>(right, right_at, next, end, &mut next_right, right_count, right_line, plan.right);
        }
        let (left_start, right_start) = (current * left_size, current * right_size);
        #[unroll]
        for k in 0..comptime!(plan.depth / plan.step) {
            let step = comptime!(k * plan.step);
            let a_0 = left_fragment::<S, N>(&left_strips, left_start, row, step, left_pitch, plan);
            let a_1 = left_fragment::<S, N>(&left_strips, left_start, row + FRAGMENT, step, left_pitch, plan);
            let b_0 = right_fragment::<S, N>(&right_strips, right_start, column, step, right_pitch, plan);
            let b_1 = right_fragment::<S, N>(&right_strips, right_start, column + FRAGMENT, step, right_pitch, plan);
            cmma::execute(&a_0, &b_0, &sum_00, &sum_00);
            cmma::execute(&a_0, &b_1, &sum_01, &sum_01);
            cmma::execute(&a_1, &b_0, &sum_10, &sum_10);
            cmma::execute(&a_1, &b_1, &sum_11, &sum_11);
        }
        current = 1 - current;
        if next < end {
            keep::<F, S, N>(&next_left, &mut left_strips, current * left_size, left_count, left_line, left_pitch);
            keep::<F, S, N>(&next_right, &mut right_strips, current * right_size, right_count, right_line, right_pitch);
        }
        sync_cube();
        at = next;
    }

    let (end_row, end_column) = (left_at.end, right_at.end);
    let (row, column) = (left_at.first + row, right_at.first + column);
    store::<F>(&sum_00, &mut results, out, base, line, row, end_row, column, end_column);
    store::<F>(&sum_01, &mut results, out, base, line, row, end_row, column + FRAGMENT, end_column);
    store::<F>(&sum_10, &mut results, out, base, line, row + FRAGMENT, end_row, column, end_column);
    store::<F>(&sum_11, &mut results, out, base, line, row + FRAGMENT, end_row, column + FRAGMENT, end_column);
}

#[cube]
fn accumulator(#[comptime] plan: Plan) -> cmma::Matrix<f32> {
    cmma::Matrix::<f32>::from_value(
        MatrixIdent::Accumulator,
        FRAGMENT,
        FRAGMENT,
        plan.step,
        MatrixLayout::Undefined,
        0f32,
    )
}

/// Reads the unit's share of the strip that begins at step `at` of the depth; zero outside the factor. Neighboring units read
/// neighboring values.
#[cube]
fn fetch<F: Numeric, N: Size>(
    factor: &Tensor<Vector<F, N>>,
    place: &Factor,
    at: usize,
    end: usize,
    values: &mut Array<Vector<F, N>>,
    #[comptime] count: usize,
    #[comptime] line: usize,
    #[comptime] lines: Lines,
) {
    let width = N::value();
    #[unroll]
    for round in 0..count {
        let index = UNIT_POS as usize + comptime!(round * UNITS);
        let (outer, inner) = (index / comptime!(line / width), index % comptime!(line / width) * width);
        let mut value = Vector::<F, N>::new(F::from_int(0));
        if comptime!(lines == Lines::AlongDepth) {
            let (result, depth) = (place.first + outer, at + inner);
            if result < place.end && depth < end {
                value = factor[(place.base + result * place.line + depth) / width];
            }
        } else {
            let (result, depth) = (place.first + inner, at + outer);
            if result < place.end && depth < end {
                value = factor[(place.base + depth * place.line + result) / width];
            }
        }
        values[round] = value;
    }
}

/// Writes what [`fetch`] read to a strip in shared memory.
#[cube]
fn keep<F: Numeric, S: Numeric, N: Size>(
    values: &Array<Vector<F, N>>,
    strips: &mut Shared<[Vector<S, N>]>,
    start: usize,
    #[comptime] count: usize,
    #[comptime] line: usize,
    #[comptime] pitch: usize,
) {
    let width = N::value();
    #[unroll]
    for round in 0..count {
        let index = UNIT_POS as usize + comptime!(round * UNITS);
        let (outer, inner) = (index / comptime!(line / width), index % comptime!(line / width));
        strips[start + outer * comptime!(pitch / width) + inner] = Vector::cast_from(values[round]);
    }
}

/// The fragment of the left factor with rows `row..` and depth `step..`.
#[cube]
fn left_fragment<S: Numeric, N: Size>(
    strips: &Shared<[Vector<S, N>]>,
    start: usize,
    row: usize,
    #[comptime] step: usize,
    #[comptime] pitch: usize,
    #[comptime] plan: Plan,
) -> cmma::Matrix<Vector<S, N>> {
    let width = N::value();
    let along = comptime!(plan.left == Lines::AlongDepth);
    let layout = comptime!(if along { MatrixLayout::RowMajor } else { MatrixLayout::ColMajor });
    let mut at = row * pitch + step;
    if comptime!(!along) {
        at = step * pitch + row;
    }
    let from = start + at / width;
    let slice = &strips[from..strips.len()];
    cmma::Matrix::from_slice(MatrixIdent::A, FRAGMENT, FRAGMENT, plan.step, layout, slice, pitch as u32)
}

/// The fragment of the right factor with columns `column..` and depth `step..`.
#[cube]
fn right_fragment<S: Numeric, N: Size>(
    strips: &Shared<[Vector<S, N>]>,
    start: usize,
    column: usize,
    #[comptime] step: usize,
    #[comptime] pitch: usize,
    #[comptime] plan: Plan,
) -> cmma::Matrix<Vector<S, N>> {
    let width = N::value();
    let along = comptime!(plan.right == Lines::AlongDepth);
    let layout = comptime!(if along { MatrixLayout::ColMajor } else { MatrixLayout::RowMajor });
    let mut at = column * pitch + step;
    if comptime!(!along) {
        at = step * pitch + column;
    }
    let from = start + at / width;
    let slice = &strips[from..strips.len()];
    cmma::Matrix::from_slice(MatrixIdent::B, FRAGMENT, FRAGMENT, plan.step, layout, slice, pitch as u32)
}

/// Writes a fragment of the result, except what is outside `end_row` and `end_column`. How a fragment's values are spread over a plane is
/// not specified, so they go through shared memory.
#[cube]
fn store<F: Numeric>(
    sum: &cmma::Matrix<f32>,
    results: &mut Shared<[f32]>,
    out: &mut Tensor<F>,
    base: usize,
    line: usize,
    row: usize,
    end_row: usize,
    column: usize,
    end_column: usize,
) {
    let (plane, unit) = (UNIT_POS as usize / PLANE, UNIT_POS as usize % PLANE);
    let start = plane * comptime!(FRAGMENT * FRAGMENT);
    let len = results.len();
    cmma::store(&mut results[start..len], sum, FRAGMENT as u32, MatrixLayout::RowMajor);
    sync_cube();
    #[unroll]
    for round in 0..comptime!(FRAGMENT * FRAGMENT / PLANE) {
        let index = unit + comptime!(round * PLANE);
        let (row, column) = (row + index / FRAGMENT, column + index % FRAGMENT);
        if row < end_row && column < end_column {
            out[base + row * line + column] = F::cast_from(results[start + index]);
        }
    }
    // The next fragment may not be written before all values of this one are read.
    sync_cube();
}

/// The kernels of this file as text.
#[cfg(all(test, feature = "kernel-text"))]
pub(super) fn kernels(on: &Dialect) -> Vec<Box<dyn CubeKernel>> {
    use super::text::{buffer, kernel, tensor};
    let plan = |left, right| Plan { step: FRAGMENT, depth: 2 * FRAGMENT, left, right };
    let types = [on.float; 2];
    let mut list = Vec::new();
    for width in [1, 8] {
        for right in [Lines::AlongDepth, Lines::AcrossDepth] {
            let plan = plan(Lines::AlongDepth, right);
            list.push(kernel!(
                on,
                UNITS,
                grouped_product_kernel::GroupedProductKernel,
                tensor(),
                tensor(),
                tensor(),
                buffer(),
                (),
                width,
                plan,
                types
            ));
        }
        let plan = plan(Lines::AcrossDepth, Lines::AcrossDepth);
        list.push(kernel!(
            on,
            UNITS,
            weight_grad_kernel::WeightGradKernel,
            tensor(),
            tensor(),
            tensor(),
            buffer(),
            (),
            width,
            plan,
            types
        ));
    }
    list
}

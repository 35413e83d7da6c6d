//! The grouped product of experts: one launch for all experts, instead of a slice, a product and a copy for each. Where a device has
//! matrix units for the dtype, `grouped_mma` computes it; here is what runs everywhere, and f32 without rounding.
//!
//! A cube computes a tile of [`TILE`] x [`TILE`] values, each of its units a patch of [`PATCH`] x [`PATCH`] in registers, from strips of
//! [`DEPTH`] values of both factors in shared memory: the usual blocking of a dense product on a GPU (Volkov and Demmel, SC'08).
//! Half types are summed in f32 and rounded once. As many cubes
//! are launched as there can be tiles, because the host need not know the layout; those without a tile end at once. An expert
//! without rows has no tile; its weight gradient is filled with zeros.

use burn::backend::Cube;
use burn::backend::tensor::FloatTensor;
use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::grouped_mma;
use super::tensor::{
    address_type_of, assert_dtype, assert_shape, buffers, elem_type, empty, layout_section, to_float_tensor,
    with_contiguous_rows,
};
#[cfg(all(test, feature = "kernel-text"))]
use super::text::Dialect;
use crate::kernels::group_layout::{Section, TILE_ROWS, most_tiles};
use crate::kernels::{F32Matmul, GroupLayout, GroupedMatmulKernel, f32_matmul, reference};

impl GroupedMatmulKernel for Cube {
    fn grouped_matmul_forward(
        rows: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        layout: &GroupLayout,
    ) -> FloatTensor<Self> {
        match buffers([&rows, &weight]) {
            Some([rows, weight]) if rows.dtype == weight.dtype => {
                to_float_tensor(grouped_product(rows, weight, layout, false))
            }
            _ => reference::grouped_matmul_forward::<Self>(rows, weight, layout),
        }
    }

    fn grouped_matmul_rows_grad(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        layout: &GroupLayout,
    ) -> FloatTensor<Self> {
        match buffers([&grad, &weight]) {
            Some([grad, weight]) if grad.dtype == weight.dtype => {
                to_float_tensor(grouped_product(grad, weight, layout, true))
            }
            _ => reference::grouped_matmul_rows_grad::<Self>(grad, weight, layout),
        }
    }

    fn grouped_matmul_weight_grad(
        rows: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        layout: &GroupLayout,
    ) -> FloatTensor<Self> {
        match buffers([&rows, &grad]) {
            Some([rows, grad]) if rows.dtype == grad.dtype => to_float_tensor(weight_grad(rows, grad, layout)),
            _ => reference::grouped_matmul_weight_grad::<Self>(rows, grad, layout),
        }
    }
}

/// Rows and columns of the tile of a cube.
pub(super) const TILE: usize = TILE_ROWS;
/// Values that are summed between two fills of shared memory. With these sizes the two strips take 8.3 KB of the 16 KB that WebGPU
/// guarantees.
pub(super) const DEPTH: usize = 16;
/// Units along each side of a cube: 256 units, the most that WebGPU guarantees.
const SIDE: usize = 16;
pub(super) const UNITS: usize = SIDE * SIDE;
/// Rows and columns of the patch of a unit.
const PATCH: usize = TILE / SIDE;
/// The distance in shared memory between steps of the depth: one more than a tile has, so that units that write the values of one
/// row use different banks.
pub(super) const PITCH: usize = TILE + 1;

/// Whether products of this dtype run on matrix units. f32 does only where the program allows TF32.
pub(super) fn on_matrix_units(factor: &CubeTensor, layout: &GroupLayout) -> bool {
    let allowed = factor.dtype != DType::F32 || (f32_matmul() == F32Matmul::Tf32 && !layout.is_exact());
    allowed && grouped_mma::has_matrix_units(factor)
}

/// The rows of each expert times its matrix, `[rows, in] x [experts, in, out]`, or times its transpose, `[rows, out]` to `[rows, in]`.
pub(super) fn grouped_product(
    rows: CubeTensor,
    weight: CubeTensor,
    layout: &GroupLayout,
    transposed: bool,
) -> CubeTensor {
    let (rows, weight) = (with_contiguous_rows(rows), with_contiguous_rows(weight));
    let [_, input, output] = weight.meta.shape().dims::<3>();
    let (depth, columns) = if transposed { (output, input) } else { (input, output) };
    assert_shape(&rows, [layout.rows(), depth]);
    assert_shape(&weight, [layout.groups(), input, output]);
    assert_dtype(&weight, rows.dtype);
    let out = empty(&rows, [layout.rows(), columns], rows.dtype);
    if on_matrix_units(&rows, layout) {
        // SAFETY: shapes and dtypes are asserted above.
        unsafe { grouped_mma::grouped_product(&rows, &weight, &out, layout, transposed) };
        return out;
    }
    let count = most_tiles(layout.groups(), layout.rows());
    let count = CubeCount::Static(columns.div_ceil(TILE) as u32, count as u32, 1);
    let client = rows.client.clone();
    let (tiles, first_tile) = layout_section(&rows, layout, Section::Tiles);
    // SAFETY: rows stay within the bounds of a tile, and so of a group of the layout; weights are indexed by group; depth and
    // columns stay below the shapes of rows and result. All tensors have these shapes and one dtype, as asserted
    // above. `with_contiguous_rows` made their last dimensions contiguous, and for the others the kernel uses their strides.
    unsafe {
        grouped_product_kernel::launch_unchecked(
            &client,
            count,
            CubeDim::new_1d(UNITS as u32),
            address_type_of(&[&rows, &weight, &out]),
            rows.clone().into_tensor_arg(),
            weight.into_tensor_arg(),
            out.clone().into_tensor_arg(),
            tiles,
            first_tile,
            transposed,
            elem_type(&rows),
        );
    }
    out
}

/// `rows^T x grad` for each expert, `[experts, in, out]`.
fn weight_grad(rows: CubeTensor, grad: CubeTensor, layout: &GroupLayout) -> CubeTensor {
    let (rows, grad) = (with_contiguous_rows(rows), with_contiguous_rows(grad));
    let (input, output) = (rows.meta.shape()[1], grad.meta.shape()[1]);
    assert_shape(&rows, [layout.rows(), input]);
    assert_shape(&grad, [layout.rows(), output]);
    assert_dtype(&grad, rows.dtype);
    let out = empty(&rows, [layout.groups(), input, output], rows.dtype);
    if on_matrix_units(&rows, layout) {
        // SAFETY: shapes and dtypes are asserted above.
        unsafe { grouped_mma::weight_grad(&rows, &grad, &out, layout) };
        return out;
    }
    let count = CubeCount::Static(output.div_ceil(TILE) as u32, input.div_ceil(TILE) as u32, layout.groups() as u32);
    let client = rows.client.clone();
    let (offsets, first_offset) = layout_section(&rows, layout, Section::Offsets);
    // SAFETY: the kernel indexes rows of both factors from one offset of the layout to the next, which never decrease and end
    // with the number of rows, and columns up to the widths of the factors. Shapes and dtypes are asserted above, and
    // `with_contiguous_rows` made the last dimensions contiguous.
    unsafe {
        weight_grad_kernel::launch_unchecked(
            &client,
            count,
            CubeDim::new_1d(UNITS as u32),
            address_type_of(&[&rows, &grad, &out]),
            rows.clone().into_tensor_arg(),
            grad.into_tensor_arg(),
            out.clone().into_tensor_arg(),
            offsets,
            first_offset,
            elem_type(&rows),
        );
    }
    out
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn grouped_product_kernel<F: Float>(
    rows: &Tensor<F>,
    weight: &Tensor<F>,
    out: &mut Tensor<F>,
    tiles: &[u32],
    first_tile: usize,
    #[comptime] transposed: bool,
    #[define(F)] _dtype: ElemType,
) {
    let tile = Tile::of_cube(tiles, first_tile, rows.shape(1));
    let (first_column, columns) = (CUBE_POS_X as usize * TILE, out.shape(1));
    let base = tile.group * weight.stride(0);

    let mut left = Shared::<[f32]>::new_slice(comptime!(DEPTH * PITCH));
    let mut right = Shared::<[f32]>::new_slice(comptime!(DEPTH * PITCH));
    let mut sums = zeros();
    let mut at = 0usize;
    while at < tile.depth {
        load::<F>(&mut left, rows, 0usize, rows.stride(0), at, tile.depth, tile.first, tile.end, true);
        load::<F>(&mut right, weight, base, weight.stride(1), at, tile.depth, first_column, columns, transposed);
        sync_cube();
        multiply(&left, &right, &mut sums);
        sync_cube();
        at += DEPTH;
    }
    let line = out.stride(0);
    store::<F>(&sums, out, 0usize, line, tile.first, tile.end, first_column, columns);
}

/// The rows of a group that a cube multiplies.
#[derive(CubeType)]
pub(super) struct Tile {
    pub group: usize,
    /// The first row, and the one after the last.
    pub first: usize,
    pub end: usize,
    /// The depth of the product; 0 for a tile without rows, which has nothing to store.
    pub depth: usize,
}

#[cube]
impl Tile {
    /// The tile of this cube, whose position in the layout is its second coordinate.
    pub(super) fn of_cube(tiles: &[u32], first_tile: usize, depth: usize) -> Tile {
        let at = first_tile + CUBE_POS_Y as usize * 3;
        let (first, end) = (tiles[at + 1] as usize, tiles[at + 2] as usize);
        Tile { group: tiles[at] as usize, first, end, depth: select(first < end, depth, 0usize) }
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn weight_grad_kernel<F: Float>(
    rows: &Tensor<F>,
    grad: &Tensor<F>,
    out: &mut Tensor<F>,
    offsets: &[u32],
    first_offset: usize,
    #[define(F)] _dtype: ElemType,
) {
    let expert = CUBE_POS_Z as usize;
    let end = offsets[first_offset + expert + 1] as usize;
    let first_row = CUBE_POS_Y as usize * TILE;
    let first_column = CUBE_POS_X as usize * TILE;
    let height = rows.shape(1);
    let width = grad.shape(1);

    let mut left = Shared::<[f32]>::new_slice(comptime!(DEPTH * PITCH));
    let mut right = Shared::<[f32]>::new_slice(comptime!(DEPTH * PITCH));
    let mut sums = zeros();
    let mut at = offsets[first_offset + expert] as usize;
    while at < end {
        load::<F>(&mut left, rows, 0usize, rows.stride(0), at, end, first_row, height, false);
        load::<F>(&mut right, grad, 0usize, grad.stride(0), at, end, first_column, width, false);
        sync_cube();
        multiply(&left, &right, &mut sums);
        sync_cube();
        at += DEPTH;
    }
    let (base, line) = (expert * out.stride(0), out.stride(1));
    store::<F>(&sums, out, base, line, first_row, height, first_column, width);
}

#[cube]
pub(super) fn zeros() -> Array<f32> {
    let mut sums = Array::<f32>::new(comptime!(PATCH * PATCH));
    #[unroll]
    for at in 0..comptime!(PATCH * PATCH) {
        sums[at] = 0f32;
    }
    sums
}

/// Fills `strip`, `[DEPTH, TILE]`, with steps `at..` of the depth and rows or columns `first..` of a factor; zero outside it. The
/// depth runs along the rows of the factor if `along` is true, and down its columns otherwise.
#[cube]
pub(super) fn load<F: Float>(
    strip: &mut Shared<[f32]>,
    factor: &Tensor<F>,
    base: usize,
    line: usize,
    at: usize,
    depth: usize,
    first: usize,
    end: usize,
    #[comptime] along: bool,
) {
    // Neighboring units read neighboring values, so that reads from memory are coalesced.
    let across = comptime!(if along { DEPTH } else { TILE });
    for round in 0..comptime!(DEPTH * TILE / UNITS) {
        let index = UNIT_POS as usize + round * UNITS;
        let (outer, inner) = (index / across, index % across);
        let mut value = 0f32;
        if comptime!(along) {
            if first + outer < end && at + inner < depth {
                value = f32::cast_from(factor[base + (first + outer) * line + at + inner]);
            }
            strip[inner * PITCH + outer] = value;
        } else {
            if at + outer < depth && first + inner < end {
                value = f32::cast_from(factor[base + (at + outer) * line + first + inner]);
            }
            strip[outer * PITCH + inner] = value;
        }
    }
}

/// Adds the product of two strips to the patch of each unit, which is consecutive rows, and columns [`SIDE`] apart.
#[cube]
pub(super) fn multiply(left: &Shared<[f32]>, right: &Shared<[f32]>, sums: &mut Array<f32>) {
    let (row, column) = (UNIT_POS as usize / SIDE * PATCH, UNIT_POS as usize % SIDE);
    for step in 0..DEPTH {
        let strip = step * PITCH;
        let mut factors = Array::<f32>::new(PATCH);
        #[unroll]
        for j in 0..PATCH {
            factors[j] = right[strip + column + j * SIDE];
        }
        #[unroll]
        for i in 0..PATCH {
            let factor = left[strip + row + i];
            #[unroll]
            for j in 0..PATCH {
                sums[i * PATCH + j] += factor * factors[j];
            }
        }
    }
}

/// Writes the patch of each unit, except what is outside the tile's rows and columns.
#[cube]
pub(super) fn store<F: Float>(
    sums: &Array<f32>,
    out: &mut Tensor<F>,
    base: usize,
    line: usize,
    first_row: usize,
    end_row: usize,
    first_column: usize,
    end_column: usize,
) {
    let row = first_row + UNIT_POS as usize / SIDE * PATCH;
    let column = first_column + UNIT_POS as usize % SIDE;
    #[unroll]
    for i in 0..PATCH {
        #[unroll]
        for j in 0..PATCH {
            if row + i < end_row && column + j * SIDE < end_column {
                out[base + (row + i) * line + column + j * SIDE] = F::cast_from(sums[i * PATCH + j]);
            }
        }
    }
}

/// The kernels of this file as text.
#[cfg(all(test, feature = "kernel-text"))]
pub(super) fn kernels(on: &Dialect) -> Vec<Box<dyn CubeKernel>> {
    use super::text::{buffer, kernel, tensor};
    let float = on.float;
    let mut list = vec![kernel!(
        on,
        UNITS,
        weight_grad_kernel::WeightGradKernel,
        tensor(),
        tensor(),
        tensor(),
        buffer(),
        (),
        float
    )];
    for transposed in [false, true] {
        list.push(kernel!(
            on,
            UNITS,
            grouped_product_kernel::GroupedProductKernel,
            tensor(),
            tensor(),
            tensor(),
            buffer(),
            (),
            transposed,
            float
        ));
    }
    list
}

//! The product by quantized weights. Without matrix units, and for few rows, weights are dequantized where they are multiplied, and only those of groups with
//! rows are read. With matrix units and many rows all weights are dequantized first, in one pass, because matrix units then do
//! most of the work.

use burn::backend::Cube;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::grouped_gemm::{
    DEPTH, PITCH, TILE, Tile, UNITS, grouped_product, load, multiply, on_matrix_units, store, zeros,
};
use super::launch::{launch, unit_per_value};
use super::tensor::{
    address_type_of, assert_shape, buffers, elem_type, empty, int_buffer, layout_section, same_device, to_float_tensor,
    with_contiguous_rows,
};
#[cfg(all(test, feature = "kernel-text"))]
use super::text::Dialect;
use crate::kernels::group_layout::{Section, most_tiles};
use crate::kernels::{
    GroupLayout, QUANT_BLOCK, QUANT_TILE, QuantBits, QuantizedMatmulKernel, QuantizedShape, reference,
};

impl QuantizedMatmulKernel for Cube {
    fn quantized_matmul_forward(
        rows: FloatTensor<Self>,
        values: IntTensor<Self>,
        scales: FloatTensor<Self>,
        spec: QuantizedShape,
        layout: &GroupLayout,
    ) -> FloatTensor<Self> {
        match (buffers([&rows, &scales]), byte_buffer(&values)) {
            (Some([rows, scales]), Some(values)) => {
                to_float_tensor(product(rows, Weights { values, scales, spec }, layout, false))
            }
            _ => reference::quantized_matmul_forward::<Self>(rows, values, scales, spec, layout),
        }
    }

    fn quantized_matmul_rows_grad(
        grad: FloatTensor<Self>,
        values: IntTensor<Self>,
        scales: FloatTensor<Self>,
        spec: QuantizedShape,
        layout: &GroupLayout,
    ) -> FloatTensor<Self> {
        match (buffers([&grad, &scales]), byte_buffer(&values)) {
            (Some([grad, scales]), Some(values)) => {
                to_float_tensor(product(grad, Weights { values, scales, spec }, layout, true))
            }
            _ => reference::quantized_matmul_rows_grad::<Self>(grad, values, scales, spec, layout),
        }
    }
}

/// With at least this many rows a group on average, dequantizing all weights takes less than the product does without matrix units. An
/// estimate, not a measurement.
const MANY_ROWS: usize = 32;

/// Quantized matrices: values `[groups, bytes]` and scales `[groups, scales]`.
struct Weights {
    values: CubeTensor,
    scales: CubeTensor,
    spec: QuantizedShape,
}

/// What the kernels need of a [`QuantizedShape`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Packing {
    bits: QuantBits,
    blocks: usize,
    value_bytes: usize,
    scales: usize,
}

/// The buffer of packed values, one byte in each element: u8, or i32 on devices without that type.
fn byte_buffer(values: &IntTensor<Cube>) -> Option<CubeTensor> {
    use burn::tensor::DType;
    let any: &dyn std::any::Any = values;
    match any.downcast_ref::<CubeTensor>() {
        Some(bytes) if bytes.dtype == DType::U8 && bytes.client.properties().supports_type(elem_type(bytes)) => {
            Some(bytes.clone())
        }
        _ => int_buffer(values),
    }
}

impl Weights {
    fn packing(&self) -> Packing {
        let spec = self.spec;
        let scales = spec.tiles() * spec.blocks() * QUANT_TILE;
        Packing { bits: spec.bits, blocks: spec.blocks(), value_bytes: spec.value_bytes(), scales }
    }

    /// Contiguous, with the shapes of `groups` matrices.
    fn checked(self, groups: usize, like: &CubeTensor) -> Self {
        let Self { values, scales, spec } = self;
        let weights = Self { values: into_contiguous(values), scales: into_contiguous(scales), spec };
        let Packing { value_bytes, scales, .. } = weights.packing();
        assert_shape(&weights.values, [groups, value_bytes]);
        assert_shape(&weights.scales, [groups, scales]);
        same_device(&weights.values, like);
        weights
    }

    fn dtypes(&self, rows: &CubeTensor) -> [ElemType; 3] {
        [elem_type(rows), elem_type(&self.values), elem_type(&self.scales)]
    }
}

/// The rows of each group times its matrix, or with `transposed` times its transpose.
fn product(rows: CubeTensor, weights: Weights, layout: &GroupLayout, transposed: bool) -> CubeTensor {
    let rows = with_contiguous_rows(rows);
    let weights = weights.checked(layout.groups(), &rows);
    let QuantizedShape { input, output, .. } = weights.spec;
    if layout.rows() >= MANY_ROWS * layout.groups() && on_matrix_units(&rows, layout) {
        return grouped_product(rows.clone(), dequantize(&weights, layout.groups(), &rows), layout, transposed);
    }
    let (depth, columns) = if transposed { (output, input) } else { (input, output) };
    assert_shape(&rows, [layout.rows(), depth]);
    let out = empty(&rows, [layout.rows(), columns], rows.dtype);
    let count = most_tiles(layout.groups(), layout.rows());
    let count = CubeCount::Static(columns.div_ceil(TILE) as u32, count as u32, 1);
    let (tiles, first_tile) = layout_section(&rows, layout, Section::Tiles);
    let (client, dtypes) = (rows.client.clone(), weights.dtypes(&rows));
    let packing = weights.packing();
    let Weights { values, scales, .. } = weights;
    // SAFETY: rows stay within the bounds of a tile, and so of a group of the layout; inputs and outputs stay below those of the
    // matrices, so that their values and scales are within the lengths of a matrix, which are asserted above, as is the number of
    // matrices. `with_contiguous_rows` made the last dimension of the rows contiguous.
    unsafe {
        product_kernel::launch_unchecked(
            &client,
            count,
            CubeDim::new_1d(UNITS as u32),
            address_type_of(&[&rows, &values, &scales, &out]),
            rows.clone().into_tensor_arg(),
            values.into_buffer_arg(),
            scales.into_buffer_arg(),
            out.clone().into_tensor_arg(),
            tiles,
            first_tile,
            transposed,
            packing,
            dtypes,
        );
    }
    out
}

/// All matrices in the dtype of `like`, `[groups, in, out]`.
fn dequantize(weights: &Weights, groups: usize, like: &CubeTensor) -> CubeTensor {
    let QuantizedShape { input, output, .. } = weights.spec;
    let out = empty(like, [groups, input, output], like.dtype);
    let (packing, dtypes) = (weights.packing(), weights.dtypes(like));
    let (values, scales) = (weights.values.clone(), weights.scales.clone());
    let count = groups * input * output;
    // SAFETY: a unit with an index below `count` writes the value with this index, and reads a group below `groups`, and inputs and
    // outputs below those of a matrix, as in `product`.
    unsafe {
        launch!(
            dequantize_kernel,
            unit_per_value(like, count),
            [out, values, scales],
            count,
            input,
            output,
            packing,
            dtypes
        );
    }
    out
}

/// The weight of an input and an output of a group; [`moonlight_simd::quant`] has the order of values and scales.
#[cube]
fn weight_at<I: Int, S: Float>(
    values: &[I],
    scales: &[S],
    group: usize,
    input: usize,
    output: usize,
    #[comptime] packing: Packing,
) -> f32 {
    let (block, at) = (input / QUANT_BLOCK, input % QUANT_BLOCK);
    let (tile, column) = (output / QUANT_TILE, output % QUANT_TILE);
    let block = tile * packing.blocks + block;
    let scale = f32::cast_from(scales[group * packing.scales + block * QUANT_TILE + column]);
    let block = group * packing.value_bytes + block * comptime!(packing.bits.tile_bytes());
    let value = match comptime!(packing.bits) {
        QuantBits::Eight => {
            i32::cast_from(values[block + at / 4 * comptime!(4 * QUANT_TILE) + column * 4 + at % 4]) - 128
        }
        // The first half of a block is in the low halves of the bytes, the second in the high ones.
        QuantBits::Four => {
            let half = at % comptime!(QUANT_BLOCK / 2);
            let byte = i32::cast_from(values[block + half / 4 * comptime!(4 * QUANT_TILE) + column * 4 + half % 4]);
            select(at == half, byte & 15, (byte >> 4) & 15) - 8
        }
    };
    f32::cast_from(value) * scale
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn product_kernel<F: Float, I: Int, S: Float>(
    rows: &Tensor<F>,
    values: &[I],
    scales: &[S],
    out: &mut Tensor<F>,
    tiles: &[u32],
    first_tile: usize,
    #[comptime] transposed: bool,
    #[comptime] packing: Packing,
    #[define(F, I, S)] _dtypes: [ElemType; 3],
) {
    let tile = Tile::of_cube(tiles, first_tile, rows.shape(1));
    let (first_column, columns) = (CUBE_POS_X as usize * TILE, out.shape(1));

    let mut left = Shared::<[f32]>::new_slice(comptime!(DEPTH * PITCH));
    let mut right = Shared::<[f32]>::new_slice(comptime!(DEPTH * PITCH));
    let mut sums = zeros();
    let mut at = 0usize;
    while at < tile.depth {
        load::<F>(&mut left, rows, 0usize, rows.stride(0), at, tile.depth, tile.first, tile.end, true);
        for round in 0..comptime!(DEPTH * TILE / UNITS) {
            let index = UNIT_POS as usize + round * UNITS;
            let (step, column) = (index / TILE, index % TILE);
            let (depth_at, column_at) = (at + step, first_column + column);
            let mut weight = 0f32;
            if depth_at < tile.depth && column_at < columns {
                if comptime!(transposed) {
                    weight = weight_at::<I, S>(values, scales, tile.group, column_at, depth_at, packing);
                } else {
                    weight = weight_at::<I, S>(values, scales, tile.group, depth_at, column_at, packing);
                }
            }
            right[step * PITCH + column] = weight;
        }
        sync_cube();
        multiply(&left, &right, &mut sums);
        sync_cube();
        at += DEPTH;
    }
    let line = out.stride(0);
    store::<F>(&sums, out, 0usize, line, tile.first, tile.end, first_column, columns);
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn dequantize_kernel<F: Float, I: Int, S: Float>(
    out: &mut [F],
    values: &[I],
    scales: &[S],
    count: usize,
    input: usize,
    output: usize,
    #[comptime] packing: Packing,
    #[define(F, I, S)] _dtypes: [ElemType; 3],
) {
    if ABSOLUTE_POS < count {
        let (line, column) = (ABSOLUTE_POS / output, ABSOLUTE_POS % output);
        let (group, row) = (line / input, line % input);
        out[ABSOLUTE_POS] = F::cast_from(weight_at::<I, S>(values, scales, group, row, column, packing));
    }
}

/// The kernels of this file as text.
#[cfg(all(test, feature = "kernel-text"))]
pub(super) fn kernels(on: &Dialect) -> Vec<Box<dyn CubeKernel>> {
    use super::text::{buffer, kernel, tensor};
    let mut list = Vec::new();
    for bits in [QuantBits::Four, QuantBits::Eight] {
        let shape = QuantizedShape { input: 256, output: 512, bits };
        let scales = shape.tiles() * shape.blocks() * QUANT_TILE;
        let packing = Packing { bits, blocks: shape.blocks(), value_bytes: shape.value_bytes(), scales };
        let dtypes = [on.float, on.byte, on.float];
        list.push(kernel!(
            on,
            256,
            dequantize_kernel::DequantizeKernel,
            buffer(),
            buffer(),
            buffer(),
            (),
            (),
            (),
            packing,
            dtypes
        ));
        for transposed in [false, true] {
            list.push(kernel!(
                on,
                UNITS,
                product_kernel::ProductKernel,
                tensor(),
                buffer(),
                buffer(),
                tensor(),
                buffer(),
                (),
                transposed,
                packing,
                dtypes
            ));
        }
    }
    list
}

//! Weights in 8 or 4 bits, for frozen models.
//!
//! A block of 32 consecutive inputs of one output has one scale of 16 bits: 8.5 or 4.5 bits a value, as GGUF's `Q8_0` and `Q4_0`
//! have. On the CPU rows are quantized too and products are sums of integers ([`moonlight_simd::quant`]); the backward pass
//! (`dX = dY W^T`) dequantizes a panel of a matrix at a time.
//!
//! Burn 0.22.1's own quantization was tried and is not used: on the CPU its 4-bit values take a byte each, and the product of a
//! float and a quantized tensor dequantizes the whole weight (all experts of a stack), which autodiff keeps until the backward
//! pass.

use std::sync::Arc;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Int, Tensor, TensorData, bf16, f16};
use moonlight_simd::quant::{QuantizedMatrix, quantize_tiles};
use rayon::prelude::*;

use crate::huge_pages;
use crate::kernels::{GroupLayout, QUANT_BLOCK, QUANT_TILE, quantized_matmul};
pub use crate::kernels::{QuantBits, QuantizedShape};
pub use moonlight_simd::quant::ScaleType;

/// A quantized matrix, or the quantized stack of a layer's experts.
#[derive(Module, Debug)]
pub struct QuantizedWeight {
    /// u8 `[experts, bytes]`, in the order of [`moonlight_simd::quant`].
    values: Param<Tensor<2, Int>>,
    /// f16 or bf16 `[experts, scales]`; f32 on devices without these types.
    scales: Param<Tensor<2>>,
    #[module(skip)]
    scale_type: ScaleType,
    #[module(skip)]
    shape: QuantizedShape,
}

impl QuantizedWeight {
    /// Quantizes `[experts, in, out]`, one expert at a time, so that the copy in f32 takes the memory of one expert.
    pub(crate) fn new(weight: Tensor<3>, bits: QuantBits) -> Self {
        let [experts, input, output] = weight.dims();
        let shape = QuantizedShape { bits, input, output };
        let device = weight.device();
        let weight = if weight.is_autodiff() { weight.inner() } else { weight };
        let (mut values, mut scales) =
            (huge_pages::zeros(experts * shape.value_bytes()), huge_pages::zeros(experts * shape.scales()));
        let parts = values.chunks_exact_mut(shape.value_bytes()).zip(scales.chunks_exact_mut(shape.scales()));
        for (expert, (values, scales)) in parts.enumerate() {
            let matrix = weight.clone().slice_dim(0, expert..expert + 1).cast(DType::F32).into_data();
            let matrix = matrix.as_slice::<f32>().expect("the matrix was cast to f32");
            let tiles = values
                .par_chunks_exact_mut(shape.blocks() * bits.tile_bytes())
                .zip(scales.par_chunks_exact_mut(shape.blocks() * QUANT_TILE));
            tiles.enumerate().for_each(|(tile, (values, scales))| {
                quantize_tiles(matrix, shape, ScaleType::F16, tile, values, scales);
            });
        }
        Self::from_parts(values, scales, ScaleType::F16, experts, shape, &device)
    }

    /// A weight from its values and scales, in the order of [`moonlight_simd::quant`], one expert after the other.
    ///
    /// # Panics
    ///
    /// If the numbers of values and scales are not those of `experts` matrices of the shape.
    pub fn from_parts(
        values: Vec<u8>,
        scales: Vec<u16>,
        scale_type: ScaleType,
        experts: usize,
        shape: QuantizedShape,
        device: &Device,
    ) -> Self {
        assert_eq!(values.len(), experts * shape.value_bytes(), "the bytes of the values must fit the shape");
        assert_eq!(scales.len(), experts * shape.scales(), "the number of scales must fit the shape");
        let dims = [experts, shape.scales()];
        let (scales, dtype) = match scale_type {
            ScaleType::F16 => (TensorData::new(bytemuck::allocation::cast_vec::<u16, f16>(scales), dims), DType::F16),
            ScaleType::Bf16 => {
                (TensorData::new(bytemuck::allocation::cast_vec::<u16, bf16>(scales), dims), DType::BF16)
            }
        };
        let dtype = if device.supports_dtype(dtype) { dtype } else { DType::F32 };
        let scales = Tensor::from_data(scales.convert_dtype(dtype), (device, dtype));
        let values = TensorData::new(values, [experts, shape.value_bytes()]);
        // WGSL has no byte type: on WGPU each byte is an integer of 32 bits.
        let dtype = if device.supports_dtype(DType::U8) { DType::U8 } else { DType::I32 };
        let values = Tensor::from_data(values.convert_dtype(dtype), (device, dtype));
        let scales = Param::from_tensor(scales).set_require_grad(false);
        Self { values: Param::initialized(ParamId::new(), values), scales, scale_type, shape }
    }

    /// The dequantized matrices, f32 `[experts, in, out]`.
    pub(crate) fn dequantized(&self) -> Tensor<3> {
        let QuantizedShape { input, output, .. } = self.shape;
        let [experts, _, _] = self.dims();
        let scales = self.scales.val();
        let device = scales.device();
        let values = self.values.val().into_data().convert::<u8>();
        let values = values.as_slice::<u8>().expect("the values were converted");
        // In f32 on devices without types of 16 bits: converting them back is exact.
        let scales = scales.into_data();
        let scales: Vec<u16> = match self.scale_type {
            ScaleType::F16 => scales.iter::<f16>().map(f16::to_bits).collect(),
            ScaleType::Bf16 => scales.iter::<bf16>().map(bf16::to_bits).collect(),
        };
        let mut weights = vec![0.0; experts * input * output];
        let matrices = weights.chunks_exact_mut(input * output);
        let parts = values.chunks_exact(self.shape.value_bytes()).zip(scales.chunks_exact(self.shape.scales()));
        for (weights, (values, scales)) in matrices.zip(parts) {
            let matrix = QuantizedMatrix::new(self.shape, self.scale_type, values, scales);
            weights.par_chunks_mut(QUANT_BLOCK * output).enumerate().for_each(|(block, rows)| {
                let width = self.shape.tiles() * QUANT_TILE;
                let mut panel = vec![0.0; QUANT_BLOCK * width];
                matrix.dequantize(0..self.shape.tiles(), block..block + 1, &mut panel);
                for (row, panel) in rows.chunks_exact_mut(output).zip(panel.chunks_exact(width)) {
                    row.copy_from_slice(&panel[..output]);
                }
            });
        }
        Tensor::from_data(TensorData::new(weights, [experts, input, output]), (&device, DType::F32))
    }

    /// `[experts, in, out]`.
    pub fn dims(&self) -> [usize; 3] {
        [self.scales.lazy_shape()[0], self.shape.input, self.shape.output]
    }

    /// The number of bits of a value.
    pub fn bits(&self) -> QuantBits {
        self.shape.bits
    }

    /// Values and scales, for kernels.
    pub(crate) fn parts(&self) -> (Tensor<2, Int>, Tensor<2>, QuantizedShape) {
        (self.values.val(), self.scales.val(), self.shape)
    }

    /// The weight as the kernel that decodes few tokens reads it; `None` if it cannot.
    #[cfg(feature = "cpu")]
    pub(crate) fn few_tokens(&self) -> Option<crate::kernels::few_tokens::Matrix> {
        let (values, scales, shape) = self.parts();
        crate::kernels::few_tokens::Matrix::quantized(values, scales, shape)
    }

    /// `x W` for a single matrix: `[rows, in]` to `[rows, out]`.
    pub(crate) fn product(&self, x: Tensor<2>) -> Tensor<2> {
        let [rows, _] = x.dims();
        self.grouped_product(x, &Arc::new(GroupLayout::uniform(1, rows)))
    }

    /// The grouped product: each row times the matrix of its expert, `[rows, in]` to `[rows, out]`.
    pub(crate) fn grouped_product(&self, rows: Tensor<2>, layout: &Arc<GroupLayout>) -> Tensor<2> {
        quantized_matmul(rows, self.values.val(), self.scales.val(), self.shape, layout)
    }

    /// The bytes of values and scales. On a device without types of 8 or 16 bits they take more.
    pub fn bytes(&self) -> usize {
        let [experts, _, _] = self.dims();
        experts * (self.shape.value_bytes() + 2 * self.shape.scales())
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, Tolerance};

    use super::*;

    fn weight(device: &Device) -> Tensor<3> {
        // 53 x 37: the last block and the last tile are filled.
        let drawn = Tensor::<3>::random([3, 53, 37], Distribution::Normal(0.0, 0.5), device);
        // An outlier, and an output whose first block is 0.
        let mut values: Vec<f32> = drawn.into_data().iter::<f32>().collect();
        values[70] = 40.0;
        (0..QUANT_BLOCK).for_each(|input| values[input * 37 + 5] = 0.0);
        Tensor::from_data(TensorData::new(values, [3, 53, 37]), device)
    }

    fn values(tensor: Tensor<3>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    #[test]
    fn quantizing_dequantized_values_changes_little() {
        let device = Device::default();
        for (bits, share, share_again) in [(QuantBits::Eight, 0.012, 1e-4), (QuantBits::Four, 0.14, 0.02)] {
            let weight = weight(&device);
            let quantized = QuantizedWeight::new(weight.clone(), bits);
            let (before, after) = (values(weight), values(quantized.dequantized()));
            let off = |a: &[f32], b: &[f32]| {
                let error: f32 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
                (error / b.iter().map(|b| b.powi(2)).sum::<f32>()).sqrt()
            };
            assert!(off(&after, &before) < share, "{}", off(&after, &before));
            let again = values(QuantizedWeight::new(quantized.dequantized(), bits).dequantized());
            assert!(off(&again, &after) < share_again, "{}", off(&again, &after));
        }
    }

    #[test]
    fn bytes_counts_what_the_tensors_hold() {
        let quantized = |bits| QuantizedWeight::new(weight(&Device::default()), bits);
        // 3 tiles of 2 blocks, each with 16 scales of 2 bytes.
        for (bits, per_block) in [(QuantBits::Eight, 544), (QuantBits::Four, 288)] {
            let quantized = quantized(bits);
            assert_eq!(quantized.bytes(), 3 * 3 * 2 * per_block);
            let held =
                quantized.values.val().into_data().bytes().len() + quantized.scales.val().into_data().bytes().len();
            assert_eq!(held, quantized.bytes());
        }
    }

    /// Rows are rounded to 127 steps of the largest in their block; the gradient is not, except to bf16.
    #[test]
    fn product_and_gradient_are_close_to_those_of_the_dequantized_matrix() {
        let device = Device::default().autodiff();
        let choices: Vec<u32> = (0..50).map(|slot| [0, 2, 2, 0, 2][slot % 5]).collect();
        let layout = Arc::new(GroupLayout::from_choices(&choices, 1, 3));
        for bits in [QuantBits::Eight, QuantBits::Four] {
            let quantized = QuantizedWeight::new(weight(&device), bits);
            let plain = quantized.dequantized();
            let run = |product: &dyn Fn(Tensor<2>) -> Tensor<2>| {
                let x = Tensor::<2>::ones([50, 53], &device).cumsum(0).cumsum(1).sin().require_grad();
                let y = product(x.clone());
                let weights = Tensor::<2>::ones([50, 37], &device).cumsum(1).cos();
                let gradients = (y.clone() * weights).sum().backward();
                (y.into_data(), x.grad(&gradients).unwrap().into_data())
            };
            let ours = run(&|x| quantized.grouped_product(x, &layout));
            let expected = run(&|x| crate::kernels::grouped_matmul(x, plain.clone(), &layout));
            // The outlier alone may move a result by half a step: 40 / 254.
            ours.0.assert_approx_eq(&expected.0, Tolerance::<f32>::rel_abs(1e-2, 0.2));
            ours.1.assert_approx_eq(&expected.1, Tolerance::<f32>::rel_abs(1e-2, 0.1));
        }
    }
}

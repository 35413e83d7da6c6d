//! Weights in 8 or 4 bits, for frozen models.
//!
//! A matrix is split into blocks of 64 consecutive values. A block has one f32 scale, its largest magnitude divided by the
//! largest integer, and its values are rounded to multiples of the scale: 8.5 or 4.5 bits a value, and an error of at most half
//! the scale. A matrix is dequantized only for its product, in the forward pass and again in the backward pass (`dX = dY W^T`),
//! one expert at a time.
//!
//! Burn 0.22.1's own quantization was tried and is not used: on the CPU its 4-bit values take a byte each, and the product of a
//! float and a quantized tensor dequantizes the whole weight (all experts of a stack), which autodiff keeps until the backward
//! pass.

use std::sync::Arc;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Int, Tensor};

pub use crate::kernels::QuantBits;
use crate::kernels::{GroupLayout, QUANT_BLOCK as BLOCK, QuantizedSpec, quantized_matmul};

/// A quantized matrix, or the quantized stack of a layer's experts.
#[derive(Module, Debug)]
pub struct QuantizedWeight {
    /// u8 `[experts, bytes]`.
    values: Param<Tensor<2, Int>>,
    /// f32 `[experts, blocks]`.
    scales: Param<Tensor<2>>,
    #[module(skip)]
    spec: QuantizedSpec,
}

impl QuantizedWeight {
    /// Quantizes `[experts, in, out]`, one expert at a time, so that the cast to f32 and the intermediate tensors take the memory of
    /// one expert.
    pub(crate) fn new(weight: Tensor<3>, bits: QuantBits) -> Self {
        let [experts, input, output] = weight.dims();
        let spec = QuantizedSpec { bits, input, output };
        // The quantized weight has no gradient, so the autodiff graph must not record these operations.
        let autodiff = weight.is_autodiff();
        let weight = if autodiff { weight.inner() } else { weight };
        let quantized: Vec<_> = (0..experts)
            .map(|expert| quantize(weight.clone().slice_dim(0, expert..expert + 1).cast(DType::F32), spec))
            .collect();
        let (values, scales): (Vec<_>, Vec<_>) = quantized.into_iter().unzip();
        let (values, scales) = (Tensor::cat(values, 0), Tensor::cat(scales, 0));
        let (values, scales) = match autodiff {
            true => (Tensor::from_inner(values), Tensor::from_inner(scales)),
            false => (values, scales),
        };
        let scales = Param::from_tensor(scales).set_require_grad(false);
        Self { values: Param::initialized(ParamId::new(), values), scales, spec }
    }

    /// The dequantized matrices, f32 `[experts, in, out]`.
    pub(crate) fn dequantized(&self) -> Tensor<3> {
        let QuantizedSpec { bits, input, output } = self.spec;
        let (values, scales) = (self.values.val(), self.scales.val());
        let [experts, blocks] = scales.dims();
        let matrices = (0..experts).map(|expert| {
            let bytes = values.clone().slice_dim(0, expert..expert + 1).float().cast(DType::F32);
            let bytes = bytes.reshape([blocks, bits.bytes(BLOCK)]);
            let integers = match bits {
                QuantBits::Eight => bytes,
                // A byte has value `i` of the block in its low half and value `i + 32` in its high half. They are split in f32, which
                // is exact for integers below 256.
                QuantBits::Four => {
                    let high = bytes.clone().div_scalar(16.0).floor();
                    Tensor::cat(vec![bytes - high.clone() * 16.0, high], 1)
                }
            };
            let scales = scales.clone().slice_dim(0, expert..expert + 1).reshape([blocks, 1]);
            let weight = (integers - f64::from(bits.zero())) * scales; // [blocks, BLOCK]
            weight.reshape([blocks * BLOCK]).slice_dim(0, 0..input * output).reshape([1, input, output])
        });
        Tensor::cat(matrices.collect(), 0)
    }

    /// `[experts, in, out]`.
    pub(crate) fn dims(&self) -> [usize; 3] {
        [self.scales.lazy_shape()[0], self.spec.input, self.spec.output]
    }

    /// The weight as the kernel that decodes few tokens reads it; `None` if it cannot.
    #[cfg(feature = "cpu")]
    pub(crate) fn few_tokens(&self) -> Option<crate::kernels::few_tokens::Matrix> {
        None
    }

    /// `x W` for a single matrix: `[rows, in]` to `[rows, out]`.
    pub(crate) fn product(&self, x: Tensor<2>) -> Tensor<2> {
        let [rows, _] = x.dims();
        self.grouped_product(x, &Arc::new(GroupLayout::uniform(1, rows)))
    }

    /// The grouped product: each row times the matrix of its expert, `[rows, in]` to `[rows, out]`.
    pub(crate) fn grouped_product(&self, rows: Tensor<2>, layout: &Arc<GroupLayout>) -> Tensor<2> {
        quantized_matmul(rows, self.values.val(), self.scales.val(), self.spec, layout)
    }

    /// The bytes of values and scales. On a device without a byte type, values take four times as many.
    pub fn bytes(&self) -> usize {
        let [experts, input, output] = self.dims();
        let blocks = (input * output).div_ceil(BLOCK);
        experts * blocks * (self.spec.bits.bytes(BLOCK) + size_of::<f32>())
    }
}

/// Quantizes one matrix `[1, in, out]` to bytes `[1, bytes]` and scales `[1, blocks]`.
fn quantize(weight: Tensor<3>, spec: QuantizedSpec) -> (Tensor<2, Int>, Tensor<2>) {
    let count = spec.input * spec.output;
    let blocks = count.div_ceil(BLOCK);
    let mut flat = weight.reshape([count]);
    // Fill the last block with zeros, which do not change its scale.
    if count < blocks * BLOCK {
        let padding = Tensor::zeros([blocks * BLOCK - count], (&flat.device(), DType::F32));
        flat = Tensor::cat(vec![flat, padding], 0);
    }
    let values = flat.reshape([blocks, BLOCK]);
    let scales = values.clone().abs().max_dim(1) / f64::from(spec.bits.largest());
    // A block of zeros has the scale 0. Dividing by 1 instead gives zeros and not NaN.
    let divisors = scales.clone().mask_fill(scales.clone().equal_elem(0.0), 1.0);
    let integers = (values / divisors).round() + f64::from(spec.bits.zero());
    let bytes = match spec.bits {
        QuantBits::Eight => integers,
        QuantBits::Four => {
            let half = BLOCK / 2;
            integers.clone().slice_dim(1, 0..half) + integers.slice_dim(1, half..BLOCK) * 16.0
        }
    };
    let bytes = bytes.reshape([1, blocks * spec.bits.bytes(BLOCK)]).int();
    // WGSL has no byte type: on WGPU each byte is an integer of 32 bits.
    let bytes = if bytes.device().supports_dtype(DType::U8) { bytes.cast(DType::U8) } else { bytes };
    (bytes, scales.reshape([1, blocks]))
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tolerance};

    use super::*;

    fn weight(device: &Device) -> Tensor<3> {
        // 23 x 37 values are 13.3 blocks, so the last block is padded.
        let drawn = Tensor::<3>::random([3, 23, 37], Distribution::Normal(0.0, 0.5), device);
        // An outlier and a block of zeros.
        let mut values: Vec<f32> = drawn.into_data().iter::<f32>().collect();
        values[70] = 40.0;
        values[128..192].fill(0.0);
        Tensor::from_data(burn::tensor::TensorData::new(values, [3, 23, 37]), device)
    }

    #[test]
    fn each_value_is_off_by_at_most_half_a_scale() {
        let device = Device::default();
        let weight = weight(&device);
        for (bits, largest) in [(QuantBits::Eight, 127.0), (QuantBits::Four, 7.0)] {
            let quantized = QuantizedWeight::new(weight.clone(), bits);
            let values = |tensor: Tensor<3>| tensor.into_data().iter::<f32>().collect::<Vec<_>>();
            let (before, after) = (values(weight.clone()), values(quantized.dequantized()));
            for (before, after) in before.chunks(23 * 37).zip(after.chunks(23 * 37)) {
                for (before, after) in before.chunks(BLOCK).zip(after.chunks(BLOCK)) {
                    let scale = before.iter().fold(0.0_f32, |most, value| most.max(value.abs())) / largest;
                    for (before, after) in before.iter().zip(after) {
                        assert!((before - after).abs() <= 0.5001 * scale, "{before} {after} {scale}");
                    }
                }
            }
            // Quantizing dequantized values again changes nothing.
            let again = values(QuantizedWeight::new(quantized.dequantized(), bits).dequantized());
            let off = again.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-5, "{off}");
        }
    }

    #[test]
    fn bytes_counts_what_the_tensors_hold() {
        let quantized = |bits| QuantizedWeight::new(weight(&Device::default()), bits);
        for (bits, per_block) in [(QuantBits::Eight, 68), (QuantBits::Four, 36)] {
            let quantized = quantized(bits);
            assert_eq!(quantized.bytes(), 3 * 14 * per_block);
            let held =
                quantized.values.val().into_data().bytes().len() + quantized.scales.val().into_data().bytes().len();
            assert_eq!(held, quantized.bytes());
        }
    }

    #[test]
    fn product_and_gradient_are_those_of_the_dequantized_matrix() {
        let device = Device::default().autodiff();
        let choices: Vec<u32> = (0..50).map(|slot| [0, 2, 2, 0, 2][slot % 5]).collect();
        let layout = Arc::new(GroupLayout::from_choices(&choices, 1, 3));
        for bits in [QuantBits::Eight, QuantBits::Four] {
            let quantized = QuantizedWeight::new(weight(&device), bits);
            let plain = quantized.dequantized();
            let run = |product: &dyn Fn(Tensor<2>) -> Tensor<2>| {
                let x = Tensor::<2>::ones([50, 23], &device).cumsum(0).sin().require_grad();
                let y = product(x.clone());
                let gradients = (y.clone() * y.clone().cos()).sum().backward();
                (y.into_data(), x.grad(&gradients).unwrap().into_data())
            };
            let ours = run(&|x| quantized.grouped_product(x, &layout));
            let expected = run(&|x| crate::kernels::grouped_matmul(x, plain.clone(), &layout));
            for (ours, expected) in [(ours.0, expected.0), (ours.1, expected.1)] {
                ours.assert_approx_eq(&expected, Tolerance::<f32>::rel_abs(1e-4, 1e-4));
            }
        }
    }
}

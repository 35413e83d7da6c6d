//! RMSNorm of rows, and its gradients.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use moonlight_simd::by_level;
use rayon::prelude::*;

use super::dtype::Element;
use super::math::dot;
use super::tensor::{by_dtype, dims, tensor_of, values_of, zeros};
use crate::kernels::{RmsNormKernel, reference};

impl RmsNormKernel for Flex {
    fn rms_norm_forward(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        by_dtype!(
            [x, gain],
            E => forward::<E>(&x, &gain, epsilon),
            reference::rms_norm_forward::<Self>(x, gain, epsilon)
        )
    }

    fn rms_norm_grad(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        output_grad: FloatTensor<Self>,
        epsilon: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        by_dtype!(
            [x, gain, output_grad],
            E => grad::<E>(&x, &gain, &output_grad, epsilon),
            reference::rms_norm_grad::<Self>(x, gain, output_grad, epsilon)
        )
    }
}

/// Rows of a task. The gradient of the gain adds one partial sum for each task, in order, so this constant fixes the order of the sum
/// whatever the number of threads.
const ROWS_PER_TASK: usize = 64;

fn forward<E: Element>(x: &FlexTensor, gain: &FlexTensor, epsilon: f32) -> FlexTensor {
    let [rows, width] = dims(x);
    let (x, gain) = (values_of::<E>(x), values_of::<E>(gain));
    let mut out = zeros::<E>(rows * width);
    out.par_chunks_mut(ROWS_PER_TASK * width).zip(x.par_chunks(ROWS_PER_TASK * width)).for_each(|(out, x)| {
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let inverse = inverse_rms(x, epsilon);
            scale(out, x, inverse, gain);
        }
    });
    tensor_of(out, [rows, width])
}

by_level! {
    /// The normalized value is rounded before it is multiplied by the gain, as in transformers.
    fn scale[E: Element](out: &mut [E], x: &[E], inverse: f32, gain: &[E]) {
        for ((out, x), gain) in out.iter_mut().zip(x).zip(gain) {
            *out = E::narrow(E::narrow(x.wide() * inverse).wide() * gain.wide());
        }
    }
}

fn grad<E: Element>(x: &FlexTensor, gain: &FlexTensor, grad: &FlexTensor, epsilon: f32) -> (FlexTensor, FlexTensor) {
    let [rows, width] = dims(x);
    let (x, gain, grad) = (values_of::<E>(x), values_of::<E>(gain), values_of::<E>(grad));
    let mut grad_x = zeros::<E>(rows * width);
    let partial_gains: Vec<Vec<f32>> = grad_x
        .par_chunks_mut(ROWS_PER_TASK * width)
        .zip(x.par_chunks(ROWS_PER_TASK * width).zip(grad.par_chunks(ROWS_PER_TASK * width)))
        .map(|(grad_x, (x, grad))| {
            let mut grad_gain = vec![0.0; width];
            let mut scaled = vec![0.0; width];
            let inputs = x.chunks_exact(width).zip(grad.chunks_exact(width));
            for (grad_x, (x, grad)) in grad_x.chunks_exact_mut(width).zip(inputs) {
                let inverse = inverse_rms(x, epsilon);
                for ((scaled, grad), gain) in scaled.iter_mut().zip(grad).zip(gain) {
                    *scaled = grad.wide() * gain.wide();
                }
                // mean(g gain n) of `reference::rms_norm_grad`
                let mean = dot(&scaled, x) * inverse / width as f32;
                for (((grad_x, &scaled), x), (grad_gain, grad)) in
                    grad_x.iter_mut().zip(&scaled).zip(x).zip(grad_gain.iter_mut().zip(grad))
                {
                    let normalized = x.wide() * inverse;
                    *grad_x = E::narrow(inverse * (scaled - normalized * mean));
                    *grad_gain += grad.wide() * normalized;
                }
            }
            grad_gain
        })
        .collect();
    let mut grad_gain = vec![0.0; width];
    for partial in partial_gains {
        for (sum, value) in grad_gain.iter_mut().zip(partial) {
            *sum += value;
        }
    }
    (tensor_of(grad_x, [rows, width]), tensor_of(E::rounded(grad_gain), [width]))
}

fn inverse_rms<E: Element>(x: &[E], epsilon: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + epsilon).sqrt()
}

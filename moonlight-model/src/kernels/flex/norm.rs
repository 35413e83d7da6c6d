//! RMS normalisation of rows.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::math::dot;
use super::{dims, tensor, values};

/// Rows of one task; also of one partial sum of the gain's gradient, so it does not depend on the threads.
const ROWS: usize = 64;

pub(super) fn forward(x: &FlexTensor, gain: &FlexTensor, epsilon: f32) -> FlexTensor {
    let [rows, width] = dims(x);
    let (x, gain) = (values(x), values(gain));
    let mut out = vec![0.0; rows * width];
    out.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).for_each(|(out, x)| {
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let inverse = inverse_rms(x, epsilon);
            for ((out, &x), &gain) in out.iter_mut().zip(x).zip(gain) {
                *out = x * inverse * gain;
            }
        }
    });
    tensor(out, [rows, width])
}

pub(super) fn grad(x: &FlexTensor, gain: &FlexTensor, grad: &FlexTensor, epsilon: f32) -> (FlexTensor, FlexTensor) {
    let [rows, width] = dims(x);
    let (x, gain, grad) = (values(x), values(gain), values(grad));
    let mut grad_x = vec![0.0; rows * width];
    let partial_gains: Vec<Vec<f32>> = grad_x
        .par_chunks_mut(ROWS * width)
        .zip(x.par_chunks(ROWS * width).zip(grad.par_chunks(ROWS * width)))
        .map(|(grad_x, (x, grad))| {
            let mut grad_gain = vec![0.0; width];
            let mut scaled = vec![0.0; width];
            let inputs = x.chunks_exact(width).zip(grad.chunks_exact(width));
            for (grad_x, (x, grad)) in grad_x.chunks_exact_mut(width).zip(inputs) {
                let inverse = inverse_rms(x, epsilon);
                for ((scaled, &grad), &gain) in scaled.iter_mut().zip(grad).zip(gain) {
                    *scaled = grad * gain;
                }
                let mean = dot(&scaled, x) * inverse / width as f32;
                for (((grad_x, &scaled), &x), (grad_gain, &grad)) in
                    grad_x.iter_mut().zip(&scaled).zip(x).zip(grad_gain.iter_mut().zip(grad))
                {
                    let normalised = x * inverse;
                    *grad_x = inverse * (scaled - normalised * mean);
                    *grad_gain += grad * normalised;
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
    (tensor(grad_x, [rows, width]), tensor(grad_gain, [width]))
}

fn inverse_rms(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + epsilon).sqrt()
}

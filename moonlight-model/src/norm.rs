//! RMS normalisation.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};

use crate::kernels::rms_norm;

/// `weight * x / sqrt(mean(x^2) + epsilon)` (arXiv 1910.07467), with f32 statistics whatever the dtype.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// The gain, `[width]`.
    pub weight: Param<Tensor<1>>,
    epsilon: f64,
}

impl RmsNorm {
    pub(crate) fn new(width: usize, epsilon: f64, device: &Device) -> Self {
        Self { weight: Initializer::Ones.init([width], device), epsilon }
    }

    /// Normalises each row of `[rows, width]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        rms_norm(x, self.weight.val(), self.epsilon)
    }
}

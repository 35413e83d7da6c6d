//! RMS normalisation.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::init::Init;
use crate::kernels::rms_norm;

/// The configuration of an [`RmsNorm`].
#[derive(Config, Debug, PartialEq)]
pub struct RmsNormConfig {
    /// Width of the rows.
    pub width: usize,
    /// Added to the mean of squares.
    #[config(default = 1e-5)]
    pub epsilon: f64,
}

impl RmsNormConfig {
    /// A norm with a gain of 1.
    pub fn init(&self, device: &Device) -> RmsNorm {
        RmsNorm::build(self.width, self.epsilon, Init::new(device))
    }
}

/// `weight * x / sqrt(mean(x^2) + epsilon)` (arXiv 1910.07467), with f32 statistics whatever the dtype.
///
/// Should be created with [`RmsNormConfig`].
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// The gain, `[width]`.
    pub weight: Param<Tensor<1>>,
    epsilon: f64,
}

impl RmsNorm {
    pub(crate) fn build(width: usize, epsilon: f64, init: Init<'_>) -> Self {
        Self { weight: init.gain(width), epsilon }
    }

    /// Normalises each row.
    ///
    /// # Shapes
    ///
    /// `[.., width]` to the same.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let shape = x.shape();
        let [width] = self.weight.lazy_shape().dims();
        let rows = shape.num_elements() / width.max(1);
        self.forward_rows(x.reshape([rows, width])).reshape(shape)
    }

    /// `[rows, width]` to the same.
    pub(crate) fn forward_rows(&self, x: Tensor<2>) -> Tensor<2> {
        rms_norm(x, self.weight.val(), self.epsilon)
    }
}

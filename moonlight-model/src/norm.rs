//! RMSNorm.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::init::Init;
#[cfg(feature = "cpu")]
use crate::kernels::few_tokens;
use crate::kernels::rms_norm;

/// The config of an [`RmsNorm`].
#[derive(Config, Debug, PartialEq)]
pub struct RmsNormConfig {
    /// Size of the dimension that is normalized.
    pub width: usize,
    /// Added to the mean of squares before the root.
    #[config(default = 1e-5)]
    pub epsilon: f64,
}

impl RmsNormConfig {
    /// Initializes a norm with a gain of 1.
    pub fn init(&self, device: &Device) -> RmsNorm {
        RmsNorm::build(self.width, self.epsilon, Init::new(device))
    }
}

/// `weight * x / sqrt(mean(x^2) + epsilon)` over the last dimension (arXiv 1910.07467).
///
/// Unlike `burn::nn::RmsNorm`, statistics are computed in f32 in every dtype, and the normalized value is rounded to the dtype of
/// `x` before it is multiplied by the gain, as in transformers.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use moonlight_model::RmsNormConfig;
///
/// let device = Device::default();
/// let norm = RmsNormConfig::new(2).with_epsilon(1e-6).init(&device);
/// let y = norm.forward(Tensor::<1>::from_data([3.0, -3.0], &device));
/// assert!((y.max().into_scalar::<f32>() - 1.0).abs() < 1e-5);
/// ```
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

    /// Normalizes the last dimension.
    ///
    /// # Shapes
    ///
    /// - x, output: `[.., width]`
    ///
    /// # Panics
    ///
    /// If the last dimension is not `width`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let shape = x.shape();
        let [width] = self.weight.lazy_shape().dims();
        let rows = shape.num_elements() / width.max(1);
        self.forward_rows(x.reshape([rows, width])).reshape(shape)
    }

    /// The norm as the kernel that decodes few tokens reads it; `None` if it cannot.
    #[cfg(feature = "cpu")]
    pub(crate) fn few_tokens(&self) -> Option<few_tokens::Norm> {
        Some(few_tokens::Norm { gain: few_tokens::vector(self.weight.val())?, epsilon: self.epsilon as f32 })
    }

    /// [`forward`](Self::forward) over `[rows, width]`.
    pub(crate) fn forward_rows(&self, x: Tensor<2>) -> Tensor<2> {
        rms_norm(x, self.weight.val(), self.epsilon)
    }
}

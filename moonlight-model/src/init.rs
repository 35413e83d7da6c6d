//! Fresh parameters: normal with the configured standard deviation, biases zero, drawn when first used.

use burn::module::{Initializer, Param};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::tensor::{Device, Tensor};

use crate::projection::Projection;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Init {
    pub(crate) standard_deviation: f64,
}

impl Init {
    fn normal(self) -> Initializer {
        Initializer::Normal { mean: 0.0, std: self.standard_deviation }
    }

    pub(crate) fn parameter<const D: usize>(self, shape: [usize; D], device: &Device) -> Param<Tensor<D>> {
        self.normal().init(shape, device)
    }

    pub(crate) fn projection(self, input: usize, output: usize, bias: bool, device: &Device) -> Projection {
        Projection {
            weight: self.parameter([input, output], device),
            bias: bias.then(|| Initializer::Zeros.init([output], device)),
            lora: None,
            quantized: None,
        }
    }

    pub(crate) fn head(self, input: usize, output: usize, device: &Device) -> Linear {
        LinearConfig::new(input, output).with_bias(false).with_initializer(self.normal()).init(device)
    }

    pub(crate) fn embedding(self, rows: usize, width: usize, device: &Device) -> Embedding {
        EmbeddingConfig::new(rows, width).with_initializer(self.normal()).init(device)
    }
}

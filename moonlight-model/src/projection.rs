//! A linear layer of the decoder, with or without a low-rank adapter beside it.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::kernels::project;
use crate::lora::LowRank;
use crate::quantization::QuantizedWeight;

/// `x W + bias`, and where it has an adapter, `+ s x A B` beside it.
#[derive(Module, Debug)]
pub struct Projection {
    /// `[in, out]`; a single zero where the weight is quantized.
    pub weight: Param<Tensor<2>>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// What is trained in place of the weight, where there is one.
    pub lora: Option<LowRank<2>>,
    /// The weight in few bits, where it is.
    pub quantized: Option<QuantizedWeight>,
}

impl Projection {
    /// `[rows, in]` to `[rows, out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.lora {
            None => self.base(x),
            Some(lora) => self.base(x.clone()) + lora.forward(x),
        }
    }

    /// Without the adapter.
    fn base(&self, x: Tensor<2>) -> Tensor<2> {
        let product = match &self.quantized {
            None => project(x, self.weight.val()),
            Some(quantized) => quantized.product(x),
        };
        match &self.bias {
            None => product,
            Some(bias) => product + bias.val().unsqueeze(),
        }
    }

    /// The weight that the layer acts by, its adapter included: `[in, out]`, in the dtype of the weight.
    pub fn effective_weight(&self) -> Tensor<2> {
        let weight = match &self.quantized {
            None => self.weight.val(),
            Some(quantized) => quantized.dequantized().squeeze_dim(0).cast(self.weight.val().dtype()),
        };
        match &self.lora {
            None => weight,
            Some(lora) => lora.merged_into(weight),
        }
    }
}

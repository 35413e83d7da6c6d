//! A linear layer of the decoder, with or without a low-rank adapter beside it.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::module::linear;

use crate::lora::LowRank;

/// `x W + bias`, and where it has an adapter, `+ s x A B` beside it.
#[derive(Module, Debug)]
pub struct Projection {
    /// `[in, out]`.
    pub weight: Param<Tensor<2>>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// What is trained in place of the weight, where there is one.
    pub lora: Option<LowRank<2>>,
}

impl Projection {
    /// `[rows, in]` to `[rows, out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let bias = self.bias.as_ref().map(|bias| bias.val());
        match &self.lora {
            None => linear(x, self.weight.val(), bias),
            Some(lora) => linear(x.clone(), self.weight.val(), bias) + lora.forward(x),
        }
    }

    /// The weight that the layer acts by, its adapter included: `[in, out]`, in the dtype of the weight.
    pub fn effective_weight(&self) -> Tensor<2> {
        match &self.lora {
            None => self.weight.val(),
            Some(lora) => lora.merged_into(self.weight.val()),
        }
    }
}

//! The routed experts, stacked.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::config::MoeShape;
use crate::init::Init;
use crate::kernels::{GroupLayout, grouped_matmul, swiglu};
use crate::lora::LowRank;
use crate::quantization::QuantizedWeight;

/// One `[experts, in, out]` parameter for each projection; each expert multiplies only its own rows.
#[derive(Module, Debug)]
pub struct Experts {
    /// `[experts, hidden, width]`.
    pub gate_proj: Param<Tensor<3>>,
    /// `[experts, hidden, width]`.
    pub up_proj: Param<Tensor<3>>,
    /// `[experts, width, hidden]`.
    pub down_proj: Param<Tensor<3>>,
    /// What is trained in place of `gate_proj`, where there is one.
    pub gate_lora: Option<LowRank<3>>,
    /// What is trained in place of `up_proj`.
    pub up_lora: Option<LowRank<3>>,
    /// What is trained in place of `down_proj`.
    pub down_lora: Option<LowRank<3>>,
    /// `gate_proj` in few bits, where it is; the weight is a single zero then.
    pub gate_quantized: Option<QuantizedWeight>,
    /// `up_proj` in few bits.
    pub up_quantized: Option<QuantizedWeight>,
    /// `down_proj` in few bits.
    pub down_quantized: Option<QuantizedWeight>,
}

impl Experts {
    pub(super) fn new(hidden: usize, moe: &MoeShape, init: Init, device: &Device) -> Self {
        let (experts, width) = (moe.n_routed_experts, moe.moe_intermediate_size);
        Self {
            gate_proj: init.parameter([experts, hidden, width], device),
            up_proj: init.parameter([experts, hidden, width], device),
            down_proj: init.parameter([experts, width, hidden], device),
            gate_lora: None,
            up_lora: None,
            down_lora: None,
            gate_quantized: None,
            up_quantized: None,
            down_quantized: None,
        }
    }

    /// `[rows, hidden]`, sorted by expert as `plan` says, to `[rows, hidden]`.
    pub fn forward(&self, rows: Tensor<2>, plan: &Arc<GroupLayout>) -> Tensor<2> {
        let gate = (&self.gate_proj, self.gate_quantized.as_ref(), self.gate_lora.as_ref());
        let up = (&self.up_proj, self.up_quantized.as_ref(), self.up_lora.as_ref());
        let down = (&self.down_proj, self.down_quantized.as_ref(), self.down_lora.as_ref());
        let (gate, up) = (project(rows.clone(), gate, plan), project(rows, up, plan));
        project(swiglu(gate, up), down, plan)
    }
}

fn project(
    rows: Tensor<2>,
    (weight, quantized, lora): (&Param<Tensor<3>>, Option<&QuantizedWeight>, Option<&LowRank<3>>),
    plan: &Arc<GroupLayout>,
) -> Tensor<2> {
    let base = |rows| match quantized {
        None => grouped_matmul(rows, weight.val(), plan),
        Some(quantized) => quantized.grouped_product(rows, plan),
    };
    match lora {
        None => base(rows),
        Some(lora) => base(rows.clone()) + lora.forward(rows, plan),
    }
}

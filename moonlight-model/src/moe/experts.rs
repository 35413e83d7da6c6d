//! The routed experts, stacked.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::config::MoeConfig;
use crate::init::Init;
use crate::kernels::{ExpertPlan, grouped_matmul, swiglu};
use crate::lora::LowRank;

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
}

impl Experts {
    pub(super) fn new(hidden: usize, moe: &MoeConfig, init: Init, device: &Device) -> Self {
        let (experts, width) = (moe.n_routed_experts, moe.moe_intermediate_size);
        Self {
            gate_proj: init.parameter([experts, hidden, width], device),
            up_proj: init.parameter([experts, hidden, width], device),
            down_proj: init.parameter([experts, width, hidden], device),
            gate_lora: None,
            up_lora: None,
            down_lora: None,
        }
    }

    /// `[rows, hidden]`, sorted by expert as `plan` says, to `[rows, hidden]`.
    pub fn forward(&self, rows: Tensor<2>, plan: &Arc<ExpertPlan>) -> Tensor<2> {
        let gate = project(rows.clone(), &self.gate_proj, self.gate_lora.as_ref(), plan);
        let up = project(rows, &self.up_proj, self.up_lora.as_ref(), plan);
        project(swiglu(gate, up), &self.down_proj, self.down_lora.as_ref(), plan)
    }
}

fn project(rows: Tensor<2>, weight: &Param<Tensor<3>>, lora: Option<&LowRank<3>>, plan: &Arc<ExpertPlan>) -> Tensor<2> {
    match lora {
        None => grouped_matmul(rows, weight.val(), plan),
        Some(lora) => grouped_matmul(rows.clone(), weight.val(), plan) + lora.forward(rows, plan),
    }
}

//! The routed experts, stacked.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::config::MoeConfig;
use crate::init::Init;
use crate::kernels::{ExpertPlan, grouped_matmul, swiglu};

/// One `[experts, in, out]` parameter for each projection; each expert multiplies only its own rows.
#[derive(Module, Debug)]
pub struct Experts {
    /// `[experts, hidden, width]`.
    pub gate_proj: Param<Tensor<3>>,
    /// `[experts, hidden, width]`.
    pub up_proj: Param<Tensor<3>>,
    /// `[experts, width, hidden]`.
    pub down_proj: Param<Tensor<3>>,
}

impl Experts {
    pub(super) fn new(hidden: usize, moe: &MoeConfig, init: Init, device: &Device) -> Self {
        let (experts, width) = (moe.n_routed_experts, moe.moe_intermediate_size);
        Self {
            gate_proj: init.parameter([experts, hidden, width], device),
            up_proj: init.parameter([experts, hidden, width], device),
            down_proj: init.parameter([experts, width, hidden], device),
        }
    }

    /// `[rows, hidden]`, sorted by expert as `plan` says, to `[rows, hidden]`.
    pub fn forward(&self, rows: Tensor<2>, plan: &Arc<ExpertPlan>) -> Tensor<2> {
        let gate = grouped_matmul(rows.clone(), self.gate_proj.val(), plan);
        let up = grouped_matmul(rows, self.up_proj.val(), plan);
        grouped_matmul(swiglu(gate, up), self.down_proj.val(), plan)
    }
}

//! The gated MLP of dense layers and shared experts.

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use crate::init::Init;
use crate::kernels::swiglu;
use crate::projection::Projection;

/// `down(silu(gate(x)) * up(x))` (arXiv 2002.05202).
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[hidden, width]`.
    pub gate_proj: Projection,
    /// `[hidden, width]`.
    pub up_proj: Projection,
    /// `[width, hidden]`.
    pub down_proj: Projection,
}

impl Mlp {
    pub(crate) fn new(hidden: usize, width: usize, init: Init, device: &Device) -> Self {
        Self {
            gate_proj: init.projection(hidden, width, false, device),
            up_proj: init.projection(hidden, width, false, device),
            down_proj: init.projection(width, hidden, false, device),
        }
    }

    /// `[tokens, hidden]` to `[tokens, hidden]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let gate = self.gate_proj.forward(x.clone());
        self.down_proj.forward(swiglu(gate, self.up_proj.forward(x)))
    }
}

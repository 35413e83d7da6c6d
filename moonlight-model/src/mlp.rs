//! The gated MLP (SwiGLU) of dense layers and shared experts.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Tensor};

use crate::init::Init;
#[cfg(feature = "cpu")]
use crate::kernels::few_tokens;
use crate::kernels::swiglu;
use crate::parameter::{MlpRole, ProjectionRole};
use crate::projection::{Projection, projections_of_fields};

/// The config of an [`Mlp`].
#[derive(Config, Debug, PartialEq)]
pub struct MlpConfig {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Width of the gated product between the projections.
    pub intermediate_size: usize,
    /// Whether the three projections have biases.
    #[config(default = false)]
    pub bias: bool,
    /// Standard deviation of initialized weights.
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl MlpConfig {
    /// Initializes an MLP. A parameter is drawn when it is first read.
    pub fn init(&self, device: &Device) -> Mlp {
        self.build(Init::new(device), ProjectionRole::Mlp)
    }

    pub(crate) fn build(&self, init: Init<'_>, role: impl Fn(MlpRole) -> ProjectionRole) -> Mlp {
        let (hidden, width) = (self.hidden_size, self.intermediate_size);
        let projection = |part, shape| init.projection(role(part), shape, self.bias, self.initializer_range);
        Mlp {
            gate_proj: projection(MlpRole::Gate, [hidden, width]),
            up_proj: projection(MlpRole::Up, [hidden, width]),
            down_proj: projection(MlpRole::Down, [width, hidden]),
        }
    }
}

/// `down(silu(gate(x)) * up(x))` (SwiGLU, arXiv 2002.05202).
///
/// Should be created with [`MlpConfig`].
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[hidden, intermediate]`.
    pub gate_proj: Projection,
    /// `[hidden, intermediate]`.
    pub up_proj: Projection,
    /// `[intermediate, hidden]`.
    pub down_proj: Projection,
}

projections_of_fields!(Mlp { gate_proj, up_proj, down_proj });

impl Mlp {
    /// Applies the MLP to each token.
    ///
    /// # Shapes
    ///
    /// - x, output: `[batch, sequence, hidden]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let shape @ [batch, sequence, hidden] = x.dims();
        self.forward_rows(x.reshape([batch * sequence, hidden])).reshape(shape)
    }

    /// The MLP as the kernel that decodes few tokens reads it; `None` if it cannot.
    #[cfg(feature = "cpu")]
    pub(crate) fn few_tokens(&self) -> Option<few_tokens::Gated> {
        Some(few_tokens::Gated {
            gate: self.gate_proj.few_tokens()?,
            up: self.up_proj.few_tokens()?,
            down: self.down_proj.few_tokens()?,
        })
    }

    /// [`forward`](Self::forward) over `[tokens, hidden]`.
    pub(crate) fn forward_rows(&self, x: Tensor<2>) -> Tensor<2> {
        let gate = self.gate_proj.forward(x.clone());
        self.down_proj.forward(swiglu(gate, self.up_proj.forward(x)))
    }
}

//! The routed experts, stacked.

use std::sync::Arc;

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::init::Init;
use crate::kernels::{GroupLayout, grouped_matmul, swiglu};
use crate::lora::low_rank::LowRank;
use crate::parameter::{MlpRole, ProjectionRole};
use crate::projection::{LayerProjection, ProjectionMut, ProjectionRef, Projections, WeightMut, WeightRef};
use crate::quantization::QuantizedWeight;

/// The configuration of [`Experts`].
#[derive(Config, Debug, PartialEq)]
pub struct ExpertsConfig {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Number of experts.
    pub n_routed_experts: usize,
    /// Width of one expert's MLP.
    pub moe_intermediate_size: usize,
    /// Standard deviation of fresh weights.
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl ExpertsConfig {
    /// Experts with fresh parameters, drawn when they are first used.
    pub fn init(&self, device: &Device) -> Experts {
        self.build(Init::new(device))
    }

    pub(crate) fn build(&self, init: Init<'_>) -> Experts {
        let (experts, hidden, width) = (self.n_routed_experts, self.hidden_size, self.moe_intermediate_size);
        let projection = |role, shape| init.experts(role, shape, self.initializer_range);
        Experts {
            gate_proj: projection(MlpRole::Gate, [experts, hidden, width]),
            up_proj: projection(MlpRole::Up, [experts, hidden, width]),
            down_proj: projection(MlpRole::Down, [experts, width, hidden]),
            gate_lora: None,
            up_lora: None,
            down_lora: None,
            gate_quantized: None,
            up_quantized: None,
            down_quantized: None,
        }
    }
}

/// One `[experts, in, out]` parameter for each projection; each expert multiplies only its own rows.
///
/// Should be created with [`ExpertsConfig`].
#[derive(Module, Debug)]
pub struct Experts {
    /// `[experts, hidden, width]`.
    pub gate_proj: Param<Tensor<3>>,
    /// `[experts, hidden, width]`.
    pub up_proj: Param<Tensor<3>>,
    /// `[experts, width, hidden]`.
    pub down_proj: Param<Tensor<3>>,
    /// The adapter that is trained in place of `gate_proj`.
    pub gate_lora: Option<LowRank<3>>,
    /// The same for `up_proj`.
    pub up_lora: Option<LowRank<3>>,
    /// The same for `down_proj`.
    pub down_lora: Option<LowRank<3>>,
    /// `gate_proj` in 8 or 4 bits; the weight is a single zero then.
    pub gate_quantized: Option<QuantizedWeight>,
    /// The same for `up_proj`.
    pub up_quantized: Option<QuantizedWeight>,
    /// The same for `down_proj`.
    pub down_quantized: Option<QuantizedWeight>,
}

impl Experts {
    /// # Shapes
    ///
    /// `[rows, hidden]`, sorted by expert as `layout` says, to the same.
    pub fn forward(&self, rows: Tensor<2>, layout: &Arc<GroupLayout>) -> Tensor<2> {
        let gate = (&self.gate_proj, self.gate_quantized.as_ref(), self.gate_lora.as_ref());
        let up = (&self.up_proj, self.up_quantized.as_ref(), self.up_lora.as_ref());
        let down = (&self.down_proj, self.down_quantized.as_ref(), self.down_lora.as_ref());
        let (gate, up) = (project(rows.clone(), gate, layout), project(rows, up, layout));
        project(swiglu(gate, up), down, layout)
    }
}

impl Projections for Experts {
    fn projections<'a>(&'a self, path: &mut Vec<&'static str>, list: &mut Vec<LayerProjection<ProjectionRef<'a>>>) {
        let Self { gate_lora, up_lora, down_lora, gate_quantized, up_quantized, down_quantized, .. } = self;
        for (name, role, quantized, lora) in [
            ("gate_proj", MlpRole::Gate, gate_quantized, gate_lora),
            ("up_proj", MlpRole::Up, up_quantized, up_lora),
            ("down_proj", MlpRole::Down, down_quantized, down_lora),
        ] {
            list.push(layer_projection(
                path,
                name,
                role,
                ProjectionRef::Experts(WeightRef { quantized: Some(quantized), lora }),
            ));
        }
    }

    fn projections_mut<'a>(
        &'a mut self,
        path: &mut Vec<&'static str>,
        list: &mut Vec<LayerProjection<ProjectionMut<'a>>>,
    ) {
        let Self { gate_proj, up_proj, down_proj, .. } = self;
        for (name, role, weight, quantized, lora) in [
            ("gate_proj", MlpRole::Gate, gate_proj, &mut self.gate_quantized, &mut self.gate_lora),
            ("up_proj", MlpRole::Up, up_proj, &mut self.up_quantized, &mut self.up_lora),
            ("down_proj", MlpRole::Down, down_proj, &mut self.down_quantized, &mut self.down_lora),
        ] {
            list.push(layer_projection(
                path,
                name,
                role,
                ProjectionMut::Experts(WeightMut { weight, quantized: Some(quantized), lora }),
            ));
        }
    }
}

fn layer_projection<P>(path: &[&'static str], name: &'static str, role: MlpRole, projection: P) -> LayerProjection<P> {
    LayerProjection { fields: [path, &[name]].concat(), role: ProjectionRole::Experts(role), projection }
}

fn project(
    rows: Tensor<2>,
    (weight, quantized, lora): (&Param<Tensor<3>>, Option<&QuantizedWeight>, Option<&LowRank<3>>),
    layout: &Arc<GroupLayout>,
) -> Tensor<2> {
    let base = |rows| match quantized {
        None => grouped_matmul(rows, weight.val(), layout),
        Some(quantized) => quantized.grouped_product(rows, layout),
    };
    match lora {
        None => base(rows),
        Some(lora) => base(rows.clone()) + lora.forward(rows, layout),
    }
}

//! [`Experts`]: the routed experts, with their weights stacked.

use std::sync::Arc;

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::init::Init;
#[cfg(feature = "cpu")]
use crate::kernels::few_tokens;
use crate::kernels::{GroupLayout, grouped_matmul, swiglu};
use crate::lora::low_rank::LowRank;
use crate::parameter::{MlpRole, ProjectionRole};
use crate::projection::{LayerProjection, ProjectionMut, ProjectionRef, Projections, WeightMut, WeightRef};
use crate::quantization::QuantizedWeight;

/// The config of [`Experts`].
#[derive(Config, Debug, PartialEq)]
pub struct ExpertsConfig {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Number of routed experts.
    pub n_routed_experts: usize,
    /// Width of the MLP of one expert.
    pub moe_intermediate_size: usize,
    /// Standard deviation of initialized weights.
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl ExpertsConfig {
    /// Initializes the experts. A parameter is drawn when it is first read.
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

/// A stack of gated MLPs. Each projection is one parameter `[experts, in, out]`, so that one grouped product computes all experts
/// and an optimizer has one parameter instead of one for each expert.
///
/// ```
/// use std::sync::Arc;
///
/// use burn::tensor::{Device, Distribution, Tensor};
/// use moonlight_model::ExpertsConfig;
/// use moonlight_model::kernels::{GroupLayout, dispatch_rows};
///
/// let device = Device::default();
/// let experts = ExpertsConfig::new(64, 4, 32).init(&device);
/// // Two tokens: the first goes to experts 0 and 3, the second to 1 and 3.
/// let layout = Arc::new(GroupLayout::from_choices(&[0, 3, 1, 3], 2, 4));
/// let x = Tensor::<2>::random([2, 64], Distribution::Default, &device);
/// let rows = experts.forward(dispatch_rows(x, &layout), &layout);
/// assert_eq!(rows.dims(), [4, 64]);
/// ```
///
/// Should be created with [`ExpertsConfig`].
#[derive(Module, Debug)]
pub struct Experts {
    /// `[experts, hidden, intermediate]`.
    pub gate_proj: Param<Tensor<3>>,
    /// `[experts, hidden, intermediate]`.
    pub up_proj: Param<Tensor<3>>,
    /// `[experts, intermediate, hidden]`.
    pub down_proj: Param<Tensor<3>>,
    /// The adapter of `gate_proj`, which is trained instead of the weight.
    pub gate_lora: Option<LowRank<3>>,
    /// The adapter of `up_proj`.
    pub up_lora: Option<LowRank<3>>,
    /// The adapter of `down_proj`.
    pub down_lora: Option<LowRank<3>>,
    /// `gate_proj` in 8 or 4 bits; `gate_proj` itself is then a `[1, 1, 1]` zero.
    pub gate_quantized: Option<QuantizedWeight>,
    /// `up_proj` in 8 or 4 bits.
    pub up_quantized: Option<QuantizedWeight>,
    /// `down_proj` in 8 or 4 bits.
    pub down_quantized: Option<QuantizedWeight>,
}

impl Experts {
    /// Applies the MLP of its expert to each row.
    ///
    /// # Shapes
    ///
    /// - rows, output: `[rows, hidden]`, sorted by expert as in `layout`
    ///
    /// # Panics
    ///
    /// If `layout` has another number of rows or groups.
    pub fn forward(&self, rows: Tensor<2>, layout: &Arc<GroupLayout>) -> Tensor<2> {
        let gate = (&self.gate_proj, self.gate_quantized.as_ref(), self.gate_lora.as_ref());
        let up = (&self.up_proj, self.up_quantized.as_ref(), self.up_lora.as_ref());
        let down = (&self.down_proj, self.down_quantized.as_ref(), self.down_lora.as_ref());
        let (gate, up) = (project(rows.clone(), gate, layout), project(rows, up, layout));
        project(swiglu(gate, up), down, layout)
    }
}

#[cfg(feature = "cpu")]
impl Experts {
    /// The experts as the kernel that decodes few tokens reads them; `None` if it cannot, or with an adapter.
    pub(super) fn few_tokens(&self) -> Option<few_tokens::Gated> {
        if self.gate_lora.is_some() || self.up_lora.is_some() || self.down_lora.is_some() {
            return None;
        }
        let matrix = |weight: &Param<Tensor<3>>, quantized: &Option<QuantizedWeight>| match quantized {
            None => few_tokens::Matrix::new(weight.val()),
            Some(quantized) => quantized.few_tokens(),
        };
        Some(few_tokens::Gated {
            gate: matrix(&self.gate_proj, &self.gate_quantized)?,
            up: matrix(&self.up_proj, &self.up_quantized)?,
            down: matrix(&self.down_proj, &self.down_quantized)?,
        })
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

/// One projection of all experts, with its adapter if it has one: `[rows, in]` to `[rows, out]`.
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

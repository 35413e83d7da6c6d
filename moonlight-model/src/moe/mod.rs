//! The mixture of experts: router, routed experts, shared experts, and how the load is kept in balance.

mod balance;
mod experts;
mod router;
pub(crate) mod shape;

use std::sync::Arc;

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Tensor};

use crate::forward::ForwardContext;
use crate::init::Init;
use crate::kernels::{GroupLayout, combine_rows, dispatch_rows};
use crate::mlp::{Mlp, MlpConfig};
use crate::parameter::ProjectionRole;
use crate::projection::projections_of_fields;

pub(crate) use balance::bias_step;
pub use experts::{Experts, ExpertsConfig};
pub use router::{Router, RouterConfig, RouterOutput};

/// The configuration of a [`Moe`], by the names of `config.json`.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use moonlight_model::{ForwardContext, MoeConfig, RouterConfig};
///
/// let device = Device::default();
/// // Eight experts, two of them for each token, each 32 wide; beside them one that every token visits.
/// let moe = MoeConfig::new(RouterConfig::new(64, 8, 2), 32).with_n_shared_experts(1).init(&device);
/// let x = Tensor::<3>::random([2, 10, 64], Distribution::Default, &device);
/// let output = moe.forward(x, &ForwardContext::without_positions([2, 10]));
/// assert_eq!(output.hidden.dims(), [2, 10, 64]);
/// assert_eq!(output.load.iter().sum::<u64>(), 2 * 10 * 2);
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct MoeConfig {
    /// Chooses each token's experts.
    pub router: RouterConfig,
    /// Width of one expert's MLP.
    pub moe_intermediate_size: usize,
    /// Number of shared experts, built as one MLP of this many times the width; 0 for none.
    #[config(default = 0)]
    pub n_shared_experts: usize,
    /// Standard deviation of the experts' fresh weights.
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl MoeConfig {
    /// A mixture with fresh parameters, drawn when they are first used.
    ///
    /// # Panics
    ///
    /// Where [`RouterConfig::init`] does.
    pub fn init(&self, device: &Device) -> Moe {
        self.build(Init::new(device))
    }

    /// The routed experts.
    pub fn experts(&self) -> ExpertsConfig {
        let RouterConfig { hidden_size, n_routed_experts, .. } = self.router;
        ExpertsConfig::new(hidden_size, n_routed_experts, self.moe_intermediate_size)
            .with_initializer_range(self.initializer_range)
    }

    /// The shared experts as one MLP; `None` where there are none.
    pub fn shared_experts(&self) -> Option<MlpConfig> {
        let width = self.n_shared_experts * self.moe_intermediate_size;
        let config = MlpConfig::new(self.router.hidden_size, width).with_initializer_range(self.initializer_range);
        (width > 0).then_some(config)
    }

    pub(crate) fn build(&self, init: Init<'_>) -> Moe {
        Moe {
            router: self.router.build(init),
            experts: self.experts().build(init),
            shared_experts: self.shared_experts().map(|shared| shared.build(init, ProjectionRole::SharedExperts)),
        }
    }
}

/// `sum_k w_k expert_k(x) + shared(x)` (DeepSeekMoE, arXiv 2401.06066).
///
/// Should be created with [`MoeConfig`].
#[derive(Module, Debug)]
pub struct Moe {
    /// Chooses each token's experts and their weights.
    pub router: Router,
    /// The routed experts.
    pub experts: Experts,
    /// The experts that every token visits, as one MLP.
    pub shared_experts: Option<Mlp>,
}

projections_of_fields!(Moe { router, experts, shared_experts });

/// What comes out of a mixture layer.
#[derive(Debug)]
pub struct MoeOutput<const D: usize> {
    /// `[batch, sequence, hidden]`.
    pub hidden: Tensor<D>,
    /// Tokens that chose each routed expert; padding does not count.
    pub load: Vec<u64>,
    /// The weighted sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20), f32 `[1]`; `None`
    /// where the context's weight is 0.
    pub balance_loss: Option<Tensor<1>>,
}

impl Moe {
    /// # Shapes
    ///
    /// `[batch, sequence, hidden]` to the same.
    ///
    /// # Panics
    ///
    /// When the context is of another batch or sequence length.
    pub fn forward(&self, x: Tensor<3>, context: &ForwardContext) -> MoeOutput<3> {
        let shape @ [batch, sequence, hidden] = x.dims();
        context.check([batch, sequence]);
        let MoeOutput { hidden, load, balance_loss } =
            self.forward_rows(x.reshape([batch * sequence, hidden]), context);
        MoeOutput { hidden: hidden.reshape(shape), load, balance_loss }
    }

    /// `[tokens, hidden]` to the same.
    pub(crate) fn forward_rows(&self, x: Tensor<2>, context: &ForwardContext) -> MoeOutput<2> {
        let routed = self.router.route(x.clone());
        let experts = self.router.experts();
        let layout = Arc::new(GroupLayout::from_choices(&routed.choices, routed.k, experts));
        let rows = self.experts.forward(dispatch_rows(x.clone(), &layout), &layout);
        let mut hidden = combine_rows(rows, routed.weights.clone(), &layout);
        if let Some(shared) = &self.shared_experts {
            hidden = hidden + shared.forward_rows(x);
        }
        let load = balance::expert_load(&routed.choices, routed.k, experts, context.padding());
        let balance_loss = (context.balance_weight() != 0.0).then(|| balance::sequence_loss(&routed, experts, context));
        MoeOutput { hidden, load, balance_loss }
    }
}

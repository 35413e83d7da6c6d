//! Mixture of experts (DeepSeekMoE, arXiv 2401.06066): router, routed experts, shared experts and load balancing.
//!
//! The load is balanced in two ways, as in DeepSeek-V3: a correction bias of the router that follows the load
//! ([`CausalLm::update_router_bias`](crate::CausalLm::update_router_bias)), and a small sequence-wise balance loss
//! ([`MoeOutput::balance_loss`]).

mod balance;
mod experts;
mod router;
mod routing_rule;
pub(crate) mod shape;

use std::sync::Arc;

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};

use crate::forward::ForwardContext;
use crate::init::Init;
#[cfg(feature = "cpu")]
use crate::kernels::few_tokens;
use crate::kernels::{GroupLayout, combine_rows, count_choices, dispatch_rows};
use crate::mlp::{Mlp, MlpConfig};
use crate::parameter::ProjectionRole;
use crate::projection::projections_of_fields;

pub(crate) use balance::bias_step;
pub use experts::{Experts, ExpertsConfig};
pub use router::{Router, RouterConfig, RouterOutput};
pub(crate) use routing_rule::RoutingRule;

/// The config of a [`Moe`], with the names of `config.json`.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use moonlight_model::{ForwardContext, MoeConfig, RouterConfig};
///
/// let device = Device::default();
/// // 8 routed experts of width 32, 2 of them for each token, and 1 shared expert.
/// let moe = MoeConfig::new(RouterConfig::new(64, 8, 2), 32).with_n_shared_experts(1).init(&device);
/// let x = Tensor::<3>::random([2, 10, 64], Distribution::Default, &device);
/// let output = moe.forward(x, &ForwardContext::without_positions([2, 10]));
/// assert_eq!(output.hidden.dims(), [2, 10, 64]);
/// assert_eq!(output.load.sum().into_scalar::<i32>(), 2 * 10 * 2);
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct MoeConfig {
    /// The router; its config also has the hidden size and the number of routed experts.
    pub router: RouterConfig,
    /// Width of the MLP of one expert.
    pub moe_intermediate_size: usize,
    /// Number of shared experts, which are built as one MLP of this many times the width; 0 for none.
    #[config(default = 0)]
    pub n_shared_experts: usize,
    /// Standard deviation of the experts' initialized weights. The router has its own.
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl MoeConfig {
    /// Initializes a mixture of experts. A parameter is drawn when it is first read.
    ///
    /// # Panics
    ///
    /// If [`RouterConfig::init`] panics.
    pub fn init(&self, device: &Device) -> Moe {
        self.build(Init::new(device))
    }

    /// The config of the routed experts.
    pub fn experts(&self) -> ExpertsConfig {
        let RouterConfig { hidden_size, n_routed_experts, .. } = self.router;
        ExpertsConfig::new(hidden_size, n_routed_experts, self.moe_intermediate_size)
            .with_initializer_range(self.initializer_range)
    }

    /// The config of the shared experts, as one MLP; `None` without shared experts.
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

/// `sum_k w_k expert_k(x) + shared(x)` over the `k` experts that the router chooses for each token (DeepSeekMoE, arXiv
/// 2401.06066). No token is dropped: an expert processes all tokens routed to it.
///
/// Should be created with [`MoeConfig`].
#[derive(Module, Debug)]
pub struct Moe {
    /// Chooses the experts of each token and their weights `w_k`.
    pub router: Router,
    /// The routed experts, stacked.
    pub experts: Experts,
    /// The shared experts as one MLP, which is applied to every token.
    pub shared_experts: Option<Mlp>,
}

projections_of_fields!(Moe { router, experts, shared_experts });

/// The output of a mixture of experts, with its load and loss.
#[derive(Debug)]
pub struct MoeOutput<const D: usize> {
    /// `[batch, sequence, hidden]` (`D` = 3), or `[tokens, hidden]` (`D` = 2).
    pub hidden: Tensor<D>,
    /// Number of tokens routed to each expert, `[experts]`, without padding.
    pub load: Tensor<1, Int>,
    /// The weighted sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20), f32 `[1]`; `None` if the
    /// context's balance weight is 0.
    pub balance_loss: Option<Tensor<1>>,
}

impl Moe {
    /// The layer as the kernel that decodes few tokens reads it; `None` if it cannot.
    #[cfg(feature = "cpu")]
    pub(crate) fn few_tokens(&self) -> Option<few_tokens::Moe> {
        let (router, correction_bias, rule) = self.router.few_tokens()?;
        let shared = match &self.shared_experts {
            None => None,
            Some(shared) => Some(shared.few_tokens()?),
        };
        Some(few_tokens::Moe { router, correction_bias, rule, experts: self.experts.few_tokens()?, shared })
    }

    /// Routes each token to its experts and adds the shared experts.
    ///
    /// # Shapes
    ///
    /// - x, output: `[batch, sequence, hidden]`
    ///
    /// # Panics
    ///
    /// If the context has another batch size or sequence length.
    pub fn forward(&self, x: Tensor<3>, context: &ForwardContext) -> MoeOutput<3> {
        let shape @ [batch, sequence, hidden] = x.dims();
        context.check([batch, sequence]);
        let MoeOutput { hidden, load, balance_loss } =
            self.forward_rows(x.reshape([batch * sequence, hidden]), context);
        MoeOutput { hidden: hidden.reshape(shape), load, balance_loss }
    }

    /// [`forward`](Self::forward) over `[tokens, hidden]`.
    pub(crate) fn forward_rows(&self, x: Tensor<2>, context: &ForwardContext) -> MoeOutput<2> {
        let routed = self.router.route(x.clone());
        let experts = self.router.experts();
        let rows_of_experts = count_choices(routed.choices.clone(), None, experts, 1); // [1, experts]
        let layout = GroupLayout::from_choice_tensor(routed.choices.clone(), rows_of_experts.clone());
        let layout = Arc::new(layout);
        let rows = dispatch_rows(x.clone(), &layout); // [tokens * k, hidden], sorted by expert
        let rows = self.experts.forward(rows, &layout);
        let mut hidden = combine_rows(rows, routed.weights.clone(), &layout); // [tokens, hidden]
        if let Some(shared) = &self.shared_experts {
            hidden = hidden + shared.forward_rows(x);
        }
        let load = match context.counted() {
            None => rows_of_experts,
            counted => count_choices(routed.choices.clone(), counted, experts, 1),
        };
        let balances = context.balance_weight() != 0.0;
        let balance_loss = balances.then(|| balance::sequence_loss(&routed, self.router.rule(), context));
        MoeOutput { hidden, load: load.reshape([experts]), balance_loss }
    }
}

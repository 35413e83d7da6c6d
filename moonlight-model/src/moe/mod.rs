//! The mixture of experts: router, routed experts, shared experts, and how the load is kept in balance.

mod balance;
mod experts;
mod router;

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use crate::config::{ModelConfig, MoeShape};
use crate::init::Init;
use crate::kernels::{GroupLayout, combine_rows, dispatch_rows};
use crate::mlp::Mlp;

pub(crate) use balance::bias_step;
pub use experts::Experts;
pub use router::Router;

/// `sum_k w_k expert_k(x) + shared(x)` (DeepSeekMoE, arXiv 2401.06066).
#[derive(Module, Debug)]
pub struct Moe {
    /// Chooses each token's experts and their weights.
    pub router: Router,
    /// The routed experts.
    pub experts: Experts,
    /// The experts that every token visits, as one MLP.
    pub shared_experts: Option<Mlp>,
}

/// What the router needs to know of the tokens beside their values.
pub(crate) struct Routing<'a> {
    pub(crate) batch: usize,
    pub(crate) sequence: usize,
    /// Tokens that are padding and count for nothing.
    pub(crate) padding: Option<&'a [bool]>,
    /// Weight of the sequence-wise balance loss; 0 for none.
    pub(crate) balance_weight: f64,
}

/// What comes out of a mixture layer.
pub(crate) struct MoeOutput {
    /// `[tokens, hidden]`.
    pub(crate) hidden: Tensor<2>,
    /// Tokens of each expert.
    pub(crate) load: Vec<u64>,
    /// The weighted balance loss, f32 `[1]`.
    pub(crate) balance_loss: Option<Tensor<1>>,
}

impl Moe {
    pub(crate) fn new(config: &ModelConfig, moe: &MoeShape, init: Init, device: &Device) -> Self {
        let shared_width = moe.n_shared_experts * moe.moe_intermediate_size;
        Self {
            router: Router::new(config.hidden_size, moe, init, device),
            experts: Experts::new(config.hidden_size, moe, init, device),
            shared_experts: (shared_width > 0).then(|| Mlp::new(config.hidden_size, shared_width, init, device)),
        }
    }

    pub(crate) fn forward(&self, x: Tensor<2>, routing: &Routing<'_>) -> MoeOutput {
        let routed = self.router.route(x.clone());
        let experts = self.router.experts();
        let plan = Arc::new(GroupLayout::from_choices(&routed.choices, routed.k, experts));
        let rows = self.experts.forward(dispatch_rows(x.clone(), &plan), &plan);
        let mut hidden = combine_rows(rows, routed.weights.clone(), &plan);
        if let Some(shared) = &self.shared_experts {
            hidden = hidden + shared.forward(x);
        }
        let load = balance::load(&routed.choices, routed.k, experts, routing.padding);
        let balance_loss = (routing.balance_weight != 0.0).then(|| balance::sequence_loss(&routed, experts, routing));
        MoeOutput { hidden, load, balance_loss }
    }
}

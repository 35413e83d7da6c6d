//! [`Router`]: chooses the experts of each token and their weights.

use std::sync::Arc;

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{DType, Device, Int, Tensor};

use super::routing_rule::RoutingRule;
use super::shape::{ScoringFunc, TopkMethod};
use crate::init::Init;
#[cfg(feature = "cpu")]
use crate::kernels::few_tokens::{Matrix, vector};
use crate::kernels::{GroupLayout, choose_experts, grouped_matmul};
use crate::lora::low_rank::LowRank;
use crate::parameter::ProjectionRole;
use crate::projection::{LayerProjection, ProjectionMut, ProjectionRef, Projections, WeightMut, WeightRef};

/// The config of a [`Router`], with the names of `config.json` and the defaults of DeepSeek-V3 without groups.
#[derive(Config, Debug, PartialEq)]
pub struct RouterConfig {
    /// Width of the input.
    pub hidden_size: usize,
    /// Number of routed experts, at most 1024.
    pub n_routed_experts: usize,
    /// Number of routed experts for each token (`k`).
    pub num_experts_per_tok: usize,
    /// Number of groups that the experts are divided into.
    #[config(default = 1)]
    pub n_group: usize,
    /// Number of groups that the experts of a token may come from.
    #[config(default = 1)]
    pub topk_group: usize,
    /// How logits become scores (`scoring_func`).
    #[config(default = "ScoringFunc::Sigmoid")]
    pub scoring: ScoringFunc,
    /// How experts are chosen by their scores.
    #[config(default = "TopkMethod::NoauxTc")]
    pub topk_method: TopkMethod,
    /// Whether the scores of the chosen experts are normalized to a sum of 1.
    #[config(default = true)]
    pub norm_topk_prob: bool,
    /// Factor on the weights of the chosen experts, after normalization.
    #[config(default = 1.0)]
    pub routed_scaling_factor: f64,
    /// Standard deviation of initialized weights.
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl RouterConfig {
    /// Initializes a router. A parameter is drawn when it is first read.
    ///
    /// # Panics
    ///
    /// If `num_experts_per_tok` is 0 or exceeds the experts in `topk_group` groups, or if the groups do not divide the experts.
    pub fn init(&self, device: &Device) -> Router {
        self.build(Init::new(device))
    }

    pub(crate) fn build(&self, init: Init<'_>) -> Router {
        let (experts, k) = (self.n_routed_experts, self.num_experts_per_tok);
        let groups = self.n_group;
        assert!(groups > 0 && experts.is_multiple_of(groups), "{groups} groups do not divide {experts} experts");
        let reachable = self.topk_group.min(groups) * (experts / groups);
        assert!(
            (1..=reachable).contains(&k),
            "num_experts_per_tok is {k}, but a token can choose from 1 to {reachable} experts"
        );
        let corrected = self.topk_method == TopkMethod::NoauxTc;
        Router {
            weight: init.router([self.hidden_size, experts], self.initializer_range),
            lora: None,
            e_score_correction_bias: corrected.then(|| init.correction_bias(experts)),
            rule: RoutingRule {
                experts,
                k,
                groups,
                groups_per_token: self.topk_group,
                scoring: self.scoring,
                method: self.topk_method,
                normalize: self.norm_topk_prob,
                scale: self.routed_scaling_factor,
            },
        }
    }
}

/// The router of a mixture of experts (DeepSeek-V3, arXiv 2412.19437, equations 13 to 16). It computes in f32 whatever the dtype:
/// rounding the scores would send some tokens to other experts.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use moonlight_model::RouterConfig;
///
/// let device = Device::default();
/// let router = RouterConfig::new(64, 8, 2).init(&device); // hidden size 64, 2 of 8 experts for each token
/// let routed = router.forward(Tensor::<3>::random([2, 10, 64], Distribution::Default, &device));
/// assert_eq!((routed.choices.dims(), routed.weights.dims()), ([20, 2], [20, 2]));
/// ```
///
/// Should be created with [`RouterConfig`].
#[derive(Module, Debug)]
pub struct Router {
    /// `[hidden, experts]`.
    pub weight: Param<Tensor<2>>,
    /// The adapter, which is trained instead of the weight.
    pub lora: Option<LowRank<2>>,
    /// Added to the scores for the choice of experts, but not in their weights; f32 `[experts]`. It is updated by a rule
    /// ([`CausalLm::update_router_bias`](crate::CausalLm::update_router_bias)) and has no gradient. `None` unless the method is
    /// `noaux_tc`.
    pub e_score_correction_bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    rule: RoutingRule,
}

/// The experts of each token and their weights.
#[derive(Debug)]
pub struct RouterOutput {
    /// Indices of the chosen experts, `[tokens, k]`, best first within a token. On a GPU they were chosen there: reading them waits for
    /// it.
    pub choices: Tensor<2, Int>,
    /// The weights of the chosen experts, f32 `[tokens, k]`; differentiable.
    pub weights: Tensor<2>,
    /// The scores of all experts (sigmoid or softmax of the logits), f32 `[tokens, experts]`; differentiable.
    pub scores: Tensor<2>,
    /// How logits became scores; the balance loss normalizes them accordingly.
    pub(crate) scoring: ScoringFunc,
}

impl Router {
    /// The number of routed experts.
    pub fn experts(&self) -> usize {
        self.rule.experts
    }

    pub(super) fn rule(&self) -> &RoutingRule {
        &self.rule
    }

    /// Chooses the experts of each token and their weights.
    ///
    /// # Shapes
    ///
    /// - x: `[batch, sequence, hidden]`
    /// - output: for `tokens = batch * sequence`, sequence by sequence
    pub fn forward(&self, x: Tensor<3>) -> RouterOutput {
        let [batch, sequence, hidden] = x.dims();
        self.route(x.reshape([batch * sequence, hidden]))
    }

    /// [`forward`](Self::forward) over `[tokens, hidden]`.
    pub(super) fn route(&self, x: Tensor<2>) -> RouterOutput {
        let x = x.cast(DType::F32);
        let mut logits = exact_product(x.clone(), self.weight.val().cast(DType::F32)); // [tokens, experts]
        if let Some(lora) = &self.lora {
            logits = logits + lora.forward(x);
        }
        let scores = match self.rule.scoring {
            ScoringFunc::Sigmoid => sigmoid(logits),
            ScoringFunc::Softmax => softmax(logits, 1),
        };
        let bias = self.e_score_correction_bias.as_ref().map(|bias| bias.val().cast(DType::F32));
        let choices = choose_experts(scores.clone(), bias, &self.rule);
        // Weights come from the scores without the bias, which only affects the choice.
        let mut weights = scores.clone().gather(1, choices.clone()); // [tokens, k]
        if self.rule.normalize {
            // transformers has the same guard against a sum of zero.
            weights = weights.clone() / (weights.sum_dim(1) + 1e-20);
        }
        RouterOutput { choices, weights: weights * self.rule.scale, scores, scoring: self.rule.scoring }
    }
}

#[cfg(feature = "cpu")]
impl Router {
    /// The weight, the correction bias and the rule, for the kernel that decodes few tokens. `None` with an adapter.
    pub(super) fn few_tokens(&self) -> Option<(Matrix, Option<Vec<f32>>, RoutingRule)> {
        if self.lora.is_some() {
            return None;
        }
        let bias = match &self.e_score_correction_bias {
            None => None,
            Some(bias) => Some(vector(bias.val())?),
        };
        Some((Matrix::new(self.weight.val())?, bias, self.rule.clone()))
    }
}

impl Projections for Router {
    fn projections<'a>(&'a self, path: &mut Vec<&'static str>, list: &mut Vec<LayerProjection<ProjectionRef<'a>>>) {
        let projection = ProjectionRef::Matrix(WeightRef { quantized: None, lora: &self.lora });
        list.push(LayerProjection { fields: path.clone(), role: ProjectionRole::Router, projection });
    }

    fn projections_mut<'a>(
        &'a mut self,
        path: &mut Vec<&'static str>,
        list: &mut Vec<LayerProjection<ProjectionMut<'a>>>,
    ) {
        let Self { weight, lora, .. } = self;
        let projection = ProjectionMut::Matrix(WeightMut { weight, quantized: None, lora });
        list.push(LayerProjection { fields: path.clone(), role: ProjectionRole::Router, projection });
    }
}

/// `x W` in f32 on every device, `[rows, in]` times `[in, out]`. Where a GPU has tensor cores, Burn's own product rounds both factors to
/// TF32, which has 10 bits and sends some tokens to other experts.
fn exact_product(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "cpu")]
    if x.device().inner() == Device::flex() {
        return x.matmul(weight);
    }
    let layout = GroupLayout::uniform(1, x.dims()[0]).exact();
    grouped_matmul(x, weight.unsqueeze(), &Arc::new(layout))
}

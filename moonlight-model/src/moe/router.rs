//! [`Router`]: chooses the experts of each token and their weights.

use std::sync::Arc;

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use rayon::prelude::*;

use super::shape::{ScoringFunc, TopkMethod};
use crate::config::limits::MAX_EXPERTS;
use crate::init::Init;
#[cfg(feature = "cpu")]
use crate::kernels::few_tokens::{Matrix, vector};
use crate::kernels::{GroupLayout, grouped_matmul};
use crate::lora::low_rank::LowRank;
use crate::parameter::ProjectionRole;
use crate::projection::{LayerProjection, ProjectionMut, ProjectionRef, Projections, WeightMut, WeightRef};

/// Tokens of one rayon task.
const TOKENS_PER_TASK: usize = 64;

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
/// assert_eq!((routed.choices.len(), routed.weights.dims()), (2 * 10 * 2, [20, 2]));
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

/// How experts are chosen and weighted; see [`RouterConfig`].
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RoutingRule {
    experts: usize,
    k: usize,
    groups: usize,
    groups_per_token: usize,
    scoring: ScoringFunc,
    method: TopkMethod,
    normalize: bool,
    scale: f64,
}

/// The experts of each token and their weights.
#[derive(Debug)]
pub struct RouterOutput {
    /// Indices of the chosen experts, `tokens * k` entries, best first within a token.
    pub choices: Vec<u32>,
    /// Experts per token.
    pub k: usize,
    /// The weights of the chosen experts, f32 `[tokens, k]`; differentiable.
    pub weights: Tensor<2>,
    /// The scores of all experts (sigmoid or softmax of the logits), f32 `[tokens, experts]`; differentiable.
    pub scores: Tensor<2>,
    /// How logits became scores; the balance loss normalizes them accordingly.
    pub(crate) scoring: ScoringFunc,
    /// `scores` in host memory, `tokens * experts` values.
    pub(crate) host_scores: Vec<f32>,
}

impl Router {
    /// The number of routed experts.
    pub fn experts(&self) -> usize {
        self.rule.experts
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
    ///
    /// The choice is made on the host, because the dispatch needs the number of rows of each expert there in any case. On a GPU it
    /// waits for the scores.
    pub(super) fn route(&self, x: Tensor<2>) -> RouterOutput {
        let tokens = x.dims()[0];
        let x = x.cast(DType::F32);
        let mut logits = exact_product(x.clone(), self.weight.val().cast(DType::F32)); // [tokens, experts]
        if let Some(lora) = &self.lora {
            logits = logits + lora.forward(x);
        }
        let scores = match self.rule.scoring {
            ScoringFunc::Sigmoid => sigmoid(logits),
            ScoringFunc::Softmax => softmax(logits, 1),
        };
        let host_scores = to_host(scores.clone().detach().into_data()); // waits for the device
        let bias = self.e_score_correction_bias.as_ref().map(|bias| to_host(bias.val().into_data()));
        let choices = self.rule.choose(&host_scores, bias.as_deref());
        let k = self.rule.k;
        let indices: Vec<i32> = choices.iter().map(|&expert| expert as i32).collect();
        let indices = Tensor::<2, Int>::from_data(TensorData::new(indices, [tokens, k]), &scores.device());
        // Weights come from the scores without the bias, which only affects the choice.
        let mut weights = scores.clone().gather(1, indices); // [tokens, k]
        if self.rule.normalize {
            // transformers has the same guard against a sum of zero.
            weights = weights.clone() / (weights.sum_dim(1) + 1e-20);
        }
        RouterOutput { choices, k, weights: weights * self.rule.scale, scores, scoring: self.rule.scoring, host_scores }
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
/// TF32, which has 10 bits and sends some tokens to other experts; the grouped product does not.
fn exact_product(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "cpu")]
    if x.device().inner() == Device::flex() {
        return x.matmul(weight);
    }
    let layout = GroupLayout::uniform(1, x.dims()[0]);
    grouped_matmul(x, weight.unsqueeze(), &Arc::new(layout))
}

fn to_host(data: TensorData) -> Vec<f32> {
    data.convert::<f32>().try_into_vec().expect("the data was converted to f32")
}

impl RoutingRule {
    /// The number of experts of a token.
    #[cfg(feature = "cpu")]
    pub(crate) fn experts_per_token(&self) -> usize {
        self.k
    }

    /// [`Router::route`] on the host: the experts of each token and their weights, `tokens * k` each, from the logits, `[tokens,
    /// experts]`.
    #[cfg(feature = "cpu")]
    pub(crate) fn route(&self, logits: &[f32], bias: Option<&[f32]>) -> (Vec<u32>, Vec<f32>) {
        let mut scores = logits.to_vec();
        for scores in scores.chunks_exact_mut(self.experts) {
            match self.scoring {
                ScoringFunc::Sigmoid => scores.iter_mut().for_each(|score| *score = 1.0 / (1.0 + (-*score).exp())),
                ScoringFunc::Softmax => {
                    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    scores.iter_mut().for_each(|score| *score = (*score - largest).exp());
                    let sum: f32 = scores.iter().sum();
                    scores.iter_mut().for_each(|score| *score /= sum);
                }
            }
        }
        let mut choices = vec![0; scores.len() / self.experts * self.k];
        self.choose_into(&mut choices, &scores, bias);
        let of_token = choices.chunks_exact(self.k).zip(scores.chunks_exact(self.experts));
        let mut weights: Vec<f32> =
            of_token.flat_map(|(choices, scores)| choices.iter().map(|&expert| scores[expert as usize])).collect();
        for weights in weights.chunks_exact_mut(self.k) {
            let sum = if self.normalize { weights.iter().sum::<f32>() + 1e-20 } else { 1.0 };
            weights.iter_mut().for_each(|weight| *weight = *weight / sum * self.scale as f32);
        }
        (choices, weights)
    }

    /// The `k` best experts of each token, best first; of equal scores the lower index.
    ///
    /// NaN ranks below every number: a model with non-finite values is still routed, and its loss then shows them.
    fn choose(&self, scores: &[f32], bias: Option<&[f32]>) -> Vec<u32> {
        let mut choices = vec![0; scores.len() / self.experts * self.k];
        choices
            .par_chunks_mut(TOKENS_PER_TASK * self.k)
            .zip(scores.par_chunks(TOKENS_PER_TASK * self.experts))
            .for_each(|(choices, scores)| self.choose_into(choices, scores, bias));
        choices
    }

    /// [`choose`](Self::choose) on this thread.
    fn choose_into(&self, choices: &mut [u32], scores: &[f32], bias: Option<&[f32]>) {
        let mut ranked = vec![0.0; self.experts];
        for (choices, scores) in choices.chunks_exact_mut(self.k).zip(scores.chunks_exact(self.experts)) {
            ranked.copy_from_slice(scores);
            if let Some(bias) = bias {
                ranked.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
            }
            self.mask_groups(&mut ranked);
            top_k(&mut ranked, choices);
        }
    }

    /// Sets the scores of all experts outside the token's best groups to minus infinity.
    fn mask_groups(&self, scores: &mut [f32]) {
        if self.groups == 1 || self.method == TopkMethod::Greedy {
            return;
        }
        let size = self.experts / self.groups;
        // The score of a group is the sum of its two best experts in DeepSeek-V3, its best expert in V2.
        let mut group_scores: Vec<f32> = scores
            .chunks_exact(size)
            .map(|group| {
                let mut group = group.to_vec();
                group.sort_by(|a, b| b.total_cmp(a));
                match self.method {
                    TopkMethod::NoauxTc => group[0] + group[1],
                    TopkMethod::Greedy | TopkMethod::GroupLimitedGreedy => group[0],
                }
            })
            .collect();
        let mut kept = vec![0; self.groups_per_token];
        top_k(&mut group_scores, &mut kept);
        for (group, scores) in scores.chunks_exact_mut(size).enumerate() {
            if !kept.contains(&(group as u32)) {
                scores.fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// Fills `chosen` with the indices of the largest scores, best first; of equal scores the lower index first, NaN last.
fn top_k(scores: &mut [f32], chosen: &mut [u32]) {
    // For the small k of a router, k scans are faster than sorting. Bits mark the chosen experts: a score of minus infinity could
    // not, because masked experts have it too, and no expert may be chosen twice.
    let mut taken = [0u64; MAX_EXPERTS / 64];
    assert!(scores.len() <= MAX_EXPERTS, "{} experts are more than {MAX_EXPERTS}", scores.len());
    for chosen in chosen {
        let mut index = usize::MAX;
        for (candidate, &score) in scores.iter().enumerate() {
            let is_free = taken[candidate / 64] & (1 << (candidate % 64)) == 0;
            if is_free && (index == usize::MAX || score > scores[index] || (scores[index].is_nan() && !score.is_nan()))
            {
                index = candidate;
            }
        }
        taken[index / 64] |= 1 << (index % 64);
        *chosen = index as u32;
    }
}

/// The `k` best experts of each token by score alone, without correction bias and groups, as the balance loss counts them.
pub(super) fn top_k_by_score(scores: &[f32], experts: usize, k: usize) -> Vec<u32> {
    let mut choices = vec![0; scores.len() / experts * k];
    choices.par_chunks_exact_mut(k).zip(scores.par_chunks_exact(experts)).for_each(|(choices, scores)| {
        top_k(&mut scores.to_vec(), choices);
    });
    choices
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(method: TopkMethod, groups: usize, groups_per_token: usize) -> RoutingRule {
        RoutingRule {
            experts: 6,
            k: 2,
            groups,
            groups_per_token,
            scoring: ScoringFunc::Sigmoid,
            method,
            normalize: true,
            scale: 1.0,
        }
    }

    const SCORES: [f32; 6] = [0.9, 0.1, 0.6, 0.5, 0.2, 0.3];

    #[test]
    fn without_groups_the_best_scores_are_chosen() {
        assert_eq!(rule(TopkMethod::Greedy, 1, 1).choose(&SCORES, None), [0, 2]);
    }

    #[test]
    fn a_router_with_the_largest_number_of_experts_chooses_the_best() {
        let most = RoutingRule { experts: MAX_EXPERTS, ..rule(TopkMethod::Greedy, 1, 1) };
        let scores: Vec<f32> = (0..MAX_EXPERTS).map(|expert| expert as f32).collect();
        assert_eq!(most.choose(&scores, None), [MAX_EXPERTS as u32 - 1, MAX_EXPERTS as u32 - 2]);
    }

    #[test]
    fn the_correction_bias_changes_the_choice() {
        let bias = [-1.0, 0.0, 0.0, 0.0, 0.0, 0.5];
        assert_eq!(rule(TopkMethod::NoauxTc, 1, 1).choose(&SCORES, Some(&bias)), [5, 2]);
    }

    #[test]
    fn groups_are_ranked_by_their_two_best_experts_or_by_their_best() {
        // Groups of two: sums 1.0, 1.1, 0.5; maxima 0.9, 0.6, 0.3.
        assert_eq!(rule(TopkMethod::NoauxTc, 3, 1).choose(&SCORES, None), [2, 3]);
        assert_eq!(rule(TopkMethod::GroupLimitedGreedy, 3, 1).choose(&SCORES, None), [0, 1]);
    }

    #[test]
    fn a_negative_biased_score_ranks_above_a_masked_one() {
        let bias = [-9.0; 6];
        let choices = rule(TopkMethod::NoauxTc, 3, 1).choose(&SCORES, Some(&bias));
        assert_eq!(choices, [2, 3]);
    }

    #[test]
    fn equal_scores_choose_the_lower_index_and_nan_ranks_last() {
        let choose = |scores: [f32; 6]| rule(TopkMethod::Greedy, 1, 1).choose(&scores, None);
        assert_eq!(choose([0.5; 6]), [0, 1]);
        assert_eq!(choose([f32::NAN, 0.1, f32::NAN, 0.2, f32::NAN, f32::NAN]), [3, 1]);
        assert_eq!(choose([f32::NAN; 6]), [0, 1]);
    }
}

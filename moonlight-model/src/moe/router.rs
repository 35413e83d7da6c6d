//! Which experts a token visits, and with what weights.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use rayon::prelude::*;

use super::shape::{ScoringFunc, TopkMethod};
use crate::config::limits::MAX_EXPERTS;
use crate::init::Init;
use crate::lora::low_rank::LowRank;
use crate::parameter::ProjectionRole;
use crate::projection::{LayerProjection, ProjectionMut, ProjectionRef, Projections, WeightMut, WeightRef};

/// Tokens that one task chooses for.
const TOKENS_PER_TASK: usize = 64;

/// The configuration of a [`Router`], by the names of `config.json`.
#[derive(Config, Debug, PartialEq)]
pub struct RouterConfig {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Number of routed experts, 1024 at most, as a configuration is checked for.
    pub n_routed_experts: usize,
    /// Routed experts that each token visits.
    pub num_experts_per_tok: usize,
    /// Groups that the experts are divided into.
    #[config(default = 1)]
    pub n_group: usize,
    /// Groups that a token may choose from.
    #[config(default = 1)]
    pub topk_group: usize,
    /// How logits become scores.
    #[config(default = "ScoringFunc::Sigmoid")]
    pub scoring: ScoringFunc,
    /// How experts are chosen from the scores.
    #[config(default = "TopkMethod::NoauxTc")]
    pub topk_method: TopkMethod,
    /// Whether the chosen scores are normalised to a sum of one.
    #[config(default = true)]
    pub norm_topk_prob: bool,
    /// Factor on the weights of the chosen experts.
    #[config(default = 1.0)]
    pub routed_scaling_factor: f64,
    /// Standard deviation of fresh weights.
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl RouterConfig {
    /// A router with fresh parameters, drawn when they are first used.
    ///
    /// # Panics
    ///
    /// When a token would visit no expert, or more than its groups have; when the groups do not divide the experts.
    pub fn init(&self, device: &Device) -> Router {
        self.build(Init::new(device))
    }

    pub(crate) fn build(&self, init: Init<'_>) -> Router {
        let (experts, k) = (self.n_routed_experts, self.num_experts_per_tok);
        let groups = self.n_group;
        assert!(groups > 0 && experts.is_multiple_of(groups), "{groups} groups do not divide {experts} experts");
        let reachable = self.topk_group.min(groups) * (experts / groups);
        assert!((1..=reachable).contains(&k), "a token cannot visit {k} of {reachable} experts");
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

/// The router, in f32 whatever the model's dtype (DeepSeek-V3, arXiv 2412.19437, equations 13 to 16).
///
/// Should be created with [`RouterConfig`].
#[derive(Module, Debug)]
pub struct Router {
    /// `[hidden, experts]`.
    pub weight: Param<Tensor<2>>,
    /// The adapter that is trained in place of the weight.
    pub lora: Option<LowRank<2>>,
    /// Joins in the choice of experts, not in their weights; f32 `[experts]`, moved by a rule and not by a gradient.
    /// Only `noaux_tc` routers have it.
    pub e_score_correction_bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    rule: RoutingRule,
}

/// How experts are chosen.
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

/// The experts of a batch of tokens.
#[derive(Debug)]
pub struct RouterOutput {
    /// `tokens * k` expert numbers.
    pub choices: Vec<u32>,
    /// Experts per token.
    pub k: usize,
    /// f32 `[tokens, k]`.
    pub weights: Tensor<2>,
    /// f32 `[tokens, experts]`: sigmoid or softmax of the logits.
    pub scores: Tensor<2>,
    /// How the scores were made.
    pub(crate) scoring: ScoringFunc,
    /// The scores on the host.
    pub(crate) host_scores: Vec<f32>,
}

impl Router {
    /// Number of routed experts.
    pub fn experts(&self) -> usize {
        self.rule.experts
    }

    /// Chooses the experts of each token, and their weights.
    ///
    /// # Shapes
    ///
    /// `[batch, sequence, hidden]`; the tokens of the result are those of all sequences, one after the other.
    pub fn forward(&self, x: Tensor<3>) -> RouterOutput {
        let [batch, sequence, hidden] = x.dims();
        self.route(x.reshape([batch * sequence, hidden]))
    }

    /// Chooses the experts of each row of `[tokens, hidden]`.
    ///
    /// The choice is made on the host: the dispatch needs the counts there in any case.
    pub(super) fn route(&self, x: Tensor<2>) -> RouterOutput {
        let tokens = x.dims()[0];
        let x = x.cast(DType::F32);
        let mut logits = x.clone().matmul(self.weight.val().cast(DType::F32));
        if let Some(lora) = &self.lora {
            logits = logits + lora.forward(x);
        }
        let scores = match self.rule.scoring {
            ScoringFunc::Sigmoid => sigmoid(logits),
            ScoringFunc::Softmax => softmax(logits, 1),
        };
        let host_scores = to_host(scores.clone().detach().into_data());
        let bias = self.e_score_correction_bias.as_ref().map(|bias| to_host(bias.val().into_data()));
        let choices = self.rule.choose(&host_scores, bias.as_deref());
        let k = self.rule.k;
        let indices: Vec<i32> = choices.iter().map(|&expert| expert as i32).collect();
        let indices = Tensor::<2, Int>::from_data(TensorData::new(indices, [tokens, k]), &scores.device());
        let mut weights = scores.clone().gather(1, indices);
        if self.rule.normalize {
            weights = weights.clone() / (weights.sum_dim(1) + 1e-20);
        }
        RouterOutput { choices, k, weights: weights * self.rule.scale, scores, scoring: self.rule.scoring, host_scores }
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

fn to_host(data: TensorData) -> Vec<f32> {
    data.convert::<f32>().try_into_vec().expect("the data was converted to f32")
}

impl RoutingRule {
    /// The `k` best experts of each token, best first; of equals the lower number.
    ///
    /// A score that is not a number counts as the worst: the loss is NaN then, and says so.
    fn choose(&self, scores: &[f32], bias: Option<&[f32]>) -> Vec<u32> {
        let mut choices = vec![0; scores.len() / self.experts * self.k];
        choices
            .par_chunks_mut(TOKENS_PER_TASK * self.k)
            .zip(scores.par_chunks(TOKENS_PER_TASK * self.experts))
            .for_each(|(choices, scores)| {
                let mut ranked = vec![0.0; self.experts];
                for (choices, scores) in choices.chunks_exact_mut(self.k).zip(scores.chunks_exact(self.experts)) {
                    ranked.copy_from_slice(scores);
                    if let Some(bias) = bias {
                        ranked.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
                    }
                    self.mask_groups(&mut ranked);
                    top_k(&mut ranked, choices);
                }
            });
        choices
    }

    /// Puts every expert outside the token's best groups out of reach.
    fn mask_groups(&self, scores: &mut [f32]) {
        if self.groups == 1 || self.method == TopkMethod::Greedy {
            return;
        }
        let size = self.experts / self.groups;
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

/// Fills `chosen` with the indices of the largest scores, best first, and strikes them from `scores`.
fn top_k(scores: &mut [f32], chosen: &mut [u32]) {
    // For the few choices of a router, looking k times beats sorting.
    let mut taken = [0u64; MAX_EXPERTS / 64];
    assert!(scores.len() <= MAX_EXPERTS, "a router has at most {MAX_EXPERTS} experts");
    for chosen in chosen {
        let mut index = usize::MAX;
        for (candidate, &score) in scores.iter().enumerate() {
            let free = taken[candidate / 64] & (1 << (candidate % 64)) == 0;
            if free && (index == usize::MAX || score > scores[index] || (scores[index].is_nan() && !score.is_nan())) {
                index = candidate;
            }
        }
        taken[index / 64] |= 1 << (index % 64);
        *chosen = index as u32;
    }
}

/// The best experts by unbiased score, which the balance loss counts.
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
    fn plain_choice_takes_the_best() {
        assert_eq!(rule(TopkMethod::Greedy, 1, 1).choose(&SCORES, None), [0, 2]);
    }

    #[test]
    fn the_most_experts_of_a_configuration_are_chosen_from() {
        let most = RoutingRule { experts: MAX_EXPERTS, ..rule(TopkMethod::Greedy, 1, 1) };
        let scores: Vec<f32> = (0..MAX_EXPERTS).map(|expert| expert as f32).collect();
        assert_eq!(most.choose(&scores, None), [MAX_EXPERTS as u32 - 1, MAX_EXPERTS as u32 - 2]);
    }

    #[test]
    fn the_bias_moves_the_choice() {
        let bias = [-1.0, 0.0, 0.0, 0.0, 0.0, 0.5];
        assert_eq!(rule(TopkMethod::NoauxTc, 1, 1).choose(&SCORES, Some(&bias)), [5, 2]);
    }

    #[test]
    fn groups_are_ranked_by_their_two_best_or_by_their_best() {
        // Groups of two: sums 1.0, 1.1, 0.5; maxima 0.9, 0.6, 0.3.
        assert_eq!(rule(TopkMethod::NoauxTc, 3, 1).choose(&SCORES, None), [2, 3]);
        assert_eq!(rule(TopkMethod::GroupLimitedGreedy, 3, 1).choose(&SCORES, None), [0, 1]);
    }

    #[test]
    fn a_negative_biased_score_is_still_better_than_a_masked_one() {
        let bias = [-9.0; 6];
        let choices = rule(TopkMethod::NoauxTc, 3, 1).choose(&SCORES, Some(&bias));
        assert_eq!(choices, [2, 3]);
    }

    #[test]
    fn equals_go_to_the_lower_number_and_nan_comes_last() {
        let choose = |scores: [f32; 6]| rule(TopkMethod::Greedy, 1, 1).choose(&scores, None);
        assert_eq!(choose([0.5; 6]), [0, 1]);
        assert_eq!(choose([f32::NAN, 0.1, f32::NAN, 0.2, f32::NAN, f32::NAN]), [3, 1]);
        assert_eq!(choose([f32::NAN; 6]), [0, 1]);
    }
}

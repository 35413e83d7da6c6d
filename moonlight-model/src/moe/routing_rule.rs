//! [`RoutingRule`]: which experts a token is sent to, given its scores.

use rayon::prelude::*;

use super::shape::{ScoringFunc, TopkMethod};
use crate::config::limits::MAX_EXPERTS;

/// Tokens of one rayon task.
const TOKENS_PER_TASK: usize = 64;

/// How experts are chosen and weighted; see [`RouterConfig`](super::RouterConfig).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RoutingRule {
    pub(crate) experts: usize,
    pub(crate) k: usize,
    pub(crate) groups: usize,
    pub(crate) groups_per_token: usize,
    pub(crate) scoring: ScoringFunc,
    pub(crate) method: TopkMethod,
    pub(crate) normalize: bool,
    pub(crate) scale: f64,
}

impl RoutingRule {
    /// The number of experts of a token.
    #[cfg(feature = "cpu")]
    pub(crate) fn experts_per_token(&self) -> usize {
        self.k
    }

    /// [`Router::forward`](super::Router::forward) on the host: the experts of each token and their weights, `tokens * k` each, from the logits, `[tokens,
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

    /// The rule by which the balance loss counts: the `k` best experts by score alone, without correction bias and groups.
    pub(super) fn by_score(&self) -> Self {
        Self { method: TopkMethod::Greedy, ..self.clone() }
    }

    /// The `k` best experts of each token, best first; of equal scores the lower index.
    ///
    /// NaN ranks below every number: a model with non-finite values is still routed, and its loss then shows them.
    pub(crate) fn choose(&self, scores: &[f32], bias: Option<&[f32]>) -> Vec<u32> {
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
                // A NaN of either sign makes the score of its group NaN, as in the kernel for GPUs.
                if group.iter().any(|score| score.is_nan()) {
                    return f32::NAN;
                }
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

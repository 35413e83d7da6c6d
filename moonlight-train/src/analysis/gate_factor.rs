//! The scaling factor of a router's gates, by simulation (arXiv 2502.16982, appendix C, figure 6).
//!
//! Normalized gates sum to 1, so the weighted sum of several independent outputs is smaller than each of them. The factor, which
//! `config.json` calls `routed_scaling_factor`, undoes that: with it the sum has the RMS of one expert's output, if the outputs of
//! experts are independent and have equal RMS.

use std::f64::consts::TAU;

use moonlight_model::config::ScoringFunc;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;

use crate::error::TrainError;

/// Draws of one rayon task. A change of it changes which draws a seed gives.
const DRAWS_PER_TASK: usize = 2048;
/// The most routed experts, as for the `n_routed_experts` of a `config.json`.
const MAX_EXPERTS: usize = 1 << 10;

/// The shape of a router with normalized gates. Experts are chosen as by `noaux_tc` of `config.json` (DeepSeek-V3) without a
/// correction bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateFactor {
    /// Routed experts, from 1 to 1024 (`n_routed_experts`).
    pub experts: usize,
    /// Routed experts of a token (`num_experts_per_tok`).
    pub top_k: usize,
    /// Groups of equal size that the experts are divided into (`n_group`); 1 for none.
    pub groups: usize,
    /// Groups that the experts of a token may come from, those with the largest sum of their two best scores (`topk_group`).
    pub top_groups: usize,
    /// How logits become scores (`scoring_func`); the softmax is over all experts.
    pub scoring: ScoringFunc,
}

/// A mean over independent draws.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// The standard error of the mean: `sqrt(sum_i (x_i - mean)^2 / (n - 1) / n)` for `n` draws.
    pub standard_error: f64,
}

impl GateFactor {
    /// Refuses a shape that no router can have.
    ///
    /// # Errors
    ///
    /// [`TrainError::Request`], which names the option of `moonlight plan --gate-factor`.
    pub fn check(&self) -> Result<(), TrainError> {
        let Self { experts, top_k, groups, top_groups, .. } = *self;
        let refuse = |problem: String, hint: String| Err(TrainError::Request { problem, hint: Some(hint) });
        if !(1..=MAX_EXPERTS).contains(&experts) {
            let hint = format!("choose from 1 to {MAX_EXPERTS} experts");
            return refuse(format!("`--experts {experts}` is outside 1..={MAX_EXPERTS}"), hint);
        }
        if groups == 0 || !experts.is_multiple_of(groups) {
            let hint = "choose groups of equal size, or omit `--groups` and `--top-groups` for a router without groups";
            return refuse(format!("`--groups {groups}` does not divide the {experts} experts"), hint.into());
        }
        let size = experts / groups;
        if groups > 1 && size < 2 {
            let hint =
                format!("choose at most {} groups, because a group is ranked by its two best experts", experts / 2);
            return refuse(format!("`--groups {groups}` leaves one expert in a group"), hint);
        }
        if !(1..=groups).contains(&top_groups) {
            let hint = format!("choose from 1 to {groups} groups for a token");
            return refuse(format!("`--top-groups {top_groups}` is outside 1..={groups}"), hint);
        }
        let reachable = top_groups * size;
        if !(1..=reachable).contains(&top_k) {
            let hint = match groups {
                1 => format!("choose from 1 to {reachable} experts for a token"),
                _ => format!(
                    "choose from 1 to {reachable}, the experts in {top_groups} of {groups} groups, or more groups"
                ),
            };
            return refuse(format!("`--top-k {top_k}` is outside 1..={reachable}"), hint);
        }
        Ok(())
    }

    /// The mean of `1 / sqrt(sum_i p_i^2)` over tokens whose logits are independent standard normals, with the gates `p` of the
    /// token's `top_k` experts, normalized to a sum of 1. It is 1 for one expert and at most `sqrt(top_k)`.
    ///
    /// The same shape, draws and seed give the same bits with any number of threads.
    ///
    /// # Panics
    ///
    /// For a shape that [`check`](Self::check) refuses, and with fewer than 2 draws, which have no standard error.
    pub fn estimate(&self, draws: usize, seed: u64) -> Estimate {
        self.check().expect("the caller has checked the shape");
        assert!(draws >= 2, "{draws} draws have no standard error");
        let tasks: Vec<Moments> = (0..draws.div_ceil(DRAWS_PER_TASK))
            .into_par_iter()
            .map(|task| {
                let mut random = ChaCha8Rng::seed_from_u64(seed);
                random.set_stream(task as u64);
                let mut logits = vec![0.0; self.experts];
                let mut moments = Moments::default();
                for _ in 0..DRAWS_PER_TASK.min(draws - task * DRAWS_PER_TASK) {
                    fill_normal(&mut random, &mut logits);
                    moments.add(self.factor_of(&logits));
                }
                moments
            })
            .collect();
        // Merged in the order of the tasks and not as they end, because rounding depends on the order of a sum.
        let all = tasks.into_iter().fold(Moments::default(), Moments::merged);
        Estimate { mean: all.mean, standard_error: (all.squares / (all.count - 1.0) / all.count).sqrt() }
    }

    /// The factor of one token, from its logits, `[experts]`.
    fn factor_of(&self, logits: &[f64]) -> f64 {
        let scores = self.scores(logits);
        let chosen = self.choose(&scores);
        let sum: f64 = chosen.iter().map(|&expert| scores[expert]).sum();
        let squares: f64 = chosen.iter().map(|&expert| (scores[expert] / sum).powi(2)).sum();
        1.0 / squares.sqrt()
    }

    /// The scores up to a factor, which changes neither the choice nor the normalized gates: a softmax is not divided by its sum.
    fn scores(&self, logits: &[f64]) -> Vec<f64> {
        match self.scoring {
            ScoringFunc::Sigmoid => logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
            ScoringFunc::Softmax => logits.iter().map(|logit| logit.exp()).collect(),
        }
    }

    /// The indices of a token's experts, in ascending order.
    fn choose(&self, scores: &[f64]) -> Vec<usize> {
        let size = self.experts / self.groups;
        // Without groups or with all of them, every expert may be chosen.
        let candidates = if self.top_groups == self.groups {
            (0..self.experts).collect()
        } else {
            let group_scores: Vec<f64> = scores.chunks_exact(size).map(sum_of_two_largest).collect();
            let groups = largest(&group_scores, (0..self.groups).collect(), self.top_groups);
            groups.into_iter().flat_map(|group| group * size..(group + 1) * size).collect()
        };
        largest(scores, candidates, self.top_k)
    }
}

/// The `count` candidates with the largest scores, in ascending order; of equal scores the lower index.
fn largest(scores: &[f64], mut candidates: Vec<usize>, count: usize) -> Vec<usize> {
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, |&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        candidates.truncate(count);
        // Sums over the chosen must not depend on how the selection moves its elements.
        candidates.sort_unstable();
    }
    candidates
}

/// The score of a group of at least two experts.
fn sum_of_two_largest(scores: &[f64]) -> f64 {
    let (first, second) = scores.iter().fold((f64::NEG_INFINITY, f64::NEG_INFINITY), |(first, second), &score| {
        if score > first { (score, first) } else { (first, second.max(score)) }
    });
    first + second
}

/// Independent standard normals (Box and Muller 1958).
fn fill_normal(random: &mut ChaCha8Rng, values: &mut [f64]) {
    for pair in values.chunks_mut(2) {
        // 1 minus a number in [0, 1) is never 0, so the logarithm is finite.
        let radius = (-2.0 * (1.0 - random.random::<f64>()).ln()).sqrt();
        let (sine, cosine) = (TAU * random.random::<f64>()).sin_cos();
        for (value, direction) in pair.iter_mut().zip([cosine, sine]) {
            *value = radius * direction;
        }
    }
}

/// Count, mean, and sum of squared deviations from the mean. Sums of the values and of their squares would cancel: the deviation
/// of a factor is a thousandth of its mean.
#[derive(Debug, Clone, Copy, Default)]
struct Moments {
    count: f64,
    mean: f64,
    squares: f64,
}

impl Moments {
    /// Welford 1962.
    fn add(&mut self, value: f64) {
        self.count += 1.0;
        let deviation = value - self.mean;
        self.mean += deviation / self.count;
        self.squares += deviation * (value - self.mean);
    }

    /// The moments of the values of both (Chan, Golub and LeVeque 1979).
    fn merged(self, other: Self) -> Self {
        let count = self.count + other.count;
        let deviation = other.mean - self.mean;
        Self {
            count,
            mean: self.mean + deviation * other.count / count,
            squares: self.squares + other.squares + deviation.powi(2) * self.count * other.count / count,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::module::Param;
    use burn::tensor::{Device, Tensor, TensorData};
    use moonlight_model::RouterConfig;

    use super::*;

    const MOONLIGHT: GateFactor =
        GateFactor { experts: 64, top_k: 6, groups: 1, top_groups: 1, scoring: ScoringFunc::Sigmoid };
    const DEEPSEEK_V3: GateFactor = GateFactor { experts: 256, top_k: 8, groups: 8, top_groups: 4, ..MOONLIGHT };

    #[test]
    fn the_factor_of_moonlight_is_the_reports() {
        let estimate = MOONLIGHT.estimate(50_000, 0);
        assert!((estimate.mean - 2.446).abs() < 1e-3, "{estimate:?}");
        assert!(estimate.standard_error > 0.0 && estimate.standard_error < 1e-4, "{estimate:?}");
    }

    /// From 400,000 draws in numpy 2.4 (8 million for the softmax), whose standard errors are at most 5e-6 (6e-5).
    #[test]
    fn other_shapes_agree_with_a_simulation_in_numpy() {
        let softmax = GateFactor { scoring: ScoringFunc::Softmax, ..MOONLIGHT };
        for (shape, expected, numpy_error) in [
            (MOONLIGHT, 2.446358, 4e-6),
            (DEEPSEEK_V3, 2.826887, 1e-6),
            (GateFactor { groups: 1, top_groups: 1, ..DEEPSEEK_V3 }, 2.827290, 1e-6),
            (GateFactor { experts: 384, top_k: 8, ..MOONLIGHT }, 2.827650, 1e-6),
            (GateFactor { experts: 16, top_k: 2, ..MOONLIGHT }, 1.412143, 5e-6),
            (softmax, 2.264157, 6e-5),
        ] {
            let Estimate { mean, standard_error } = shape.estimate(20_000, 1);
            let error = standard_error.hypot(numpy_error);
            assert!((mean - expected).abs() < 4.0 * error, "{shape:?}: {mean} +- {standard_error}, numpy {expected}");
        }
    }

    #[test]
    fn one_expert_needs_no_scaling() {
        for shape in [GateFactor { top_k: 1, ..MOONLIGHT }, GateFactor { top_k: 1, ..DEEPSEEK_V3 }] {
            assert_eq!(shape.estimate(5_000, 3), Estimate { mean: 1.0, standard_error: 0.0 });
        }
    }

    /// `E[(a + b) / sqrt(a^2 + b^2)]` for two positive scores, by the trapezoidal rule over the plane of the logits.
    fn integral_for_two(score: fn(f64) -> f64) -> f64 {
        const STEP: f64 = 0.05;
        let points: Vec<(f64, f64)> =
            (-180..=180).map(|i| f64::from(i) * STEP).map(|x| (score(x), STEP * (-0.5 * x * x).exp())).collect();
        let row = |&(a, weight): &(f64, f64)| {
            weight * points.iter().map(|(b, weight)| weight * (a + b) / a.hypot(*b)).sum::<f64>()
        };
        points.iter().map(row).sum::<f64>() / TAU
    }

    #[test]
    fn two_of_two_experts_agree_with_numerical_integration() {
        let sigmoid: fn(f64) -> f64 = |x| 1.0 / (1.0 + (-x).exp());
        for (scoring, score) in [(ScoringFunc::Sigmoid, sigmoid), (ScoringFunc::Softmax, f64::exp)] {
            let Estimate { mean, standard_error } =
                GateFactor { experts: 2, top_k: 2, scoring, ..MOONLIGHT }.estimate(200_000, 5);
            let expected = integral_for_two(score);
            assert!((mean - expected).abs() < 4.0 * standard_error, "{scoring:?}: {mean}, integral {expected}");
            assert!(standard_error < 5e-4, "{standard_error}");
        }
    }

    #[test]
    fn groups_that_are_all_kept_change_nothing() {
        let kept = GateFactor { groups: 8, top_groups: 8, ..MOONLIGHT };
        assert_eq!(kept.estimate(3_000, 0), MOONLIGHT.estimate(3_000, 0));
        let fewer = GateFactor { groups: 8, top_groups: 3, ..MOONLIGHT };
        assert_ne!(fewer.estimate(3_000, 0), MOONLIGHT.estimate(3_000, 0));
    }

    #[test]
    fn the_estimate_is_the_same_with_any_number_of_threads_and_differs_by_seed() {
        let with = |threads, seed| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| DEEPSEEK_V3.estimate(3 * DRAWS_PER_TASK + 17, seed))
        };
        assert_eq!(with(1, 7), with(2, 7));
        assert_eq!(with(1, 7), with(5, 7));
        assert_ne!(with(1, 7), with(1, 8));
    }

    #[test]
    fn experts_and_gates_are_those_of_the_router() {
        const TOKENS: usize = 200;
        let device = Device::default();
        let small = GateFactor { experts: 16, top_k: 2, ..MOONLIGHT };
        for shape in [
            MOONLIGHT,
            small,
            DEEPSEEK_V3,
            GateFactor { groups: 4, top_groups: 1, ..small },
            GateFactor { scoring: ScoringFunc::Softmax, ..MOONLIGHT },
            GateFactor { scoring: ScoringFunc::Softmax, ..DEEPSEEK_V3 },
        ] {
            let config = RouterConfig::new(shape.experts, shape.experts, shape.top_k)
                .with_n_group(shape.groups)
                .with_topk_group(shape.top_groups)
                .with_scoring(shape.scoring);
            let mut router = config.init(&device);
            // With the identity as its weight, the router's input is its logits.
            router.weight = Param::from_tensor(Tensor::eye(shape.experts, &device));
            let mut logits = vec![0.0; TOKENS * shape.experts];
            fill_normal(&mut ChaCha8Rng::seed_from_u64(11), &mut logits);
            let rounded: Vec<f32> = logits.iter().map(|&logit| logit as f32).collect();
            let x = TensorData::new(rounded.clone(), [1, TOKENS, shape.experts]);
            let routed = router.forward(Tensor::<3>::from_data(x, &device));
            let chosen: Vec<usize> = routed.choices.into_data().iter::<u32>().map(|expert| expert as usize).collect();
            let gates: Vec<f64> = routed.weights.into_data().iter::<f64>().collect();
            for token in 0..TOKENS {
                let logits = &rounded[token * shape.experts..][..shape.experts];
                let logits: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
                let of_token = token * shape.top_k..(token + 1) * shape.top_k;
                let mut choices = chosen[of_token.clone()].to_vec();
                choices.sort_unstable();
                assert_eq!(shape.choose(&shape.scores(&logits)), choices, "{shape:?}, token {token}");
                let factor = 1.0 / gates[of_token].iter().map(|gate| gate * gate).sum::<f64>().sqrt();
                assert!((shape.factor_of(&logits) / factor - 1.0).abs() < 1e-5, "{shape:?}, token {token}");
            }
        }
    }

    #[test]
    fn a_shape_that_no_router_can_have_is_refused_with_a_hint() {
        for (shape, problem) in [
            (GateFactor { experts: 0, ..MOONLIGHT }, "`--experts 0` is outside 1..=1024"),
            (GateFactor { experts: 1025, ..MOONLIGHT }, "`--experts 1025` is outside 1..=1024"),
            (GateFactor { groups: 0, ..MOONLIGHT }, "`--groups 0` does not divide the 64 experts"),
            (GateFactor { groups: 7, ..MOONLIGHT }, "`--groups 7` does not divide the 64 experts"),
            (GateFactor { groups: 64, top_groups: 8, ..MOONLIGHT }, "`--groups 64` leaves one expert in a group"),
            (GateFactor { top_groups: 0, ..DEEPSEEK_V3 }, "`--top-groups 0` is outside 1..=8"),
            (GateFactor { top_groups: 9, ..DEEPSEEK_V3 }, "`--top-groups 9` is outside 1..=8"),
            (GateFactor { top_k: 0, ..MOONLIGHT }, "`--top-k 0` is outside 1..=64"),
            (GateFactor { top_k: 65, ..MOONLIGHT }, "`--top-k 65` is outside 1..=64"),
            (GateFactor { top_k: 129, ..DEEPSEEK_V3 }, "`--top-k 129` is outside 1..=128"),
        ] {
            let error = shape.check().unwrap_err();
            assert_eq!(error.to_string(), problem);
            assert!(error.hint().is_some_and(|hint| hint.starts_with("choose ")), "{problem}");
        }
        for shape in [MOONLIGHT, DEEPSEEK_V3, GateFactor { experts: 1, top_k: 1, ..MOONLIGHT }] {
            shape.check().unwrap();
        }
    }
}

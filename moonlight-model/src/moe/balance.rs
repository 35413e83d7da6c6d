//! Load balancing: the update of the correction bias, and the sequence-wise balance loss.

use burn::tensor::{Tensor, TensorData};

use super::router::{RouterOutput, top_k_by_score};
use super::shape::ScoringFunc;
use crate::forward::ForwardContext;

/// The number of tokens routed to each expert; padding does not count.
pub(super) fn expert_load(choices: &[u32], k: usize, experts: usize, padding: Option<&[bool]>) -> Vec<u64> {
    let mut load = vec![0; experts];
    for (token, choices) in choices.chunks_exact(k).enumerate() {
        if !padding.is_some_and(|padding| padding[token]) {
            choices.iter().for_each(|&expert| load[expert as usize] += 1);
        }
    }
    load
}

/// The update of the correction bias (Muon report, arXiv 2502.16982, appendix C): `u (sign(e_i) - mean_j sign(e_j))`, where `e_i`
/// is the mean load minus the load of expert `i`. An overloaded expert becomes less likely. Subtracting the mean keeps the sum of
/// the biases constant.
pub(crate) fn bias_step(load: &[u64], rate: f64) -> Vec<f32> {
    // sign(mean - load_i) in integers: comparing the total with `experts * load_i` avoids a rounded division, so a load that equals
    // the mean has the sign 0.
    let total: u64 = load.iter().sum();
    let signs: Vec<f64> =
        load.iter().map(|&load_i| f64::from(total.cmp(&(load_i * load.len() as u64)) as i8)).collect();
    let mean = signs.iter().sum::<f64>() / signs.len() as f64;
    signs.into_iter().map(|sign| (rate * (sign - mean)) as f32).collect()
}

/// The sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20), averaged over sequences.
///
/// `L = a sum_i f_i P_i` with `f_i = N / (k T) sum_t [i among the k best of s_t]` (by score, without the bias) and `P_i` the mean
/// over the sequence of `s_i / sum_j s_j`. The gradient flows through `P` only. Padding does not count.
pub(super) fn sequence_loss(routed: &RouterOutput, experts: usize, context: &ForwardContext) -> Tensor<1> {
    let (batch, sequence, k) = (context.batch(), context.sequence(), routed.k);
    let top_k = top_k_by_score(&routed.host_scores, experts, k);
    let is_counted = |token: usize| !context.padding().is_some_and(|padding| padding[token]);
    // coefficients[t, i] = a f_i / (T sequences). `f` has no gradient, so the loss is one product of these constants with the
    // normalized scores.
    let mut coefficients = vec![0.0f32; batch * sequence * experts];
    for row in 0..batch {
        let tokens = row * sequence..(row + 1) * sequence;
        // T, without padding. If a whole sequence is padding, `factor` is infinite, but no token below uses it.
        let length = tokens.clone().filter(|&token| is_counted(token)).count();
        let mut chosen = vec![0u64; experts];
        for token in tokens.clone().filter(|&token| is_counted(token)) {
            top_k[token * k..(token + 1) * k].iter().for_each(|&expert| chosen[expert as usize] += 1);
        }
        let factor = context.balance_weight() * experts as f64 / (k as f64 * (length as f64).powi(2) * batch as f64);
        for token in tokens.filter(|&token| is_counted(token)) {
            for (coefficient, &chosen) in coefficients[token * experts..][..experts].iter_mut().zip(&chosen) {
                *coefficient = (factor * chosen as f64) as f32;
            }
        }
    }
    let shape = [batch * sequence, experts];
    let coefficients = Tensor::<2>::from_data(TensorData::new(coefficients, shape), &routed.scores.device());
    // Softmax scores already sum to 1.
    let normalized = match routed.scoring {
        ScoringFunc::Softmax => routed.scores.clone(),
        ScoringFunc::Sigmoid => routed.scores.clone() / routed.scores.clone().sum_dim(1),
    };
    (normalized * coefficients).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bias_moves_against_the_load_and_keeps_its_sum() {
        // Mean 4: experts 0 and 1 are overloaded, 2 is even, 3 is empty.
        let step = bias_step(&[7, 5, 4, 0], 1e-3);
        let mean_sign = -0.25;
        let expected = [-1.0, -1.0, 0.0, 1.0].map(|sign| (1e-3 * (sign - mean_sign)) as f32);
        assert_eq!(step, expected);
        assert!(step.iter().sum::<f32>().abs() < 1e-9);
        assert_eq!(bias_step(&[3, 3, 3], 1.0), [0.0; 3]);
    }

    #[test]
    fn padding_does_not_count() {
        let choices = [0, 1, 1, 2, 0, 2];
        assert_eq!(expert_load(&choices, 2, 3, None), [2, 2, 2]);
        assert_eq!(expert_load(&choices, 2, 3, Some(&[false, true, false])), [2, 1, 1]);
    }
}

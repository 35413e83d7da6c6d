//! Load balancing: the update of the correction bias, and the sequence-wise balance loss.

use burn::tensor::{DType, FloatDType, Tensor, TensorData};

use super::router::RouterOutput;
use super::routing_rule::RoutingRule;
use super::shape::ScoringFunc;
use crate::forward::ForwardContext;
use crate::kernels::{choose_experts, count_choices};

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
pub(super) fn sequence_loss(routed: &RouterOutput, rule: &RoutingRule, context: &ForwardContext) -> Tensor<1> {
    let (batch, sequence, experts) = (context.batch(), context.sequence(), rule.experts);
    let counted = context.counted();
    let chosen = choose_experts(routed.scores.clone(), None, &rule.by_score());
    let chosen = count_choices(chosen, counted.clone(), experts, batch); // [batch, experts]
    // coefficients[b, i] = a f_i / (T sequences), a multiple of the number of choices: of each sequence a table of the multiples, rounded
    // once. `f` has no gradient, so the loss is one product of these constants with the normalized scores.
    let mut multiples = Vec::with_capacity(batch * (sequence + 1));
    for row in 0..batch {
        let tokens = row * sequence..(row + 1) * sequence;
        // T, without padding. A sequence of padding alone has no choices, so that its factor does not matter.
        let length = context.padding().map_or(sequence, |padding| padding[tokens].iter().filter(|&&p| !p).count());
        let divisor = rule.k as f64 * (length.max(1) as f64).powi(2) * batch as f64;
        let factor = context.balance_weight() * experts as f64 / divisor;
        multiples.extend((0..=sequence).map(|chosen| (factor * chosen as f64) as f32));
    }
    let device = routed.scores.device();
    let multiples = Tensor::<2>::from_data(TensorData::new(multiples, [batch, sequence + 1]), (&device, DType::F32));
    let coefficients = multiples.gather(1, chosen).reshape([batch, 1, experts]);
    // Softmax scores already sum to 1.
    let normalized = match routed.scoring {
        ScoringFunc::Softmax => routed.scores.clone(),
        ScoringFunc::Sigmoid => routed.scores.clone() / routed.scores.clone().sum_dim(1),
    };
    let mut normalized = normalized.reshape([batch, sequence, experts]);
    if let Some(counted) = counted {
        normalized = normalized * counted.reshape([batch, sequence, 1]).cast(FloatDType::F32);
    }
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
}

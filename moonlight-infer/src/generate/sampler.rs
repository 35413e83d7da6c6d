//! Samples the next token from a row of logits.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::InferError;

/// How the next token is sampled. The default is greedy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 for greedy decoding.
    pub temperature: f64,
    /// Nucleus sampling: only the most likely tokens whose probabilities add up to this value are candidates; 1 for all.
    pub top_p: f64,
    /// Only this many of the most likely tokens are candidates; 0 for all.
    pub top_k: usize,
    /// The seed of the random number generator.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 }
    }
}

/// Samples the tokens of one sequence.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    /// A sampler at the start of its random sequence.
    pub fn new(sampling: Sampling) -> Self {
        Self { sampling, random: ChaCha8Rng::seed_from_u64(sampling.seed) }
    }

    /// Chooses a token from logits `[vocab]`. Temperature, `top_k` and `top_p` are applied in this order, as in
    /// transformers. Of equal logits, the one with the lower token id comes first.
    ///
    /// # Errors
    ///
    /// [`InferError::NonFinite`] for a logit that is NaN or infinite.
    pub fn choose(&mut self, logits: &[f32]) -> Result<u32, InferError> {
        if let Some(token) = logits.iter().position(|logit| !logit.is_finite()) {
            return Err(InferError::NonFinite { token, value: logits[token] });
        }
        let Sampling { temperature, top_p, top_k, .. } = self.sampling;
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        // Equal logits are ordered by token id, because an unstable sort could return them in any order.
        let by_probability = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if temperature == 0.0 {
            return Ok(order.into_iter().min_by(by_probability).unwrap_or(0));
        }
        order.sort_unstable_by(by_probability);
        if top_k > 0 {
            order.truncate(top_k);
        }
        // The largest logit is subtracted so that `exp` does not overflow at a low temperature.
        let largest = f64::from(logits[order[0] as usize]);
        let weights: Vec<f64> =
            order.iter().map(|&token| ((f64::from(logits[token as usize]) - largest) / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut cumulative = 0.0;
        let kept = weights
            .iter()
            .position(|weight| {
                cumulative += weight / total;
                cumulative >= top_p
            })
            .map_or(weights.len(), |last| last + 1);
        let mut draw = self.random.random::<f64>() * weights[..kept].iter().sum::<f64>();
        for (&token, weight) in order.iter().zip(&weights[..kept]) {
            draw -= weight;
            if draw < 0.0 {
                return Ok(token);
            }
        }
        // Reached only if rounding leaves a remainder of the draw after the last weight.
        Ok(order[kept - 1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(sampling: Sampling, logits: &[f32]) -> Vec<f64> {
        let mut sampler = Sampler::new(sampling);
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..20_000 {
            counts[sampler.choose(logits).unwrap() as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn zero_temperature_takes_the_largest_logit_and_of_equal_ones_the_first() {
        let mut sampler = Sampler::new(Sampling::default());
        assert_eq!(sampler.choose(&[0.1, 3.0, 2.0, 3.0]).unwrap(), 1);
    }

    #[test]
    fn non_finite_logits_are_an_error() {
        for temperature in [0.0, 1.0] {
            let mut sampler = Sampler::new(Sampling { temperature, ..Sampling::default() });
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let error = sampler.choose(&[0.5, value, 1.0]).unwrap_err();
                assert!(
                    error.to_string().starts_with("the model's logits are non-finite: that of token 1 is "),
                    "{error}"
                );
                assert!(error.hint().is_some());
            }
            assert!(sampler.choose(&[0.5, 1.0]).is_ok());
        }
    }

    #[test]
    fn samples_follow_the_softmax() {
        let logits = [1.0f32.ln(), 2.0f32.ln(), 5.0f32.ln()];
        let found = frequencies(Sampling { temperature: 1.0, ..Sampling::default() }, &logits);
        for (found, expected) in found.iter().zip([0.125, 0.25, 0.625]) {
            assert!((found - expected).abs() < 0.02, "{found} {expected}");
        }
    }

    #[test]
    fn top_k_and_top_p_keep_the_most_likely_tokens() {
        let logits = [1.0f32.ln(), 2.0f32.ln(), 5.0f32.ln()];
        let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
        for one in [Sampling { top_k: 1, ..sampling }, Sampling { top_p: 0.5, ..sampling }] {
            assert_eq!(frequencies(one, &logits)[..2], [0.0, 0.0]);
        }
        let two = frequencies(Sampling { top_p: 0.8, ..sampling }, &logits);
        assert!(two[0] == 0.0 && two[1] > 0.2);
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
        let (mut a, mut b) = (Sampler::new(sampling), Sampler::new(sampling));
        let logits: Vec<f32> = (0..50).map(|index| (index as f32).sin()).collect();
        for _ in 0..100 {
            assert_eq!(a.choose(&logits).unwrap(), b.choose(&logits).unwrap());
        }
    }
}

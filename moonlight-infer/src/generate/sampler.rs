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
    /// The memory of the last [`Ranking`], so that a token allocates nothing.
    keys: Vec<u64>,
}

impl Sampler {
    /// A sampler at the start of its random sequence.
    pub fn new(sampling: Sampling) -> Self {
        Self { sampling, random: ChaCha8Rng::seed_from_u64(sampling.seed), keys: Vec::new() }
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
        if temperature == 0.0 {
            let key = |token: u32| ranking_key(logits[token as usize], token);
            return Ok((0..logits.len() as u32).max_by_key(|&token| key(token)).unwrap_or(0));
        }
        let Some(largest) = logits.iter().copied().reduce(f32::max) else { return Ok(0) };
        // The largest logit is subtracted so that `exp` does not overflow at a low temperature.
        let weight = |logit: f32| ((f64::from(logit) - f64::from(largest)) / temperature).exp();
        let mut ranking = Ranking::new(logits, std::mem::take(&mut self.keys));
        let candidates = if top_k == 0 { logits.len() } else { top_k.min(logits.len()) };
        let mut weight_at = |rank: usize| weight(logits[ranking.token(rank) as usize]);
        let total: f64 = if candidates == logits.len() {
            logits.iter().map(|&logit| weight(logit)).sum() // needs no order
        } else {
            (0..candidates).map(&mut weight_at).sum()
        };
        let (mut kept, mut mass) = (candidates, total);
        if top_p < 1.0 {
            let mut cumulative = 0.0;
            (kept, mass) = (0, 0.0);
            while kept < candidates && (kept == 0 || cumulative < top_p) {
                let weight = weight_at(kept);
                cumulative += weight / total;
                mass += weight;
                kept += 1;
            }
        }
        let mut draw = self.random.random::<f64>() * mass;
        let mut rank = 0;
        // The last token is also taken if rounding leaves a remainder of the draw after its weight.
        while rank + 1 < kept {
            draw -= weight_at(rank);
            if draw < 0.0 {
                break;
            }
            rank += 1;
        }
        let token = ranking.token(rank);
        self.keys = ranking.keys;
        Ok(token)
    }
}

/// Tokens by decreasing logit, of equal logits the lower token first. It sorts as far as it is read: of a large vocabulary only
/// few tokens are.
struct Ranking {
    /// [`ranking_key`] of each token.
    keys: Vec<u64>,
    /// The first of `keys` that are the largest, in order.
    sorted: usize,
}

impl Ranking {
    /// The first number of tokens that are sorted; each further one is four times as large.
    const FIRST: usize = 64;

    fn new(logits: &[f32], mut keys: Vec<u64>) -> Self {
        keys.clear();
        keys.extend((0..).zip(logits).map(|(token, &logit)| ranking_key(logit, token)));
        Self { keys, sorted: 0 }
    }

    fn token(&mut self, rank: usize) -> u32 {
        while rank >= self.sorted {
            let rest = &mut self.keys[self.sorted..];
            let count = Self::FIRST.max(3 * self.sorted).min(rest.len());
            if count < rest.len() {
                rest.select_nth_unstable_by(count, |a, b| b.cmp(a));
            }
            rest[..count].sort_unstable_by(|a, b| b.cmp(a));
            self.sorted += count;
        }
        !(self.keys[rank] as u32)
    }
}

/// A number that orders tokens by their logits, in the order of [`f32::total_cmp`], and of equal logits has the largest value for
/// the lowest token.
fn ranking_key(logit: f32, token: u32) -> u64 {
    let bits = logit.to_bits();
    // The bits of floats are ordered like integers if those of negative ones are inverted.
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | u64::from(!token)
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

    /// Sorts all tokens, in place of [`Ranking`].
    fn choose_by_sorting(sampling: Sampling, random: &mut ChaCha8Rng, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_p, top_k, .. } = sampling;
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        if temperature == 0.0 {
            return order[0];
        }
        if top_k > 0 {
            order.truncate(top_k);
        }
        let largest = f64::from(logits[order[0] as usize]);
        let weight = |&token: &u32| ((f64::from(logits[token as usize]) - largest) / temperature).exp();
        let weights: Vec<f64> = order.iter().map(weight).collect();
        let total: f64 = weights.iter().sum();
        let mut cumulative = 0.0;
        let reached = weights.iter().position(|weight| {
            cumulative += weight / total;
            cumulative >= top_p
        });
        let kept = reached.map_or(weights.len(), |last| last + 1);
        let mut draw = random.random::<f64>() * weights[..kept].iter().sum::<f64>();
        let chosen = weights[..kept].iter().position(|weight| {
            draw -= weight;
            draw < 0.0
        });
        order[chosen.unwrap_or(kept - 1)]
    }

    #[test]
    fn sorting_only_the_likely_tokens_chooses_the_same() {
        let mut random = ChaCha8Rng::seed_from_u64(5);
        for (vocab, spread) in [(1, 1.0), (5, 2.0), (64, 0.0), (65, 4.0), (3000, 1.0), (3000, 12.0)] {
            for temperature in [0.0, 0.3, 1.0, 5.0] {
                for (top_k, top_p) in [(0, 1.0), (0, 0.9), (0, 0.0), (1, 1.0), (40, 0.7), (500, 0.99), (5000, 1.0)] {
                    let sampling = Sampling { temperature, top_k, top_p, seed: 3 };
                    let (mut sampler, mut sorting) = (Sampler::new(sampling), ChaCha8Rng::seed_from_u64(3));
                    for _ in 0..10 {
                        // Rounded, so that some logits are equal; zeros of both signs among them.
                        let mut logit = || ((random.random::<f32>() - 0.5) * spread * 8.0).round() / 8.0;
                        let logits: Vec<f32> = (0..vocab).map(|_| logit()).collect();
                        let expected = choose_by_sorting(sampling, &mut sorting, &logits);
                        assert_eq!(sampler.choose(&logits).unwrap(), expected, "{sampling:?}, {vocab} tokens");
                    }
                }
            }
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

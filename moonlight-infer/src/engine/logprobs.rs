//! Log-probabilities from a row of logits.

use super::event::TokenLogprobs;

/// The log-probability of `token` under logits `[vocab]`, and those of the `alternatives` most likely tokens.
///
/// `x - max - ln(sum exp(x - max))`, with the sum in f64.
pub(super) fn token_logprobs(logits: &[f32], token: u32, alternatives: usize) -> TokenLogprobs {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - largest).exp())).sum();
    let log_sum = sum.ln();
    let logprob = |logit: f32| (f64::from(logit) - f64::from(largest) - log_sum) as f32;
    let top = most_likely(logits, alternatives).into_iter().map(|(token, logit)| (token, logprob(logit))).collect();
    TokenLogprobs { token, logprob: logprob(logits[token as usize]), top }
}

/// The tokens with the `count` largest logits, the largest first; of equal ones the lower token first.
fn most_likely(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    if count == 0 {
        return top;
    }
    for (token, &logit) in logits.iter().enumerate() {
        // Nearly all tokens end here, so this is a single pass over the logits.
        if top.len() == count && top.last().is_some_and(|&(_, least)| logit <= least) {
            continue;
        }
        let place = top.partition_point(|&(_, other)| other >= logit);
        top.insert(place, (token as u32, logit));
        top.truncate(count);
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_a_log_softmax() {
        let logits = [1.0f32.ln() + 50.0, 2.0f32.ln() + 50.0, 5.0f32.ln() + 50.0, f32::MIN];
        let found = token_logprobs(&logits, 1, 2);
        assert!((found.logprob - 0.25f32.ln()).abs() < 1e-5, "{found:?}");
        assert_eq!(found.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [2, 1]);
        assert!((found.top[0].1 - 0.625f32.ln()).abs() < 1e-5 && found.top[1].1 == found.logprob);
        assert_eq!(token_logprobs(&logits, 0, 0).top, []);
    }

    #[test]
    fn the_most_likely_tokens_are_sorted_and_equal_ones_come_by_token() {
        let logits = [1.0, 3.0, 3.0, -1.0, 2.0, 3.0];
        let tokens = |count| most_likely(&logits, count).iter().map(|(token, _)| *token).collect::<Vec<_>>();
        assert_eq!(tokens(2), [1, 2]);
        assert_eq!(tokens(4), [1, 2, 5, 4]);
        assert_eq!(tokens(99), [1, 2, 5, 4, 0, 3]);
    }
}

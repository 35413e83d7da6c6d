//! Applies [`Penalties`] to a row of logits.

use rustc_hash::FxHashMap;

use super::error::EngineError;
use super::request::Penalties;

/// The tokens of a text that penalties depend on.
#[derive(Debug)]
pub(super) struct PenaltyState {
    penalties: Penalties,
    /// For each token of the prompt or the new text how often the new text has it.
    counts: FxHashMap<u32, u32>,
}

impl Penalties {
    /// Whether the logits stay as they are.
    fn is_neutral(&self) -> bool {
        self.presence == 0.0 && self.frequency == 0.0 && self.repetition == 1.0 && self.logit_bias.is_empty()
    }

    /// Checks the ranges, which are those of OpenAI's API; that of `repetition` keeps logits finite.
    ///
    /// # Errors
    ///
    /// [`EngineError::OutOfRange`], [`EngineError::UnknownToken`].
    pub(super) fn check(&self, vocab_size: usize) -> Result<(), EngineError> {
        let in_range = |key, value: f32, [low, high]: [f32; 2], range| {
            let fits = (low..=high).contains(&value); // false for NaN
            if fits { Ok(()) } else { Err(EngineError::OutOfRange { key, value: value.into(), range }) }
        };
        in_range("presence_penalty", self.presence, [-2.0, 2.0], "between -2 and 2")?;
        in_range("frequency_penalty", self.frequency, [-2.0, 2.0], "between -2 and 2")?;
        in_range("repetition_penalty", self.repetition, [0.01, 100.0], "between 0.01 and 100")?;
        for &(token, bias) in &self.logit_bias {
            if token as usize >= vocab_size {
                return Err(EngineError::UnknownToken { token, vocab_size });
            }
            in_range("logit_bias", bias, [-100.0, 100.0], "between -100 and 100")?;
        }
        if self.logit_bias.len() > vocab_size {
            let value = self.logit_bias.len() as f64;
            return Err(EngineError::OutOfRange {
                key: "logit_bias",
                value,
                range: "at most one value for each token",
            });
        }
        Ok(())
    }
}

impl PenaltyState {
    /// `None` if the penalties change nothing.
    pub(super) fn new(penalties: Penalties, prompt: &[u32]) -> Option<Self> {
        if penalties.is_neutral() {
            return None;
        }
        let mut counts = FxHashMap::default();
        if penalties.repetition != 1.0 {
            counts.extend(prompt.iter().map(|&token| (token, 0)));
        }
        Some(Self { penalties, counts })
    }

    /// Counts a new token.
    pub(super) fn push(&mut self, token: u32) {
        *self.counts.entry(token).or_default() += 1;
    }

    /// Changes logits `[vocab]`: bias, then repetition, frequency and presence, in the order of vLLM.
    pub(super) fn apply(&self, logits: &mut [f32]) {
        let Penalties { presence, frequency, repetition, logit_bias } = &self.penalties;
        for &(token, bias) in logit_bias {
            logits[token as usize] += bias;
        }
        // The order of a map does not matter, because each token is changed once.
        for (&token, &count) in &self.counts {
            let logit = &mut logits[token as usize];
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            if count > 0 {
                *logit -= frequency * count as f32 + presence;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(penalties: Penalties, prompt: &[u32], new: &[u32], mut logits: Vec<f32>) -> Vec<f32> {
        let mut state = PenaltyState::new(penalties, prompt).unwrap();
        new.iter().for_each(|&token| state.push(token));
        state.apply(&mut logits);
        logits
    }

    #[test]
    fn the_defaults_change_nothing() {
        assert!(PenaltyState::new(Penalties::default(), &[1, 2]).is_none());
    }

    /// Values from vLLM's `apply_penalties` by hand: repetition counts the prompt, the others do not.
    #[test]
    fn penalties_follow_their_definitions() {
        let logits = || vec![2.0, -2.0, 1.0, 0.0];
        let none = Penalties::default();
        let repetition = Penalties { repetition: 2.0, ..none.clone() };
        assert_eq!(applied(repetition, &[0], &[1, 1], logits()), [1.0, -4.0, 1.0, 0.0]);
        let others = Penalties { presence: 0.5, frequency: 0.25, ..none.clone() };
        assert_eq!(applied(others, &[0], &[1, 1, 2], logits()), [2.0, -3.0, 0.25, 0.0]);
        let bias = Penalties { logit_bias: vec![(3, 5.0), (0, -1.0), (3, 1.0)], ..none.clone() };
        assert_eq!(applied(bias, &[], &[], logits()), [1.0, -2.0, 1.0, 6.0]);
        // The bias comes first: 0 + 4, then halved.
        let both = Penalties { logit_bias: vec![(3, 4.0)], repetition: 2.0, ..none };
        assert_eq!(applied(both, &[3], &[], logits())[3], 2.0);
    }

    #[test]
    fn values_out_of_range_are_refused() {
        let valid = Penalties::default();
        assert!(valid.check(4).is_ok());
        for invalid in [
            Penalties { presence: 2.5, ..valid.clone() },
            Penalties { frequency: f32::NAN, ..valid.clone() },
            Penalties { repetition: 0.0, ..valid.clone() },
            Penalties { logit_bias: vec![(1, f32::INFINITY)], ..valid.clone() },
            Penalties { logit_bias: vec![(4, 1.0)], ..valid.clone() },
            Penalties { logit_bias: vec![(1, 1.0); 5], ..valid.clone() },
        ] {
            assert!(invalid.check(4).is_err(), "{invalid:?}");
        }
    }
}

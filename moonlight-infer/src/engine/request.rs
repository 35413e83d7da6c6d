//! [`Request`]: a prompt and how to continue it.

use super::error::EngineError;
use crate::error::InferError;
use crate::generate::{Sampling, check_prompt};

/// The most alternatives of a token that a request can ask for, as in OpenAI's API and by default in vLLM. It bounds the memory of
/// a response.
pub const MAX_ALTERNATIVES: usize = 20;

/// A prompt, and how to continue it.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The name of a model of the engine.
    pub model: String,
    /// At least one token.
    pub prompt: Vec<u32>,
    /// The most new tokens; the end of the slot's context may come first. 0 only computes `prompt_logprobs`.
    pub max_new_tokens: usize,
    /// Temperature, top-k, top-p and seed.
    pub sampling: Sampling,
    /// Changes of the logits before sampling.
    pub penalties: Penalties,
    /// Tokens that end the text, such as EOS. The one that ends it is not part of the text.
    pub stop_tokens: Vec<u32>,
    /// Whether `stop_tokens` do not end the text, to measure with a fixed number of tokens.
    pub ignore_eos: bool,
    /// Returns the log-probability of each new token and of this many of the most likely alternatives.
    pub logprobs: Option<usize>,
    /// Returns the same for each token of the prompt. The prompt is then computed in full, without reuse of a prefix.
    pub prompt_logprobs: Option<usize>,
}

impl Request {
    /// A greedy request without penalties, stop tokens and log-probabilities.
    pub fn new(model: &str, prompt: Vec<u32>, max_new_tokens: usize) -> Self {
        Self {
            model: model.into(),
            prompt,
            max_new_tokens,
            sampling: Sampling::default(),
            penalties: Penalties::default(),
            stop_tokens: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

impl Request {
    /// Checks the request for a model with this vocabulary and a slot of `capacity` tokens.
    ///
    /// # Errors
    ///
    /// [`EngineError::EmptyPrompt`], [`EngineError::PromptTooLong`], [`EngineError::UnknownToken`], [`EngineError::OutOfRange`].
    pub(super) fn check(&self, vocab_size: usize, capacity: usize) -> Result<(), EngineError> {
        // The last token of a prompt without a continuation is not read, so such a prompt may be one token longer.
        let capacity = capacity + usize::from(self.max_new_tokens == 0);
        check_prompt(&self.prompt, vocab_size, capacity).map_err(|error| match error {
            InferError::EmptyPrompt => EngineError::EmptyPrompt,
            InferError::UnknownToken { token, vocab_size } => EngineError::UnknownToken { token, vocab_size },
            _ => EngineError::PromptTooLong { tokens: self.prompt.len(), context: capacity },
        })?;
        let require = |fits: bool, key, value: f64, range| {
            if fits { Ok(()) } else { Err(EngineError::OutOfRange { key, value, range }) }
        };
        let Sampling { temperature, top_p, .. } = self.sampling;
        // Comparisons with NaN are false.
        require(temperature >= 0.0 && temperature.is_finite(), "temperature", temperature, "at least 0")?;
        require((0.0..=1.0).contains(&top_p), "top_p", top_p, "between 0 and 1")?;
        let alternatives = [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)];
        for (key, alternatives) in alternatives {
            let count = alternatives.unwrap_or(0);
            require(count <= MAX_ALTERNATIVES, key, count as f64, "at most 20")?;
        }
        require(
            self.stop_tokens.len() <= vocab_size,
            "stop_tokens",
            self.stop_tokens.len() as f64,
            "at most as many as there are tokens",
        )?;
        self.penalties.check(vocab_size)
    }
}

/// Changes of the logits before sampling, as OpenAI's API and vLLM define them. The default changes nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Penalties {
    /// Subtracted from the logit of each token that the new text has.
    pub presence: f32,
    /// Subtracted from the logit of each token for each time that the new text has it.
    pub frequency: f32,
    /// Divides positive logits and multiplies negative ones, of tokens that the prompt or the new text has (CTRL, arXiv
    /// 1909.05858, section 4.1); 1 changes nothing.
    pub repetition: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for Penalties {
    fn default() -> Self {
        Self { presence: 0.0, frequency: 0.0, repetition: 1.0, logit_bias: Vec::new() }
    }
}

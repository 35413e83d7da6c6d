//! [`Request`]: a prompt and how to continue it.

use crate::generate::Sampling;

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

//! [`Active`]: a request that has a slot.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::sync::mpsc;

use super::error::EngineError;
use super::event::{Event, TokenLogprobs, Usage};
use super::logprobs::token_logprobs;
use super::model_version::ModelVersion;
use super::penalties::PenaltyState;
use super::request::Request;
use super::shared::Job;
use crate::error::InferError;
use crate::generate::{Sampler, StopReason};

/// A request that has a slot.
pub(super) struct Active {
    pub(super) version: Arc<ModelVersion>,
    pub(super) events: mpsc::Sender<Event>,
    /// See [`Job::is_complete`].
    is_complete: Arc<AtomicBool>,
    pub(super) deadline: Option<Instant>,
    sampler: Sampler,
    penalties: Option<PenaltyState>,
    stop_tokens: Vec<u32>,
    logprobs: Option<usize>,
    /// Of the token that ended the text.
    stop_logprobs: Option<TokenLogprobs>,
    /// The most new tokens, within the context.
    max_new_tokens: usize,
    pub(super) usage: Usage,
    /// The log-probabilities of the prompt so far; `None` if they are not wanted or were sent.
    prompt_scores: Option<PromptScores>,
    /// Tokens of another sequence that are copied when they are computed.
    pub(super) awaited: Option<AwaitedPrefix>,
    /// How many forward passes with this request have panicked.
    pub(super) panics: u32,
    /// Whether it runs alone until its next token, because its last pass panicked or had non-finite logits.
    pub(super) is_suspect: bool,
}

/// See [`PrefixSource`](super::placement::PrefixSource).
#[derive(Debug, Clone, Copy)]
pub(super) struct AwaitedPrefix {
    pub(super) slot: usize,
    /// When the request that computes them got the slot, to recognize that another request has it now.
    pub(super) last_used: u64,
    pub(super) length: usize,
}

struct PromptScores {
    alternatives: usize,
    scores: Vec<Option<TokenLogprobs>>,
}

/// How a request ended.
pub(super) enum Ending {
    Done { reason: StopReason, stop_token: Option<u32> },
    Cancelled,
    Failed(EngineError),
}

impl Job {
    /// How a request ends whose receiver is gone.
    pub(super) fn receiver_ending(&self) -> Ending {
        receiver_ending(&self.is_complete)
    }
}

fn receiver_ending(is_complete: &AtomicBool) -> Ending {
    if is_complete.load(Ordering::Relaxed) {
        Ending::Done { reason: StopReason::Interrupted, stop_token: None }
    } else {
        Ending::Cancelled
    }
}

impl Active {
    /// See [`Job::receiver_ending`].
    pub(super) fn receiver_ending(&self) -> Ending {
        receiver_ending(&self.is_complete)
    }

    /// The request and the tokens of its prompt. `capacity` is the number of tokens of a slot.
    pub(super) fn new(job: Job, capacity: usize) -> (Self, Vec<u32>) {
        let Request {
            prompt,
            max_new_tokens,
            sampling,
            penalties,
            stop_tokens,
            ignore_eos,
            logprobs,
            prompt_logprobs,
            ..
        } = job.request;
        let active = Self {
            sampler: Sampler::new(sampling),
            penalties: PenaltyState::new(penalties, &prompt),
            stop_tokens: if ignore_eos { Vec::new() } else { stop_tokens },
            logprobs,
            stop_logprobs: None,
            // The last token needs no place, because it is not read.
            max_new_tokens: max_new_tokens.min((capacity + 1).saturating_sub(prompt.len())),
            usage: Usage { prompt_tokens: prompt.len(), ..Usage::default() },
            prompt_scores: prompt_logprobs.map(PromptScores::new),
            version: job.version,
            events: job.events,
            is_complete: job.is_complete,
            deadline: job.deadline,
            awaited: None,
            panics: 0,
            is_suspect: false,
        };
        (active, prompt)
    }

    /// Whether logits of every token of the prompt are wanted.
    pub(super) fn scores_prompt(&self) -> bool {
        self.prompt_scores.is_some()
    }

    /// Whether a token follows the prompt. Otherwise the last token of the prompt needs no forward pass.
    pub(super) fn generates(&self) -> bool {
        self.max_new_tokens > 0
    }

    /// For a prompt that is computed again: nothing of it is reused, and its log-probabilities start again.
    pub(super) fn restart(&mut self) {
        self.usage.reused_tokens = 0;
        self.prompt_scores = self.prompt_scores.take().map(|scores| PromptScores::new(scores.alternatives));
    }

    /// Takes the logits after token `position` of `tokens`, the request's text so far; appends the new token if it is the last.
    /// Returns the ending if the request ends.
    pub(super) fn take_logits(&mut self, position: usize, tokens: &mut Vec<u32>, logits: &mut [f32]) -> Option<Ending> {
        let next = position + 1;
        let is_finite = |scores: &TokenLogprobs| scores.logprob.is_finite();
        if let Some(prompt) = &mut self.prompt_scores {
            if next < self.usage.prompt_tokens {
                let scores = token_logprobs(logits, tokens[next], prompt.alternatives);
                if !is_finite(&scores) {
                    return Some(Ending::Failed(non_finite(logits)));
                }
                prompt.scores.push(Some(scores));
            }
            if prompt.scores.len() == self.usage.prompt_tokens {
                self.send_prompt_scores();
            }
            if !self.generates() && next + 1 == tokens.len() {
                return Some(Ending::Done { reason: StopReason::Length, stop_token: None });
            }
        }
        if next < tokens.len() {
            return None;
        }
        self.is_suspect = false;
        self.new_token(tokens, logits)
    }

    /// Sends the log-probabilities of the prompt, if they are wanted and were not sent.
    fn send_prompt_scores(&mut self) {
        if let Some(PromptScores { scores, .. }) = self.prompt_scores.take() {
            self.send(Event::Prompt(scores));
        }
    }

    fn new_token(&mut self, tokens: &mut Vec<u32>, logits: &mut [f32]) -> Option<Ending> {
        // Penalties change the logits, and may raise a damaged one above the rest, so the raw ones are kept if they are needed.
        let raw = (self.logprobs.is_some() && self.penalties.is_some()).then(|| logits.to_vec());
        if let Some(penalties) = &self.penalties {
            penalties.apply(logits);
        }
        let token = match self.sampler.choose(logits) {
            Ok(token) => token,
            Err(InferError::NonFinite { token, value }) => {
                return Some(Ending::Failed(EngineError::NonFinite { token, value: value.to_string() }));
            }
            Err(error) => return Some(Ending::Failed(EngineError::Panicked(error.to_string()))),
        };
        if self.stop_tokens.contains(&token) {
            let logits: &[f32] = raw.as_deref().unwrap_or(logits);
            self.stop_logprobs = self.logprobs.map(|alternatives| token_logprobs(logits, token, alternatives));
            return Some(Ending::Done { reason: StopReason::Eos, stop_token: Some(token) });
        }
        let logits: &[f32] = raw.as_deref().unwrap_or(logits);
        let logprobs = self.logprobs.map(|alternatives| token_logprobs(logits, token, alternatives));
        tokens.push(token);
        if let Some(penalties) = &mut self.penalties {
            penalties.push(token);
        }
        self.usage.new_tokens += 1;
        self.send(Event::Token { token, logprobs });
        let is_full = self.usage.new_tokens == self.max_new_tokens;
        is_full.then_some(Ending::Done { reason: StopReason::Length, stop_token: None })
    }

    fn send(&self, event: Event) {
        // The channel has room for every event of the request. An error is a receiver that was dropped, which the next iteration
        // sees.
        let _ = self.events.try_send(event);
    }

    /// Sends the last event.
    pub(super) fn finish(mut self, ending: Ending) {
        match ending {
            Ending::Done { reason, stop_token } => {
                self.send_prompt_scores(); // those of a prompt that needed no pass
                let stop_logprobs = self.stop_logprobs.take();
                self.send(Event::End { reason, stop_token, stop_logprobs, usage: self.usage });
            }
            Ending::Failed(error) => self.send(Event::Failed(error)),
            Ending::Cancelled => {}
        }
    }
}

impl PromptScores {
    fn new(alternatives: usize) -> Self {
        Self { alternatives, scores: vec![None] } // nothing precedes the first token
    }
}

fn non_finite(logits: &[f32]) -> EngineError {
    let token = logits.iter().position(|logit| !logit.is_finite()).unwrap_or(0);
    EngineError::NonFinite { token, value: logits[token].to_string() }
}

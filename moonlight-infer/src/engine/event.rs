//! [`Events`]: what an engine reports about a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;

use super::error::EngineError;
use crate::generate::StopReason;

/// A report about a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The log-probabilities of the prompt's tokens, if the request asked for them; `None` for the first. Comes once, before the
    /// first new token.
    Prompt(Vec<Option<TokenLogprobs>>),
    /// A new token.
    Token {
        /// The token.
        token: u32,
        /// Its log-probability, if the request asked for it.
        logprobs: Option<TokenLogprobs>,
    },
    /// The last report about a request that ended as it should.
    End {
        /// Why the text ended.
        reason: StopReason,
        /// The token that ended the text; `Some` for [`StopReason::Eos`].
        stop_token: Option<u32>,
        /// The log-probability of that token, if the request asked for those of new tokens.
        stop_logprobs: Option<TokenLogprobs>,
        /// What was computed.
        usage: Usage,
    },
    /// The last report about a request that did not.
    Failed(EngineError),
}

/// Numbers of tokens of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of the prompt whose keys and values were known already.
    pub reused_tokens: usize,
    /// New tokens, without the one that ended the text.
    pub new_tokens: usize,
}

/// The log-probability of a token, under the model's distribution before temperature, top-k, top-p and penalties, in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub token: u32,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens with theirs, the most likely first; of equal ones the lower token first.
    pub top: Vec<(u32, f32)>,
}

/// The reports about a request. Dropping them cancels the request and frees its slot.
#[derive(Debug)]
pub struct Events {
    receiver: mpsc::Receiver<Event>,
    is_complete: Arc<AtomicBool>,
    ended: bool,
}

impl Events {
    pub(super) fn new(receiver: mpsc::Receiver<Event>, is_complete: Arc<AtomicBool>) -> Self {
        Self { receiver, is_complete, ended: false }
    }

    /// The next report; `None` after [`Event::End`] or [`Event::Failed`].
    pub async fn next(&mut self) -> Option<Event> {
        let event = self.receiver.recv().await;
        self.checked(event)
    }

    /// [`next`](Self::next) for code that is not asynchronous.
    ///
    /// # Panics
    ///
    /// Within an asynchronous task, which it would block.
    pub fn blocking_next(&mut self) -> Option<Event> {
        let event = self.receiver.blocking_recv();
        self.checked(event)
    }

    /// Ends the request because its text is complete, for example at a stop string. Dropping the events does the same, but is
    /// counted as [`cancelled`](super::EndCounts::cancelled) and not as [`interrupted`](super::EndCounts::interrupted).
    pub fn complete(self) {
        self.is_complete.store(true, Ordering::Relaxed);
    }

    /// An engine whose thread ends early drops its senders, which must not look like the end of a text.
    fn checked(&mut self, event: Option<Event>) -> Option<Event> {
        if self.ended {
            return None;
        }
        let event = event.unwrap_or(Event::Failed(EngineError::Stopped));
        self.ended = matches!(event, Event::End { .. } | Event::Failed(_));
        Some(event)
    }
}

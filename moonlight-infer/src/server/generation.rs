//! The sequences of one HTTP request, run by the engine: several prompts, several answers to each.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;

use super::decoder::{Decoder, Piece};
use super::error::ApiError;
use super::metrics::Metrics;
use crate::engine::{Engine, EngineError, Event, Events, Request, TokenLogprobs};
use crate::generate::StopReason;
use crate::tokenizer::Tokenizer;

/// The pause before a sequence is submitted again that found the queue full while the others of its request had ended.
const RETRY: Duration = Duration::from_millis(50);

/// Something new about a sequence.
#[derive(Debug)]
pub(super) enum Update {
    /// The log-probabilities of the prompt.
    Prompt(Vec<Option<TokenLogprobs>>),
    Piece(Piece),
    End {
        finish: Finish,
        tokens: Tokens,
    },
}

/// Numbers of tokens of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tokens {
    pub(super) prompt: usize,
    /// Those of the prompt that were in the cache; `None` for a sequence that ended at a stop string: the engine reports it at
    /// the end of a sequence.
    pub(super) reused: Option<usize>,
    /// Without the token that ended the text.
    pub(super) new: usize,
}

/// OpenAI's `finish_reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finish {
    /// At a token that ends the text, or at a stop string.
    Stop,
    Length,
}

/// What is needed to decode the text of a sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Decoding<'t> {
    pub(super) tokenizer: &'t Tokenizer,
    /// See [`Decoder::new`].
    pub(super) kept: &'t [(u32, String)],
    pub(super) stops: &'t [String],
    pub(super) metrics: &'t Metrics,
}

/// The sequences of a request: `n` answers to each prompt, those of the first prompt first.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) prompts: Vec<Vec<u32>>,
    pub(super) n: usize,
    /// The request of each sequence, except for its prompt. The answers to a prompt have consecutive seeds.
    pub(super) request: Request,
}

impl Work {
    fn len(&self) -> usize {
        self.prompts.len() * self.n
    }

    /// The request of a sequence. It is made when it is submitted, because a prompt is copied for each of its answers.
    fn request(&self, index: usize) -> Request {
        let mut request = self.request.clone();
        request.prompt.clone_from(&self.prompts[index / self.n]);
        request.sampling.seed = request.sampling.seed.wrapping_add((index % self.n) as u64);
        request
    }
}

/// A sequence that runs.
struct Sequence<'t> {
    decoder: Decoder<'t>,
    prompt_tokens: usize,
    new_tokens: usize,
    /// When the sequence was submitted, or its last token came.
    last: Instant,
}

/// What follows an event of a sequence.
enum Next {
    Events,
    /// The text is complete, and the engine does not know it.
    StopString,
    Nothing,
}

type Waiting = BoxFuture<'static, (usize, Option<Event>, Events)>;

/// The sequences of one request. Dropping it cancels those that run.
///
/// As many run at once as the engine has slots; the others are submitted when one ends, so that one request with a thousand
/// prompts does not fill the queue.
pub(super) struct Generation<'t> {
    engine: &'t Engine,
    decoding: Decoding<'t>,
    work: Work,
    /// The first sequence that was not submitted.
    later: usize,
    sequences: Vec<Option<Sequence<'t>>>,
    running: FuturesUnordered<Waiting>,
    window: usize,
    ready: VecDeque<(usize, Update)>,
}

impl<'t> Generation<'t> {
    /// Submits the first sequences.
    ///
    /// # Errors
    ///
    /// That of the engine if it refuses one of them.
    pub(super) fn start(engine: &'t Engine, work: Work, decoding: Decoding<'t>) -> Result<Self, ApiError> {
        let mut generation = Self {
            engine,
            decoding,
            sequences: (0..work.len()).map(|_| None).collect(),
            later: 0,
            work,
            running: FuturesUnordered::new(),
            window: engine.options().slots.max(1),
            ready: VecDeque::new(),
        };
        if !generation.submit()? {
            let waiting = engine.options().max_waiting;
            return Err(EngineError::QueueFull { waiting }.into());
        }
        Ok(generation)
    }

    /// Submits sequences while there is room. Returns whether any runs.
    fn submit(&mut self) -> Result<bool, ApiError> {
        while self.running.len() < self.window && self.later < self.sequences.len() {
            let index = self.later;
            let request = self.work.request(index);
            let prompt_tokens = request.prompt.len();
            match self.engine.submit(request) {
                Ok(events) => {
                    let Decoding { tokenizer, kept, stops, .. } = self.decoding;
                    let decoder = Decoder::new(tokenizer, kept, stops.to_vec());
                    let last = Instant::now();
                    self.sequences[index] = Some(Sequence { decoder, prompt_tokens, new_tokens: 0, last });
                    self.running.push(wait(index, events));
                    self.later += 1;
                }
                Err(EngineError::QueueFull { .. }) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(!self.running.is_empty())
    }

    /// The next update with the index of its sequence; `None` after all of them ended.
    pub(super) async fn next(&mut self) -> Result<Option<(usize, Update)>, ApiError> {
        loop {
            if let Some(update) = self.ready.pop_front() {
                return Ok(Some(update));
            }
            if !self.submit()? {
                if self.later == self.sequences.len() {
                    return Ok(None);
                }
                tokio::time::sleep(RETRY).await;
                continue;
            }
            let Some((index, event, events)) = self.running.next().await else { continue };
            let event = event.unwrap_or(Event::Failed(EngineError::Stopped));
            match self.handle(index, event)? {
                Next::Events => self.running.push(wait(index, events)),
                Next::StopString => events.complete(),
                Next::Nothing => {}
            }
        }
    }

    fn handle(&mut self, index: usize, event: Event) -> Result<Next, ApiError> {
        let Some(sequence) = &mut self.sequences[index] else { return Ok(Next::Nothing) };
        let ready = &mut self.ready;
        let mut send = |piece: Piece| {
            if !piece.text.is_empty() || !piece.logprobs.is_empty() {
                ready.push_back((index, Update::Piece(piece)));
            }
        };
        let (finish, usage) = match event {
            Event::Prompt(logprobs) => {
                ready.push_back((index, Update::Prompt(logprobs)));
                return Ok(Next::Events);
            }
            Event::Token { token, logprobs } => {
                let pause = std::mem::replace(&mut sequence.last, Instant::now()).elapsed();
                self.decoding.metrics.token(sequence.new_tokens == 0, pause);
                sequence.new_tokens += 1;
                let (piece, stopped) = sequence.decoder.push(token, logprobs);
                send(piece);
                if !stopped {
                    return Ok(Next::Events);
                }
                (Finish::Stop, None)
            }
            Event::End { reason, stop_logprobs, usage, .. } => {
                let (piece, stopped) = sequence.decoder.finish(stop_logprobs);
                send(piece);
                match reason {
                    StopReason::Length if !stopped => (Finish::Length, Some(usage)),
                    _ => (Finish::Stop, Some(usage)),
                }
            }
            Event::Failed(error) => return Err(error.into()),
        };
        let reused = usage.map(|usage| usage.reused_tokens);
        let tokens = Tokens { prompt: sequence.prompt_tokens, reused, new: sequence.new_tokens };
        self.sequences[index] = None;
        self.ready.push_back((index, Update::End { finish, tokens }));
        Ok(if usage.is_some() { Next::Nothing } else { Next::StopString })
    }
}

fn wait(index: usize, mut events: Events) -> Waiting {
    Box::pin(async move {
        let event = events.next().await;
        (index, event, events)
    })
}

//! What the routes share: the engine, the texts of the model, limits and metrics.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::body::BodyDataStream;
use axum::extract::Request;
use axum::http::header;
use futures_util::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use super::metrics::Metrics;
use super::options::ServerOptions;
use super::request::Settings;
use super::text_model::TextModel;
use crate::chat::ChatEncoder;
use crate::engine::{Engine, EngineError, Health, Request as EngineRequest};
use crate::tokenizer::Tokenizer;

/// The unit in which the memory for bodies is counted.
const BODY_UNIT: usize = 1024;
/// The time that a request waits for memory for its body.
const BODY_WAIT: Duration = Duration::from_secs(5);
/// The longest pause of a client within a body.
const BODY_PAUSE: Duration = Duration::from_secs(10);

/// How much is read of a body that is too large, in multiples of the limit, and for how long: most clients read the answer only
/// after they have sent everything, and a connection that is closed before that loses it.
const DRAINED: usize = 8;
const DRAIN_TIME: Duration = Duration::from_secs(5);
/// The pause of a client after which it is not sending any more.
const DRAIN_PAUSE: Duration = Duration::from_millis(250);

/// Bytes that tokens of every tokenizer have.
const SHORT_TOKEN: usize = 16;
/// How much shorter a text may be for the model than in the request: a normalizer composes characters, and a template leaves out
/// the reasoning of earlier answers.
const SHRINKING: usize = 2;

/// Reads and forgets the rest of a body, within limits.
async fn drain(mut body: BodyDataStream, most: usize) {
    let drained = async {
        let mut bytes = 0;
        while let Ok(Some(Ok(part))) = tokio::time::timeout(DRAIN_PAUSE, body.next()).await {
            bytes += part.len();
            if bytes > most {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(DRAIN_TIME, drained).await;
}

/// The state of the routes.
#[derive(Debug)]
pub(super) struct App {
    pub(super) engine: Engine,
    /// Encodes prompts: without the suffix of a complete text, and with special tokens, because the client writes all of a
    /// prompt.
    pub(super) tokenizer: Tokenizer,
    pub(super) text: TextModel,
    pub(super) options: ServerOptions,
    pub(super) metrics: Metrics,
    /// Seconds since 1970.
    pub(super) created: u64,
    /// Whether new requests are refused, because the server ends.
    ending: AtomicBool,
    /// Memory for the bodies of requests, in units of [`BODY_UNIT`].
    bodies: Arc<Semaphore>,
    /// Threads that parse and encode.
    encoders: Arc<Semaphore>,
    /// The bytes of the longest token; read for the first text that may be too long.
    longest_token: OnceLock<usize>,
}

/// The memory of a request's body, and of what is made of it: it is counted until the answer is complete.
#[derive(Debug)]
pub(super) struct BodyMemory(
    #[expect(dead_code, reason = "it is freed when it is dropped")] Option<OwnedSemaphorePermit>,
);

impl App {
    pub(super) fn new(engine: Engine, text: TextModel, options: ServerOptions) -> Self {
        let units = (options.body_memory.max(options.max_body) / BODY_UNIT + 1).min(Semaphore::MAX_PERMITS);
        Self {
            metrics: Metrics::new(engine.clone()),
            tokenizer: text.tokenizer.clone().for_prompts().with_parse_special(true),
            created: super::reply::now(),
            ending: AtomicBool::new(false),
            bodies: Arc::new(Semaphore::new(units)),
            encoders: Arc::new(Semaphore::new(options.encoders.max(1))),
            longest_token: OnceLock::new(),
            engine,
            text,
            options,
        }
    }

    /// Refuses new requests from now on.
    pub(super) fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
            || matches!(self.engine.status().health, Health::ShuttingDown | Health::Stopped)
    }

    /// The encoder of conversations.
    pub(super) fn chat(&self) -> Result<Arc<ChatEncoder>, ApiError> {
        self.text.chat.clone().ok_or(ApiError::NoChatTemplate)
    }

    /// Checks that there is a model, before its prompt is encoded.
    pub(super) fn check_model(&self, name: &str) -> Result<(), ApiError> {
        match self.engine.models().iter().any(|known| known == name) {
            true => Ok(()),
            false => Err(EngineError::UnknownModel(name.to_owned()).into()),
        }
    }

    /// Refuses a text that cannot fit into the context, before it is tokenized, which takes seconds for each megabyte.
    pub(super) fn check_text(&self, bytes: usize) -> Result<(), ApiError> {
        let context = self.context();
        if bytes <= SHORT_TOKEN * context {
            return Ok(());
        }
        let longest = self.longest_token.get_or_init(|| {
            let tokens = 0..u32::try_from(self.tokenizer.vocab_size()).unwrap_or(u32::MAX);
            tokens.map(|token| self.tokenizer.decode_with_special(&[token]).len()).max().unwrap_or(0)
        });
        match bytes > SHRINKING * longest.max(&SHORT_TOKEN) * context {
            true => Err(ApiError::PromptTooLarge { bytes, context }),
            false => Ok(()),
        }
    }

    /// Checks the length of a prompt. The engine does it too, but of several prompts it gets the later ones only when the first
    /// ones are answered.
    pub(super) fn check_prompt(&self, prompt: &[u32], new_tokens: usize) -> Result<(), ApiError> {
        // The last token of a prompt without a continuation needs no place.
        match (prompt.len(), self.context() + usize::from(new_tokens == 0)) {
            (0, _) => Err(EngineError::EmptyPrompt.into()),
            (tokens, context) if tokens > context => Err(EngineError::PromptTooLong { tokens, context }.into()),
            _ => Ok(()),
        }
    }

    /// Reads the body of a request, within the limits of size, time and memory.
    pub(super) async fn read_body(&self, request: Request) -> Result<(Vec<u8>, BodyMemory), ApiError> {
        if self.is_ending() {
            return Err(EngineError::ShuttingDown.into());
        }
        let limit = self.options.max_body;
        let length = request.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        // A client that asks first whether it may send the body gets the answer instead.
        let is_sent = !request.headers().contains_key(header::EXPECT);
        let mut body = request.into_body().into_data_stream();
        if length.is_some_and(|length| length > limit) {
            if is_sent {
                drain(body, DRAINED * limit).await;
            }
            return Err(ApiError::BodyTooLarge { limit });
        }
        // The memory is reserved as the bytes arrive: a client that announces a large body and sends nothing holds none.
        let mut memory: Option<OwnedSemaphorePermit> = None;
        let mut bytes = Vec::new();
        let read = async {
            loop {
                let part = tokio::time::timeout(BODY_PAUSE, body.next()).await;
                let part = part.map_err(|_| ApiError::SlowBody { seconds: BODY_PAUSE.as_secs() })?;
                let Some(part) = part else { return Ok(()) };
                let part = part.map_err(|error| ApiError::Body { problem: error.to_string() })?;
                if bytes.len() + part.len() > limit {
                    return Err(ApiError::BodyTooLarge { limit });
                }
                self.reserve(bytes.len() + part.len(), &mut memory).await?;
                bytes.extend_from_slice(&part);
            }
        };
        let read = tokio::time::timeout(self.options.body_timeout, read).await;
        let slow = || Err(ApiError::SlowBody { seconds: self.options.body_timeout.as_secs() });
        if let Err(error) = read.unwrap_or_else(|_| slow()) {
            if !matches!(error, ApiError::SlowBody { .. }) {
                drain(body, DRAINED * limit).await;
            }
            return Err(error);
        }
        Ok((bytes, BodyMemory(memory)))
    }

    /// Waits until `bytes` of a body fit into the memory for all bodies. A client that has to wait does not send meanwhile.
    async fn reserve(&self, bytes: usize, held: &mut Option<OwnedSemaphorePermit>) -> Result<(), ApiError> {
        let missing =
            (bytes / BODY_UNIT + 1).saturating_sub(held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits));
        let missing = u32::try_from(missing).unwrap_or(u32::MAX);
        if missing == 0 {
            return Ok(());
        }
        let more = tokio::time::timeout(BODY_WAIT, self.bodies.clone().acquire_many_owned(missing)).await;
        let Ok(Ok(more)) = more else { return Err(ApiError::TooManyBodies) };
        match held {
            Some(held) => held.merge(more),
            None => *held = Some(more),
        }
        Ok(())
    }

    /// Runs work that takes long (parsing, templates, tokenizing) on a thread of its own. Only a few run at once, also those
    /// whose client has gone away.
    pub(super) async fn encode<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let closed = |_| ApiError::Internal { problem: "the encoders have ended".into() };
        let turn = self.encoders.clone().acquire_owned().await.map_err(closed)?;
        let task = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work()
        });
        task.await.map_err(|error| ApiError::Internal { problem: format!("encoding the prompt ended with {error}") })?
    }

    /// The most tokens of a prompt and its answer.
    pub(super) fn context(&self) -> usize {
        self.engine.options().context
    }

    /// The request of a sequence, without its prompt.
    pub(super) fn engine_request(
        &self,
        settings: &Settings,
        stop_tokens: &[u32],
        prompt_logprobs: bool,
    ) -> EngineRequest {
        let most = settings.max_tokens.unwrap_or(usize::MAX).min(self.context());
        EngineRequest {
            sampling: settings.sampling,
            penalties: settings.penalties.clone(),
            stop_tokens: stop_tokens.to_vec(),
            ignore_eos: settings.ignore_eos,
            logprobs: settings.logprobs,
            prompt_logprobs: settings.logprobs.filter(|_| prompt_logprobs),
            ..EngineRequest::new(&settings.model, Vec::new(), most)
        }
    }
}

//! What the answers of both routes have: ids, times, counts of tokens, and streams of events.

use std::convert::Infallible;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use rand::RngExt;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use super::error::ApiError;
use super::generation::{Finish, Tokens};

/// The time after which a stream without events gets a comment, so that proxies and clients keep the connection open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Events that wait for a slow reader. The engine waits for the reader when they are full.
const EVENTS: usize = 32;

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// The fields that every object of an answer begins with. All events of a stream have the same.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: &'static str,
}

impl Head {
    pub(super) fn new(prefix: &str, object: &'static str, model: &str) -> Self {
        let id = format!("{prefix}-{:032x}", rand::rng().random::<u128>());
        Self { id, object, created: now(), model: model.to_owned(), system_fingerprint: FINGERPRINT }
    }
}

/// The version of what computes the answer: with the same, the same seed gives the same text.
const FINGERPRINT: &str = concat!("moonlight_", env!("CARGO_PKG_VERSION"));

impl Finish {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// `usage` of an answer.
#[derive(Debug, Default, Clone, Serialize)]
pub(super) struct UsageReport {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Debug, Default, Clone, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

impl UsageReport {
    /// Adds a sequence. A prompt with several answers counts once, with its first answer.
    pub(super) fn add(&mut self, tokens: Tokens, is_first_answer: bool) {
        let is_first = self.total_tokens == 0;
        self.completion_tokens += tokens.new;
        if is_first_answer {
            self.prompt_tokens += tokens.prompt;
            let known = self.prompt_tokens_details.take().map(|details| details.cached_tokens);
            let known = known.or(is_first.then_some(0));
            self.prompt_tokens_details =
                tokens.reused.zip(known).map(|(reused, known)| PromptDetails { cached_tokens: known + reused });
        }
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// The sender of a stream of events.
#[derive(Debug, Clone)]
pub(super) struct EventSender(mpsc::Sender<Event>);

/// The client went away.
#[derive(Debug)]
pub(super) struct Gone;

impl EventSender {
    pub(super) async fn send(&self, data: &impl Serialize) -> Result<(), Gone> {
        let text = serde_json::to_string(data).map_err(|_| Gone)?;
        self.0.send(Event::default().data(text)).await.map_err(|_| Gone)
    }

    /// The last event of every stream, also after an error.
    pub(super) async fn done(&self) -> Result<(), Gone> {
        self.0.send(Event::default().data("[DONE]")).await.map_err(|_| Gone)
    }

    pub(super) async fn error(&self, error: &ApiError) -> Result<(), Gone> {
        self.send(&error.body()).await
    }

    /// Returns when the client has gone away.
    pub(super) async fn closed(&self) {
        self.0.closed().await;
    }
}

/// Answers with the events that `write` sends, or with the error that it reports instead of starting. `write` is dropped, which
/// cancels its sequences, when the client goes away, also while they wait.
pub(super) async fn answer_with_events<F>(
    write: impl FnOnce(EventSender, oneshot::Sender<Result<(), ApiError>>) -> F,
) -> Result<Response, ApiError>
where
    F: Future<Output = Result<(), Gone>> + Send + 'static,
{
    let (sender, response) = event_stream();
    let (started, start) = oneshot::channel();
    let written = write(sender.clone(), started);
    tokio::spawn(async move {
        tokio::select! {
            () = sender.closed() => {}
            _ = written => {}
        }
    });
    let ended = |_| ApiError::Internal { problem: "the stream has ended".into() };
    start.await.map_err(ended)?.map(|()| response)
}

/// A response that is sent as its events come.
fn event_stream() -> (EventSender, Response) {
    let (sender, receiver) = mpsc::channel(EVENTS);
    let events = futures_util::stream::unfold(receiver, |mut receiver| async {
        let event = receiver.recv().await?;
        Some((Ok::<_, Infallible>(event), receiver))
    });
    let mut response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    // nginx would collect the events otherwise.
    response.headers_mut().insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    (EventSender(sender), response)
}

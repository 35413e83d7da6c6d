//! Errors of requests, in the form of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`; and those of the server.

use std::io;

use axum::Json;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use moonlight_convert::{Printable, printable};
use serde_json::{Value, json};

use super::fields::quoted;
use crate::chat::ChatError;
use crate::engine::EngineError;
use crate::tokenizer::TokenizerError;

/// Why the server cannot start or continue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// An API key that no client could send.
    #[error("an API key is empty, or has characters other than printable ASCII")]
    InvalidKey,
    /// An origin that is not one.
    #[error("`{}` is not an origin", Printable(.0))]
    InvalidOrigin(String),
    /// The listener cannot be used.
    #[error("connections cannot be accepted: {0}")]
    Listener(#[source] io::Error),
    /// The threads of the server cannot be started.
    #[error("the threads of the server cannot be started: {0}")]
    Threads(#[source] io::Error),
}

impl ServerError {
    /// What to do, if it is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::InvalidKey => Some("choose a key of letters and digits".into()),
            Self::InvalidOrigin(_) => Some("an origin is `https://example.org`, without a path; `*` is any".into()),
            Self::Listener(_) | Self::Threads(_) => None,
        }
    }
}

/// Why a request is refused or fails.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(super) enum ApiError {
    #[error("the body is {problem} (line {line}, column {column})")]
    Json { problem: String, line: usize, column: usize },
    #[error("the body has more than {limit} values")]
    TooManyValues { limit: usize },
    #[error("`{name}` {problem}")]
    Field { name: String, problem: String },
    #[error("`{name}` is missing")]
    Missing { name: &'static str },
    #[error("unknown field {}", quoted(name))]
    UnknownField { name: String },
    #[error("`{name}` is not supported{}", reason.map(|reason| format!(": {reason}")).unwrap_or_default())]
    Unsupported { name: String, reason: Option<&'static str> },
    #[error("{problem}")]
    Messages { problem: String },
    #[error("the prompt cannot be encoded: {problem}")]
    Prompt { problem: String },
    #[error("the model has no chat template: use /v1/completions")]
    NoChatTemplate,
    #[error("the prompt has {bytes} bytes, more than {context} tokens can have")]
    PromptTooLarge { bytes: usize, context: usize },
    #[error("{}", engine_message(.0))]
    Engine(EngineError),
    #[error("there is no route {} {}", method, quoted(path))]
    NoRoute { method: Method, path: String },
    #[error("{} does not accept {method}", quoted(path))]
    NoMethod { method: Method, path: String },
    #[error("{}", match given { true => "the API key is wrong", false => "an API key is required: `Authorization: Bearer KEY`" })]
    Key { given: bool },
    #[error("the host {} is not one of this server, which has no API key and accepts only local names", quoted(host))]
    Host { host: String },
    #[error("requests from pages of {} are not allowed", quoted(origin))]
    Origin { origin: String },
    #[error("the body has more than {limit} bytes")]
    BodyTooLarge { limit: usize },
    #[error("the body cannot be read: {problem}")]
    Body { problem: String },
    #[error("the body did not arrive in {seconds} s")]
    SlowBody { seconds: u64 },
    #[error("the bodies of other requests take all memory that is set aside for them")]
    TooManyBodies,
    #[error("the server has a defect: {problem}")]
    Internal { problem: String },
}

/// An error of the engine, with its hint.
fn engine_message(error: &EngineError) -> String {
    let hint = error.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
    format!("{}{hint}", printable(&error.to_string()))
}

/// The seconds after which a client may try again when the queue is full.
const RETRY_AFTER: u64 = 1;

impl ApiError {
    pub(super) fn field(name: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Field { name: name.into(), problem: problem.into() }
    }

    pub(super) fn unsupported(name: impl Into<String>, reason: &'static str) -> Self {
        Self::Unsupported { name: name.into(), reason: Some(reason) }
    }

    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Json { .. }
            | Self::TooManyValues { .. }
            | Self::Field { .. }
            | Self::Missing { .. }
            | Self::UnknownField { .. }
            | Self::Unsupported { .. }
            | Self::Messages { .. }
            | Self::Prompt { .. }
            | Self::NoChatTemplate
            | Self::PromptTooLarge { .. }
            | Self::Body { .. } => StatusCode::BAD_REQUEST,
            Self::Key { .. } => StatusCode::UNAUTHORIZED,
            Self::Host { .. } | Self::Origin { .. } => StatusCode::FORBIDDEN,
            Self::NoRoute { .. } => StatusCode::NOT_FOUND,
            Self::NoMethod { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::SlowBody { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooManyBodies => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Engine(error) => match error {
                EngineError::EmptyPrompt
                | EngineError::PromptTooLong { .. }
                | EngineError::UnknownToken { .. }
                | EngineError::OutOfRange { .. } => StatusCode::BAD_REQUEST,
                EngineError::UnknownModel(_) => StatusCode::NOT_FOUND,
                EngineError::QueueFull { .. } => StatusCode::TOO_MANY_REQUESTS,
                EngineError::ShuttingDown | EngineError::Stopped => StatusCode::SERVICE_UNAVAILABLE,
                EngineError::OutOfTime { .. } => StatusCode::GATEWAY_TIMEOUT,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            },
        }
    }

    /// OpenAI's `type`.
    fn kind(&self) -> &'static str {
        match self.status().as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::Field { name, .. } | Self::UnknownField { name } | Self::Unsupported { name, .. } => Some(name),
            Self::Missing { name } => Some(name),
            Self::Engine(EngineError::UnknownModel(_)) => Some("model"),
            Self::Engine(EngineError::OutOfRange { key, .. }) => Some(key),
            Self::Messages { .. } => Some("messages"),
            Self::Prompt { .. } => Some("prompt"),
            _ => None,
        }
    }

    fn code(&self) -> Option<&'static str> {
        Some(match self {
            Self::Missing { .. } => "missing_required_parameter",
            Self::Unsupported { .. } => "unsupported_parameter",
            Self::UnknownField { .. } => "unknown_parameter",
            Self::Field { .. } => "invalid_value",
            Self::Json { .. } => "invalid_json",
            Self::NoChatTemplate => "no_chat_template",
            Self::PromptTooLarge { .. } | Self::Engine(EngineError::PromptTooLong { .. }) => "context_length_exceeded",
            Self::Engine(EngineError::UnknownModel(_)) => "model_not_found",
            Self::Engine(EngineError::QueueFull { .. }) => "queue_full",
            Self::Engine(EngineError::ShuttingDown) => "shutting_down",
            Self::Engine(EngineError::OutOfTime { .. }) => "timeout",
            Self::Key { given: true } => "invalid_api_key",
            Self::Key { given: false } => "missing_api_key",
            _ => return None,
        })
    }

    /// The body of the response, and the data of the last event of a stream that fails.
    pub(super) fn body(&self) -> Value {
        json!({"error": {
            "message": self.to_string(), "type": self.kind(), "param": self.param(), "code": self.code(),
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let response_status = self.status();
        let mut response = (response_status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self {
            _ if matches!(response_status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER));
            }
            Self::Key { .. } => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

impl From<ChatError> for ApiError {
    fn from(error: ChatError) -> Self {
        Self::Messages { problem: error.to_string() }
    }
}

impl From<TokenizerError> for ApiError {
    fn from(error: TokenizerError) -> Self {
        Self::Prompt { problem: error.to_string() }
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        Self::Engine(error)
    }
}

//! An HTTP server with OpenAI's API over an [`Engine`].
//!
//! * `accept.rs`: connections and the end of the server; `guard.rs`: who may use it; `routes.rs`: all routes.
//! * `request/`: the bodies of requests, parsed and checked; `fields.rs`: their fields, by name and type.
//! * `chat.rs`, `completions.rs`: the two routes that generate; `generation.rs`: their sequences, run by the engine.
//! * `decoder.rs`: from tokens to text; `stop.rs`: stop strings; `tools/`: tool calls in a text; `logprobs.rs`, `reply.rs`: parts
//!   of answers.
//! * `metrics.rs`: `/metrics`; `page.rs`: the page.
//!
//! Reading, parsing, templates and tokenizing have limits on bytes, values, time and threads, so that a request of a client
//! cannot take all memory or all time of the server.

mod accept;
mod app;
mod chat;
mod completions;
mod decoder;
mod defaults;
mod error;
mod fields;
mod generation;
mod guard;
mod logprobs;
mod metrics;
mod options;
mod page;
mod reply;
mod request;
mod routes;
mod stop;
#[cfg(test)]
mod tests;
mod text_model;
mod tools;

use std::net::TcpListener;
use std::sync::Arc;

use axum::Router;

use crate::engine::Engine;
use app::App;
pub use defaults::SamplingDefaults;
pub use error::ServerError;
pub use options::ServerOptions;
pub use text_model::TextModel;

/// An HTTP server with OpenAI's API.
#[derive(Debug)]
pub struct Server {
    app: Arc<App>,
    more: Router,
}

impl Server {
    /// A server of the models of an engine, whose texts are those of `text`.
    ///
    /// # Errors
    ///
    /// [`ServerError::InvalidKey`], [`ServerError::InvalidOrigin`].
    pub fn new(engine: Engine, text: TextModel, options: ServerOptions) -> Result<Self, ServerError> {
        options.check()?;
        Ok(Self { app: Arc::new(App::new(engine, text, options)), more: Router::new() })
    }

    /// Adds routes. They are guarded like those of the API.
    pub fn with_routes(mut self, routes: Router) -> Self {
        self.more = self.more.merge(routes);
        self
    }

    /// All routes, to be served in another way than by [`serve`](Self::serve).
    pub fn router(&self) -> Router {
        routes::router(self.app.clone(), self.more.clone())
    }

    /// Serves until `end` is ready, then finishes the requests that run. Within a tokio runtime with time and I/O.
    ///
    /// # Errors
    ///
    /// [`ServerError::Listener`].
    pub async fn serve(self, listener: TcpListener, end: impl Future<Output = ()>) -> Result<(), ServerError> {
        let router = self.router();
        accept::serve(self.app, router, listener, end).await
    }
}

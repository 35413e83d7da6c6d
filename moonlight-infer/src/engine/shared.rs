//! [`Shared`]: what an engine's handles and its thread have in common.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use moonlight_model::CausalLm;
use tokio::sync::{mpsc, watch};

use super::event::Event;
use super::model_version::{CacheShape, ModelVersion};
use super::options::EngineOptions;
use super::request::Request;
use super::status::{EngineStatus, Health};

/// Shared by the handles and the thread.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) options: EngineOptions,
    pub(super) shape: CacheShape,
    /// Tokens of each slot of the cache.
    pub(super) capacity: usize,
    state: Mutex<State>,
    /// Wakes the thread when a request arrives or the engine closes.
    wake: Condvar,
    /// Becomes true when the thread ends.
    pub(super) stopped: watch::Sender<bool>,
}

/// Locked only for moments, never during a forward pass.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) models: BTreeMap<String, Arc<ModelVersion>>,
    /// The number of versions of models so far.
    versions: u64,
    pub(super) queue: VecDeque<Job>,
    /// Accepted requests that have not ended.
    pub(super) in_flight: usize,
    /// No more requests are taken.
    pub(super) closing: bool,
    /// The thread has ended.
    pub(super) stopped: bool,
    /// The last passes panicked.
    pub(super) is_failing: bool,
    /// Without what follows from the rest of the state; see [`State::status`].
    pub(super) status: EngineStatus,
}

/// An accepted request.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) version: Arc<ModelVersion>,
    pub(super) request: Request,
    pub(super) events: mpsc::Sender<Event>,
    /// Whether the receiver was dropped because the text was complete; see [`Events::complete`](super::Events::complete).
    pub(super) is_complete: Arc<AtomicBool>,
    pub(super) deadline: Option<Instant>,
}

impl Shared {
    pub(super) fn new(options: EngineOptions, shape: CacheShape, capacity: usize, cache_bytes: u64) -> Self {
        let slots = options.slots;
        let status = EngineStatus { slots, cache_capacity: slots * capacity, cache_bytes, ..EngineStatus::default() };
        Self {
            options,
            shape,
            capacity,
            state: Mutex::new(State { status, ..State::default() }),
            wake: Condvar::new(),
            stopped: watch::Sender::new(false),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // No code that holds the lock leaves the state half changed, so it is valid after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake(&self) {
        self.wake.notify_all();
    }

    /// Waits for a request or the end.
    pub(super) fn wait_for_work(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while state.queue.is_empty() && !state.closing {
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    /// Makes a model the current version under a name.
    pub(super) fn add_model(&self, name: &str, model: CausalLm) {
        let mut state = self.lock();
        if state.stopped {
            return; // no request will use it
        }
        state.versions += 1;
        let version = Arc::new(ModelVersion::new(state.versions, model));
        let replaced = state.models.insert(name.into(), version);
        drop(state);
        drop(replaced); // may free a model, which takes a while
    }
}

impl State {
    pub(super) fn status(&self) -> EngineStatus {
        let health = if self.stopped {
            Health::Stopped
        } else if self.closing {
            Health::ShuttingDown
        } else if self.is_failing {
            Health::Failing
        } else {
            Health::Ready
        };
        EngineStatus { health, waiting: self.queue.len(), ..self.status.clone() }
    }
}

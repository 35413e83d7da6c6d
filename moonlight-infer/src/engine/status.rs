//! [`EngineStatus`]: what an engine does, and counts.

use std::time::Duration;

/// A snapshot of an engine. Counters start at 0 with the engine and never decrease.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineStatus {
    /// Whether it works.
    pub health: Health,
    /// Sequences that can be generated next to each other.
    pub slots: usize,
    /// Slots with a request.
    pub busy: usize,
    /// Requests without a slot.
    pub waiting: usize,
    /// Tokens in the KV cache, of running requests and of ended ones whose tokens may be used again.
    pub cached_tokens: usize,
    /// Tokens that the KV cache has room for.
    pub cache_capacity: usize,
    /// Bytes of the KV cache.
    pub cache_bytes: u64,
    /// Requests that ended, by reason.
    pub ended: EndCounts,
    /// Requests that [`Engine::submit`](super::Engine::submit) refused.
    pub refused: u64,
    /// Tokens of prompts that went through the model.
    pub prompt_tokens_computed: u64,
    /// Tokens of prompts whose keys and values were known.
    pub prompt_tokens_reused: u64,
    /// New tokens.
    pub tokens_generated: u64,
    /// Forward passes.
    pub passes: u64,
    /// Time in forward passes, sampling included.
    pub pass_time: Duration,
    /// The longest iteration, which is the longest pause of a stream.
    pub longest_iteration: Duration,
}

/// Whether an engine works.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Health {
    /// It takes requests.
    #[default]
    Ready,
    /// The last forward passes panicked, all of them. It still takes requests, and is ready again when one succeeds.
    Failing,
    /// It finishes what runs.
    ShuttingDown,
    /// Its thread has ended.
    Stopped,
}

/// Numbers of requests that ended, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EndCounts {
    /// At a stop token.
    pub eos: u64,
    /// At `max_new_tokens` or the end of the context.
    pub length: u64,
    /// By [`Events::complete`](super::Events::complete).
    pub interrupted: u64,
    /// Because their events were dropped.
    pub cancelled: u64,
    /// After `max_time`.
    pub out_of_time: u64,
    /// With any other error.
    pub failed: u64,
}

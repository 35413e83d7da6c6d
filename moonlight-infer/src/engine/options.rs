//! [`EngineOptions`]: the limits of an engine, and the memory that follows from them.

use std::time::Duration;

use burn::tensor::DType;
use moonlight_model::{KvCache, ModelConfig};

use super::error::EngineError;

/// The limits of an [`Engine`](super::Engine).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineOptions {
    /// Sequences that are generated next to each other, at least 1.
    pub slots: usize,
    /// Tokens of a slot, prompt and continuation together; a model whose context is shorter uses less.
    pub context: usize,
    /// The most tokens of one iteration, at least `slots`: one for each sequence that is being generated, the rest for prompts.
    /// A smaller value makes the pauses shorter that a long prompt causes in other streams, and prompts slower.
    pub prefill_chunk: usize,
    /// Requests that wait for a slot.
    pub max_waiting: usize,
    /// The most time from submission to the end of a request; `None` for no limit.
    pub max_time: Option<Duration>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { slots: 8, context: 4096, prefill_chunk: 512, max_waiting: 64, max_time: None }
    }
}

impl EngineOptions {
    /// Bytes of the KV cache, which is allocated when the engine starts and never grows: `slots` sequences of `context` tokens.
    /// `dtype` is [`CausalLm::cache_dtype`](moonlight_model::CausalLm::cache_dtype).
    ///
    /// The rest of an engine's memory is that of one forward pass over `prefill_chunk` tokens.
    pub fn cache_bytes(&self, config: &ModelConfig, dtype: DType) -> u64 {
        KvCache::bytes(config, self.slots, self.capacity(config), dtype)
    }

    /// Tokens of a slot for a model: not more than its context.
    pub fn capacity(&self, config: &ModelConfig) -> usize {
        self.context.min(config.max_position_embeddings)
    }

    /// # Errors
    ///
    /// [`EngineError::Options`].
    pub(super) fn check(&self) -> Result<(), EngineError> {
        let problem = if self.slots == 0 {
            "there must be at least 1 slot".into()
        } else if self.context == 0 {
            "a slot must have at least 1 token".into()
        } else if self.prefill_chunk < self.slots {
            let Self { slots, prefill_chunk, .. } = self;
            format!("a chunk of {prefill_chunk} tokens is less than one token for each of {slots} slots")
        } else {
            return Ok(());
        };
        Err(EngineError::Options(problem))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_has_a_row_for_each_token_slot_and_layer() {
        let config = ModelConfig::preset("moonlight-16b-a3b").unwrap();
        let options = EngineOptions { slots: 2, context: 100, ..EngineOptions::default() };
        assert_eq!(options.cache_bytes(&config, DType::BF16), 2 * 100 * 27 * 576 * 2);
        let all = EngineOptions { context: usize::MAX, ..options };
        assert_eq!(all.capacity(&config), config.max_position_embeddings);
    }

    #[test]
    fn options_without_room_are_refused() {
        let valid = EngineOptions::default();
        assert!(valid.check().is_ok());
        for invalid in [
            EngineOptions { slots: 0, ..valid },
            EngineOptions { context: 0, ..valid },
            EngineOptions { prefill_chunk: 7, ..valid },
        ] {
            assert!(invalid.check().is_err(), "{invalid:?}");
        }
    }
}

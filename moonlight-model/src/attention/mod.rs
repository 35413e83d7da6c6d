//! Attention layers: multi-head latent attention and grouped-query attention.

mod gqa;
mod logit_stats;
mod mla;

use std::sync::Arc;

use burn::tensor::{Device, Tensor};

use crate::cache::LayerCache;
use crate::config::{AttentionShape, ModelConfig};
use crate::init::Init;
use crate::kernels::{AttentionSpec, CacheSpan};
use crate::module_enum::delegate_module;
use crate::rope::Rotation;

pub use gqa::GroupedQueryAttention;
pub(crate) use logit_stats::LogitStats;
pub use mla::MultiHeadLatentAttention;

/// The tokens of a forward pass as the attention sees them.
pub(crate) struct Tokens<'a> {
    pub(crate) batch: usize,
    pub(crate) sequence: usize,
    pub(crate) rotation: &'a Rotation,
    /// For each token the start of its document, where sequences are packed.
    pub(crate) starts: Option<Arc<Vec<u32>>>,
    pub(crate) probe_logits: bool,
}

/// New tokens of several sequences, one behind the other: `tokens` has them as one sequence, packed.
pub(crate) struct NewTokens<'a> {
    pub(crate) tokens: Tokens<'a>,
    pub(crate) runs: Arc<Vec<CacheSpan>>,
}

impl NewTokens<'_> {
    /// Whether they begin their sequences, and are enough for whole attention to be cheaper than attention to a cache.
    fn are_prompts(&self) -> bool {
        self.runs.iter().all(|run| run.start == 0) && self.tokens.sequence > self.runs.len()
    }
}

impl Tokens<'_> {
    fn spec(&self, scale: f64) -> AttentionSpec {
        AttentionSpec { scale: scale as f32, starts: self.starts.clone() }
    }
}

/// A layer's attention.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "there are a few dozen, one a layer")]
pub enum Attention {
    /// Multi-head latent attention.
    Mla(MultiHeadLatentAttention),
    /// Grouped-query attention.
    Gqa(GroupedQueryAttention),
}

delegate_module!(Attention { Mla, Gqa });

impl Attention {
    pub(crate) fn new(config: &ModelConfig, init: Init, device: &Device) -> Self {
        match &config.attention {
            AttentionShape::Mla(mla) => Self::Mla(MultiHeadLatentAttention::new(config, mla, init, device)),
            AttentionShape::Gqa(gqa) => Self::Gqa(GroupedQueryAttention::new(config, gqa, init, device)),
        }
    }

    /// `[tokens, hidden]` to `[tokens, hidden]`, over whole sequences.
    pub(crate) fn forward(&self, x: Tensor<2>, tokens: &Tokens<'_>) -> (Tensor<2>, Option<LogitStats>) {
        match self {
            Self::Mla(attention) => attention.forward(x, tokens, None),
            Self::Gqa(attention) => attention.forward(x, tokens, None),
        }
    }

    /// Like [`forward`](Self::forward) for tokens that follow those in the cache, to which they are added.
    pub(crate) fn decode(&self, x: Tensor<2>, new: &NewTokens<'_>, cache: &mut LayerCache) -> Tensor<2> {
        match self {
            Self::Mla(attention) => attention.decode(x, new, cache),
            Self::Gqa(attention) => attention.decode(x, new, cache),
        }
    }
}

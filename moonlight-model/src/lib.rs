#![doc = include_str!("../README.md")]
//!
//! # Where things are
//!
//! | term | here |
//! |---|---|
//! | multi-head latent attention, grouped-query attention | [`MultiHeadLatentAttention`], [`GroupedQueryAttention`] |
//! | router, experts, auxiliary-loss-free balancing, sequence-wise balance loss | [`moe`] |
//! | rotary embedding, YaRN | [`rope`], [`config::YarnConfig`] |
//! | decoder layer, decoder | [`DecoderLayer`], [`CausalLm`] |
//! | KV cache, prefill, decode | [`KvCache`], [`CausalLm::extend`], [`CausalLm::extend_hidden`], [`CausalLm::decode`] |
//! | LoRA | [`lora`] |
//! | weights in 8 or 4 bits | [`QuantizedWeight`] |
//! | fused operations with hand-written gradients | [`kernels`] |
//!
//! Public `forward` functions take `[batch, sequence, hidden]`. Inside a model, tokens are rows, `[tokens, hidden]` with
//! `tokens = batch * sequence`; only attention sees `[batch, sequence, heads, width]`.

mod allocator;
pub mod attention;
mod batch;
mod cache;
pub mod config;
mod decode;
pub mod disjoint;
mod forward;
mod forward_stats;
pub mod huge_pages;
mod init;
pub mod kernels;
mod layer;
pub mod lora;
mod mlp;
mod model;
mod module_enum;
pub mod moe;
mod norm;
mod parameter;
mod parameter_list;
mod pattern;
mod projection;
mod projections;
mod quantization;
mod rayon_pool;
pub mod rope;

pub use allocator::keep_freed_memory;
pub use attention::{
    Attention, AttentionConfig, GroupedQueryAttention, GroupedQueryAttentionConfig, MultiHeadLatentAttention,
    MultiHeadLatentAttentionConfig,
};
pub use batch::{LmBatch, Segments};
pub use cache::{KvCache, PreparedWeights};
pub use config::{ConfigError, ModelConfig, RopeConfig};
pub use forward::ForwardContext;
pub use forward_stats::{ForwardStats, LayerStats, Probe};
pub use layer::{DecoderLayer, DecoderLayerConfig, FeedForward, FeedForwardConfig, LayerOutput};
pub use mlp::{Mlp, MlpConfig};
pub use model::{CausalLm, HiddenOutput, LossOutput};
pub use moe::{Experts, ExpertsConfig, Moe, MoeConfig, MoeOutput, Router, RouterConfig};
/// The choice of vector instructions for the CPU kernels.
#[cfg(feature = "cpu")]
pub use moonlight_simd as simd;
pub use norm::{RmsNorm, RmsNormConfig};
pub use pattern::{NamePattern, PatternError};
pub use projection::Projection;
pub use quantization::{QuantBits, QuantizedShape, QuantizedWeight, ScaleType};

//! The Moonlight family of language models for [Burn](https://burn.dev).
//!
//! One definition covers DeepSeek-V3 (Moonlight, Kimi-VL's language model, Kimi-K2), DeepSeek-V2 and V2-Lite, and the
//! dense decoders of "Muon is Scalable for LLM Training" (Llama, Qwen2). A [`ModelConfig`] parses the published
//! `config.json`; [`ModelConfig::init`] makes a [`CausalLm`] on any of Burn's devices.
//!
//! ```
//! use burn::tensor::{Device, Int, Tensor};
//! use moonlight_model::{KvCache, ModelConfig};
//!
//! let mut config = ModelConfig::preset("bench-small")?;
//! config.num_hidden_layers = 2;
//! let device = Device::default();
//! let model = config.init(&device);
//!
//! let tokens = Tensor::<2, Int>::from_data([[1, 2, 3]], &device);
//! let logits = model.forward(tokens.clone()); // [batch, sequence, vocab]
//! assert_eq!(logits.dims(), [1, 3, 8192]);
//!
//! let mut cache = KvCache::new(&config, 1, 16, &device, model.dtype());
//! let next = model.decode(tokens, &mut cache); // the same, remembering the tokens
//! assert_eq!(next.dims(), [1, 3, 8192]);
//! # Ok::<(), moonlight_model::ConfigError>(())
//! ```
//!
//! # Layers in a model of one's own
//!
//! Every layer has a configuration in Burn's form (`new`, `with_*`, `init`, `save`, `load`) and runs by itself over
//! `[batch, sequence, hidden]`. A [`ForwardContext`] tells it about the tokens. `examples/custom_model.rs` trains such a model.
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use moonlight_model::rope::RotaryEmbedding;
//! use moonlight_model::{
//!     ForwardContext, MoeConfig, MultiHeadLatentAttentionConfig, RmsNormConfig, RopeConfig, RouterConfig,
//! };
//!
//! let device = Device::default();
//! // Hidden states of 64; 4 heads, a latent of 16, queries and keys of 16 + 8, values of 16.
//! let attention = MultiHeadLatentAttentionConfig::new(64, 4, 16, 16, 8, 16).init(&device);
//! // Two of eight experts for each token, each 32 wide, and one that every token visits.
//! let moe = MoeConfig::new(RouterConfig::new(64, 8, 2), 32).with_n_shared_experts(1).init(&device);
//! let norm = RmsNormConfig::new(64).init(&device);
//!
//! let rotary = RotaryEmbedding::new(&RopeConfig::new(), 8);
//! let context = ForwardContext::new(&rotary, [2, 10], &device).with_balance_weight(0.001);
//! let x = Tensor::<3>::random([2, 10, 64], Distribution::Default, &device);
//! let x = x.clone() + attention.forward(norm.forward(x), &context);
//! let output = moe.forward(norm.forward(x.clone()), &context);
//! let x = x + output.hidden;
//! assert_eq!(x.dims(), [2, 10, 64]);
//! assert_eq!(output.load.iter().sum::<u64>(), 2 * 10 * 2); // tokens that each expert was given
//! assert!(output.balance_loss.is_some());
//! ```
//!
//! | a paper's word | here |
//! |---|---|
//! | multi-head latent attention, grouped-query attention | [`MultiHeadLatentAttention`], [`GroupedQueryAttention`] |
//! | router, auxiliary-loss-free balancing, sequence-wise balance loss | [`moe`] |
//! | rotary embedding, YaRN | [`rope`], [`config::YarnConfig`] |
//! | a decoder layer, the whole decoder | [`DecoderLayer`], [`CausalLm`] |
//! | LoRA: low-rank adapters beside frozen weights | [`lora`] |
//! | the operations that the time goes into, with hand-written gradients | [`kernels`] |
//!
//! Inside of a model tokens travel as `[tokens, hidden]`, `tokens = batch * sequence`; only attention sees `[batch, sequence,
//! heads, width]`. The features `cpu` (default), `cuda`, `wgpu`, `vulkan` and `metal` compile a backend in; the device
//! chooses.

mod allocator;
pub mod attention;
mod batch;
mod cache;
pub mod config;
mod decode;
pub mod disjoint;
mod forward;
mod forward_stats;
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
pub use cache::KvCache;
pub use config::{ConfigError, ModelConfig, RopeConfig};
pub use forward::ForwardContext;
pub use forward_stats::{ForwardStats, LayerStats, Probe};
pub use layer::{DecoderLayer, DecoderLayerConfig, FeedForward, FeedForwardConfig, LayerOutput};
pub use mlp::{Mlp, MlpConfig};
pub use model::{CausalLm, HiddenOutput, LossOutput};
pub use moe::{Experts, ExpertsConfig, Moe, MoeConfig, MoeOutput, Router, RouterConfig};
/// Which vector instructions the CPU's kernels use.
#[cfg(feature = "cpu")]
pub use moonlight_simd as simd;
pub use norm::{RmsNorm, RmsNormConfig};
pub use pattern::{NamePattern, PatternError};
pub use projection::Projection;
pub use quantization::{QuantBits, QuantizedWeight};

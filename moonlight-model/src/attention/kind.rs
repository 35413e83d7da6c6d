//! The traits that a kind of attention implements: [`AttentionKind`] for its part of `config.json`, [`AttentionModule`] for the
//! computation. Code that depends on the kind goes through these.

use burn::tensor::Tensor;
use serde_json::{Map, Value};

use super::cache::LayerCache;
use super::logit_stats::LogitStats;
use crate::config::error::ConfigError;
use crate::config::model_type::ModelType;
use crate::config::rope::RopeConfig;
use crate::forward::{DecodeContext, ForwardContext};
use crate::projection::{Projection, Projections};

/// The number of values that one token needs in an attention layer, for FLOP counts, memory plans and the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionWidths {
    /// Queries of all heads.
    pub query: usize,
    /// Keys and values of all heads, as the attention kernel reads them.
    pub key_value: usize,
    /// The attention output of all heads, before the output projection.
    pub output: usize,
    /// Other activations that a training step keeps: latents before and after their norms.
    pub latent: usize,
    /// The cache row: `[key heads, values of each head]`.
    pub cache: [usize; 2],
    /// Width of the query and the key of one head.
    pub head: usize,
    /// Dimensions of a head that the rotary embedding rotates.
    pub rotated: usize,
}

impl AttentionWidths {
    /// Multiplications for one query and one key in all heads: the score, and the probability times the value.
    pub fn products_per_pair(&self) -> usize {
        self.query + self.output
    }
}

/// The parts of a [`ModelConfig`](crate::ModelConfig) that the attention of a layer depends on.
pub(crate) struct ModelWidths<'a> {
    /// Index of the layer: sliding windows may differ by layer.
    pub(crate) layer: usize,
    pub(crate) hidden_size: usize,
    pub(crate) num_attention_heads: usize,
    pub(crate) rope: &'a RopeConfig,
    pub(crate) initializer_range: f64,
}

/// The part of `config.json` that describes a kind of attention. `AttentionShape::read` reads it.
pub(crate) trait AttentionKind {
    /// Writes the keys as published files spell them.
    fn write(&self, model_type: ModelType, heads: usize, map: &mut Map<String, Value>);

    /// Refuses impossible values; `heads` is the number of query heads.
    fn validate(&self, heads: usize) -> Result<(), ConfigError>;

    /// The widths with `heads` query heads.
    fn widths(&self, heads: usize) -> AttentionWidths;

    /// The default of `rope_interleave`: whether rotary pairs are adjacent dimensions.
    fn interleaves(&self) -> bool;

    /// The factor on the attention scores.
    fn softmax_scale(&self, rope: &RopeConfig) -> f64;
}

/// The computation of a kind of attention.
pub(crate) trait AttentionModule: Projections {
    /// Attends over whole sequences, `[tokens, hidden]` to `[tokens, hidden]`. Returns statistics if the context probes logits.
    fn forward_rows(&self, x: Tensor<2>, context: &ForwardContext) -> (Tensor<2>, Option<LogitStats>);

    /// Appends new tokens to the cache and attends to it, `[tokens, hidden]` to `[tokens, hidden]`.
    fn decode(&self, x: Tensor<2>, new: &DecodeContext, cache: &mut LayerCache) -> Tensor<2>;

    /// The projections that QK-clip rescales.
    fn qk_clip_projections_mut(&mut self) -> QkClipProjections<'_>;
}

/// The projections of an attention that QK-clip rescales (MuonClip, arXiv 2507.20534), and the columns of a head in them.
#[derive(Debug)]
pub struct QkClipProjections<'a> {
    /// The projection that outputs the queries of all heads, `nope + rope` columns each.
    pub query: &'a mut Projection,
    /// The projection that outputs keys and values of all heads, `nope + value` columns each; `None` if heads share complete keys
    /// (grouped-query attention), so that the whole factor goes into the query.
    pub key_value: Option<&'a mut Projection>,
    /// Columns of a key that belong to one head (without position).
    pub nope: usize,
    /// Columns of a key that all heads share (with position).
    pub rope: usize,
    /// Columns of a value.
    pub value: usize,
}

/// [`AttentionModule::forward_rows`] over `[batch, sequence, hidden]`.
pub(super) fn forward(module: &impl AttentionModule, x: Tensor<3>, context: &ForwardContext) -> Tensor<3> {
    let [batch, sequence, hidden] = x.dims();
    context.check([batch, sequence]);
    module.forward_rows(x.reshape([batch * sequence, hidden]), context).0.reshape([batch, sequence, hidden])
}

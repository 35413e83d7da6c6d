//! What a kind of attention has to say and do. Everything else in the workspace that depends on the kind asks here.

use burn::tensor::Tensor;
use serde_json::{Map, Value};

use super::cache::LayerCache;
use super::logit_stats::LogitStats;
use crate::config::error::ConfigError;
use crate::config::model_type::ModelType;
use crate::config::rope::RopeConfig;
use crate::forward::{DecodeContext, ForwardContext};
use crate::projection::{Projection, Projections};

/// What one token takes in an attention layer, in values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionWidths {
    /// Queries of all heads.
    pub query: usize,
    /// Keys and values of all heads as the attention's product reads them.
    pub key_value: usize,
    /// Weighted values of all heads.
    pub output: usize,
    /// What a training step keeps beside these: latents before and after their norms.
    pub latent: usize,
    /// What the cache keeps, `[key heads, values of each]`.
    pub cache: [usize; 2],
    /// Width of one head's query and key.
    pub head: usize,
    /// Dimensions of a head that the rotary embedding turns.
    pub rotated: usize,
}

impl AttentionWidths {
    /// Multiplications of a query with one key, and of its probability with the value, in all heads.
    pub fn products_per_pair(&self) -> usize {
        self.query + self.output
    }
}

/// The widths of a model that its attention depends on.
pub(crate) struct ModelWidths<'a> {
    /// The layer that the attention is for.
    pub(crate) layer: usize,
    pub(crate) hidden_size: usize,
    pub(crate) num_attention_heads: usize,
    pub(crate) rope: &'a RopeConfig,
    pub(crate) initializer_range: f64,
}

/// The part of `config.json` that describes a kind of attention. Its reading is `AttentionShape::read`.
pub(crate) trait AttentionKind {
    /// Writes the published spelling.
    fn write(&self, model_type: ModelType, heads: usize, map: &mut Map<String, Value>);

    /// Refuses impossible numbers, beside `heads` query heads.
    fn validate(&self, heads: usize) -> Result<(), ConfigError>;

    /// What a token takes, with `heads` query heads.
    fn widths(&self, heads: usize) -> AttentionWidths;

    /// Whether the kind's rotary embedding turns neighbouring dimensions where the file does not say.
    fn interleaves(&self) -> bool;

    /// The factor on the scores.
    fn softmax_scale(&self, rope: &RopeConfig) -> f64;
}

/// What a kind of attention computes.
pub(crate) trait AttentionModule: Projections {
    /// `[tokens, hidden]` to `[tokens, hidden]`, over whole sequences.
    fn forward_rows(&self, x: Tensor<2>, context: &ForwardContext) -> (Tensor<2>, Option<LogitStats>);

    /// The same for tokens that follow those in the cache, to which they are added.
    fn decode(&self, x: Tensor<2>, new: &DecodeContext, cache: &mut LayerCache) -> Tensor<2>;

    /// What QK-clip rewrites.
    fn qk_clip_projections_mut(&mut self) -> QkClipProjections<'_>;
}

/// What QK-clip rewrites in an attention (MuonClip, arXiv 2507.20534), and how a head's columns are laid out in it.
#[derive(Debug)]
pub struct QkClipProjections<'a> {
    /// Makes the queries of all heads; a head has `nope + rope` columns.
    pub query: &'a mut Projection,
    /// Makes keys and values of all heads, `nope + value` columns each; `None` where heads share whole keys, and the query
    /// takes all of the factor.
    pub key_value: Option<&'a mut Projection>,
    /// Columns of a head's key that are its own.
    pub nope: usize,
    /// Columns of a head's key that all heads share.
    pub rope: usize,
    /// Columns of a head's value.
    pub value: usize,
}

/// A forward pass of `[batch, sequence, hidden]`.
pub(super) fn forward(module: &impl AttentionModule, x: Tensor<3>, context: &ForwardContext) -> Tensor<3> {
    let [batch, sequence, hidden] = x.dims();
    context.check([batch, sequence]);
    module.forward_rows(x.reshape([batch * sequence, hidden]), context).0.reshape([batch, sequence, hidden])
}

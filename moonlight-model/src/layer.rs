//! One decoder layer.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::attention::{Attention, AttentionConfig, LayerCache, ModelWidths};
use crate::config::ModelConfig;
use crate::forward::{DecodeContext, ForwardContext};
use crate::forward_stats::LayerStats;
use crate::init::Init;
use crate::mlp::{Mlp, MlpConfig};
use crate::module_enum::delegate_module;
use crate::moe::{Moe, MoeConfig, MoeOutput};
use crate::norm::RmsNorm;
use crate::parameter::ProjectionRole;
use crate::projection::{projections_of_fields, projections_of_variants};

/// The configuration of a [`DecoderLayer`].
#[derive(Config, Debug, PartialEq)]
pub struct DecoderLayerConfig {
    /// The attention; its hidden width is the layer's.
    pub attention: AttentionConfig,
    /// The feed-forward part.
    pub feed_forward: FeedForwardConfig,
    /// Epsilon of the two norms.
    #[config(default = 1e-5)]
    pub rms_norm_eps: f64,
}

/// The configuration of a [`FeedForward`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FeedForwardConfig {
    /// One MLP for every token.
    Dense(MlpConfig),
    /// A mixture of experts.
    Moe(MoeConfig),
}

impl DecoderLayerConfig {
    /// A layer with fresh parameters, drawn when they are first used.
    ///
    /// # Panics
    ///
    /// Where the `init` of its parts does, and when their hidden widths differ.
    pub fn init(&self, device: &Device) -> DecoderLayer {
        self.build(Init::new(device))
    }

    pub(crate) fn build(&self, init: Init<'_>) -> DecoderLayer {
        let hidden = self.attention.hidden_size();
        let other = match &self.feed_forward {
            FeedForwardConfig::Dense(mlp) => mlp.hidden_size,
            FeedForwardConfig::Moe(moe) => moe.router.hidden_size,
        };
        assert_eq!(hidden, other, "attention and feed-forward part have different hidden widths");
        DecoderLayer {
            input_layernorm: RmsNorm::build(hidden, self.rms_norm_eps, init),
            self_attn: self.attention.build(init),
            post_attention_layernorm: RmsNorm::build(hidden, self.rms_norm_eps, init),
            mlp: match &self.feed_forward {
                FeedForwardConfig::Dense(mlp) => FeedForward::Dense(mlp.build(init, ProjectionRole::Mlp)),
                FeedForwardConfig::Moe(moe) => FeedForward::Moe(moe.build(init)),
            },
        }
    }
}

impl ModelConfig {
    /// The configuration of decoder layer `layer`.
    ///
    /// # Panics
    ///
    /// When the model has no such layer.
    pub fn layer(&self, layer: usize) -> DecoderLayerConfig {
        assert!(layer < self.num_hidden_layers, "the model has {} layers", self.num_hidden_layers);
        let (hidden_size, initializer_range) = (self.hidden_size, self.initializer_range);
        let attention = self.attention.config(&ModelWidths {
            layer,
            hidden_size,
            num_attention_heads: self.num_attention_heads,
            rope: &self.rope,
            initializer_range,
        });
        let feed_forward = match self.moe_of_layer(layer) {
            Some(moe) => FeedForwardConfig::Moe(moe.config(hidden_size, initializer_range)),
            None => FeedForwardConfig::Dense(
                MlpConfig::new(hidden_size, self.intermediate_size)
                    .with_bias(self.mlp_bias)
                    .with_initializer_range(initializer_range),
            ),
        };
        DecoderLayerConfig { attention, feed_forward, rms_norm_eps: self.rms_norm_eps }
    }

    /// Decoder layer `layer` with fresh parameters, drawn when they are first used.
    ///
    /// # Panics
    ///
    /// When the model has no such layer.
    pub fn init_layer(&self, layer: usize, device: &Device) -> DecoderLayer {
        self.layer(layer).init(device)
    }
}

/// Attention, then a feed-forward part, each after a norm and beside the residual stream.
///
/// Should be created with [`DecoderLayerConfig`].
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// Before the attention.
    pub input_layernorm: RmsNorm,
    /// The attention.
    pub self_attn: Attention,
    /// Before the feed-forward part.
    pub post_attention_layernorm: RmsNorm,
    /// The feed-forward part.
    pub mlp: FeedForward,
}

projections_of_fields!(DecoderLayer { self_attn, mlp });

/// A layer's feed-forward part.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "there are a few dozen, one a layer")]
pub enum FeedForward {
    /// One MLP for every token.
    Dense(Mlp),
    /// A mixture of experts.
    Moe(Moe),
}

delegate_module!(FeedForward { Dense, Moe });
projections_of_variants!(FeedForward { Dense, Moe });

/// What comes out of a layer.
#[derive(Debug)]
pub struct LayerOutput<const D: usize> {
    /// `[batch, sequence, hidden]`, or where the tokens came as rows `[tokens, hidden]`.
    pub hidden: Tensor<D>,
    /// The layer's weighted sequence-wise balance loss, f32 `[1]`; `None` where its weight is 0 or the layer is dense.
    pub balance_loss: Option<Tensor<1>>,
    /// Expert loads, and what the probe asked for.
    pub stats: LayerStats,
}

impl DecoderLayer {
    /// # Shapes
    ///
    /// `[batch, sequence, hidden]` to the same.
    ///
    /// # Panics
    ///
    /// When the context is of another batch or sequence length, or has no positions.
    pub fn forward(&self, x: Tensor<3>, context: &ForwardContext) -> LayerOutput<3> {
        let shape @ [batch, sequence, hidden] = x.dims();
        context.check([batch, sequence]);
        let LayerOutput { hidden, balance_loss, stats } =
            self.forward_rows(x.reshape([batch * sequence, hidden]), context);
        LayerOutput { hidden: hidden.reshape(shape), balance_loss, stats }
    }

    /// `[tokens, hidden]` over whole sequences.
    pub(crate) fn forward_rows(&self, x: Tensor<2>, context: &ForwardContext) -> LayerOutput<2> {
        let (attended, logits) = self.self_attn.forward_rows(self.input_layernorm.forward_rows(x.clone()), context);
        let (hidden, load, balance_loss) = self.feed_forward(x + attended, context);
        let (max_attention_logit, share_above_100) = match logits {
            Some(logits) => (Some(logits.max_logit), Some(logits.share_above_100)),
            None => (None, None),
        };
        let stats = LayerStats { layer: 0, expert_load: load, max_attention_logit, share_above_100 };
        LayerOutput { hidden, balance_loss, stats }
    }

    /// `[tokens, hidden]` of tokens that follow those in the cache.
    pub(crate) fn decode(&self, x: Tensor<2>, new: &DecodeContext, cache: &mut LayerCache) -> Tensor<2> {
        let attended = self.self_attn.decode(self.input_layernorm.forward_rows(x.clone()), new, cache);
        self.feed_forward(x + attended, &new.tokens).0
    }

    fn feed_forward(&self, x: Tensor<2>, context: &ForwardContext) -> (Tensor<2>, Option<Vec<u64>>, Option<Tensor<1>>) {
        let normed = self.post_attention_layernorm.forward_rows(x.clone());
        match &self.mlp {
            FeedForward::Dense(mlp) => (x + mlp.forward_rows(normed), None, None),
            FeedForward::Moe(moe) => {
                let MoeOutput { hidden, load, balance_loss } = moe.forward_rows(normed, context);
                (x + hidden, Some(load), balance_loss)
            }
        }
    }
}

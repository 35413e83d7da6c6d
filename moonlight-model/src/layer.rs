//! A decoder layer: attention and a feed-forward part with their norms and residual connections.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use serde::{Deserialize, Serialize};

use crate::attention::{Attention, AttentionConfig, LayerCache, ModelWidths};
use crate::config::ModelConfig;
use crate::forward::{DecodeContext, ForwardContext};
use crate::forward_stats::LayerStats;
use crate::init::Init;
#[cfg(feature = "cpu")]
use crate::kernels::few_tokens;
use crate::mlp::{Mlp, MlpConfig};
use crate::module_enum::delegate_module;
use crate::moe::{Moe, MoeConfig, MoeOutput};
use crate::norm::RmsNorm;
use crate::parameter::ProjectionRole;
use crate::projection::{projections_of_fields, projections_of_variants};

/// The config of a [`DecoderLayer`].
#[derive(Config, Debug, PartialEq)]
pub struct DecoderLayerConfig {
    /// The attention, whose hidden size is that of the layer.
    pub attention: AttentionConfig,
    /// Dense or a mixture of experts, with the same hidden size.
    pub feed_forward: FeedForwardConfig,
    /// Epsilon of the two norms.
    #[config(default = 1e-5)]
    pub rms_norm_eps: f64,
}

/// The config of a [`FeedForward`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FeedForwardConfig {
    /// One MLP for every token.
    Dense(MlpConfig),
    /// A mixture of experts.
    Moe(MoeConfig),
}

impl DecoderLayerConfig {
    /// Initializes a layer. A parameter is drawn when it is first read.
    ///
    /// # Panics
    ///
    /// If the hidden sizes of attention and feed-forward part differ, or if the `init` of a part panics.
    pub fn init(&self, device: &Device) -> DecoderLayer {
        self.build(Init::new(device))
    }

    pub(crate) fn build(&self, init: Init<'_>) -> DecoderLayer {
        let hidden = self.attention.hidden_size();
        let other = match &self.feed_forward {
            FeedForwardConfig::Dense(mlp) => mlp.hidden_size,
            FeedForwardConfig::Moe(moe) => moe.router.hidden_size,
        };
        assert_eq!(hidden, other, "attention and feed-forward part have different hidden sizes");
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
    /// The config of decoder layer `layer`, from 0.
    ///
    /// # Panics
    ///
    /// If the model has no such layer.
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

    /// Initializes decoder layer `layer` alone, without the rest of the model.
    ///
    /// # Panics
    ///
    /// If the model has no such layer.
    pub fn init_layer(&self, layer: usize, device: &Device) -> DecoderLayer {
        self.layer(layer).init(device)
    }
}

/// `x + attention(norm(x))`, then `x + feed_forward(norm(x))` (pre-norm residual layer).
///
/// Should be created with [`DecoderLayerConfig`].
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// The norm before the attention.
    pub input_layernorm: RmsNorm,
    /// Latent or grouped-query attention.
    pub self_attn: Attention,
    /// The norm before the feed-forward part.
    pub post_attention_layernorm: RmsNorm,
    /// Dense or a mixture of experts.
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

/// The output of a layer, with its loss and statistics.
#[derive(Debug)]
pub struct LayerOutput<const D: usize> {
    /// `[batch, sequence, hidden]` (`D` = 3), or `[tokens, hidden]` if the input was rows (`D` = 2).
    pub hidden: Tensor<D>,
    /// The layer's weighted sequence-wise balance loss, f32 `[1]`; `None` if its weight is 0 or the layer is dense.
    pub balance_loss: Option<Tensor<1>>,
    /// Expert load, and what the [`Probe`](crate::Probe) asked for.
    pub stats: LayerStats,
}

impl DecoderLayer {
    /// Runs the layer over whole sequences.
    ///
    /// # Shapes
    ///
    /// - x, output: `[batch, sequence, hidden]`
    ///
    /// # Panics
    ///
    /// If the context has another batch size or sequence length, or no positions.
    pub fn forward(&self, x: Tensor<3>, context: &ForwardContext) -> LayerOutput<3> {
        let shape @ [batch, sequence, hidden] = x.dims();
        context.check([batch, sequence]);
        let LayerOutput { hidden, balance_loss, stats } =
            self.forward_rows(x.reshape([batch * sequence, hidden]), context);
        LayerOutput { hidden: hidden.reshape(shape), balance_loss, stats }
    }

    /// [`forward`](Self::forward) over rows, `[tokens, hidden]`.
    pub(crate) fn forward_rows(&self, x: Tensor<2>, context: &ForwardContext) -> LayerOutput<2> {
        let (attended, logits) = self.self_attn.forward_rows(self.input_layernorm.forward_rows(x.clone()), context);
        let (hidden, load, balance_loss) = self.feed_forward(x + attended, context);
        let (max_attention_logit, share_above_100) = match logits {
            Some(logits) => (Some(logits.max_logit), Some(logits.share_above_100)),
            None => (None, None),
        };
        // A layer does not know its index; `CausalLm::run_layer` sets it.
        let stats = LayerStats { layer: 0, expert_load: load, max_attention_logit, share_above_100 };
        LayerOutput { hidden, balance_loss, stats }
    }

    /// Runs the layer for new tokens, `[tokens, hidden]`, and appends their keys and values to the cache.
    pub(crate) fn decode(&self, x: Tensor<2>, new: &DecodeContext, cache: &mut LayerCache) -> Tensor<2> {
        let attended = self.self_attn.decode(self.input_layernorm.forward_rows(x.clone()), new, cache);
        self.feed_forward(x + attended, &new.tokens).0
    }

    /// The layer as the kernel that decodes few tokens reads it; `None` if it cannot.
    #[cfg(feature = "cpu")]
    pub(crate) fn few_tokens(&self, cache: &mut LayerCache) -> Option<few_tokens::Layer> {
        let feed_forward = match &self.mlp {
            FeedForward::Dense(mlp) => few_tokens::FeedForward::Dense(Box::new(mlp.few_tokens()?)),
            FeedForward::Moe(moe) => few_tokens::FeedForward::Moe(Box::new(moe.few_tokens()?)),
        };
        Some(few_tokens::Layer {
            attention_norm: self.input_layernorm.few_tokens()?,
            attention: self.self_attn.few_tokens(cache)?,
            feed_forward_norm: self.post_attention_layernorm.few_tokens()?,
            feed_forward,
        })
    }

    fn feed_forward(
        &self,
        x: Tensor<2>,
        context: &ForwardContext,
    ) -> (Tensor<2>, Option<Tensor<1, Int>>, Option<Tensor<1>>) {
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

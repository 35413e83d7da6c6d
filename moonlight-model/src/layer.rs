//! One decoder layer.

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use crate::attention::{Attention, NewTokens, Tokens};
use crate::cache::LayerCache;
use crate::config::ModelConfig;
use crate::forward_stats::LayerStats;
use crate::init::Init;
use crate::mlp::Mlp;
use crate::module_enum::delegate_module;
use crate::moe::{Moe, MoeOutput, Routing};
use crate::norm::RmsNorm;
use crate::rope::RotaryEmbedding;

/// Attention, then a feed-forward part, each behind a norm and beside the residual stream.
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

/// What comes out of a layer.
#[derive(Debug)]
pub struct LayerOutput {
    /// `[tokens, hidden]`.
    pub hidden: Tensor<2>,
    /// The layer's weighted sequence-wise balance loss, f32 `[1]`; `None` where its weight is 0 or the layer is dense.
    pub balance_loss: Option<Tensor<1>>,
    /// Expert loads, and what the probe asked for.
    pub stats: LayerStats,
}

impl DecoderLayer {
    pub(crate) fn new(config: &ModelConfig, layer: usize, init: Init, device: &Device) -> Self {
        let norm = || RmsNorm::new(config.hidden_size, config.rms_norm_eps, device);
        Self {
            input_layernorm: norm(),
            self_attn: Attention::new(config, init, device),
            post_attention_layernorm: norm(),
            mlp: match config.moe_of_layer(layer) {
                Some(moe) => FeedForward::Moe(Moe::new(config, moe, init, device)),
                None => FeedForward::Dense(Mlp::new(config.hidden_size, config.intermediate_size, init, device)),
            },
        }
    }

    /// `[tokens, hidden]` over whole sequences.
    pub(crate) fn forward(&self, x: Tensor<2>, tokens: &Tokens<'_>, routing: &Routing<'_>) -> LayerOutput {
        let (attended, statistics) = self.self_attn.forward(self.input_layernorm.forward(x.clone()), tokens);
        let x = x + attended;
        let (hidden, load, balance_loss) = self.feed_forward(x, routing);
        let (max_attention_logit, share_above_100) = match statistics {
            Some(statistics) => (Some(statistics.largest), Some(statistics.share_above_100)),
            None => (None, None),
        };
        let stats = LayerStats { layer: 0, expert_load: load, max_attention_logit, share_above_100 };
        LayerOutput { hidden, balance_loss, stats }
    }

    /// `[tokens, hidden]` of tokens that follow those in the cache.
    pub(crate) fn decode(&self, x: Tensor<2>, new: &NewTokens<'_>, cache: &mut LayerCache) -> Tensor<2> {
        let attended = self.self_attn.decode(self.input_layernorm.forward(x.clone()), new, cache);
        let routing = Routing { batch: 1, sequence: new.tokens.sequence, padding: None, balance_weight: 0.0 };
        self.feed_forward(x + attended, &routing).0
    }

    fn feed_forward(&self, x: Tensor<2>, routing: &Routing<'_>) -> (Tensor<2>, Option<Vec<u64>>, Option<Tensor<1>>) {
        let normed = self.post_attention_layernorm.forward(x.clone());
        match &self.mlp {
            FeedForward::Dense(mlp) => (x + mlp.forward(normed), None, None),
            FeedForward::Moe(moe) => {
                let MoeOutput { hidden, load, balance_loss } = moe.forward(normed, routing);
                (x + hidden, Some(load), balance_loss)
            }
        }
    }
}

impl ModelConfig {
    /// Decoder layer `layer` with fresh parameters, drawn when they are first used.
    ///
    /// # Panics
    ///
    /// When the model has no such layer.
    pub fn init_layer(&self, layer: usize, device: &Device) -> DecoderLayer {
        assert!(layer < self.num_hidden_layers, "the model has {} layers", self.num_hidden_layers);
        DecoderLayer::new(self, layer, Init { standard_deviation: self.initializer_range }, device)
    }
}

impl DecoderLayer {
    /// What the layer makes of hidden states `[batch, sequence, hidden]` at positions `0..sequence`; the same shape.
    /// `config` is the model's that the layer is of.
    pub fn forward_alone(&self, config: &ModelConfig, hidden: Tensor<3>) -> Tensor<3> {
        let [batch, sequence, width] = hidden.dims();
        let positions: Vec<u32> = (0..batch).flat_map(|_| 0..sequence as u32).collect();
        let rotation = RotaryEmbedding::new(&config.rope, config.rope_dim()).at(&positions, &hidden.device());
        let tokens = Tokens { batch, sequence, rotation: &rotation, starts: None, probe_logits: false };
        let routing = Routing { batch, sequence, padding: None, balance_weight: 0.0 };
        let output = self.forward(hidden.reshape([batch * sequence, width]), &tokens, &routing);
        output.hidden.reshape([batch, sequence, width])
    }
}

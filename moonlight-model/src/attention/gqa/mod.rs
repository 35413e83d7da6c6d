//! Grouped-query attention (arXiv 2305.13245), for Llama and Qwen2.

mod shape;

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::cache::LayerCache;
use super::kind::{AttentionModule, QkClipProjections};
use super::logit_stats::{LogitStats, logit_stats};
use crate::forward::{DecodeContext, ForwardContext};
use crate::init::Init;
#[cfg(feature = "cpu")]
use crate::kernels::few_tokens;
use crate::kernels::{CachedAttentionSpec, cached_attention, grouped_attention};
use crate::parameter::{AttentionRole, ProjectionRole};
use crate::projection::{Projection, projections_of_fields};

pub use shape::{GqaShape, SlidingWindow, WindowLayers};

/// The config of a [`GroupedQueryAttention`], with the names of `config.json`.
#[derive(Config, Debug, PartialEq)]
pub struct GroupedQueryAttentionConfig {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; must divide the number of query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; must be even, because the rotary embedding rotates pairs.
    pub head_dim: usize,
    /// Factor on the scores; `None` for `head_dim^-1/2`.
    pub softmax_scale: Option<f64>,
    /// Whether query, key and value projections have biases.
    #[config(default = false)]
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    #[config(default = false)]
    pub o_bias: bool,
    /// Number of tokens that a token sees, itself included; `None` for all tokens before it.
    pub sliding_window: Option<usize>,
    /// Standard deviation of initialized weights.
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl GroupedQueryAttentionConfig {
    /// Initializes an attention layer. A parameter is drawn when it is first read.
    ///
    /// # Panics
    ///
    /// If the key heads do not divide the query heads, `head_dim` is odd, or the sliding window is 0.
    pub fn init(&self, device: &Device) -> GroupedQueryAttention {
        self.build(Init::new(device))
    }

    pub(crate) fn build(&self, init: Init<'_>) -> GroupedQueryAttention {
        let (hidden, heads, key_heads, width) =
            (self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim);
        assert!(heads.is_multiple_of(key_heads), "{key_heads} key heads do not divide {heads} heads");
        assert!(width.is_multiple_of(2), "head_dim is {width}, but the rotary embedding rotates pairs");
        assert!(self.sliding_window != Some(0), "the sliding window is 0");
        let (queries, keys) = (heads * width, key_heads * width);
        let projection =
            |role, shape, bias| init.projection(ProjectionRole::Attention(role), shape, bias, self.initializer_range);
        GroupedQueryAttention {
            q_proj: projection(AttentionRole::Query, [hidden, queries], self.qkv_bias),
            k_proj: projection(AttentionRole::Key, [hidden, keys], self.qkv_bias),
            v_proj: projection(AttentionRole::Value, [hidden, keys], self.qkv_bias),
            o_proj: projection(AttentionRole::Output, [queries, hidden], self.o_bias),
            heads,
            key_heads,
            width,
            scale: self.softmax_scale.unwrap_or_else(|| (width as f64).powf(-0.5)),
            window: self.sliding_window,
        }
    }
}

/// Causal attention in which several query heads share each key and value head (arXiv 2305.13245).
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use moonlight_model::rope::RotaryEmbedding;
/// use moonlight_model::{ForwardContext, GroupedQueryAttentionConfig, RopeConfig};
///
/// let device = Device::default();
/// // Hidden size 64; 4 query heads and 2 key heads of width 16; adjacent halves rotated, as in Llama.
/// let attention = GroupedQueryAttentionConfig::new(64, 4, 2, 16).init(&device);
/// let rotary = RotaryEmbedding::new(&RopeConfig::new().with_interleave(false), 16);
/// let x = Tensor::<3>::random([2, 10, 64], Distribution::Default, &device);
/// let y = attention.forward(x, &ForwardContext::new(&rotary, [2, 10], &device));
/// assert_eq!(y.dims(), [2, 10, 64]);
/// ```
///
/// Should be created with [`GroupedQueryAttentionConfig`].
#[derive(Module, Debug)]
pub struct GroupedQueryAttention {
    /// `[hidden, heads * head_dim]`.
    pub q_proj: Projection,
    /// `[hidden, key heads * head_dim]`.
    pub k_proj: Projection,
    /// `[hidden, key heads * head_dim]`.
    pub v_proj: Projection,
    /// `[heads * head_dim, hidden]`.
    pub o_proj: Projection,
    heads: usize,
    key_heads: usize,
    width: usize,
    scale: f64,
    window: Option<usize>,
}

impl GroupedQueryAttention {
    /// Causal attention over whole sequences.
    ///
    /// # Shapes
    ///
    /// - x, output: `[batch, sequence, hidden]`
    ///
    /// # Panics
    ///
    /// If the context has another batch size or sequence length, or no positions.
    pub fn forward(&self, x: Tensor<3>, context: &ForwardContext) -> Tensor<3> {
        super::kind::forward(self, x, context)
    }

    /// Attends over whole sequences. If `cache_rows` is given, it receives keys and values,
    /// `[batch, sequence, key heads, 2 head_dim]`.
    fn attend(
        &self,
        x: Tensor<2>,
        context: &ForwardContext,
        cache_rows: Option<&mut Option<Tensor<4>>>,
    ) -> (Tensor<2>, Option<LogitStats>) {
        let (batch, sequence) = (context.batch(), context.sequence());
        let (query, key_value) = self.project(x, context);
        if let Some(cache_rows) = cache_rows {
            *cache_rows = Some(key_value.clone());
        }
        let statistics = context.probes_logits().then(|| {
            // A copy of the key head for each query head, which only the statistics need.
            let group = self.heads / self.key_heads;
            let key = key_value.clone().slice_dim(3, 0..self.width);
            let key = key.reshape([batch, sequence, self.key_heads, 1, self.width]);
            let key = key.expand([batch, sequence, self.key_heads, group, self.width]);
            let key = key.reshape([batch, sequence, self.heads, self.width]);
            logit_stats(query.clone(), key, self.scale, self.window, context)
        });
        let output = grouped_attention(query, key_value, context.attention_spec(self.scale, self.window));
        (self.o_proj.forward(output.reshape([batch * sequence, self.heads * self.width])), statistics)
    }

    /// The attention as the kernel that decodes few tokens reads it; `None` if it cannot.
    #[cfg(feature = "cpu")]
    pub(super) fn few_tokens(&self) -> Option<few_tokens::Gqa> {
        let Self { heads, key_heads, width, window, .. } = *self;
        Some(few_tokens::Gqa {
            query: self.q_proj.few_tokens()?,
            key: self.k_proj.few_tokens()?,
            value: self.v_proj.few_tokens()?,
            output: self.o_proj.few_tokens()?,
            widths: few_tokens::GqaWidths { heads, key_heads, width, scale: self.scale as f32, window },
        })
    }

    /// Queries `[batch, sequence, heads, width]` and keys with values `[batch, sequence, key heads, 2 width]`.
    fn project(&self, x: Tensor<2>, context: &ForwardContext) -> (Tensor<4>, Tensor<4>) {
        let shape = |heads| [context.batch(), context.sequence(), heads, self.width];
        let query = self.q_proj.forward(x.clone()).reshape(shape(self.heads)); // [batch, sequence, heads, width]
        let key = self.k_proj.forward(x.clone()).reshape(shape(self.key_heads));
        let value = self.v_proj.forward(x).reshape(shape(self.key_heads));
        let key = context.rotation().apply(key, 0);
        // Key and value of a head side by side, as the kernel and a row of the cache have them.
        (context.rotation().apply(query, 0), Tensor::cat(vec![key, value], 3))
    }
}

projections_of_fields!(GroupedQueryAttention { q_proj, k_proj, v_proj, o_proj });

impl AttentionModule for GroupedQueryAttention {
    fn forward_rows(&self, x: Tensor<2>, context: &ForwardContext) -> (Tensor<2>, Option<LogitStats>) {
        self.attend(x, context, None)
    }

    fn decode(&self, x: Tensor<2>, new: &DecodeContext, cache: &mut LayerCache) -> Tensor<2> {
        let (count, width) = (new.tokens.sequence(), self.width);
        let row = [count, self.key_heads, 2 * width];
        if new.is_prefill() {
            let mut cache_rows = None;
            let (output, _) = self.attend(x, &new.tokens, Some(&mut cache_rows));
            let cache_rows = cache_rows.expect("`attend` fills it");
            cache.write(cache_rows.reshape(row), &new.spans);
            return output;
        }
        let (query, key_value) = self.project(x, &new.tokens);
        cache.write(key_value.reshape(row), &new.spans); // first: a token attends to itself
        let spec = CachedAttentionSpec {
            scale: self.scale as f32,
            keys: 0..width,
            values: width..2 * width,
            window: self.window,
            spans: new.spans.clone(),
        };
        let dtype = query.dtype();
        let query = query.reshape([count, self.heads, width]).cast(cache.dtype());
        let output = cached_attention(query, cache.rows(), spec).cast(dtype);
        self.o_proj.forward(output.reshape([count, self.heads * width]))
    }

    fn qk_clip_projections_mut(&mut self) -> QkClipProjections<'_> {
        // The heads of a group share their key, so a factor for one head can only go into its query.
        QkClipProjections { query: &mut self.q_proj, key_value: None, nope: 0, rope: self.width, value: 0 }
    }
}

//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

mod shape;

use std::sync::Arc;

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
use crate::kernels::{CacheSpan, CachedAttentionSpec, GroupLayout, cached_attention, grouped_matmul, latent_attention};
use crate::norm::RmsNorm;
use crate::parameter::{AttentionRole, ProjectionRole};
use crate::projection::{Projection, projections_of_fields};
#[cfg(feature = "cpu")]
use crate::quantization::{QuantBits, QuantizedWeight};

pub use shape::MlaShape;

/// The config of a [`MultiHeadLatentAttention`], with the names of `config.json`.
#[derive(Config, Debug, PartialEq)]
pub struct MultiHeadLatentAttentionConfig {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Number of heads.
    pub num_attention_heads: usize,
    /// Width of the latent that is cached and that keys and values are expanded from.
    pub kv_lora_rank: usize,
    /// Width of the part of a head's query and key without position.
    pub qk_nope_head_dim: usize,
    /// Width of the part with position, of a head's query and of the one key that all heads share; must be even, because the
    /// rotary embedding rotates pairs.
    pub qk_rope_head_dim: usize,
    /// Width of the value of a head.
    pub v_head_dim: usize,
    /// Width of the query latent; `None` to project queries directly, as in Moonlight.
    pub q_lora_rank: Option<usize>,
    /// Factor on the scores; `None` for `(qk_nope_head_dim + qk_rope_head_dim)^-1/2`.
    pub softmax_scale: Option<f64>,
    /// Epsilon of the norms of the latents.
    #[config(default = 1e-6)]
    pub latent_norm_eps: f64,
    /// Whether `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have biases.
    #[config(default = false)]
    pub attention_bias: bool,
    /// Standard deviation of initialized weights.
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl MultiHeadLatentAttentionConfig {
    /// Initializes an attention layer. A parameter is drawn when it is first read.
    ///
    /// # Panics
    ///
    /// If `qk_rope_head_dim` is odd.
    pub fn init(&self, device: &Device) -> MultiHeadLatentAttention {
        self.build(Init::new(device))
    }

    pub(crate) fn build(&self, init: Init<'_>) -> MultiHeadLatentAttention {
        let (hidden, heads, bias) = (self.hidden_size, self.num_attention_heads, self.attention_bias);
        let (nope, rope, value) = (self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim);
        assert!(rope.is_multiple_of(2), "qk_rope_head_dim is {rope}, but the rotary embedding rotates pairs");
        let (queries, latent) = (heads * (nope + rope), self.kv_lora_rank);
        let norm = |width| RmsNorm::build(width, self.latent_norm_eps, init);
        let projection =
            |role, shape, bias| init.projection(ProjectionRole::Attention(role), shape, bias, self.initializer_range);
        use AttentionRole::{KeyValueDown, KeyValueUp, Output, Query, QueryDown, QueryUp};
        let rank = self.q_lora_rank;
        MultiHeadLatentAttention {
            q_proj: rank.is_none().then(|| projection(Query, [hidden, queries], false)),
            q_a_proj: rank.map(|rank| projection(QueryDown, [hidden, rank], bias)),
            q_a_layernorm: rank.map(norm),
            q_b_proj: rank.map(|rank| projection(QueryUp, [rank, queries], false)),
            kv_a_proj_with_mqa: projection(KeyValueDown, [hidden, latent + rope], bias),
            kv_a_layernorm: norm(latent),
            kv_b_proj: projection(KeyValueUp, [latent, heads * (nope + value)], false),
            o_proj: projection(Output, [heads * value, hidden], bias),
            heads,
            nope,
            rope,
            value,
            latent,
            scale: self.softmax_scale.unwrap_or_else(|| ((nope + rope) as f64).powf(-0.5)),
        }
    }
}

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, equations 9 to 19): keys and values of all heads are expanded
/// from one latent a token, and one key with the position is shared by all heads. Only the latent and the shared key are
/// cached.
///
/// See [`ForwardContext`] for an example.
///
/// Should be created with [`MultiHeadLatentAttentionConfig`].
#[derive(Module, Debug)]
pub struct MultiHeadLatentAttention {
    /// `[hidden, heads * (nope + rope)]`; `None` if queries have a latent.
    pub q_proj: Option<Projection>,
    /// `[hidden, q_lora_rank]`; `None`, as the two below, if queries have no latent.
    pub q_a_proj: Option<Projection>,
    /// `[q_lora_rank]`.
    pub q_a_layernorm: Option<RmsNorm>,
    /// `[q_lora_rank, heads * (nope + rope)]`.
    pub q_b_proj: Option<Projection>,
    /// `[hidden, kv_lora_rank + rope]`: the latent, then the shared key.
    pub kv_a_proj_with_mqa: Projection,
    /// `[kv_lora_rank]`.
    pub kv_a_layernorm: RmsNorm,
    /// `[kv_lora_rank, heads * (nope + value)]`: for each head the key, then the value.
    pub kv_b_proj: Projection,
    /// `[heads * value, hidden]`.
    pub o_proj: Projection,
    heads: usize,
    nope: usize,
    rope: usize,
    value: usize,
    latent: usize,
    scale: f64,
}

impl MultiHeadLatentAttention {
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

    /// Attends over whole sequences, with expanded keys and values. If `latents` is given, it receives the cache rows,
    /// `[batch, sequence, kv_lora_rank + rope]`.
    fn attend(
        &self,
        x: Tensor<2>,
        context: &ForwardContext,
        latents: Option<&mut Option<Tensor<3>>>,
    ) -> (Tensor<2>, Option<LogitStats>) {
        let (batch, sequence) = (context.batch(), context.sequence());
        let query = self.query(x.clone(), context); // [batch, sequence, heads, nope + rope]
        let (latent, shared_key) = self.latent(x, context);
        if let Some(latents) = latents {
            let latent = latent.clone().reshape([batch, sequence, self.latent]);
            *latents = Some(Tensor::cat(vec![latent, shared_key.clone()], 2));
        }
        let pair = self.nope + self.value;
        let key_value = self.kv_b_proj.forward(latent).reshape([batch, sequence, self.heads, pair]); // keys, then values
        let statistics = context.probes_logits().then(|| {
            // The complete key of every head, which the kernel never builds.
            let own = key_value.clone().slice_dim(3, 0..self.nope);
            let shared = shared_key.clone().reshape([batch, sequence, 1, self.rope]);
            let shared = shared.expand([batch, sequence, self.heads, self.rope]);
            logit_stats(query.clone(), Tensor::cat(vec![own, shared], 3), self.scale, None, context)
        });
        let output = latent_attention(query, key_value, shared_key, context.attention_spec(self.scale, None));
        let output = output.reshape([batch * sequence, self.heads * self.value]); // [tokens, heads * value]
        (self.o_proj.forward(output), statistics)
    }

    /// Rotated queries, `[batch, sequence, heads, nope + rope]`.
    fn query(&self, x: Tensor<2>, context: &ForwardContext) -> Tensor<4> {
        let query = match (&self.q_proj, &self.q_a_proj, &self.q_a_layernorm, &self.q_b_proj) {
            (Some(direct), ..) => direct.forward(x),
            (None, Some(down), Some(norm), Some(up)) => up.forward(norm.forward(down.forward(x))),
            _ => unreachable!("`build` makes either the one projection or all three parts"),
        };
        let query = query.reshape([context.batch(), context.sequence(), self.heads, self.nope + self.rope]);
        context.rotation().apply(query, self.nope)
    }

    /// The normalized latent, `[tokens, latent]`, and the rotated shared key, `[batch, sequence, rope]`.
    fn latent(&self, x: Tensor<2>, context: &ForwardContext) -> (Tensor<2>, Tensor<3>) {
        let compressed = self.kv_a_proj_with_mqa.forward(x); // [tokens, latent + rope]
        let latent = compressed.clone().slice_dim(1, 0..self.latent);
        let shared = compressed.slice_dim(1, self.latent..self.latent + self.rope);
        let shared = shared.reshape([context.batch(), context.sequence(), 1, self.rope]);
        let shared = context.rotation().apply(shared, 0).reshape([context.batch(), context.sequence(), self.rope]);
        (self.kv_a_layernorm.forward(latent), shared)
    }

    /// Whether it takes fewer multiplications to expand the keys and values of all cached tokens for the new ones than to attend to the
    /// latents, which are wider. For Moonlight that is so from 171 new tokens of a sequence on, whatever the context.
    fn is_expanding_cheaper(&self, spans: &[CacheSpan]) -> bool {
        let Self { nope, rope, value, latent, .. } = *self;
        let (mut expanded, mut absorbed) = (0, 0);
        for span in spans {
            // A token in the middle of the span sees these keys.
            let pairs = span.count * (span.start + span.count.div_ceil(2));
            expanded += span.end() * latent * (nope + value) + pairs * (nope + rope + value);
            absorbed += span.count * latent * (nope + value) + pairs * (2 * latent + rope);
        }
        expanded < absorbed
    }

    /// The attention of new tokens, whose rows the cache has already, over the expanded keys and values of their sequences.
    ///
    /// # Shapes
    ///
    /// - query: `[tokens, heads, nope + rope]`
    /// - output: `[tokens, hidden]`
    fn decode_expanded(&self, query: Tensor<3>, spans: &[CacheSpan], cache: &LayerCache) -> Tensor<2> {
        let Self { heads, nope, rope, value, latent, .. } = *self;
        let (count, dtype) = (query.dims()[0], query.dtype());
        let mut token = 0;
        // One sequence after the other, so that only the keys and values of one are in memory.
        let of_span = spans.iter().map(|span| {
            let query = query.clone().slice_dim(0, token..token + span.count);
            token += span.count;
            let (sequence, end) = (span.sequence, span.end());
            let rows = cache.rows().slice([sequence..sequence + 1, 0..1, 0..end, 0..latent + rope]);
            let rows = rows.reshape([end, latent + rope]).cast(dtype);
            let expanded = self.kv_b_proj.forward(rows.clone().slice_dim(1, 0..latent));
            let expanded = expanded.reshape([end, heads, nope + value]).swap_dims(0, 1); // [heads, keys, ..]
            let shared = rows.slice_dim(1, latent..latent + rope).reshape([1, end, rope]).expand([heads, end, rope]);
            let (own, values) = (expanded.clone().slice_dim(2, 0..nope), expanded.slice_dim(2, nope..nope + value));
            let rows = Tensor::cat(vec![own, shared, values], 2).reshape([1, heads, end, nope + rope + value]);
            let spec = CachedAttentionSpec {
                scale: self.scale as f32,
                keys: 0..nope + rope,
                values: nope + rope..nope + rope + value,
                window: None,
                spans: Arc::new(vec![CacheSpan { sequence: 0, ..*span }]),
            };
            cached_attention(query, rows, spec)
        });
        let output = Tensor::cat(of_span.collect(), 0); // [tokens, heads, value]
        self.o_proj.forward(output.reshape([count, heads * value]))
    }

    /// The key half `[heads, nope, latent]` and the value half `[heads, latent, value]` of `kv_b_proj`. They are made once for each
    /// cache, so weights must not change while a cache is in use.
    fn absorbed(&self, cache: &mut LayerCache) -> [Tensor<3>; 2] {
        let halves = cache.prepared.get_or_insert_with(|| self.halves().to_vec());
        [halves[0].clone(), halves[1].clone()]
    }

    fn halves(&self) -> [Tensor<3>; 2] {
        let weight = self.kv_b_proj.effective_weight();
        let weight = weight.reshape([self.latent, self.heads, self.nope + self.value]).swap_dims(0, 1); // [heads, latent, ..]
        let key = weight.clone().slice_dim(2, 0..self.nope).swap_dims(1, 2); // [heads, nope, latent]
        let value = weight.slice_dim(2, self.nope..self.nope + self.value);
        // Both are strided views, which the grouped product would copy for every token. Flattening them copies them once.
        [key, value].map(|tensor| {
            let [heads, rows, columns] = tensor.dims();
            tensor.reshape([heads * rows, columns]).reshape([heads, rows, columns])
        })
    }

    /// The attention as the kernel that decodes few tokens reads it; `None` if it cannot.
    #[cfg(feature = "cpu")]
    pub(super) fn few_tokens(&self, cache: &mut LayerCache) -> Option<few_tokens::Mla> {
        let Self { heads, nope, rope, value, latent, .. } = *self;
        let query = match (&self.q_proj, &self.q_a_proj, &self.q_a_layernorm, &self.q_b_proj) {
            (Some(direct), ..) => few_tokens::MlaQuery::Direct(direct.few_tokens()?),
            (None, Some(down), Some(norm), Some(up)) => few_tokens::MlaQuery::Latent {
                down: down.few_tokens()?,
                norm: norm.few_tokens()?,
                up: up.few_tokens()?,
            },
            _ => unreachable!("`build` makes either the one projection or all three parts"),
        };
        if self.kv_b_proj.lora.is_some() {
            return None;
        }
        let absorbed = if self.kv_b_proj.quantized.is_some() {
            // In 8 bits: in f32 they would be most of what a quantized model reads in short contexts.
            self.halves().map(|half| QuantizedWeight::new(half, QuantBits::Eight).few_tokens())
        } else {
            self.absorbed(cache).map(few_tokens::Matrix::new)
        };
        let [Some(key_half), Some(value_half)] = absorbed else { return None };
        Some(few_tokens::Mla {
            query,
            key_value_down: self.kv_a_proj_with_mqa.few_tokens()?,
            latent_norm: self.kv_a_layernorm.few_tokens()?,
            absorbed: few_tokens::AbsorbedHalves { key: key_half, value: value_half },
            output: self.o_proj.few_tokens()?,
            widths: few_tokens::MlaWidths { heads, nope, rope, value, latent, scale: self.scale as f32 },
        })
    }
}

projections_of_fields!(MultiHeadLatentAttention { q_proj, q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj });

impl AttentionModule for MultiHeadLatentAttention {
    fn forward_rows(&self, x: Tensor<2>, context: &ForwardContext) -> (Tensor<2>, Option<LogitStats>) {
        self.attend(x, context, None)
    }

    /// Few new tokens attend to cached ones without expanding keys or values (arXiv 2405.04434, section 2.1.2).
    ///
    /// A score is `q_nope . (W_uk c) = (W_uk^T q_nope) . c`, so the key half of `kv_b_proj` is applied to the query, and likewise
    /// its value half to the weighted sum of latents. Prompts, and later pieces of long prompts, expand keys and values instead, which
    /// is cheaper for many tokens.
    fn decode(&self, x: Tensor<2>, new: &DecodeContext, cache: &mut LayerCache) -> Tensor<2> {
        let (count, heads, latent, rope) = (new.tokens.sequence(), self.heads, self.latent, self.rope);
        if new.is_prefill() {
            let mut latents = None;
            let (output, _) = self.attend(x, &new.tokens, Some(&mut latents));
            let latents = latents.expect("`attend` fills it");
            cache.write(latents.reshape([count, 1, latent + rope]), &new.spans);
            return output;
        }
        let query = self.query(x.clone(), &new.tokens).reshape([count, heads, self.nope + rope]);
        let (new_latent, shared_key) = self.latent(x, &new.tokens);
        let shared_key = shared_key.reshape([count, rope]);
        // Written first, because a token attends to itself.
        cache.write(Tensor::cat(vec![new_latent, shared_key], 1).reshape([count, 1, latent + rope]), &new.spans);
        if self.is_expanding_cheaper(&new.spans) {
            return self.decode_expanded(query, &new.spans, cache);
        }
        let [absorbed_key, absorbed_value] = self.absorbed(cache);
        // Each head multiplies by its own matrix: the grouped product with a head as a group.
        let by_head = Arc::new(GroupLayout::uniform(heads, count));

        let own = query.clone().slice_dim(2, 0..self.nope).swap_dims(0, 1).reshape([heads * count, self.nope]);
        let own = grouped_matmul(own, absorbed_key, &by_head).reshape([heads, count, latent]).swap_dims(0, 1);
        // [count, heads, latent + rope], as wide as a row of the cache
        let query = Tensor::cat(vec![own, query.slice_dim(2, self.nope..self.nope + rope)], 2);
        let spec = CachedAttentionSpec {
            scale: self.scale as f32,
            keys: 0..latent + rope,
            values: 0..latent,
            window: None,
            spans: new.spans.clone(),
        };
        let dtype = query.dtype();
        let latents = cached_attention(query.cast(cache.dtype()), cache.rows(), spec).cast(dtype); // [count, heads, latent]
        let latents = latents.swap_dims(0, 1).reshape([heads * count, latent]);
        let output = grouped_matmul(latents, absorbed_value, &by_head).reshape([heads, count, self.value]);
        self.o_proj.forward(output.swap_dims(0, 1).reshape([count, heads * self.value]))
    }

    fn qk_clip_projections_mut(&mut self) -> QkClipProjections<'_> {
        QkClipProjections {
            query: self
                .q_proj
                .as_mut()
                .or(self.q_b_proj.as_mut())
                .expect("`build` makes one of the two query projections"),
            key_value: Some(&mut self.kv_b_proj),
            nope: self.nope,
            rope: self.rope,
            value: self.value,
        }
    }
}

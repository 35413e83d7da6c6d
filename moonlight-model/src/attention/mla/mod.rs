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
use crate::kernels::{CachedAttentionSpec, GroupLayout, cached_attention, grouped_matmul, latent_attention};
use crate::norm::RmsNorm;
use crate::parameter::{AttentionRole, ProjectionRole};
use crate::projection::{Projection, projections_of_fields};

pub use shape::MlaShape;

/// The configuration of a [`MultiHeadLatentAttention`], by the names of `config.json`.
#[derive(Config, Debug, PartialEq)]
pub struct MultiHeadLatentAttentionConfig {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Number of heads.
    pub num_attention_heads: usize,
    /// Width of the latent that keys and values are expanded from, and that the cache holds.
    pub kv_lora_rank: usize,
    /// Width of a head's query and key without position.
    pub qk_nope_head_dim: usize,
    /// Width of a head's query, and of the one shared key, that carry the position; even.
    pub qk_rope_head_dim: usize,
    /// Width of a head's value.
    pub v_head_dim: usize,
    /// Width of the query latent; without one queries are projected directly, as in Moonlight.
    pub q_lora_rank: Option<usize>,
    /// Factor on the scores; by default `(qk_nope_head_dim + qk_rope_head_dim)^-1/2`.
    pub softmax_scale: Option<f64>,
    /// Epsilon of the two latent norms.
    #[config(default = 1e-6)]
    pub latent_norm_eps: f64,
    /// Biases on `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj`.
    #[config(default = false)]
    pub attention_bias: bool,
    /// Standard deviation of fresh weights.
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl MultiHeadLatentAttentionConfig {
    /// An attention with fresh parameters, drawn when they are first used.
    ///
    /// # Panics
    ///
    /// When `qk_rope_head_dim` is odd: positions turn pairs.
    pub fn init(&self, device: &Device) -> MultiHeadLatentAttention {
        self.build(Init::new(device))
    }

    pub(crate) fn build(&self, init: Init<'_>) -> MultiHeadLatentAttention {
        let (hidden, heads, bias) = (self.hidden_size, self.num_attention_heads, self.attention_bias);
        let (nope, rope, value) = (self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim);
        assert!(rope.is_multiple_of(2), "qk_rope_head_dim is {rope}: positions turn pairs");
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

/// Keys and values of all heads are expanded from one latent a token, and one key that carries the position is shared
/// by all heads (DeepSeek-V2, arXiv 2405.04434, equations 9 to 19).
///
/// Should be created with [`MultiHeadLatentAttentionConfig`].
#[derive(Module, Debug)]
pub struct MultiHeadLatentAttention {
    /// `[hidden, heads * (nope + rope)]`; absent where queries have a latent.
    pub q_proj: Option<Projection>,
    /// `[hidden, q_lora_rank]`.
    pub q_a_proj: Option<Projection>,
    /// `[q_lora_rank]`.
    pub q_a_layernorm: Option<RmsNorm>,
    /// `[q_lora_rank, heads * (nope + rope)]`.
    pub q_b_proj: Option<Projection>,
    /// `[hidden, kv_lora_rank + rope]`: the latent, then the shared key.
    pub kv_a_proj_with_mqa: Projection,
    /// `[kv_lora_rank]`.
    pub kv_a_layernorm: RmsNorm,
    /// `[kv_lora_rank, heads * (nope + value)]`: for each head its key, then its value.
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
    /// Attends causally over whole sequences; see [`ForwardContext`] for an example.
    ///
    /// # Shapes
    ///
    /// `[batch, sequence, hidden]` to the same.
    ///
    /// # Panics
    ///
    /// When the context is of another batch or sequence length, or has no positions.
    pub fn forward(&self, x: Tensor<3>, context: &ForwardContext) -> Tensor<3> {
        super::kind::forward(self, x, context)
    }

    /// Attends over whole sequences; `latents` takes what the cache keeps of each token, where it is asked for.
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
        let key_value = self.kv_b_proj.forward(latent).reshape([batch, sequence, self.heads, pair]);
        let statistics = context.probes_logits().then(|| {
            let own = key_value.clone().slice_dim(3, 0..self.nope);
            let shared = shared_key.clone().reshape([batch, sequence, 1, self.rope]);
            let shared = shared.expand([batch, sequence, self.heads, self.rope]);
            logit_stats(query.clone(), Tensor::cat(vec![own, shared], 3), self.scale, None, context)
        });
        let output = latent_attention(query, key_value, shared_key, context.attention_spec(self.scale, None));
        let output = output.reshape([batch * sequence, self.heads * self.value]);
        (self.o_proj.forward(output), statistics)
    }

    /// Queries with their positions, `[batch, sequence, heads, nope + rope]`.
    fn query(&self, x: Tensor<2>, context: &ForwardContext) -> Tensor<4> {
        let query = match (&self.q_proj, &self.q_a_proj, &self.q_a_layernorm, &self.q_b_proj) {
            (Some(whole), ..) => whole.forward(x),
            (None, Some(down), Some(norm), Some(up)) => up.forward(norm.forward(down.forward(x))),
            _ => unreachable!("`build` makes either the one projection or all three parts"),
        };
        let query = query.reshape([context.batch(), context.sequence(), self.heads, self.nope + self.rope]);
        context.rotation().apply(query, self.nope)
    }

    /// The normalised latent `[tokens, latent]` and the shared key with its position `[batch, sequence, rope]`.
    fn latent(&self, x: Tensor<2>, context: &ForwardContext) -> (Tensor<2>, Tensor<3>) {
        let compressed = self.kv_a_proj_with_mqa.forward(x);
        let latent = compressed.clone().slice_dim(1, 0..self.latent);
        let shared = compressed.slice_dim(1, self.latent..self.latent + self.rope);
        let shared = shared.reshape([context.batch(), context.sequence(), 1, self.rope]);
        let shared = context.rotation().apply(shared, 0).reshape([context.batch(), context.sequence(), self.rope]);
        (self.kv_a_layernorm.forward(latent), shared)
    }

    /// The two halves of `kv_b_proj` laid out for decoding, made once for a cache: `[heads, nope, latent]` and
    /// `[heads, latent, value]`.
    fn absorbed(&self, cache: &mut LayerCache) -> [Tensor<3>; 2] {
        let halves = cache.prepared.get_or_insert_with(|| {
            let weight = self.kv_b_proj.effective_weight();
            let weight = weight.reshape([self.latent, self.heads, self.nope + self.value]).swap_dims(0, 1);
            let key = weight.clone().slice_dim(2, 0..self.nope).swap_dims(1, 2);
            let value = weight.slice_dim(2, self.nope..self.nope + self.value);
            // A product needs contiguous rows: this copies them, once for all tokens.
            let copied = |tensor: Tensor<3>| {
                let [heads, rows, columns] = tensor.dims();
                tensor.reshape([heads * rows, columns]).reshape([heads, rows, columns])
            };
            vec![copied(key), copied(value)]
        });
        [halves[0].clone(), halves[1].clone()]
    }
}

projections_of_fields!(MultiHeadLatentAttention { q_proj, q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj });

impl AttentionModule for MultiHeadLatentAttention {
    fn forward_rows(&self, x: Tensor<2>, context: &ForwardContext) -> (Tensor<2>, Option<LogitStats>) {
        self.attend(x, context, None)
    }

    /// Attends to the cache and the new tokens without expanding a single old key or value.
    ///
    /// A score is `q_nope . (W_uk c) = (W_uk^T q_nope) . c`, so `kv_b_proj`'s key half is applied to the query, and
    /// likewise its value half to the weighted sum of latents (arXiv 2405.04434, section 2.1.2). The first tokens of
    /// empty sequences are cheaper to expand.
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
        cache.write(Tensor::cat(vec![new_latent, shared_key], 1).reshape([count, 1, latent + rope]), &new.spans);
        let [absorbed_key, absorbed_value] = self.absorbed(cache);
        let by_head = Arc::new(GroupLayout::uniform(heads, count));

        let own = query.clone().slice_dim(2, 0..self.nope).swap_dims(0, 1).reshape([heads * count, self.nope]);
        let own = grouped_matmul(own, absorbed_key, &by_head).reshape([heads, count, latent]).swap_dims(0, 1);
        let query = Tensor::cat(vec![own, query.slice_dim(2, self.nope..self.nope + rope)], 2);
        let spec = CachedAttentionSpec {
            scale: self.scale as f32,
            keys: 0..latent + rope,
            values: 0..latent,
            window: None,
            spans: new.spans.clone(),
        };
        let mixed = cached_attention(query, cache.rows(), spec); // [count, heads, latent]
        let mixed = mixed.swap_dims(0, 1).reshape([heads * count, latent]);
        let output = grouped_matmul(mixed, absorbed_value, &by_head).reshape([heads, count, self.value]);
        self.o_proj.forward(output.swap_dims(0, 1).reshape([count, heads * self.value]))
    }

    fn qk_clip_projections_mut(&mut self) -> QkClipProjections<'_> {
        QkClipProjections {
            query: self.q_proj.as_mut().or(self.q_b_proj.as_mut()).expect("queries are made by one of the two"),
            key_value: Some(&mut self.kv_b_proj),
            nope: self.nope,
            rope: self.rope,
            value: self.value,
        }
    }
}

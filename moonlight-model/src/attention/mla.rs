//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::logit_stats::{LogitStats, measure};
use super::{NewTokens, Tokens};
use crate::cache::{Absorbed, LayerCache};
use crate::config::{MlaShape, ModelConfig};
use crate::init::Init;
use crate::kernels::{CachedAttentionSpec, GroupLayout, cached_attention, grouped_matmul, latent_attention};
use crate::norm::RmsNorm;
use crate::projection::Projection;

/// Keys and values of all heads are expanded from one latent a token, and one key that carries the position is shared
/// by all heads.
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
    pub(super) fn new(config: &ModelConfig, mla: &MlaShape, init: Init, device: &Device) -> Self {
        let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
        let (nope, rope, value) = (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim);
        let queries = heads * (nope + rope);
        let norm = |width| RmsNorm::new(width, mla.latent_norm_eps, device);
        let rank = mla.q_lora_rank;
        Self {
            q_proj: rank.is_none().then(|| init.projection(hidden, queries, false, device)),
            q_a_proj: rank.map(|rank| init.projection(hidden, rank, mla.attention_bias, device)),
            q_a_layernorm: rank.map(norm),
            q_b_proj: rank.map(|rank| init.projection(rank, queries, false, device)),
            kv_a_proj_with_mqa: init.projection(hidden, mla.kv_lora_rank + rope, mla.attention_bias, device),
            kv_a_layernorm: norm(mla.kv_lora_rank),
            kv_b_proj: init.projection(mla.kv_lora_rank, heads * (nope + value), false, device),
            o_proj: init.projection(heads * value, hidden, mla.attention_bias, device),
            heads,
            nope,
            rope,
            value,
            latent: mla.kv_lora_rank,
            scale: config.softmax_scale(),
        }
    }

    /// Attends over whole sequences; `latents` takes what the cache keeps of each token, where it is asked for.
    pub(super) fn forward(
        &self,
        x: Tensor<2>,
        tokens: &Tokens<'_>,
        latents: Option<&mut Option<Tensor<3>>>,
    ) -> (Tensor<2>, Option<LogitStats>) {
        let (batch, sequence) = (tokens.batch, tokens.sequence);
        let query = self.query(x.clone(), tokens); // [batch, sequence, heads, nope + rope]
        let (latent, shared_key) = self.latent(x, tokens);
        if let Some(latents) = latents {
            let latent = latent.clone().reshape([batch, sequence, self.latent]);
            *latents = Some(Tensor::cat(vec![latent, shared_key.clone()], 2));
        }
        let pair = self.nope + self.value;
        let key_value = self.kv_b_proj.forward(latent).reshape([batch, sequence, self.heads, pair]);
        let statistics = tokens.probe_logits.then(|| {
            let own = key_value.clone().slice_dim(3, 0..self.nope);
            let shared = shared_key.clone().reshape([batch, sequence, 1, self.rope]);
            let shared = shared.expand([batch, sequence, self.heads, self.rope]);
            measure(query.clone(), Tensor::cat(vec![own, shared], 3), self.scale, tokens)
        });
        let output = latent_attention(query, key_value, shared_key, tokens.spec(self.scale));
        let output = output.reshape([batch * sequence, self.heads * self.value]);
        (self.o_proj.forward(output), statistics)
    }

    /// Attends to the cache and the new tokens without expanding a single old key or value.
    ///
    /// A score is `q_nope . (W_uk c) = (W_uk^T q_nope) . c`, so `kv_b_proj`'s key half is applied to the query, and
    /// likewise its value half to the weighted sum of latents (arXiv 2405.04434, section 2.1.2). The first tokens of
    /// empty sequences are cheaper to expand.
    pub(super) fn decode(&self, x: Tensor<2>, new: &NewTokens<'_>, cache: &mut LayerCache) -> Tensor<2> {
        let (count, heads, latent, rope) = (new.tokens.sequence, self.heads, self.latent, self.rope);
        if new.are_prompts() {
            let mut latents = None;
            let (output, _) = self.forward(x, &new.tokens, Some(&mut latents));
            let latents = latents.expect("the forward pass fills what it is handed");
            cache.write(latents.reshape([count, 1, latent + rope]), &new.runs);
            return output;
        }
        let query = self.query(x.clone(), &new.tokens).reshape([count, heads, self.nope + rope]);
        let (new_latent, shared_key) = self.latent(x, &new.tokens);
        let shared_key = shared_key.reshape([count, rope]);
        cache.write(Tensor::cat(vec![new_latent, shared_key], 1).reshape([count, 1, latent + rope]), &new.runs);
        let absorbed = self.absorbed(cache);
        let by_head = Arc::new(GroupLayout::uniform(heads, count));

        let own = query.clone().slice_dim(2, 0..self.nope).swap_dims(0, 1).reshape([heads * count, self.nope]);
        let own = grouped_matmul(own, absorbed.key, &by_head).reshape([heads, count, latent]).swap_dims(0, 1);
        let query = Tensor::cat(vec![own, query.slice_dim(2, self.nope..self.nope + rope)], 2);
        let (keys, values) = (0..latent + rope, 0..latent);
        let spec = CachedAttentionSpec { scale: self.scale as f32, keys, values, spans: new.runs.clone() };
        let mixed = cached_attention(query, cache.past(), spec); // [count, heads, latent]
        let mixed = mixed.swap_dims(0, 1).reshape([heads * count, latent]);
        let output = grouped_matmul(mixed, absorbed.value, &by_head).reshape([heads, count, self.value]);
        self.o_proj.forward(output.swap_dims(0, 1).reshape([count, heads * self.value]))
    }

    /// Queries with their positions, `[batch, sequence, heads, nope + rope]`.
    fn query(&self, x: Tensor<2>, tokens: &Tokens<'_>) -> Tensor<4> {
        let query = match (&self.q_proj, &self.q_a_proj, &self.q_a_layernorm, &self.q_b_proj) {
            (Some(whole), ..) => whole.forward(x),
            (None, Some(down), Some(norm), Some(up)) => up.forward(norm.forward(down.forward(x))),
            _ => unreachable!("`new` makes either the one projection or all three parts"),
        };
        let query = query.reshape([tokens.batch, tokens.sequence, self.heads, self.nope + self.rope]);
        tokens.rotation.apply(query, self.nope)
    }

    /// The normalised latent `[tokens, latent]` and the shared key with its position `[batch, sequence, rope]`.
    fn latent(&self, x: Tensor<2>, tokens: &Tokens<'_>) -> (Tensor<2>, Tensor<3>) {
        let compressed = self.kv_a_proj_with_mqa.forward(x);
        let latent = compressed.clone().slice_dim(1, 0..self.latent);
        let shared = compressed.slice_dim(1, self.latent..self.latent + self.rope);
        let shared = shared.reshape([tokens.batch, tokens.sequence, 1, self.rope]);
        let shared = tokens.rotation.apply(shared, 0).reshape([tokens.batch, tokens.sequence, self.rope]);
        (self.kv_a_layernorm.forward(latent), shared)
    }

    /// The two halves of `kv_b_proj` as the decoding products want them, made once for a cache.
    fn absorbed(&self, cache: &mut LayerCache) -> Absorbed {
        cache
            .absorbed
            .get_or_insert_with(|| {
                let weight = self.kv_b_proj.effective_weight();
                let weight = weight.reshape([self.latent, self.heads, self.nope + self.value]).swap_dims(0, 1);
                let key = weight.clone().slice_dim(2, 0..self.nope).swap_dims(1, 2);
                let value = weight.slice_dim(2, self.nope..self.nope + self.value);
                // Rows that lie apart cannot be seen as one matrix: this copies them, once for all tokens.
                let copied = |tensor: Tensor<3>| {
                    let [heads, rows, columns] = tensor.dims();
                    tensor.reshape([heads * rows, columns]).reshape([heads, rows, columns])
                };
                Absorbed { key: copied(key), value: copied(value) }
            })
            .clone()
    }
}

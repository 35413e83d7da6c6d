//! Grouped-query attention (arXiv 2305.13245), as Llama and Qwen2 have it.

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::logit_stats::{LogitStats, measure};
use super::{NewTokens, Tokens};
use crate::cache::LayerCache;
use crate::config::{GqaShape, ModelConfig};
use crate::init::Init;
use crate::kernels::{CachedAttentionSpec, cached_attention, grouped_attention};
use crate::projection::Projection;

/// Several query heads share each key and value head.
#[derive(Module, Debug)]
pub struct GroupedQueryAttention {
    /// `[hidden, heads * width]`.
    pub q_proj: Projection,
    /// `[hidden, key heads * width]`.
    pub k_proj: Projection,
    /// `[hidden, key heads * width]`.
    pub v_proj: Projection,
    /// `[heads * width, hidden]`.
    pub o_proj: Projection,
    heads: usize,
    key_heads: usize,
    width: usize,
    scale: f64,
}

impl GroupedQueryAttention {
    pub(super) fn new(config: &ModelConfig, gqa: &GqaShape, init: Init, device: &Device) -> Self {
        let hidden = config.hidden_size;
        let (queries, keys) = (config.num_attention_heads * gqa.head_dim, gqa.num_key_value_heads * gqa.head_dim);
        Self {
            q_proj: init.projection(hidden, queries, gqa.qkv_bias, device),
            k_proj: init.projection(hidden, keys, gqa.qkv_bias, device),
            v_proj: init.projection(hidden, keys, gqa.qkv_bias, device),
            o_proj: init.projection(queries, hidden, gqa.o_bias, device),
            heads: config.num_attention_heads,
            key_heads: gqa.num_key_value_heads,
            width: gqa.head_dim,
            scale: config.softmax_scale(),
        }
    }

    /// Attends over whole sequences; `kept` takes keys and values for the cache, where it is asked for.
    pub(super) fn forward(
        &self,
        x: Tensor<2>,
        tokens: &Tokens<'_>,
        kept: Option<&mut Option<Tensor<4>>>,
    ) -> (Tensor<2>, Option<LogitStats>) {
        let (batch, sequence) = (tokens.batch, tokens.sequence);
        let (query, key_value) = self.project(x, tokens);
        if let Some(kept) = kept {
            *kept = Some(key_value.clone());
        }
        let statistics = tokens.probe_logits.then(|| {
            let group = self.heads / self.key_heads;
            let key = key_value.clone().slice_dim(3, 0..self.width);
            let key = key.reshape([batch, sequence, self.key_heads, 1, self.width]);
            let key = key.expand([batch, sequence, self.key_heads, group, self.width]);
            measure(query.clone(), key.reshape([batch, sequence, self.heads, self.width]), self.scale, tokens)
        });
        let output = grouped_attention(query, key_value, tokens.spec(self.scale));
        (self.o_proj.forward(output.reshape([batch * sequence, self.heads * self.width])), statistics)
    }

    pub(super) fn decode(&self, x: Tensor<2>, new: &NewTokens<'_>, cache: &mut LayerCache) -> Tensor<2> {
        let (count, width) = (new.tokens.sequence, self.width);
        let row = [count, self.key_heads, 2 * width];
        if new.are_prompts() {
            let mut kept = None;
            let (output, _) = self.forward(x, &new.tokens, Some(&mut kept));
            let kept = kept.expect("the forward pass fills what it is handed");
            cache.write(kept.reshape(row), &new.runs);
            return output;
        }
        let (query, key_value) = self.project(x, &new.tokens);
        cache.write(key_value.reshape(row), &new.runs);
        let scale = self.scale as f32;
        let spec = CachedAttentionSpec { scale, keys: 0..width, values: width..2 * width, spans: new.runs.clone() };
        let output = cached_attention(query.reshape([count, self.heads, width]), cache.past(), spec);
        self.o_proj.forward(output.reshape([count, self.heads * width]))
    }

    /// Queries `[batch, sequence, heads, width]` and keys with values `[batch, sequence, key heads, 2 width]`.
    fn project(&self, x: Tensor<2>, tokens: &Tokens<'_>) -> (Tensor<4>, Tensor<4>) {
        let shape = |heads| [tokens.batch, tokens.sequence, heads, self.width];
        let query = self.q_proj.forward(x.clone()).reshape(shape(self.heads));
        let key = self.k_proj.forward(x.clone()).reshape(shape(self.key_heads));
        let value = self.v_proj.forward(x).reshape(shape(self.key_heads));
        let key = tokens.rotation.apply(key, 0);
        (tokens.rotation.apply(query, 0), Tensor::cat(vec![key, value], 3))
    }
}

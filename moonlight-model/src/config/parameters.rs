//! Every parameter of a model with its shape, counted without allocating one.

use super::{AttentionShape, GqaShape, MlaShape, ModelConfig, MoeShape, TopkMethod};

/// One tensor of the model, under the path that Burn's module visitors see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterShape {
    /// The path, e.g. `layers.3.mlp.experts.gate_proj`.
    pub path: String,
    /// The shape in Burn's layout: a projection is `[in, out]`, a stack of experts `[experts, in, out]`.
    pub shape: Vec<usize>,
    /// What the tensor is for.
    pub kind: ParameterKind,
}

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterKind {
    /// The token embedding, `[vocab, hidden]`.
    Embedding,
    /// The output head, `[hidden, vocab]`.
    Head,
    /// A projection, `[in, out]`.
    Matrix,
    /// A stack of routed experts' projections, `[experts, in, out]`.
    Experts,
    /// The router's matrix, `[hidden, experts]`.
    Router,
    /// The gain of a norm.
    Norm,
    /// The bias of a projection.
    Bias,
    /// The router's correction bias: a buffer that no gradient reaches.
    CorrectionBias,
}

/// How many parameters a model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCount {
    /// All of them, the correction bias included.
    pub total: u64,
    /// Those that one token's forward pass uses: of the routed experts only the chosen ones.
    pub activated: u64,
    /// The embedding and the head, which the report's sizes leave out.
    pub embeddings: u64,
}

impl ParameterShape {
    /// Number of values.
    pub fn count(&self) -> u64 {
        self.shape.iter().map(|&dim| dim as u64).product()
    }
}

impl ModelConfig {
    /// All tensors of the model in the order in which the module holds them.
    pub fn parameter_shapes(&self) -> Vec<ParameterShape> {
        let mut list = List::default();
        let hidden = self.hidden_size;
        list.push("embed_tokens.weight", [self.vocab_size, hidden], ParameterKind::Embedding);
        for layer in 0..self.num_hidden_layers {
            list.prefix = format!("layers.{layer}.");
            list.push("input_layernorm.weight", [hidden], ParameterKind::Norm);
            match &self.attention {
                AttentionShape::Mla(mla) => self.push_mla(&mut list, mla),
                AttentionShape::Gqa(gqa) => self.push_gqa(&mut list, gqa),
            }
            list.push("post_attention_layernorm.weight", [hidden], ParameterKind::Norm);
            match self.moe_of_layer(layer) {
                Some(moe) => self.push_moe(&mut list, moe),
                None => list.push_mlp("mlp", hidden, self.intermediate_size),
            }
        }
        list.prefix.clear();
        list.push("norm.weight", [hidden], ParameterKind::Norm);
        if !self.tie_word_embeddings {
            list.push("lm_head.weight", [hidden, self.vocab_size], ParameterKind::Head);
        }
        list.shapes
    }

    /// Counts the parameters from their shapes; what is more than 64 bits count is the largest number.
    pub fn parameter_count(&self) -> ParameterCount {
        let mut count = ParameterCount { total: 0, activated: 0, embeddings: 0 };
        for parameter in self.parameter_shapes() {
            let values = parameter.count();
            count.total = count.total.saturating_add(values);
            let activated = match (parameter.kind, &self.moe) {
                (ParameterKind::Experts, Some(moe)) => {
                    values / moe.n_routed_experts as u64 * moe.num_experts_per_tok as u64
                }
                _ => values,
            };
            count.activated = count.activated.saturating_add(activated);
            if matches!(parameter.kind, ParameterKind::Embedding | ParameterKind::Head) {
                count.embeddings = count.embeddings.saturating_add(values);
            }
        }
        count
    }

    fn push_mla(&self, list: &mut List, mla: &MlaShape) {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        let bias = mla.attention_bias;
        let queries = heads * self.qk_head_dim();
        match mla.q_lora_rank {
            None => list.push_linear("self_attn.q_proj", hidden, queries, false),
            Some(rank) => {
                list.push_linear("self_attn.q_a_proj", hidden, rank, bias);
                list.push("self_attn.q_a_layernorm.weight", [rank], ParameterKind::Norm);
                list.push_linear("self_attn.q_b_proj", rank, queries, false);
            }
        }
        let latent = mla.kv_lora_rank;
        list.push_linear("self_attn.kv_a_proj_with_mqa", hidden, latent + mla.qk_rope_head_dim, bias);
        list.push("self_attn.kv_a_layernorm.weight", [latent], ParameterKind::Norm);
        list.push_linear("self_attn.kv_b_proj", latent, heads * (mla.qk_nope_head_dim + mla.v_head_dim), false);
        list.push_linear("self_attn.o_proj", heads * mla.v_head_dim, hidden, bias);
    }

    fn push_gqa(&self, list: &mut List, gqa: &GqaShape) {
        let queries = self.num_attention_heads * gqa.head_dim;
        let keys = gqa.num_key_value_heads * gqa.head_dim;
        list.push_linear("self_attn.q_proj", self.hidden_size, queries, gqa.qkv_bias);
        list.push_linear("self_attn.k_proj", self.hidden_size, keys, gqa.qkv_bias);
        list.push_linear("self_attn.v_proj", self.hidden_size, keys, gqa.qkv_bias);
        list.push_linear("self_attn.o_proj", queries, self.hidden_size, gqa.o_bias);
    }

    fn push_moe(&self, list: &mut List, moe: &MoeShape) {
        let (hidden, experts, width) = (self.hidden_size, moe.n_routed_experts, moe.moe_intermediate_size);
        list.push("mlp.router.weight", [hidden, experts], ParameterKind::Router);
        if moe.topk_method == TopkMethod::NoauxTc {
            list.push("mlp.router.e_score_correction_bias", [experts], ParameterKind::CorrectionBias);
        }
        list.push("mlp.experts.gate_proj", [experts, hidden, width], ParameterKind::Experts);
        list.push("mlp.experts.up_proj", [experts, hidden, width], ParameterKind::Experts);
        list.push("mlp.experts.down_proj", [experts, width, hidden], ParameterKind::Experts);
        if moe.n_shared_experts > 0 {
            list.push_mlp("mlp.shared_experts", hidden, width * moe.n_shared_experts);
        }
    }
}

#[derive(Default)]
struct List {
    prefix: String,
    shapes: Vec<ParameterShape>,
}

impl List {
    fn push<const N: usize>(&mut self, name: &str, shape: [usize; N], kind: ParameterKind) {
        let path = format!("{}{name}", self.prefix);
        self.shapes.push(ParameterShape { path, shape: shape.to_vec(), kind });
    }

    fn push_linear(&mut self, name: &str, input: usize, output: usize, bias: bool) {
        self.push(&format!("{name}.weight"), [input, output], ParameterKind::Matrix);
        if bias {
            self.push(&format!("{name}.bias"), [output], ParameterKind::Bias);
        }
    }

    fn push_mlp(&mut self, name: &str, hidden: usize, width: usize) {
        self.push_linear(&format!("{name}.gate_proj"), hidden, width, false);
        self.push_linear(&format!("{name}.up_proj"), hidden, width, false);
        self.push_linear(&format!("{name}.down_proj"), width, hidden, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The figures of the published checkpoint and of the report's table of sizes.
    #[test]
    fn moonlight_has_the_published_number_of_parameters() {
        let count = ModelConfig::preset("moonlight-16b-a3b").unwrap().parameter_count();
        assert_eq!(count.total, 15_960_110_208);
        assert_eq!(count.embeddings, 2 * 335_544_320);
        // "15.29B total, 2.24B activated, excluding embeddings".
        assert_eq!(count.total - count.embeddings, 15_289_021_568);
        assert_eq!((count.activated - count.embeddings) / 10_000_000, 224);
    }

    #[test]
    fn paths_are_unique() {
        for preset in super::super::PRESETS {
            let shapes = ModelConfig::preset(preset).unwrap().parameter_shapes();
            let mut paths: Vec<_> = shapes.iter().map(|shape| &shape.path).collect();
            paths.sort();
            paths.dedup();
            assert_eq!(paths.len(), shapes.len(), "{preset}");
        }
    }
}

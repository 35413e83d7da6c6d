//! Statistics of a forward pass.

use burn::tensor::Tensor;

/// What to measure beyond expert loads, which cost nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Probe {
    /// The largest attention logit of each head and the share of logits above 100. Computes the logits once more.
    pub attention_logits: bool,
}

/// One entry for each decoder layer.
#[derive(Debug, Clone, Default)]
pub struct ForwardStats {
    /// In the order of the layers.
    pub layers: Vec<LayerStats>,
}

/// The statistics of one layer.
#[derive(Debug, Clone, Default)]
pub struct LayerStats {
    /// Index of the layer.
    pub layer: usize,
    /// Number of tokens routed to each expert, `[experts]`; `None` for a dense layer.
    pub expert_load: Option<Vec<u64>>,
    /// The largest scaled attention logit of each head, f32 `[heads]`; `None` unless probed.
    pub max_attention_logit: Option<Tensor<1>>,
    /// The share of visible attention logits above 100, f32 `[1]`; `None` unless probed.
    pub share_above_100: Option<Tensor<1>>,
}

impl ForwardStats {
    /// The expert loads of all layers, for [`CausalLm::update_router_bias`](crate::CausalLm::update_router_bias).
    pub fn expert_loads(&self) -> Vec<Option<Vec<u64>>> {
        self.layers.iter().map(|layer| layer.expert_load.clone()).collect()
    }
}

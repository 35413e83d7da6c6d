//! [`ForwardStats`]: expert loads and attention logits of a forward pass, and [`Probe`], which asks for the latter.

use burn::tensor::{Int, Tensor, Transaction};

/// Which statistics to compute in addition to expert loads, which are a by-product of routing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Probe {
    /// The largest attention logit of each head and the share of logits above 100. Computes the logits a second time: the
    /// attention kernels never hold them.
    pub attention_logits: bool,
}

/// The statistics of all decoder layers.
#[derive(Debug, Clone, Default)]
pub struct ForwardStats {
    /// One entry for each layer, first layer first.
    pub layers: Vec<LayerStats>,
}

/// The statistics of one decoder layer.
#[derive(Debug, Clone, Default)]
pub struct LayerStats {
    /// Index of the layer, from 0.
    pub layer: usize,
    /// Number of tokens routed to each expert, `[experts]`, without padding; `None` for a dense layer.
    pub expert_load: Option<Tensor<1, Int>>,
    /// The largest scaled attention logit of each head, f32 `[heads]`; `None` unless probed.
    pub max_attention_logit: Option<Tensor<1>>,
    /// The share of visible attention logits above 100, f32 `[1]`; `None` unless probed.
    pub share_above_100: Option<Tensor<1>>,
}

impl ForwardStats {
    /// The expert load of each layer, for [`CausalLm::update_router_bias`](crate::CausalLm::update_router_bias). Waits for the device
    /// once, for the loads of all layers.
    pub fn expert_loads(&self) -> Vec<Option<Vec<u64>>> {
        let loads = self.layers.iter().filter_map(|layer| layer.expert_load.clone());
        let mut loads = loads.fold(Transaction::default(), Transaction::register).execute().into_iter();
        let mut next =
            || loads.next().expect("one result for each load").iter::<i64>().map(i64::unsigned_abs).collect();
        self.layers.iter().map(|layer| layer.expert_load.as_ref().map(|_| next())).collect()
    }
}

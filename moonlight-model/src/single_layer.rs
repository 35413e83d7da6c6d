//! One decoder layer by itself, without the model around it.

use burn::tensor::{Device, Tensor};

use crate::attention::Tokens;
use crate::config::ModelConfig;
use crate::init::Init;
use crate::layer::DecoderLayer;
use crate::moe::Routing;
use crate::rope::RotaryEmbedding;

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

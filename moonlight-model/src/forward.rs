//! A forward pass in stages, for whoever wants to walk it back layer by layer.
//!
//! [`CausalLm::loss`] is these stages one after the other. A trainer that keeps no more than each layer's input between
//! them, and runs a layer again when its gradient is wanted, needs the memory of one layer's activations instead of all.

use std::sync::Arc;

use burn::tensor::{Int, Tensor};

use crate::attention::Tokens;
use crate::batch::{LmBatch, Segments};
use crate::forward_stats::Probe;
use crate::layer::LayerOutput;
use crate::model::CausalLm;
use crate::moe::Routing;
use crate::rope::Rotation;

/// What all layers of a forward pass know of its tokens.
#[derive(Debug, Clone)]
pub struct ForwardContext {
    batch: usize,
    sequence: usize,
    rotation: Rotation,
    starts: Option<Arc<Vec<u32>>>,
    padding: Option<Arc<Vec<bool>>>,
    balance_weight: f64,
    probe: Probe,
}

impl ForwardContext {
    /// The same pass on the device without gradients, for a model that is there.
    pub fn inner(self) -> Self {
        Self { rotation: self.rotation.inner(), ..self }
    }

    pub(crate) fn tokens(&self) -> Tokens<'_> {
        Tokens {
            batch: self.batch,
            sequence: self.sequence,
            rotation: &self.rotation,
            starts: self.starts.clone(),
            probe_logits: self.probe.attention_logits,
        }
    }

    pub(crate) fn routing(&self) -> Routing<'_> {
        Routing {
            batch: self.batch,
            sequence: self.sequence,
            padding: self.padding.as_ref().map(|padding| padding.as_slice()),
            balance_weight: self.balance_weight,
        }
    }
}

impl CausalLm {
    /// The pass of a batch; `balance_weight` is that of the experts' balance loss, 0 for none.
    pub fn forward_context(&self, batch: &LmBatch, balance_weight: f64, probe: Probe) -> ForwardContext {
        self.context_of(&batch.tokens, batch.segments.as_ref(), balance_weight, probe)
    }

    /// Embeds `[batch, sequence]` tokens: `[batch * sequence, hidden]`, the input of layer 0.
    pub fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<2> {
        let [batch, sequence] = tokens.dims();
        self.embed_tokens.forward(tokens).reshape([batch * sequence, self.config().hidden_size])
    }

    /// Runs one layer over `[batch * sequence, hidden]`.
    ///
    /// # Panics
    ///
    /// When the model has no layer `index`.
    pub fn run_layer(&self, index: usize, hidden: Tensor<2>, context: &ForwardContext) -> LayerOutput {
        let mut output = self.layers[index].forward(hidden, &context.tokens(), &context.routing());
        output.stats.layer = index;
        output
    }

    pub(crate) fn context_of(
        &self,
        tokens: &Tensor<2, Int>,
        segments: Option<&Segments>,
        balance_weight: f64,
        probe: Probe,
    ) -> ForwardContext {
        let [batch, sequence] = tokens.dims();
        if let Some(segments) = segments {
            assert_eq!((segments.batch, segments.sequence), (batch, sequence), "segments describe another batch");
        }
        let device = tokens.device();
        let rotation = match segments {
            Some(segments) => self.rotary().at(&segments.positions, &device),
            None => {
                let positions: Vec<u32> = (0..batch).flat_map(|_| 0..sequence as u32).collect();
                self.rotary().at(&positions, &device)
            }
        };
        ForwardContext {
            batch,
            sequence,
            rotation,
            starts: segments.map(|segments| segments.starts.clone()),
            padding: segments.map(|segments| segments.padding.clone()),
            balance_weight,
            probe,
        }
    }
}

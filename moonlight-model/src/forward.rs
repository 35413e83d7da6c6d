//! What all layers of a forward pass know of its tokens.

use std::sync::Arc;

use burn::tensor::Device;

use crate::batch::Segments;
use crate::forward_stats::Probe;
use crate::kernels::{AttentionSpec, CacheSpan};
use crate::rope::{RotaryEmbedding, Rotation};

/// The tokens of a forward pass as layers see them: how many, at which positions, of which documents, and what is to be
/// measured on the way.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use moonlight_model::rope::RotaryEmbedding;
/// use moonlight_model::{ForwardContext, MultiHeadLatentAttentionConfig, RopeConfig};
///
/// let device = Device::default();
/// // Hidden states of 64, 4 heads; a latent of 16; queries and keys of 16 + 8, values of 16.
/// let attention = MultiHeadLatentAttentionConfig::new(64, 4, 16, 16, 8, 16).init(&device);
/// let rotary = RotaryEmbedding::new(&RopeConfig::new(), 8);
/// let x = Tensor::<3>::random([2, 10, 64], Distribution::Default, &device);
/// let context = ForwardContext::new(&rotary, [2, 10], &device);
/// assert_eq!(attention.forward(x, &context).dims(), [2, 10, 64]);
/// ```
#[derive(Debug, Clone)]
pub struct ForwardContext {
    batch: usize,
    sequence: usize,
    rotation: Option<Rotation>,
    starts: Option<Arc<Vec<u32>>>,
    padding: Option<Arc<Vec<bool>>>,
    balance_weight: f64,
    probe: Probe,
}

impl ForwardContext {
    /// Whole sequences, each one document at positions `0..sequence`.
    pub fn new(rotary: &RotaryEmbedding, [batch, sequence]: [usize; 2], device: &Device) -> Self {
        let positions: Vec<u32> = (0..batch).flat_map(|_| 0..sequence as u32).collect();
        Self { rotation: Some(rotary.at(&positions, device)), ..Self::without_positions([batch, sequence]) }
    }

    /// Sequences that are packed from documents: attention stays inside of each, and positions restart with it.
    pub fn packed(rotary: &RotaryEmbedding, segments: &Segments, device: &Device) -> Self {
        Self {
            rotation: Some(rotary.at(&segments.positions, device)),
            starts: Some(segments.starts.clone()),
            padding: Some(segments.padding.clone()),
            ..Self::without_positions([segments.batch, segments.sequence])
        }
    }

    /// For layers that have no attention.
    pub fn without_positions([batch, sequence]: [usize; 2]) -> Self {
        Self {
            batch,
            sequence,
            rotation: None,
            starts: None,
            padding: None,
            balance_weight: 0.0,
            probe: Probe::default(),
        }
    }

    /// Sets the weight of the experts' sequence-wise balance loss; 0, the default, for none.
    #[must_use]
    pub fn with_balance_weight(mut self, weight: f64) -> Self {
        self.balance_weight = weight;
        self
    }

    /// Sets what is measured beyond expert loads.
    #[must_use]
    pub fn with_probe(mut self, probe: Probe) -> Self {
        self.probe = probe;
        self
    }

    /// The same on the device without gradients, for `model.valid()`.
    pub fn inner(self) -> Self {
        Self { rotation: self.rotation.map(Rotation::inner), ..self }
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens of each sequence.
    pub fn sequence(&self) -> usize {
        self.sequence
    }

    /// New tokens of several sequences, one after the other, for a cache; their context is that of one packed sequence.
    pub(crate) fn decoding(rotation: Rotation, sequence: usize, starts: Option<Vec<u32>>) -> Self {
        let rotation = Some(rotation);
        Self { rotation, starts: starts.map(Arc::new), ..Self::without_positions([1, sequence]) }
    }

    /// # Panics
    ///
    /// For a context without positions.
    pub(crate) fn rotation(&self) -> &Rotation {
        self.rotation.as_ref().expect("attention needs a context with positions: `ForwardContext::new`")
    }

    /// For each token the first that it sees in its sequence: the start of its document or, with a window, the first of that
    /// many tokens that end with it; `None` where every token sees back to the start of its sequence.
    pub(crate) fn first_keys(&self, window: Option<usize>) -> Option<Arc<Vec<u32>>> {
        let Some(window) = window.filter(|window| *window < self.sequence) else { return self.starts.clone() };
        let first = |token: usize| {
            let document = self.starts.as_ref().map_or(0, |starts| starts[token]);
            document.max((token % self.sequence + 1).saturating_sub(window) as u32)
        };
        Some(Arc::new((0..self.batch * self.sequence).map(first).collect()))
    }

    /// Which tokens are padding and count for nothing.
    pub(crate) fn padding(&self) -> Option<&[bool]> {
        self.padding.as_ref().map(|padding| padding.as_slice())
    }

    pub(crate) fn balance_weight(&self) -> f64 {
        self.balance_weight
    }

    pub(crate) fn probes_logits(&self) -> bool {
        self.probe.attention_logits
    }

    pub(crate) fn attention_spec(&self, scale: f64, window: Option<usize>) -> AttentionSpec {
        AttentionSpec { scale: scale as f32, starts: self.first_keys(window) }
    }

    /// # Panics
    ///
    /// When `[batch, sequence]` are not those of the context.
    pub(crate) fn check(&self, [batch, sequence]: [usize; 2]) {
        let expected = [self.batch, self.sequence];
        assert_eq!([batch, sequence], expected, "the context is of another batch or sequence length");
    }
}

/// New tokens for a cache.
pub(crate) struct DecodeContext {
    /// The tokens as one packed sequence.
    pub(crate) tokens: ForwardContext,
    /// The sequences that they belong to.
    pub(crate) spans: Arc<Vec<CacheSpan>>,
}

impl DecodeContext {
    /// Whether they begin their sequences, and are enough for whole attention to be cheaper than attention to a cache.
    pub(crate) fn is_prefill(&self) -> bool {
        self.spans.iter().all(|span| span.start == 0) && self.tokens.sequence > self.spans.len()
    }
}

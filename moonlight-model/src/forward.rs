//! [`ForwardContext`]: what the layers of a forward pass need to know about its tokens.

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::batch::Segments;
use crate::forward_stats::Probe;
use crate::kernels::{AttentionSpec, CacheSpan};
use crate::rope::{RotaryEmbedding, Rotation};

/// What the layers of a forward pass need to know about its tokens: batch size, positions, document boundaries, padding, and
/// which losses and statistics to compute. One context serves all layers, so cos and sin are computed once.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use moonlight_model::rope::RotaryEmbedding;
/// use moonlight_model::{ForwardContext, MultiHeadLatentAttentionConfig, RopeConfig};
///
/// let device = Device::default();
/// // Hidden size 64, 4 heads, KV latent of 16, query and key heads of 16 + 8 (without and with position), value heads of 16.
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
    /// `[batch * sequence]`: index in its sequence of the first token of each token's document.
    starts: Option<Arc<Vec<u32>>>,
    padding: Option<Arc<Vec<bool>>>,
    /// `[batch * sequence]`: 0 for padding, 1 for other tokens; `None` without padding.
    counted: Option<Tensor<1, Int>>,
    balance_weight: f64,
    probe: Probe,
}

impl ForwardContext {
    /// Whole sequences, each one document at positions `0..sequence`.
    pub fn new(rotary: &RotaryEmbedding, [batch, sequence]: [usize; 2], device: &Device) -> Self {
        let positions: Vec<u32> = (0..batch).flat_map(|_| 0..sequence as u32).collect();
        Self { rotation: Some(rotary.at(&positions, device)), ..Self::without_positions([batch, sequence]) }
    }

    /// Packed sequences: attention stays within a document, and positions restart with each.
    pub fn packed(rotary: &RotaryEmbedding, segments: &Segments, device: &Device) -> Self {
        Self {
            rotation: Some(rotary.at(&segments.positions, device)),
            starts: Some(segments.starts.clone()),
            counted: counted(&segments.padding, device),
            padding: Some(segments.padding.clone()),
            ..Self::without_positions([segments.batch, segments.sequence])
        }
    }

    /// A context for layers without attention, such as [`Moe`](crate::Moe).
    pub fn without_positions([batch, sequence]: [usize; 2]) -> Self {
        Self {
            batch,
            sequence,
            rotation: None,
            starts: None,
            padding: None,
            counted: None,
            balance_weight: 0.0,
            probe: Probe::default(),
        }
    }

    /// Sets the weight of the experts' sequence-wise balance loss; 0, the default, turns it off.
    #[must_use]
    pub fn with_balance_weight(mut self, weight: f64) -> Self {
        self.balance_weight = weight;
        self
    }

    /// Sets which statistics are computed in addition to expert loads; none by default.
    #[must_use]
    pub fn with_probe(mut self, probe: Probe) -> Self {
        self.probe = probe;
        self
    }

    /// The context on the inner device, without gradients, for the model that `valid()` returns.
    pub fn inner(self) -> Self {
        Self { rotation: self.rotation.map(Rotation::inner), counted: self.counted.map(Tensor::inner), ..self }
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Number of tokens in each sequence, padding included.
    pub fn sequence(&self) -> usize {
        self.sequence
    }

    /// New tokens of several sequences, to be added to a cache, as one packed sequence `[1, sequence]`.
    pub(crate) fn decoding(rotation: Rotation, sequence: usize, starts: Option<Vec<u32>>) -> Self {
        let rotation = Some(rotation);
        Self { rotation, starts: starts.map(Arc::new), ..Self::without_positions([1, sequence]) }
    }

    /// # Panics
    ///
    /// If the context has no positions.
    pub(crate) fn rotation(&self) -> &Rotation {
        self.rotation.as_ref().expect("attention needs a context with positions: `ForwardContext::new`")
    }

    /// The first key that each token sees, `[batch * sequence]`, as an index in its sequence: the start of its document or, with
    /// a sliding window of `w` tokens, the token `w - 1` before it, whichever is later. `None` if every token sees its
    /// sequence up to itself.
    pub(crate) fn first_keys(&self, window: Option<usize>) -> Option<Arc<Vec<u32>>> {
        // A window at least as long as the sequence hides nothing, and kernels are faster with `None`.
        let Some(window) = window.filter(|window| *window < self.sequence) else { return self.starts.clone() };
        let first = |token: usize| {
            let document = self.starts.as_ref().map_or(0, |starts| starts[token]);
            document.max((token % self.sequence + 1).saturating_sub(window) as u32)
        };
        Some(Arc::new((0..self.batch * self.sequence).map(first).collect()))
    }

    /// Which tokens are padding, `[batch * sequence]`; they do not count in expert loads and balance losses.
    pub(crate) fn padding(&self) -> Option<&[bool]> {
        self.padding.as_ref().map(|padding| padding.as_slice())
    }

    /// [`padding`](Self::padding) on the device: 0 for padding, 1 for other tokens. `None` without padding.
    pub(crate) fn counted(&self) -> Option<Tensor<1, Int>> {
        self.counted.clone()
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
    /// If `[batch, sequence]` is not the context's.
    pub(crate) fn check(&self, [batch, sequence]: [usize; 2]) {
        let expected = [self.batch, self.sequence];
        assert_eq!([batch, sequence], expected, "the context is of another batch size or sequence length");
    }
}

/// The context of new tokens that are added to a cache.
pub(crate) struct DecodeContext {
    /// All new tokens as one packed sequence.
    pub(crate) tokens: ForwardContext,
    /// Which tokens belong to which sequence of the cache.
    pub(crate) spans: Arc<Vec<CacheSpan>>,
}

impl DecodeContext {
    /// Whether the tokens are prompts of empty sequences. For those, attention over expanded keys and values is cheaper than cached
    /// attention, unless every prompt is a single token.
    pub(crate) fn is_prefill(&self) -> bool {
        self.spans.iter().all(|span| span.start == 0) && self.tokens.sequence > self.spans.len()
    }
}

fn counted(padding: &[bool], device: &Device) -> Option<Tensor<1, Int>> {
    let counted: Vec<i32> = padding.iter().map(|&padding| i32::from(!padding)).collect();
    let has_padding = padding.contains(&true);
    has_padding.then(|| Tensor::from_data(TensorData::new(counted, [padding.len()]), device))
}

//! [`CausalLm`]: embedding, decoder layers, final norm and head, with the loss of a training step.

use burn::module::{Module, Param};
use burn::nn::{Embedding, Linear};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::batch::{LmBatch, Segments};
use crate::config::ModelConfig;
use crate::forward::ForwardContext;
use crate::forward_stats::{ForwardStats, Probe};
use crate::init::Init;
use crate::kernels::{cross_entropy, project};
use crate::layer::{DecoderLayer, FeedForward, LayerOutput};
use crate::moe::bias_step;
use crate::norm::RmsNorm;
use crate::quantization::QuantizedWeight;
use crate::rope::RotaryEmbedding;

/// A decoder-only language model of the Moonlight family.
///
/// Should be created with [`ModelConfig::init`]. Parameters are drawn when they are first read, so a model whose weights are
/// about to be loaded allocates nothing.
///
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use moonlight_model::ModelConfig;
///
/// let mut config = ModelConfig::preset("bench-small")?;
/// config.num_hidden_layers = 2;
/// let device = Device::default();
/// let tokens = Tensor::<2, Int>::from_data([[1, 2, 3]], &device);
/// assert_eq!(config.init(&device).forward(tokens).dims(), [1, 3, config.vocab_size]);
/// # Ok::<(), moonlight_model::ConfigError>(())
/// ```
#[derive(Module, Debug)]
pub struct CausalLm {
    /// `[vocab, hidden]`.
    pub embed_tokens: Embedding,
    /// `num_hidden_layers` of them.
    pub layers: Vec<DecoderLayer>,
    /// The final norm, before the head.
    pub norm: RmsNorm,
    /// `[hidden, vocab]`; `None` if the head is the transposed embedding (`tie_word_embeddings`).
    pub lm_head: Option<Linear>,
    /// The head in 8 bits, used instead of `lm_head` (whose weight is then a `[1, 1]` zero) or of the transposed embedding.
    pub head_quantized: Option<QuantizedWeight>,
    #[module(skip)]
    config: ModelConfig,
    #[module(skip)]
    rotary: RotaryEmbedding,
}

/// The losses and statistics of a forward pass, for a training or validation step.
#[derive(Debug)]
pub struct LossOutput {
    /// Sum over the batch of `-mask log p(target)`, f32 `[1]`, differentiable.
    pub loss_sum: Tensor<1>,
    /// The weighted sequence-wise balance loss, averaged over sequences and summed over layers, f32 `[1]`; `None` if its
    /// weight is 0 or the model is dense.
    pub balance_loss: Option<Tensor<1>>,
    /// Expert loads, and what the [`Probe`] asked for.
    pub stats: ForwardStats,
}

/// The output of the decoder layers.
#[derive(Debug)]
pub struct HiddenOutput {
    /// `[tokens, hidden]`, before the final norm.
    pub hidden: Tensor<2>,
    /// The weighted sequence-wise balance loss of each layer that has one, first layer first, f32 `[1]` each.
    pub balance_losses: Vec<Tensor<1>>,
    /// Expert loads, and what the [`Probe`] asked for.
    pub stats: ForwardStats,
}

impl HiddenOutput {
    /// The sum of the layers' balance losses; `None` if no layer has one.
    pub fn balance_loss(&self) -> Option<Tensor<1>> {
        self.balance_losses.iter().cloned().reduce(|sum, loss| sum + loss)
    }
}

impl ModelConfig {
    /// Initializes a model on `device`: matrices and embeddings are normal with standard deviation `initializer_range`, norms
    /// are 1, biases 0. A parameter is drawn when it is first read.
    ///
    /// # Panics
    ///
    /// If [`validate`](ModelConfig::validate) would refuse the config.
    pub fn init(&self, device: &Device) -> CausalLm {
        self.build(Init::new(device))
    }

    /// The rotary embedding of the model's attention, to make the [`ForwardContext`] of a single layer.
    pub fn rotary(&self) -> RotaryEmbedding {
        RotaryEmbedding::new(&self.rope, self.rope_dim())
    }

    pub(crate) fn build(&self, init: Init<'_>) -> CausalLm {
        let (vocab, hidden, deviation) = (self.vocab_size, self.hidden_size, self.initializer_range);
        CausalLm {
            embed_tokens: init.embedding([vocab, hidden], deviation),
            layers: (0..self.num_hidden_layers).map(|layer| self.layer(layer).build(init)).collect(),
            norm: RmsNorm::build(hidden, self.rms_norm_eps, init),
            lm_head: (!self.tie_word_embeddings).then(|| init.head([hidden, vocab], deviation)),
            head_quantized: None,
            rotary: self.rotary(),
            config: self.clone(),
        }
    }
}

impl CausalLm {
    /// The config that the model was made from.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The dtype of the weights, of activations and of a [`KvCache`](crate::KvCache).
    pub fn dtype(&self) -> DType {
        self.embed_tokens.weight.val().dtype()
    }

    /// The logits of every token, in the dtype of the weights. Each sequence is one document at positions `0..sequence`.
    ///
    /// # Shapes
    ///
    /// - tokens: `[batch, sequence]`
    /// - output: `[batch, sequence, vocab]`
    pub fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        self.logits(tokens, None)
    }

    /// [`forward`](CausalLm::forward) over packed sequences: attention stays within a document and positions restart with each.
    ///
    /// # Shapes
    ///
    /// - tokens: `[batch, sequence]`
    /// - output: `[batch, sequence, vocab]`
    ///
    /// # Panics
    ///
    /// If `segments` has another batch size or sequence length than `tokens`.
    pub fn logits(&self, tokens: Tensor<2, Int>, segments: Option<&Segments>) -> Tensor<3> {
        let [batch, sequence] = tokens.dims();
        let context = self.context(&tokens, segments);
        let hidden = self.forward_hidden(tokens, &context).hidden;
        self.head(hidden).reshape([batch, sequence, self.config.vocab_size])
    }

    /// The language-modeling loss of a micro-batch, as a sum over its tokens: the caller divides by the number of tokens of the step,
    /// which may have more micro-batches.
    ///
    /// `sequence_balance_weight` is the weight of the experts' balance loss (DeepSeek-V3, equation 17); 0 turns it off.
    ///
    /// # Panics
    ///
    /// If the batch's segments have another batch size or sequence length than its tokens.
    pub fn loss(&self, batch: &LmBatch, sequence_balance_weight: f64, probe: Probe) -> LossOutput {
        let [rows, sequence] = batch.tokens.dims();
        let context = self.forward_context(batch, sequence_balance_weight, probe);
        let output = self.forward_hidden(batch.tokens.clone(), &context);
        let balance_loss = output.balance_loss();
        let losses = self.token_losses(output.hidden, batch.targets.clone().reshape([rows * sequence]));
        let mask = batch.loss_mask.clone().reshape([rows * sequence]);
        LossOutput { loss_sum: (losses * mask).sum(), balance_loss, stats: output.stats }
    }

    /// The [`ForwardContext`] of a batch; `balance_weight` is the weight of the experts' balance loss, 0 to turn it off.
    ///
    /// # Panics
    ///
    /// If the batch's segments have another batch size or sequence length than its tokens.
    pub fn forward_context(&self, batch: &LmBatch, balance_weight: f64, probe: Probe) -> ForwardContext {
        let context = self.context(&batch.tokens, batch.segments.as_ref());
        context.with_balance_weight(balance_weight).with_probe(probe)
    }

    /// Embeds the tokens and runs all layers. [`loss`](CausalLm::loss) is this followed by
    /// [`token_losses`](CausalLm::token_losses).
    ///
    /// # Shapes
    ///
    /// - tokens: `[batch, sequence]`
    /// - output: `[batch * sequence, hidden]`
    pub fn forward_hidden(&self, tokens: Tensor<2, Int>, context: &ForwardContext) -> HiddenOutput {
        self.forward_hidden_with(tokens, context, |_, _| {})
    }

    /// [`forward_hidden`](CausalLm::forward_hidden), which calls `visit` with the index and the input
    /// (`[batch * sequence, hidden]`) of each layer before it runs.
    ///
    /// For activation checkpointing: a caller can keep only these inputs, run each layer again by
    /// [`run_layer`](CausalLm::run_layer) in its backward pass, and so hold the activations of one layer instead of all.
    pub fn forward_hidden_with(
        &self,
        tokens: Tensor<2, Int>,
        context: &ForwardContext,
        mut visit: impl FnMut(usize, &Tensor<2>),
    ) -> HiddenOutput {
        let mut hidden = self.embed(tokens);
        let (mut balance_losses, mut stats) = (Vec::new(), ForwardStats::default());
        for index in 0..self.layers.len() {
            visit(index, &hidden);
            let output = self.run_layer(index, hidden, context);
            hidden = output.hidden;
            balance_losses.extend(output.balance_loss);
            stats.layers.push(output.stats);
        }
        HiddenOutput { hidden, balance_losses, stats }
    }

    /// The input of layer 0.
    ///
    /// # Shapes
    ///
    /// - tokens: `[batch, sequence]`
    /// - output: `[batch * sequence, hidden]`
    pub fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<2> {
        let [batch, sequence] = tokens.dims();
        self.embed_tokens.forward(tokens).reshape([batch * sequence, self.config.hidden_size])
    }

    /// Runs layer `index`.
    ///
    /// # Shapes
    ///
    /// - hidden, output: `[batch * sequence, hidden]`
    ///
    /// # Panics
    ///
    /// If the model has no layer `index`.
    pub fn run_layer(&self, index: usize, hidden: Tensor<2>, context: &ForwardContext) -> LayerOutput<2> {
        let mut output = self.layers[index].forward_rows(hidden, context);
        output.stats.layer = index;
        output
    }

    /// Final norm and head: the logits of the last layer's output, in the dtype of the weights.
    ///
    /// # Shapes
    ///
    /// - hidden: `[tokens, hidden]`
    /// - output: `[tokens, vocab]`
    pub fn head(&self, hidden: Tensor<2>) -> Tensor<2> {
        let hidden = self.norm.forward_rows(hidden);
        match (&self.head_quantized, &self.lm_head) {
            (Some(head), _) => head.product(hidden),
            (None, Some(head)) => project(hidden, head.weight.val()),
            // Tied: [vocab, hidden]^T. `project` would copy the transposed view to make it contiguous.
            (None, None) => hidden.matmul(self.embed_tokens.weight.val().transpose()),
        }
    }

    /// The cross-entropy `-log p(target)` of each token, computed in f32.
    ///
    /// # Shapes
    ///
    /// - hidden: `[tokens, hidden]`, the last layer's output
    /// - targets: `[tokens]`
    /// - output: f32 `[tokens]`
    pub fn token_losses(&self, hidden: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
        cross_entropy(self.head(hidden), targets)
    }

    /// Moves each router's correction bias against its load: `b += rate (sign(e) - mean(sign(e)))`, where `e` is the mean load
    /// minus that of the expert (auxiliary-loss-free balancing, arXiv 2408.15664; centered as in the Muon report, appendix C).
    ///
    /// `loads` has an entry for each layer, as [`ForwardStats::expert_loads`] returns them, summed over all micro-batches and ranks
    /// of the step. A layer with `None`, or whose router has no correction bias, does not change.
    pub fn update_router_bias(mut self, loads: &[Option<Vec<u64>>], rate: f64) -> Self {
        if rate == 0.0 {
            return self;
        }
        for (layer, load) in self.layers.iter_mut().zip(loads) {
            let (FeedForward::Moe(moe), Some(load)) = (&mut layer.mlp, load) else { continue };
            moe.router.e_score_correction_bias = moe.router.e_score_correction_bias.take().map(|bias| {
                let step = bias_step(load, rate);
                add_to_bias(bias, step)
            });
        }
        self
    }

    fn context(&self, tokens: &Tensor<2, Int>, segments: Option<&Segments>) -> ForwardContext {
        let (shape, device) = (tokens.dims(), tokens.device());
        match segments {
            Some(segments) => {
                let described = [segments.batch, segments.sequence];
                assert_eq!(described, shape, "the segments are of another batch size or sequence length");
                ForwardContext::packed(&self.rotary, segments, &device)
            }
            None => ForwardContext::new(&self.rotary, shape, &device),
        }
    }

    pub(crate) fn rotary(&self) -> &RotaryEmbedding {
        &self.rotary
    }
}

fn add_to_bias(bias: Param<Tensor<1>>, step: Vec<f32>) -> Param<Tensor<1>> {
    let experts = step.len();
    bias.map(|bias| {
        let step = Tensor::<1>::from_data(TensorData::new(step, [experts]), &bias.device());
        bias + step
    })
}

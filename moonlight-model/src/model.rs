//! The causal language model.

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
use crate::rope::RotaryEmbedding;

/// A decoder-only language model of the Moonlight family.
///
/// Should be created with [`ModelConfig::init`]; parameters are drawn when they are first used, so a model that is about
/// to be loaded costs nothing.
#[derive(Module, Debug)]
pub struct CausalLm {
    /// `[vocab, hidden]`.
    pub embed_tokens: Embedding,
    /// The decoder layers.
    pub layers: Vec<DecoderLayer>,
    /// Before the head.
    pub norm: RmsNorm,
    /// `[hidden, vocab]`; absent where the embedding is the head, transposed.
    pub lm_head: Option<Linear>,
    #[module(skip)]
    config: ModelConfig,
    #[module(skip)]
    rotary: RotaryEmbedding,
}

/// What a training or validation step gets from a forward pass.
#[derive(Debug)]
pub struct LossOutput {
    /// Sum over the batch of `-mask log p(target)`, f32 `[1]`, differentiable.
    pub loss_sum: Tensor<1>,
    /// The weighted sequence-wise balance loss, averaged over sequences and summed over layers, f32 `[1]`; `None` where
    /// its weight is 0 or the model is dense.
    pub balance_loss: Option<Tensor<1>>,
    /// Expert loads, and what the probe asked for.
    pub stats: ForwardStats,
}

/// The result of the decoder's layers.
#[derive(Debug)]
pub struct HiddenOutput {
    /// `[tokens, hidden]`, before the final norm.
    pub hidden: Tensor<2>,
    /// The weighted sequence-wise balance losses of the layers that have one, in their order, f32 `[1]` each.
    pub balance_losses: Vec<Tensor<1>>,
    /// Expert loads, and what the probe asked for.
    pub stats: ForwardStats,
}

impl HiddenOutput {
    /// The sum of the layers' balance losses; `None` where no layer has one.
    pub fn balance_loss(&self) -> Option<Tensor<1>> {
        self.balance_losses.iter().cloned().reduce(|sum, loss| sum + loss)
    }
}

impl ModelConfig {
    /// A model with fresh parameters on `device`: matrices and embeddings normal with `initializer_range`, norms 1, biases
    /// 0. They are drawn when they are first used.
    ///
    /// # Panics
    ///
    /// For numbers that [`validate`](ModelConfig::validate) refuses.
    pub fn init(&self, device: &Device) -> CausalLm {
        self.build(Init::new(device))
    }

    /// The rotary embedding of the model's attention, for a [`ForwardContext`] of a layer by itself.
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
            rotary: self.rotary(),
            config: self.clone(),
        }
    }
}

impl CausalLm {
    /// The shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The dtype of the weights.
    pub fn dtype(&self) -> DType {
        self.embed_tokens.weight.val().dtype()
    }

    /// The logits of every token, in the dtype of the weights.
    ///
    /// # Shapes
    ///
    /// `[batch, sequence]` to `[batch, sequence, vocab]`.
    pub fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        self.logits(tokens, None)
    }

    /// [`forward`](CausalLm::forward) over sequences that may be packed from documents.
    ///
    /// # Panics
    ///
    /// When `segments` describe another batch.
    pub fn logits(&self, tokens: Tensor<2, Int>, segments: Option<&Segments>) -> Tensor<3> {
        let [batch, sequence] = tokens.dims();
        let context = self.context(&tokens, segments);
        let hidden = self.forward_hidden(tokens, &context).hidden;
        self.head(hidden).reshape([batch, sequence, self.config.vocab_size])
    }

    /// The language-modelling loss of a batch.
    ///
    /// `sequence_balance_weight` is the weight of the experts' balance loss, 0 for none.
    pub fn loss(&self, batch: &LmBatch, sequence_balance_weight: f64, probe: Probe) -> LossOutput {
        let [rows, sequence] = batch.tokens.dims();
        let context = self.forward_context(batch, sequence_balance_weight, probe);
        let output = self.forward_hidden(batch.tokens.clone(), &context);
        let balance_loss = output.balance_loss();
        let losses = self.token_losses(output.hidden, batch.targets.clone().reshape([rows * sequence]));
        let mask = batch.loss_mask.clone().reshape([rows * sequence]);
        LossOutput { loss_sum: (losses * mask).sum(), balance_loss, stats: output.stats }
    }

    /// The context of a batch; `balance_weight` is that of the experts' balance loss, 0 for none.
    ///
    /// # Panics
    ///
    /// When the batch's segments describe another batch.
    pub fn forward_context(&self, batch: &LmBatch, balance_weight: f64, probe: Probe) -> ForwardContext {
        let context = self.context(&batch.tokens, batch.segments.as_ref());
        context.with_balance_weight(balance_weight).with_probe(probe)
    }

    /// Embedding and all layers. [`loss`](CausalLm::loss) is this and [`token_losses`](CausalLm::token_losses).
    ///
    /// # Shapes
    ///
    /// `[batch, sequence]` to `[batch * sequence, hidden]`.
    pub fn forward_hidden(&self, tokens: Tensor<2, Int>, context: &ForwardContext) -> HiddenOutput {
        self.forward_hidden_with(tokens, context, |_, _| {})
    }

    /// [`forward_hidden`](CausalLm::forward_hidden); `visit` sees the number and the input, `[batch * sequence, hidden]`, of
    /// each layer before it runs. Who keeps these inputs and nothing else can run a layer again, by
    /// [`run_layer`](CausalLm::run_layer), when its gradient is wanted: that takes the memory of one layer's activations
    /// instead of all.
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

    /// Embeds tokens.
    ///
    /// # Shapes
    ///
    /// `[batch, sequence]` to `[batch * sequence, hidden]`, the input of layer 0.
    pub fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<2> {
        let [batch, sequence] = tokens.dims();
        self.embed_tokens.forward(tokens).reshape([batch * sequence, self.config.hidden_size])
    }

    /// Runs one layer.
    ///
    /// # Shapes
    ///
    /// `[batch * sequence, hidden]` to the same.
    ///
    /// # Panics
    ///
    /// When the model has no layer `index`.
    pub fn run_layer(&self, index: usize, hidden: Tensor<2>, context: &ForwardContext) -> LayerOutput<2> {
        let mut output = self.layers[index].forward_rows(hidden, context);
        output.stats.layer = index;
        output
    }

    /// Final norm and head: the logits of the last layer's output, in the dtype of the weights.
    ///
    /// # Shapes
    ///
    /// `[tokens, hidden]` to `[tokens, vocab]`.
    pub fn head(&self, hidden: Tensor<2>) -> Tensor<2> {
        let hidden = self.norm.forward_rows(hidden);
        match &self.lm_head {
            Some(head) => project(hidden, head.weight.val()),
            None => hidden.matmul(self.embed_tokens.weight.val().transpose()),
        }
    }

    /// `-log p` of each token's target.
    ///
    /// # Shapes
    ///
    /// The last layer's `[tokens, hidden]` and `[tokens]` to f32 `[tokens]`.
    pub fn token_losses(&self, hidden: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
        cross_entropy(self.head(hidden), targets)
    }

    /// Moves each router's correction bias against its load: `b += rate (sign(e) - mean(sign(e)))`.
    ///
    /// `loads` has an entry for each layer, as [`ForwardStats::expert_loads`] gives them, summed over all
    /// micro-batches of the step; `None` leaves a layer alone, and so does a router without a bias.
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
                assert_eq!([segments.batch, segments.sequence], shape, "segments describe another batch");
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

//! The causal language model.

use burn::module::{Module, Param};
use burn::nn::{Embedding, Linear};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::batch::{LmBatch, Segments};
use crate::config::ModelConfig;
use crate::forward_stats::{ForwardStats, Probe};
use crate::init::Init;
use crate::kernels::{cross_entropy, project};
use crate::layer::{DecoderLayer, FeedForward};
use crate::moe::bias_step;
use crate::norm::RmsNorm;
use crate::rope::RotaryEmbedding;

/// A decoder-only language model of the Moonlight family.
///
/// Made by [`ModelConfig::init`]; parameters are drawn when they are first used, so a model that is about to be loaded
/// costs nothing.
#[derive(Module, Debug)]
pub struct CausalLm {
    /// `[vocab, hidden]`.
    pub embed_tokens: Embedding,
    /// The decoder layers.
    pub layers: Vec<DecoderLayer>,
    /// Before the head.
    pub norm: RmsNorm,
    /// `[hidden, vocab]`; absent where the embedding serves.
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
struct Hidden {
    /// `[tokens, hidden]`, before the final norm.
    hidden: Tensor<2>,
    balance_loss: Option<Tensor<1>>,
    stats: ForwardStats,
}

impl ModelConfig {
    /// A model with fresh parameters on `device`: matrices and embeddings normal with `initializer_range`, norms 1, biases
    /// 0.
    pub fn init(&self, device: &Device) -> CausalLm {
        let init = Init { standard_deviation: self.initializer_range };
        CausalLm {
            embed_tokens: init.embedding(self.vocab_size, self.hidden_size, device),
            layers: (0..self.num_hidden_layers).map(|layer| DecoderLayer::new(self, layer, init, device)).collect(),
            norm: RmsNorm::new(self.hidden_size, self.rms_norm_eps, device),
            lm_head: (!self.tie_word_embeddings).then(|| init.head(self.hidden_size, self.vocab_size, device)),
            rotary: RotaryEmbedding::new(&self.rope, self.rope_dim()),
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

    /// The logits of every token: `[batch, sequence]` to `[batch, sequence, vocab]`, in the dtype of the weights.
    pub fn logits(&self, tokens: Tensor<2, Int>, segments: Option<&Segments>) -> Tensor<3> {
        let [batch, sequence] = tokens.dims();
        let hidden = self.hidden(tokens, segments, 0.0, Probe::default()).hidden;
        self.head(hidden).reshape([batch, sequence, self.config.vocab_size])
    }

    /// The language-modelling loss of a batch.
    ///
    /// `sequence_balance_weight` is the weight of the experts' balance loss, 0 for none.
    pub fn loss(&self, batch: &LmBatch, sequence_balance_weight: f64, probe: Probe) -> LossOutput {
        let [rows, sequence] = batch.tokens.dims();
        let Hidden { hidden, balance_loss, stats } =
            self.hidden(batch.tokens.clone(), batch.segments.as_ref(), sequence_balance_weight, probe);
        let losses = self.token_losses(hidden, batch.targets.clone().reshape([rows * sequence]));
        let mask = batch.loss_mask.clone().reshape([rows * sequence]);
        LossOutput { loss_sum: (losses * mask).sum(), balance_loss, stats }
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
                move_bias(bias, step)
            });
        }
        self
    }

    fn hidden(&self, tokens: Tensor<2, Int>, segments: Option<&Segments>, balance_weight: f64, probe: Probe) -> Hidden {
        let context = self.context_of(&tokens, segments, balance_weight, probe);
        let mut hidden = self.embed(tokens);
        let mut balance_loss: Option<Tensor<1>> = None;
        let mut stats = ForwardStats::default();
        for index in 0..self.layers.len() {
            let output = self.run_layer(index, hidden, &context);
            hidden = output.hidden;
            if let Some(loss) = output.balance_loss {
                balance_loss = Some(balance_loss.map_or(loss.clone(), |sum| sum + loss));
            }
            stats.layers.push(output.stats);
        }
        Hidden { hidden, balance_loss, stats }
    }

    pub(crate) fn rotary(&self) -> &RotaryEmbedding {
        &self.rotary
    }

    /// `-log p` of each token's target, f32 `[tokens]`, from the last layer's `[tokens, hidden]`.
    pub fn token_losses(&self, hidden: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
        cross_entropy(self.head(hidden), targets)
    }

    /// Final norm and head: `[tokens, hidden]` to `[tokens, vocab]`.
    pub(crate) fn head(&self, hidden: Tensor<2>) -> Tensor<2> {
        let hidden = self.norm.forward(hidden);
        match &self.lm_head {
            Some(head) => project(hidden, head.weight.val()),
            None => hidden.matmul(self.embed_tokens.weight.val().transpose()),
        }
    }
}

fn move_bias(bias: Param<Tensor<1>>, step: Vec<f32>) -> Param<Tensor<1>> {
    let experts = step.len();
    bias.map(|bias| {
        let step = Tensor::<1>::from_data(TensorData::new(step, [experts]), &bias.device());
        bias + step
    })
}

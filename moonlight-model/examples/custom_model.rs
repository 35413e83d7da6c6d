//! Multi-head latent attention and a mixture of experts in your own Burn model: a character model with one block, trained for a few
//! steps with Burn's AdamW.
//!
//! `cargo run --release -p moonlight-model --example custom_model`

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData};
use moonlight_model::rope::RotaryEmbedding;
use moonlight_model::{
    ForwardContext, Moe, MoeConfig, MultiHeadLatentAttention, MultiHeadLatentAttentionConfig, RmsNorm, RmsNormConfig,
    RopeConfig, RouterConfig,
};

const TEXT: &str = "the moon takes its light from the sun and the night takes its light from the moon. ";
/// The ASCII characters.
const VOCABULARY: usize = 128;
const HIDDEN: usize = 32;
/// Dimensions of a query or key head with position.
const ROPE: usize = 8;
const SEQUENCE: usize = 48;
const BATCH: usize = 4;

/// One block. A deeper model has a `Vec` of them.
#[derive(Module, Debug)]
struct CharModel {
    embedding: Embedding,
    attention_norm: RmsNorm,
    attention: MultiHeadLatentAttention,
    experts_norm: RmsNorm,
    experts: Moe,
    norm: RmsNorm,
    head: Linear,
}

impl CharModel {
    fn new(device: &Device) -> Self {
        let norm = RmsNormConfig::new(HIDDEN);
        // 4 heads, KV latent of 16, query and key heads of 8 + ROPE (without and with position), value heads of 8.
        let attention = MultiHeadLatentAttentionConfig::new(HIDDEN, 4, 16, 8, ROPE, 8).with_initializer_range(0.1);
        // 8 routed experts of width 16, 2 of them for each token, and 1 shared expert.
        let router = RouterConfig::new(HIDDEN, 8, 2);
        let experts = MoeConfig::new(router, 16).with_n_shared_experts(1).with_initializer_range(0.1);
        Self {
            embedding: EmbeddingConfig::new(VOCABULARY, HIDDEN).init(device),
            attention_norm: norm.init(device),
            attention: attention.init(device),
            experts_norm: norm.init(device),
            experts: experts.init(device),
            norm: norm.init(device),
            head: LinearConfig::new(HIDDEN, VOCABULARY).with_bias(false).init(device),
        }
    }

    /// `[batch, sequence]` tokens to `[batch, sequence, vocabulary]` logits, and the experts' balance loss.
    fn forward(&self, tokens: Tensor<2, Int>, context: &ForwardContext) -> (Tensor<3>, Tensor<1>) {
        let x = self.embedding.forward(tokens);
        let x = x.clone() + self.attention.forward(self.attention_norm.forward(x), context);
        let experts = self.experts.forward(self.experts_norm.forward(x.clone()), context);
        let x = x + experts.hidden;
        let balance = experts.balance_loss.expect("the context has a balance weight");
        (self.head.forward(self.norm.forward(x)), balance)
    }
}

fn main() {
    let device = Device::default().autodiff();
    device.seed(7);
    let mut model = CharModel::new(&device);
    let mut optimizer = AdamWConfig::new().init();

    // What the layers need to know about the tokens: their positions, and the weight of the experts' balance loss.
    let rotary = RotaryEmbedding::new(&RopeConfig::new(), ROPE);
    let context = ForwardContext::new(&rotary, [BATCH, SEQUENCE], &device).with_balance_weight(0.001);

    let mut losses = Vec::new();
    for step in 0..60 {
        let (tokens, targets) = batch(step, &device);
        let (logits, balance) = model.forward(tokens, &context);
        let loss = CrossEntropyLossConfig::new()
            .init(&device)
            .forward(logits.reshape([BATCH * SEQUENCE, VOCABULARY]), targets.reshape([BATCH * SEQUENCE]));
        losses.push(loss.clone().into_scalar::<f32>());
        let gradients = GradientsParams::from_grads((loss + balance).backward(), &model);
        model = optimizer.step(1e-2, model, gradients);
        if step % 10 == 0 {
            println!("step {step:2}: loss {:.3}", losses[step]);
        }
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    println!("from {first:.3} to {last:.3}");
    assert!(last < 0.3 * first, "the model has not learned: {losses:?}");
}

/// Sequences from the text, and as targets the same sequences shifted by one character.
fn batch(step: usize, device: &Device) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let text: Vec<i32> = TEXT.bytes().cycle().take(4 * TEXT.len()).map(i32::from).collect();
    let piece = |shift: usize| {
        let starts = (0..BATCH).map(|row| (31 * step + 17 * row) % TEXT.len() + shift);
        let values: Vec<i32> = starts.flat_map(|start| text[start..start + SEQUENCE].to_vec()).collect();
        Tensor::from_data(TensorData::new(values, [BATCH, SEQUENCE]), device)
    };
    (piece(0), piece(1))
}

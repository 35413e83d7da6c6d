//! Single layers through the public API, and the model as the composition of its layers.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData, Tolerance};
use moonlight_model::config::{AttentionShape, GqaShape, MlaShape, ModelType, ScoringFunc, TopkMethod};
use moonlight_model::rope::RotaryEmbedding;
use moonlight_model::{
    AttentionConfig, DecoderLayerConfig, Experts, ExpertsConfig, FeedForward, FeedForwardConfig, ForwardContext,
    GroupedQueryAttentionConfig, LayerStats, LmBatch, MlpConfig, ModelConfig, MoeConfig,
    MultiHeadLatentAttentionConfig, Probe, RmsNormConfig, RopeConfig, RouterConfig, Segments,
};

const HIDDEN: usize = 24;

fn hidden(device: &Device) -> Tensor<3> {
    Tensor::random([2, 7, HIDDEN], Distribution::Normal(0.0, 1.0), device)
}

fn rotary() -> RotaryEmbedding {
    RotaryEmbedding::new(&RopeConfig::new(), 4)
}

fn latent() -> MultiHeadLatentAttentionConfig {
    MultiHeadLatentAttentionConfig::new(HIDDEN, 3, 10, 6, 4, 5).with_initializer_range(0.3)
}

fn grouped() -> GroupedQueryAttentionConfig {
    GroupedQueryAttentionConfig::new(HIDDEN, 4, 2, 4).with_qkv_bias(true).with_initializer_range(0.3)
}

fn mixture() -> MoeConfig {
    let router = RouterConfig::new(HIDDEN, 6, 2).with_routed_scaling_factor(2.5).with_initializer_range(0.3);
    MoeConfig::new(router, 8).with_n_shared_experts(1).with_initializer_range(0.3)
}

fn close<const D: usize>(actual: Tensor<D>, expected: Tensor<D>) {
    actual.into_data().assert_approx_eq(&expected.into_data(), Tolerance::<f32>::rel_abs(1e-5, 1e-5));
}

#[test]
fn attention_is_causal_and_stays_within_documents() {
    let device = Device::default();
    for attention in [AttentionConfig::Mla(latent()), AttentionConfig::Gqa(grouped())] {
        let attention = attention.init(&device);
        let x = hidden(&device);
        let whole = attention.forward(x.clone(), &ForwardContext::new(&rotary(), [2, 7], &device));
        let head = attention.forward(x.clone().slice_dim(1, 0..4), &ForwardContext::new(&rotary(), [2, 4], &device));
        close(whole.slice_dim(1, 0..4), head);
        // The last three tokens as a separate document.
        let segments = Segments::new(&[0, 0, 0, 0, 1, 1, 1].repeat(2), 2, 7);
        let packed = attention.forward(x.clone(), &ForwardContext::packed(&rotary(), &segments, &device));
        let alone = attention.forward(x.slice_dim(1, 4..7), &ForwardContext::new(&rotary(), [2, 3], &device));
        close(packed.slice_dim(1, 4..7), alone);
    }
}

#[test]
fn a_mixture_is_the_weighted_sum_of_its_experts() {
    let device = Device::default();
    let moe = mixture().init(&device);
    let x = hidden(&device);
    let context = ForwardContext::without_positions([2, 7]).with_balance_weight(0.01);
    let output = moe.forward(x.clone(), &context);
    assert_eq!(output.load.sum().into_scalar::<i32>(), 2 * 7 * 2);
    // `sum_i f_i P_i` is about 1 for a balanced router and larger for an unbalanced one.
    let balance = output.balance_loss.expect("the weight is not zero").into_scalar::<f32>();
    assert!(balance > 0.005 && balance < 0.1, "{balance}");
    assert!(moe.forward(x.clone(), &ForwardContext::without_positions([2, 7])).balance_loss.is_none());

    let routed = moe.router.forward(x.clone());
    let weights: Vec<f32> = routed.weights.into_data().iter::<f32>().collect();
    for pair in weights.chunks(2) {
        assert!((pair.iter().sum::<f32>() - 2.5).abs() < 1e-4, "weights must be normalized, then scaled: {pair:?}");
    }
    let rows = x.clone().reshape([14, HIDDEN]);
    let mut expected = moe.shared_experts.as_ref().expect("there is one").forward(x.clone()).reshape([14, HIDDEN]);
    let choices = routed.choices.into_data();
    for (slot, (expert, weight)) in choices.iter::<u32>().zip(weights).enumerate() {
        let token = slot / 2;
        let row = rows.clone().slice_dim(0, token..token + 1);
        let made = one_expert(&moe.experts, expert as usize, row) * f64::from(weight);
        let sum = expected.clone().slice_dim(0, token..token + 1) + made;
        expected = expected.slice_assign([token..token + 1, 0..HIDDEN], sum);
    }
    close(output.hidden, expected.reshape([2, 7, HIDDEN]));
}

fn one_expert(experts: &Experts, expert: usize, row: Tensor<2>) -> Tensor<2> {
    let matrix = |weight: Tensor<3>| weight.slice_dim(0, expert..expert + 1).squeeze_dim::<2>(0);
    let gate = row.clone().matmul(matrix(experts.gate_proj.val()));
    let up = row.matmul(matrix(experts.up_proj.val()));
    (burn::tensor::activation::silu(gate) * up).matmul(matrix(experts.down_proj.val()))
}

#[test]
fn a_norm_takes_any_rank_and_a_layer_is_its_parts_with_residuals() {
    let device = Device::default();
    let norm = RmsNormConfig::new(HIDDEN).with_epsilon(1e-6).init(&device);
    let x = hidden(&device);
    close(norm.forward(x.clone()).reshape([14, HIDDEN]), norm.forward(x.clone().reshape([14, HIDDEN])));
    let mean_square = norm.forward(x.clone()).square().mean_dim(2).into_data();
    assert!(mean_square.iter::<f32>().all(|value| (value - 1.0).abs() < 1e-3));

    let context = ForwardContext::new(&rotary(), [2, 7], &device);
    for feed_forward in [FeedForwardConfig::Dense(MlpConfig::new(HIDDEN, 40)), FeedForwardConfig::Moe(mixture())] {
        let layer = DecoderLayerConfig::new(AttentionConfig::Mla(latent()), feed_forward).init(&device);
        let middle = x.clone() + layer.self_attn.forward(layer.input_layernorm.forward(x.clone()), &context);
        let normed = layer.post_attention_layernorm.forward(middle.clone());
        let expected = middle
            + match &layer.mlp {
                FeedForward::Dense(mlp) => mlp.forward(normed),
                FeedForward::Moe(moe) => moe.forward(normed, &context).hidden,
            };
        let output = layer.forward(x.clone(), &context);
        assert_eq!(output.stats.expert_load.is_some(), matches!(layer.mlp, FeedForward::Moe(_)));
        close(output.hidden, expected);
    }
}

fn model() -> ModelConfig {
    let mut config = ModelConfig::preset("bench-small").unwrap();
    (config.vocab_size, config.hidden_size, config.num_hidden_layers) = (61, 64, 3);
    config
}

#[test]
fn a_model_is_its_embedding_layers_and_head_bit_for_bit() {
    let device = Device::default();
    let config = model();
    let lm = config.init(&device);
    let tokens = Tensor::<2, Int>::from_data(TensorData::from([[1, 5, 9, 60, 0], [3, 3, 7, 2, 1]]), &device);
    let batch = LmBatch {
        targets: tokens.clone().flip([1]),
        tokens: tokens.clone(),
        loss_mask: Tensor::ones([2, 5], &device),
        segments: None,
    };
    let context = lm.forward_context(&batch, 0.01, Probe { attention_logits: true });
    let mut inputs = Vec::new();
    let output = lm.forward_hidden_with(tokens.clone(), &context, |layer, input| {
        assert_eq!(layer, inputs.len());
        inputs.push(input.clone());
    });
    assert_eq!(inputs[0].clone().into_data(), lm.embed(tokens.clone()).into_data());
    let mut balance: Option<Tensor<1>> = None;
    for (index, input) in inputs.iter().enumerate() {
        let layer = lm.run_layer(index, input.clone(), &context);
        let next = inputs.get(index + 1).unwrap_or(&output.hidden);
        assert_eq!(layer.hidden.into_data(), next.clone().into_data(), "layer {index}");
        assert_eq!(layer.stats.layer, index);
        let load = |stats: &LayerStats| stats.expert_load.clone().map(Tensor::into_data);
        assert_eq!(load(&layer.stats), load(&output.stats.layers[index]));
        assert!(layer.stats.max_attention_logit.is_some());
        if let Some(loss) = layer.balance_loss {
            balance = Some(balance.map_or(loss.clone(), |sum| sum + loss));
        }
    }
    assert_eq!(output.balance_losses.len(), 2, "the first layer is dense");
    let loss = lm.loss(&batch, 0.01, Probe::default());
    let sums = [loss.balance_loss.unwrap(), balance.unwrap(), output.balance_loss().unwrap()].map(Tensor::into_data);
    assert_eq!((&sums[0], &sums[0]), (&sums[1], &sums[2]));
    let losses = lm.token_losses(output.hidden.clone(), batch.targets.clone().reshape([10]));
    assert_eq!(losses.sum().into_data(), loss.loss_sum.into_data());
    let logits = lm.head(output.hidden).reshape([2, 5, 61]).into_data();
    assert_eq!(logits, lm.forward(tokens.clone()).into_data());
    assert_eq!(logits, lm.logits(tokens, None).into_data());
}

#[test]
fn saved_configs_are_loaded_unchanged() {
    fn again<C: Config + PartialEq>(config: &C, what: &str) {
        let path = std::env::temp_dir().join(format!("moonlight-{what}-{}.json", std::process::id()));
        config.save(&path).unwrap();
        assert!(C::load(&path).unwrap() == *config, "{what}");
        std::fs::remove_file(&path).unwrap();
    }
    again(&latent().with_q_lora_rank(Some(8)).with_softmax_scale(Some(0.1)), "mla");
    again(&grouped(), "gqa");
    again(&mixture(), "moe");
    let router = RouterConfig::new(HIDDEN, 8, 2).with_scoring(ScoringFunc::Softmax);
    again(&router.with_topk_method(TopkMethod::GroupLimitedGreedy).with_n_group(4).with_topk_group(2), "router");
    again(&ExpertsConfig::new(HIDDEN, 4, 8), "experts");
    again(&RmsNormConfig::new(HIDDEN), "norm");
    again(&MlpConfig::new(HIDDEN, 8), "mlp");
    again(&RopeConfig::new().with_theta(5e4), "rope");
    let layer = DecoderLayerConfig::new(AttentionConfig::Gqa(grouped()), FeedForwardConfig::Moe(mixture()));
    again(&layer.with_rms_norm_eps(1e-6), "layer");
    again(&model().layer(1), "layer-of-a-model");
}

#[test]
fn configs_made_in_rust_equal_those_read_from_json() {
    let attention = AttentionShape::Mla(MlaShape::new(16, 8, 4, 8));
    let built = ModelConfig::new(ModelType::DeepseekV3, 61, 32, 48, 2, 3, attention)
        .with_rms_norm_eps(1e-5)
        .with_rope(RopeConfig::new().with_theta(5e4));
    built.validate().unwrap();
    let read = ModelConfig::from_json(
        r#"{"model_type": "deepseek_v3", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "q_lora_rank": null, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
            "rope_theta": 50000.0}"#,
    );
    assert_eq!(built, read.unwrap());
    assert_eq!(ModelConfig::from_json(&built.to_json()).unwrap(), built);
    let dense = ModelConfig::new(ModelType::Llama, 61, 32, 48, 2, 4, AttentionShape::Gqa(GqaShape::new(2, 8)));
    assert_eq!(ModelConfig::from_json(&dense.to_json()).unwrap(), dense);
    let model = dense.init(&Device::default());
    assert_eq!(model.num_params() as u64, dense.parameter_count().total);
}

#[test]
#[should_panic(expected = "another batch size or sequence length")]
fn a_context_of_another_batch_is_refused() {
    let device = Device::default();
    let context = ForwardContext::new(&rotary(), [2, 6], &device);
    latent().init(&device).forward(hidden(&device), &context);
}

#[test]
#[should_panic(expected = "positions")]
fn attention_without_positions_is_refused() {
    let device = Device::default();
    latent().init(&device).forward(hidden(&device), &ForwardContext::without_positions([2, 7]));
}

#[test]
#[should_panic(expected = "a token can choose from")]
fn a_router_with_fewer_experts_than_k_is_refused() {
    RouterConfig::new(HIDDEN, 4, 5).init(&Device::default());
}

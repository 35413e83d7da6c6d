//! Quantized models: their logits, their size, and adapters on quantized weights.

mod common;

use burn::tensor::{Device, Int, Tensor, TensorData};
use common::moonlight;
use moonlight_model::lora::LoraConfig;
use moonlight_model::{CausalLm, KvCache, LmBatch, ModelConfig, Probe, QuantBits};
use serde_json::json;

fn config() -> ModelConfig {
    moonlight(json!({}))
}

fn tokens(device: &Device) -> Tensor<2, Int> {
    let values: Vec<i32> = (0..28).map(|index| (index * 37 + index / 3) % 61).collect();
    Tensor::from_data(TensorData::new(values, [2, 14]), device)
}

/// The median and not the mean: a token whose scores are nearly equal may be routed to another expert, and its logits then differ a lot.
fn median_difference(a: Tensor<3>, b: Tensor<3>) -> f32 {
    let mut differences = (a - b).abs().into_data().iter::<f32>().collect::<Vec<_>>();
    differences.sort_by(f32::total_cmp);
    differences[differences.len() / 2]
}

#[test]
fn more_bits_are_closer_and_the_dequantized_model_computes_the_same() {
    let device = Device::default();
    let model = config().init(&device);
    let whole = model.logits(tokens(&device), None);
    let size = whole.clone().abs().mean().into_scalar::<f32>();
    let off = [QuantBits::Eight, QuantBits::Four].map(|bits| {
        let quantized = model.clone().quantized(bits);
        let logits = quantized.logits(tokens(&device), None);
        assert!(quantized.is_quantized() && !quantized.clone().dequantized().is_quantized());
        // Rows are rounded to 127 steps, too.
        let exact = quantized.clone().dequantized().logits(tokens(&device), None);
        let rows = median_difference(exact, logits.clone());
        assert!(rows < 0.1 * size, "{rows} of {size}");
        let mut cache = KvCache::new(&config(), 2, 14, &device, quantized.dtype());
        let parts = [(0, 6), (6, 7), (7, 14)]
            .map(|(start, end)| quantized.decode(tokens(&device).slice_dim(1, start..end), &mut cache));
        let decoded = median_difference(Tensor::cat(parts.to_vec(), 1), logits.clone());
        assert!(decoded < 0.1 * size, "{decoded} of {size}");
        median_difference(logits, whole.clone()) / size
    });
    // Rounding weights to 8 instead of 127 steps is 16 times as coarse; rows have 127 steps in both.
    assert!(off[0] < 0.08 && (4.0..40.0).contains(&(off[1] / off[0])), "{off:?}");
}

#[test]
fn the_projections_take_eight_or_four_bits_and_a_scale() {
    let device = Device::default();
    let model = config().init(&device);
    let shapes = config().parameter_shapes();
    // Blocks have 32 inputs, tiles 16 outputs.
    let filled = |shape: &[usize]| match *shape {
        [experts, input, output] => experts * input.next_multiple_of(32) * output.next_multiple_of(16),
        [input, output] => input.next_multiple_of(32) * output.next_multiple_of(16),
        _ => 0,
    };
    let count = |part: &str| -> usize {
        shapes.iter().filter(|shape| shape.path.contains(part)).map(|shape| filled(&shape.shape)).sum()
    };
    let (values, head) = (count("_proj"), count("lm_head"));
    for (bits, per_value) in [(QuantBits::Eight, 8.5), (QuantBits::Four, 4.5)] {
        let bytes = model.clone().quantized(bits).quantized_bytes() as f64;
        let expected = values as f64 * per_value / 8.0 + head as f64 * 8.5 / 8.0;
        assert_eq!(bytes, expected, "{values} values, {head} of the head");
    }
}

#[test]
fn adapters_have_the_gradients_of_the_dequantized_base() {
    let device = Device::default().autodiff();
    let lora = LoraConfig { rank: 3, alpha: 6.0, targets: vec!["all".into()], ..LoraConfig::default() };
    let batch = LmBatch {
        tokens: tokens(&device),
        targets: tokens(&device).flip([1]),
        loss_mask: Tensor::ones([2, 14], &device),
        segments: None,
    };
    // Every expert is chosen, so that rounding cannot send a token to another.
    let config = moonlight(json!({"n_routed_experts": 6, "num_experts_per_tok": 6}));
    for bits in [QuantBits::Eight, QuantBits::Four] {
        // The forward pass rounds rows to 127 steps and the backward pass gradients to bf16. Layers enlarge what rounding begins, more in
        // some random models than in others: hence the median of several.
        let mut differences = Vec::new();
        for _ in 0..8 {
            let quantized = config.init(&device).quantized(bits);
            let plain = quantized.clone().dequantized().with_lora(&lora, 5).unwrap();
            let quantized = quantized.with_lora(&lora, 5).unwrap();
            assert!(quantized.is_quantized());
            let (ours, expected) = (gradients(&quantized, &batch), gradients(&plain, &batch));
            differences
                .extend(ours.into_iter().zip(expected).map(|(ours, expected)| relative_difference(ours, expected)));
            // Merging dequantizes the weights that have an adapter, here all but the head.
            let merged = quantized.merge();
            assert_eq!(merged.quantized_bytes(), merged.head_quantized.unwrap().bytes());
        }
        differences.sort_by(f32::total_cmp);
        let (median, most) = (differences[differences.len() / 2], differences[differences.len() - 1]);
        assert!(median < 0.1 && most < 0.5, "{bits:?}: {differences:?}");
    }
}

/// The gradients of the adapters of the experts in layer 1 and of the queries in layer 0.
fn gradients(model: &CausalLm, batch: &LmBatch) -> [Tensor<1>; 2] {
    let gradients = model.loss(batch, 0.0, Probe::default()).loss_sum.backward();
    let moonlight_model::FeedForward::Moe(moe) = &model.layers[1].mlp else { panic!("layer 1 has experts") };
    let moonlight_model::attention::Attention::Mla(attention) = &model.layers[0].self_attn else {
        panic!("Moonlight has latent attention")
    };
    let experts = moe.experts.down_lora.as_ref().unwrap().b.val().grad(&gradients).unwrap();
    let query = attention.q_proj.as_ref().unwrap().lora.as_ref().unwrap().b.val().grad(&gradients).unwrap();
    [experts.flatten(0, 2), query.flatten(0, 1)]
}

/// The norm of the difference over the norm of what is expected.
fn relative_difference(ours: Tensor<1>, expected: Tensor<1>) -> f32 {
    let norm = |values: Tensor<1>| values.square().sum().into_scalar::<f32>().sqrt();
    norm(ours - expected.clone()) / norm(expected)
}

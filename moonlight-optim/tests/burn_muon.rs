//! Comparison with Burn's own Muon: equal where the rules are the same, different where this crate documents a difference.

use burn::nn::{Linear, LinearConfig};
use burn::optim::decay::WeightDecayConfig;
use burn::optim::{AdjustLrFn, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Distribution, Tensor};
use moonlight_optim::{MuonConfig, UpdateScale, WeightLayout};

/// The weight of a layer after three steps on a fixed batch, from a given start.
fn trained(start: &Linear, batch: &(Tensor<2>, Tensor<2>), mut optimizer: ModuleOptimizer) -> Tensor<2> {
    let mut layer = start.clone();
    for _ in 0..3 {
        let loss = layer.forward(batch.0.clone()).sub(batch.1.clone()).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &layer);
        layer = optimizer.step(0.1, layer, grads);
    }
    layer.weight.val().inner()
}

fn distance(one: Tensor<2>, other: Tensor<2>) -> f32 {
    let norm = |tensor: Tensor<2>| tensor.square().sum().sqrt().into_scalar::<f32>();
    norm(one.sub(other.clone())) / norm(other)
}

fn compare(inputs: usize, outputs: usize, theirs: AdjustLrFn, ours: &MuonConfig) -> f32 {
    let device = Device::default().autodiff();
    let layer: Linear = LinearConfig::new(inputs, outputs).with_bias(false).init(&device);
    let batch = (
        Tensor::random([64, inputs], Distribution::Normal(0.0, 1.0), &device),
        Tensor::random([64, outputs], Distribution::Normal(0.0, 1.0), &device),
    );
    let theirs = burn::optim::MuonConfig::new()
        .with_adjust_lr_fn(theirs)
        .with_weight_decay(Some(WeightDecayConfig { penalty: 0.1 }));
    distance(trained(&layer, &batch, ours.init()), trained(&layer, &batch, theirs.init()))
}

#[test]
fn the_reports_scale_equals_burns_match_rms_adamw() {
    for (inputs, outputs) in [(8, 20), (20, 8), (12, 12)] {
        let error = compare(inputs, outputs, AdjustLrFn::MatchRmsAdamW, &MuonConfig::new());
        assert!(error < 1e-5, "[{inputs}, {outputs}]: {error}");
    }
}

/// Burn 0.22.1 reads `[in, out]` as `[out, in]`. If this test fails, Burn has fixed that, and the README must be corrected.
#[test]
fn burns_original_scale_reads_a_layer_the_wrong_way_round() {
    let ours = MuonConfig::new().with_scale(UpdateScale::KellerJordan);
    for (inputs, outputs) in [(8, 20), (20, 8)] {
        let swapped = compare(inputs, outputs, AdjustLrFn::Original, &ours.clone().with_layout(WeightLayout::OutIn));
        assert!(swapped < 1e-5, "[{inputs}, {outputs}]: {swapped}");
        let right = compare(inputs, outputs, AdjustLrFn::Original, &ours);
        assert!(right > 1e-2, "[{inputs}, {outputs}]: {right}");
    }
}

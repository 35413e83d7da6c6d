use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig, LinearLayout};
use burn::optim::{GradientsParams, Optimizer};
use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};

use super::*;
use crate::{Adaptive, Blocks, Coefficients, Decay, UpdateScale, WeightLayout};

fn device() -> Device {
    Device::default().autodiff()
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// One step on a layer from `inputs` to `outputs` features, with a full-rank gradient, no decay and a learning rate of 1: the
/// weight `[in, out]` before and after.
fn step_on_layer(config: &MuonConfig, inputs: usize, outputs: usize) -> (Tensor<2>, Tensor<2>) {
    let device = device();
    let layer: Linear = LinearConfig::new(inputs, outputs).with_bias(false).init(&device);
    let x = Tensor::<2>::random([4 * (inputs + outputs), inputs], Distribution::Normal(0.0, 1.0), &device);
    let target = Tensor::<2>::random([4 * (inputs + outputs), outputs], Distribution::Normal(0.0, 1.0), &device);
    let loss = layer.forward(x).sub(target).square().mean();
    let grads = GradientsParams::from_grads(loss.backward(), &layer);
    let before = layer.weight.val().inner();
    let layer = config.clone().with_weight_decay(0.0).init().step(1.0, layer, grads);
    (before, layer.weight.val().inner())
}

fn rms(tensor: Tensor<2>) -> f64 {
    f64::from(tensor.square().mean().sqrt().into_scalar::<f32>())
}

#[test]
fn the_update_has_the_reports_rms_for_any_shape() {
    // Enough steps of Polar Express to converge: the singular values are 1, and Lemma 1 holds up to rounding.
    let config = MuonConfig::new().with_coefficients(Coefficients::PolarExpress).with_steps(12);
    for (inputs, outputs) in [(24, 64), (64, 24), (32, 32)] {
        let (before, after) = step_on_layer(&config, inputs, outputs);
        let rms = rms(before.sub(after));
        assert!((rms - 0.2).abs() < 1e-4, "[{inputs}, {outputs}]: {rms}");
    }
}

#[test]
fn scales_that_depend_on_inputs_and_outputs_are_right_for_a_layer() {
    // sqrt(max(1, out / in)) times an update of RMS 1 / sqrt(max(in, out)).
    let config = MuonConfig::new().with_coefficients(Coefficients::PolarExpress).with_steps(12);
    let cases = [
        (UpdateScale::KellerJordan, 16, 64, 2.0 / 8.0),
        (UpdateScale::KellerJordan, 64, 16, 1.0 / 8.0),
        (UpdateScale::Spectral, 16, 64, 2.0 / 8.0),
        (UpdateScale::Spectral, 64, 16, 0.5 / 8.0),
        (UpdateScale::Unit, 64, 16, 1.0 / 8.0),
        (UpdateScale::HiddenSize { factor: 0.2, hidden: 25 }, 64, 16, 1.0 / 8.0),
        (UpdateScale::UpdateNorm { factor: 0.2 }, 64, 16, 0.2),
    ];
    for (scale, inputs, outputs, expected) in cases {
        let (before, after) = step_on_layer(&config.clone().with_scale(scale), inputs, outputs);
        let rms = rms(before.sub(after));
        assert!((rms / expected - 1.0).abs() < 1e-3, "{scale:?} [{inputs}, {outputs}]: {rms}, not {expected}");
    }
}

#[test]
fn a_layer_stored_column_major_takes_the_same_step() {
    let device = device();
    let step = |layout| {
        let mut layer: Linear = LinearConfig::new(6, 10).with_bias(false).with_layout(layout).init(&device);
        let values: Vec<f32> = (0..60).map(|i| ((i * 37 % 61) as f32 / 61.0) - 0.5).collect();
        let weight = Tensor::<2>::from_data(TensorData::new(values, [6, 10]), &device.clone().inner());
        layer.weight = layer.weight.map(|_| Tensor::from_inner(weight.clone()).require_grad());
        let x = Tensor::<2>::ones([3, 6], &device).cumsum(0);
        let loss = layer.forward(x).powi_scalar(3).mean();
        let grads = GradientsParams::from_grads(loss.backward(), &layer);
        floats(MuonConfig::new().init().step(0.1, layer, grads).weight.val())
    };
    assert_eq!(step(LinearLayout::Row), step(LinearLayout::Col));
}

#[test]
fn a_stack_takes_the_same_steps_as_its_matrices_alone() {
    let device = Device::default();
    for (rows, columns) in [(5, 9), (9, 5), (7, 7)] {
        let weight = Tensor::<3>::random([6, rows, columns], Distribution::Normal(0.0, 1.0), &device);
        let grads: Vec<_> =
            (0..3).map(|_| Tensor::<3>::random([6, rows, columns], Distribution::Default, &device)).collect();
        let muon = MuonConfig::new().build();

        let mut stack = (weight.clone(), None);
        for grad in &grads {
            stack = muon.step(0.02, stack.0, grad.clone(), stack.1);
        }
        for index in 0..6 {
            let matrix = |tensor: &Tensor<3>| tensor.clone().narrow(0, index, 1).squeeze_dim::<2>(0);
            let mut alone = (matrix(&weight), None);
            for grad in &grads {
                alone = muon.step(0.02, alone.0, matrix(grad), alone.1);
            }
            assert_eq!(floats(matrix(&stack.0)), floats(alone.0), "matrix {index} of [6, {rows}, {columns}]");
        }
    }
}

#[test]
fn a_zero_gradient_leaves_only_decay() {
    let device = Device::default();
    let weight = Tensor::<2>::random([4, 6], Distribution::Default, &device);
    for epsilon in [0.0, 1e-7] {
        for scale in [UpdateScale::default(), UpdateScale::UpdateNorm { factor: 0.2 }] {
            let config = MuonConfig::new().with_epsilon(epsilon).with_scale(scale).with_weight_decay(0.0);
            let (after, _) = config.build().step(0.1, weight.clone(), weight.zeros_like(), None);
            assert_eq!(floats(after), floats(weight.clone()));
            let (after, _) = config.with_weight_decay(0.5).build().step(0.1, weight.clone(), weight.zeros_like(), None);
            assert_eq!(floats(after), floats(weight.clone().mul_scalar(0.95)));
        }
    }
}

#[test]
fn decay_uses_the_learning_rate_before_the_scale() {
    let device = Device::default();
    let weight = Tensor::<2>::random([16, 100], Distribution::Default, &device);
    let grad = Tensor::<2>::random([16, 100], Distribution::Default, &device);
    let step =
        |decay| MuonConfig::new().with_weight_decay(decay).build().step(0.1, weight.clone(), grad.clone(), None).0;
    let difference = step(0.0).sub(step(0.5));
    let expected = weight.mul_scalar(0.1 * 0.5);
    assert!(difference.sub(expected).abs().max().into_scalar::<f32>() < 1e-6);
}

#[test]
fn a_non_finite_gradient_makes_its_own_matrix_nan_and_no_other() {
    let device = Device::default();
    let weight = Tensor::<3>::ones([2, 3, 3], &device);
    let mut grad = vec![0.5_f32; 18];
    grad[1] = f32::INFINITY;
    let grad = Tensor::from_data(TensorData::new(grad, [2, 3, 3]), &device);
    let after = floats(MuonConfig::new().build().step(0.1, weight, grad, None).0);
    assert!(after[..9].iter().all(|value| value.is_nan()));
    assert!(after[9..].iter().all(|value| value.is_finite()));
}

#[test]
#[should_panic(expected = "a parameter of shape [5] is neither and belongs in another parameter group")]
fn a_vector_is_refused() {
    let vector = Tensor::<1>::ones([5], &Device::default());
    MuonConfig::new().build().step(0.1, vector.clone(), vector, None);
}

#[test]
fn half_precision_parameters_keep_a_full_precision_momentum() {
    let device = Device::default();
    let weight = Tensor::<2>::random([8, 8], Distribution::Default, &device).cast(DType::BF16);
    let grad = Tensor::<2>::random([8, 8], Distribution::Default, &device).cast(DType::BF16);
    let (after, state) = MuonConfig::new().build().step(0.1, weight.clone(), grad.clone(), None);
    assert_eq!(after.dtype(), DType::BF16);
    assert_eq!(state.unwrap().momentum.dtype(), DType::F32);
    let wide = MuonConfig::new().build().step(0.1, weight.cast(DType::F32), grad.cast(DType::F32), None).0;
    assert_eq!(floats(after), floats(wide.cast(DType::BF16)));
}

#[test]
fn settings_survive_serde_and_unknown_ones_are_refused() {
    let config = MuonConfig::new()
        .with_scale(UpdateScale::UpdateNorm { factor: 0.1 })
        .with_coefficients(Coefficients::Custom(vec![[2.0, -1.5, 0.5]]));
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<MuonConfig>(&json).unwrap(), config);
    let few: MuonConfig = serde_json::from_str(r#"{"scale": "keller_jordan", "coefficients": "quintic"}"#).unwrap();
    assert_eq!(few, MuonConfig::new().with_scale(UpdateScale::KellerJordan).with_coefficients(Coefficients::Quintic));
    assert!(serde_json::from_str::<MuonConfig>(r#"{"momentun": 0.9}"#).is_err());
}

#[test]
fn a_bare_parameter_trains() {
    // The optimum of ||W - T||^2 is T; updates of a fixed length reach it to within that length.
    #[derive(Module, Debug)]
    struct Bare {
        weight: Param<Tensor<2>>,
    }
    let device = device();
    let target = Tensor::<2>::random([6, 4], Distribution::Default, &device);
    let mut module = Bare { weight: Param::from_tensor(target.zeros_like()) };
    let mut optimizer = MuonConfig::new().with_weight_decay(0.0).with_momentum(0.0).init();
    for step in 0..200 {
        let loss = module.weight.val().sub(target.clone()).square().sum();
        let grads = GradientsParams::from_grads(loss.backward(), &module);
        module = optimizer.step(0.2 * (1.0 - f64::from(step) / 200.0), module, grads);
    }
    let error = module.weight.val().sub(target).abs().max().into_scalar::<f32>();
    assert!(error < 0.02, "{error}");
}

#[test]
fn a_batch_takes_the_same_steps_as_its_members_alone() {
    let device = Device::default();
    let random = |_| Tensor::<2>::random([6, 9], Distribution::Normal(0.0, 1.0), &device);
    let weights: Vec<_> = (0..5).map(random).collect();
    let configs = [
        MuonConfig::new(),
        MuonConfig::new().with_adaptive(Adaptive::nor_muon()).with_blocks(Blocks::Columns(vec![3])),
        MuonConfig::new().with_adaptive(Adaptive::ada_muon()).with_momentum_warmup(0.5, 2),
    ];
    for config in configs {
        let muon = config.build();
        let mut together: Vec<(_, Option<MuonState<2>>)> =
            weights.iter().map(|weight| (weight.clone(), None)).collect();
        let mut alone = together.clone();
        for step in 0..3 {
            let grads: Vec<_> = (0..5).map(random).collect();
            // The fifth one has a state without second moment at the last step, as a state of other settings would be.
            if step == 2 {
                for (_, state) in [&mut together[4], &mut alone[4]] {
                    state.as_mut().unwrap().second_moment = None;
                }
            }
            // The third one skips the second step, so that the next batch has members at two different steps.
            let parameters: Vec<usize> = (0..5).filter(|index| step != 1 || *index != 2).collect();
            let batch = parameters.iter().map(|&index| {
                let (weight, state) = together[index].clone();
                (weight, grads[index].clone(), state)
            });
            let results = muon.step_batch(0.02, batch.collect());
            for (index, (weight, state)) in parameters.into_iter().zip(results) {
                together[index] = (weight, Some(state));
                let (weight, state) = alone[index].clone();
                alone[index] = muon.step(0.02, weight, grads[index].clone(), state);
            }
        }
        for ((together, _), (alone, _)) in together.into_iter().zip(alone) {
            assert_eq!(floats(together), floats(alone));
        }
    }
    assert!(MuonConfig::new().build().step_batch::<2>(0.1, Vec::new()).is_empty());
}

#[test]
fn blocks_take_the_same_steps_as_separate_matrices() {
    let device = Device::default();
    let weight = Tensor::<2>::random([8, 12], Distribution::Normal(0.0, 1.0), &device);
    let grads: Vec<_> = (0..3).map(|_| Tensor::<2>::random([8, 12], Distribution::Default, &device)).collect();
    let cases = [
        (Blocks::Columns(vec![4]), 1, vec![4, 4, 4]),
        (Blocks::Columns(vec![6, 3, 3]), 1, vec![6, 3, 3]),
        (Blocks::Rows(vec![2]), 0, vec![2, 2, 2, 2]),
        (Blocks::Rows(vec![1, 7]), 0, vec![1, 7]),
    ];
    let variants = [Adaptive::Off, Adaptive::nor_muon(), Adaptive::ada_muon()];
    for ((blocks, dimension, sizes), adaptive) in
        cases.iter().flat_map(|case| variants.map(|adaptive| (case, adaptive)))
    {
        for layout in [WeightLayout::InOut, WeightLayout::OutIn] {
            let config =
                MuonConfig::new().with_adaptive(adaptive).with_layout(layout).with_scale(UpdateScale::KellerJordan);
            let cut = config.clone().with_blocks(blocks.clone());
            let mut whole = (weight.clone(), None);
            for grad in &grads {
                whole = cut.build().step(0.02, whole.0, grad.clone(), whole.1);
            }
            let found = whole.1.unwrap().second_moment.map(|second| second.dims());
            assert_eq!(found, cut.second_moment_shape(&[8, 12]), "{blocks} {adaptive:?} {layout:?}");
            let mut start = 0;
            for &size in sizes {
                let block = |x: &Tensor<2>| x.clone().narrow(*dimension, start, size);
                let mut alone = (block(&weight), None);
                for grad in &grads {
                    alone = config.build().step(0.02, alone.0, block(grad), alone.1);
                }
                assert_eq!(floats(block(&whole.0)), floats(alone.0), "{blocks} {adaptive:?} {layout:?} at {start}");
                start += size;
            }
        }
    }
}

#[test]
fn a_convolution_kernel_is_one_matrix_with_its_outputs_in_rows() {
    let device = Device::default();
    let weight = Tensor::<4>::random([8, 2, 3, 3], Distribution::Normal(0.0, 1.0), &device);
    let grad = Tensor::<4>::random([8, 2, 3, 3], Distribution::Normal(0.0, 1.0), &device);
    for scale in [UpdateScale::default(), UpdateScale::KellerJordan, UpdateScale::Spectral] {
        let config = MuonConfig::new().with_scale(scale);
        let kernel = config.clone().with_view(MatrixView::Kernel).build();
        let kernel = kernel.step(0.1, weight.clone(), grad.clone(), None).0;
        let (flat, flat_grad) = (weight.clone().reshape([8, 18]), grad.clone().reshape([8, 18]));
        let matrix = config.with_layout(WeightLayout::OutIn).build().step(0.1, flat, flat_grad, None).0;
        assert_eq!(floats(kernel), floats(matrix));
    }
}

#[test]
fn momentum_warms_up_linearly() {
    let config = MuonConfig::new().with_momentum_warmup(0.85, 10);
    assert!((config.momentum_at(0) - 0.85).abs() < 1e-12);
    assert!((config.momentum_at(5) - 0.90).abs() < 1e-12);
    assert_eq!((config.momentum_at(10), config.momentum_at(1000)), (0.95, 0.95));

    // M after two equal gradients is (1 + mu) of one, with the momentum of the second step.
    let device = Device::default();
    let grad = Tensor::<2>::random([4, 4], Distribution::Default, &device);
    let muon = MuonConfig::new().with_momentum_warmup(0.0, 4).build();
    let (weight, state) = muon.step(0.1, grad.zeros_like(), grad.clone(), None);
    let (_, state) = muon.step(0.1, weight, grad.clone(), state);
    let state = state.unwrap();
    assert_eq!(state.step, 2);
    let expected = grad.mul_scalar(1.0 + 0.95 / 4.0);
    assert!(state.momentum.sub(expected).abs().max().into_scalar::<f32>() < 1e-6);
}

#[test]
fn cautious_decay_applies_where_update_and_weight_agree_in_sign() {
    let device = Device::default();
    let weight = Tensor::<2>::random([16, 24], Distribution::Normal(0.0, 1.0), &device);
    let grad = Tensor::<2>::random([16, 24], Distribution::Normal(0.0, 1.0), &device);
    let step = |decay: f64, cautious: bool| {
        let decay_kind = Decay { cautious, ..Decay::default() };
        let config = MuonConfig::new().with_weight_decay(decay).with_decay(decay_kind);
        floats(config.build().step(0.1, weight.clone(), grad.clone(), None).0)
    };
    let (plain, decayed, cautious) = (step(0.0, false), step(0.5, false), step(0.5, true));
    let mut undecayed = 0;
    for (index, before) in floats(weight.clone()).into_iter().enumerate() {
        let update = before - plain[index];
        let expected = if before * update >= 0.0 { decayed[index] } else { plain[index] };
        undecayed += usize::from(before * update < 0.0);
        assert!((cautious[index] - expected).abs() < 1e-6);
    }
    assert!((100..284).contains(&undecayed), "{undecayed} of 384");
}

#[test]
fn bf16_momentum_gives_nearly_the_same_steps() {
    let device = Device::default();
    let weight = Tensor::<2>::random([24, 16], Distribution::Normal(0.0, 1.0), &device);
    let grads: Vec<_> =
        (0..5).map(|_| Tensor::<2>::random([24, 16], Distribution::Normal(0.0, 1.0), &device)).collect();
    let run = |precision| {
        let muon = MuonConfig::new().with_momentum_precision(precision).build();
        let mut held = (weight.clone(), None);
        for grad in &grads {
            held = muon.step(0.1, held.0, grad.clone(), held.1);
        }
        (held.0, held.1.unwrap().momentum.dtype())
    };
    let (exact, wide) = run(MomentumPrecision::F32);
    let (rough, narrow) = run(MomentumPrecision::Bf16);
    assert_eq!((wide, narrow), (DType::F32, DType::BF16));
    let moved = rms(exact.clone().sub(weight.clone()));
    let difference = rms(exact.sub(rough)) / moved;
    assert!((1e-5..0.05).contains(&difference), "{difference}");
}

#[test]
fn a_non_finite_gradient_gives_nan_with_signs_too() {
    let device = Device::default();
    let grad = Tensor::<2>::from_data([[1.0_f32, f32::INFINITY], [0.5, 2.0]], &device);
    let config = MuonConfig::new().with_adaptive(Adaptive::ada_muon());
    let after = floats(config.build().step(0.1, grad.ones_like(), grad, None).0);
    assert!(after.iter().all(|value| value.is_nan()));
    let zero = Tensor::<2>::zeros([3, 2], &device);
    for adaptive in [Adaptive::nor_muon(), Adaptive::ada_muon()] {
        let muon = MuonConfig::new().with_adaptive(adaptive).with_weight_decay(0.0).build();
        assert_eq!(floats(muon.step(0.1, zero.ones_like(), zero.clone(), None).0), [1.0; 6]);
    }
}

#[test]
fn half_precisions_stay_near_f32() {
    let device = Device::default();
    let grad = Tensor::<2>::random([24, 40], Distribution::Normal(0.0, 1.0), &device);
    let step = |precision| {
        let muon = MuonConfig::new().with_precision(precision).with_weight_decay(0.0).build();
        muon.step(1.0, grad.zeros_like(), grad.clone(), None).0
    };
    let exact = step(Precision::F32);
    for (precision, low, high) in [(Precision::Bf16, 1e-4, 0.1), (Precision::F16, 1e-5, 0.02)] {
        let error = rms(step(precision).sub(exact.clone())) / rms(exact.clone());
        assert!((low..high).contains(&error), "{precision:?}: {error}");
    }
}

#[test]
fn a_config_is_read_by_its_serde_names_and_by_older_ones() {
    let new = r#"{"momentum_dtype": "bf16", "newton_schulz_steps": 7, "newton_schulz_epsilon": 0.0,
        "newton_schulz_dtype": "f16", "rounding": "master", "scale": "update_norm"}"#;
    let old = r#"{"momentum_precision": "bf16", "steps": 7, "epsilon": 0.0, "precision": "f16",
        "rounding": "master_weights", "scale": {"update_norm": {"factor": 0.2}}}"#;
    let expected = MuonConfig::new()
        .with_momentum_precision(MomentumPrecision::Bf16)
        .with_steps(7)
        .with_epsilon(0.0)
        .with_precision(Precision::F16)
        .with_rounding(crate::Rounding::MasterWeights)
        .with_scale(UpdateScale::UpdateNorm { factor: 0.2 });
    for text in [new, old] {
        assert_eq!(serde_json::from_str::<MuonConfig>(text).unwrap(), expected);
    }
    // Through Burn's `Config` trait, to a file and back.
    use burn::config::Config;
    let dir = tempfile::tempdir().unwrap();
    expected.save(dir.path().join("muon.json")).unwrap();
    assert_eq!(MuonConfig::load(dir.path().join("muon.json")).unwrap(), expected);
    assert!(expected.to_string().contains(r#""momentum_dtype": "bf16""#));
}

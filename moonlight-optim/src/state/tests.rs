use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{Bytes, DType, Device, Tensor};

use super::*;
use crate::{AdamWConfig, Adaptive, Assignment, MomentumPrecision, MuonConfig, ParameterRules, Rounding, Rule};

/// The optimizer with the state of a file of these bytes.
fn load(assignment: &Assignment, bytes: Bytes) -> Result<ModuleOptimizer, StateError> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("optimizer.bpk");
    std::fs::write(&file, &bytes[..]).unwrap();
    assignment.load_module_optimizer(&[file])
}

#[derive(Module, Debug)]
struct Pair {
    first: Linear,
    second: Linear,
}

fn pair(width: usize) -> Pair {
    let device = &Device::default().autodiff();
    Pair {
        first: LinearConfig::new(width, 5).init(device),
        second: LinearConfig::new(5, 3).with_bias(false).init(device),
    }
}

fn assign(pair: &Pair, muon: bool) -> Assignment {
    let rules = if muon {
        ParameterRules::muon_except(Vec::<String>::new(), MuonConfig::new(), AdamWConfig::new())
    } else {
        ParameterRules::adamw(AdamWConfig::new())
    };
    rules.assign(pair).unwrap()
}

fn step(optimizer: &mut ModuleOptimizer, pair: Pair, power: i32) -> Pair {
    let [width, _] = pair.first.weight.dims();
    let x = Tensor::<2>::ones([2, width], &Device::default().autodiff()).cumsum(0);
    let loss = pair.second.forward(pair.first.forward(x)).powi_scalar(power).mean();
    let grads = GradientsParams::from_grads(loss.backward(), &pair);
    optimizer.step(0.01, pair, grads)
}

fn bits(pair: &Pair) -> Vec<Vec<u32>> {
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
    vec![
        bits(pair.first.weight.val().into_data().iter::<f32>().collect()),
        bits(pair.first.bias.as_ref().unwrap().val().into_data().iter::<f32>().collect()),
        bits(pair.second.weight.val().into_data().iter::<f32>().collect()),
    ]
}

/// The same values under new `ParamId`s, as after loading a checkpoint in a new process.
fn with_new_ids(old: &Pair) -> Pair {
    fn copy(old: &Linear) -> Linear {
        let [inputs, outputs] = old.weight.dims();
        let device = &Device::default().autodiff();
        let mut new = LinearConfig::new(inputs, outputs).with_bias(old.bias.is_some()).init(device);
        new.weight = new.weight.map(|_| Tensor::from_inner(old.weight.val().inner()).require_grad());
        if let (Some(to), Some(from)) = (new.bias.take(), &old.bias) {
            new.bias = Some(to.map(|_| Tensor::from_inner(from.val().inner()).require_grad()));
        }
        new
    }
    Pair { first: copy(&old.first), second: copy(&old.second) }
}

#[test]
fn a_resumed_run_continues_bit_for_bit_under_new_ids() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("optimizer.bpk");
    let mut model = pair(4);
    let mut optimizer = assign(&model, true).to_module_optimizer();
    for _ in 0..3 {
        model = step(&mut optimizer, model, 2);
    }
    optimizer.save(&file).unwrap();
    let mut resumed = with_new_ids(&model);
    assert_ne!(resumed.first.weight.id, model.first.weight.id);
    assert_eq!(bits(&resumed), bits(&model));
    let mut restored = assign(&resumed, true).load_module_optimizer(&[&file]).unwrap();
    let mut from_bytes = load(&assign(&resumed, true), optimizer.into_bytes().unwrap()).unwrap();
    let mut twin = resumed.clone();
    for _ in 0..3 {
        model = step(&mut optimizer, model, 3);
        resumed = step(&mut restored, resumed, 3);
        twin = step(&mut from_bytes, twin, 3);
        assert_eq!(bits(&resumed), bits(&model));
        assert_eq!(bits(&twin), bits(&model));
    }
}

/// The pair with weights in bf16 and without biases.
fn in_bf16(pair: Pair) -> Pair {
    let cast = |mut layer: Linear| {
        let half = |tensor: Tensor<2>| Tensor::from_inner(tensor.inner().cast(DType::BF16)).require_grad();
        layer.weight = layer.weight.map(half);
        layer.bias = None;
        layer
    };
    Pair { first: cast(pair.first), second: cast(pair.second) }
}

/// A step of a pair in bf16.
fn bf16_step(optimizer: &mut ModuleOptimizer, lr: f64, pair: Pair) -> Pair {
    let x = Tensor::<2>::ones([2, 4], &Device::default().autodiff()).cumsum(0).cast(DType::BF16);
    let loss = pair.second.forward(pair.first.forward(x)).square().mean();
    let grads = GradientsParams::from_grads(loss.backward(), &pair);
    optimizer.step(lr, pair, grads)
}

#[test]
fn bf16_weights_resume_bit_for_bit_with_their_f32_state() {
    let step = |optimizer: &mut ModuleOptimizer, pair: Pair| bf16_step(optimizer, 0.01, pair);
    let bits = |pair: &Pair| -> Vec<f32> { pair.second.weight.val().into_data().iter::<f32>().collect() };
    for muon in [true, false] {
        let mut model = in_bf16(pair(4));
        let mut optimizer = assign(&model, muon).to_module_optimizer();
        for _ in 0..3 {
            model = step(&mut optimizer, model);
        }
        let mut resumed = in_bf16(with_new_ids(&model));
        let mut restored = load(&assign(&resumed, muon), optimizer.into_bytes().unwrap()).unwrap();
        for _ in 0..3 {
            model = step(&mut optimizer, model);
            resumed = step(&mut restored, resumed);
            assert_eq!(bits(&resumed), bits(&model));
        }
    }
}

/// This behavior of Burn is why the module exists. If this test fails, the module may no longer be needed.
#[test]
fn burns_own_load_drops_the_state_under_new_ids() {
    let mut model = pair(4);
    let mut optimizer = assign(&model, true).to_module_optimizer();
    model = step(&mut optimizer, model, 2);
    let bytes = optimizer.into_bytes().unwrap();
    let resumed = with_new_ids(&model);
    let mut restored = assign(&resumed, true).to_module_optimizer().from_bytes(bytes).unwrap();
    assert_ne!(bits(&step(&mut restored, resumed, 3)), bits(&step(&mut optimizer, model, 3)));
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let mut model = pair(4);
    let mut optimizer = assign(&model, true).to_module_optimizer();
    model = step(&mut optimizer, model, 2);
    let bytes = || optimizer.into_bytes().unwrap();
    let message = |result: Result<ModuleOptimizer, StateError>| result.err().unwrap().to_string();

    assert_eq!(
        message(load(&assign(&model, false), bytes())),
        "the optimizer state of `first.weight` is of another optimizer than that of its group `adamw`"
    );
    assert_eq!(
        message(load(&assign(&pair(6), true), bytes())),
        "the optimizer state of `first.weight` has shape [4, 5], expected [6, 5]"
    );
    let rules = ParameterRules::muon_except(Vec::<String>::new(), MuonConfig::new(), AdamWConfig::new());
    let linear = rules.assign(&pair(4).first).unwrap();
    assert_eq!(
        message(load(&linear, bytes())),
        "the optimizer state contains `first.bias`, which the model does not train"
    );
    let mut truncated = bytes().to_vec();
    truncated.truncate(truncated.len() - 8);
    let error = message(load(&assign(&model, true), Bytes::from_bytes_vec(truncated)));
    assert!(error.starts_with("the optimizer state cannot be read"), "{error}");
    // The file ends with the values of the last tensor.
    let mut infinite = bytes().to_vec();
    let end = infinite.len();
    infinite[end - 4..].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
    let error = message(load(&assign(&model, true), Bytes::from_bytes_vec(infinite)));
    assert!(error.ends_with("contains NaN or infinity"), "{error}");
    let missing = assign(&model, true).load_module_optimizer(&["/nowhere/optimizer.bpk"]);
    assert!(message(missing).contains("/nowhere/optimizer.bpk"));
}

/// Saved with some settings and loaded with others: missing second moments start anew, unused ones are dropped.
#[test]
fn a_state_loads_into_other_dtypes_variants_and_groups() {
    let save = |muon: &MuonConfig, model: &Pair| {
        let rules = ParameterRules::muon_except(Vec::<String>::new(), muon.clone(), AdamWConfig::new());
        let mut optimizer = rules.assign(model).unwrap().to_module_optimizer();
        let model = step(&mut optimizer, model.clone(), 2);
        (optimizer, model)
    };
    // Other groups: each layer's matrix has one of its own.
    let load = |muon: &MuonConfig, model: &Pair, bytes: Bytes| {
        let assignment = ParameterRules::new()
            .group("first", muon.clone())
            .group("second", muon.clone())
            .group("rest", AdamWConfig::new())
            .rule(Rule::to("first").path("first.weight"))
            .rule(Rule::to("second").path("second.weight"))
            .rule(Rule::to("rest").rank(1..=1))
            .assign(model)
            .unwrap();
        load(&assignment, bytes)
    };
    let start = pair(4);
    let plain = MuonConfig::new();
    let bf16 = MuonConfig::new().with_momentum_precision(MomentumPrecision::Bf16);
    let nor = MuonConfig::new().with_adaptive(Adaptive::nor_muon());
    let ada = MuonConfig::new().with_adaptive(Adaptive::ada_muon());
    for (from, to) in [(&plain, &bf16), (&bf16, &plain), (&plain, &nor), (&nor, &plain), (&nor, &nor), (&ada, &ada)] {
        let (optimizer, model) = save(from, &start);
        let mut restored = load(to, &model, optimizer.into_bytes().unwrap()).unwrap();
        let after = step(&mut restored, model, 3);
        assert!(bits(&after).iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()));
        // The state has the tensors that the new settings keep.
        let (native, _) = save(to, &start);
        assert_eq!(restored.to_record().len(), native.to_record().len());
    }
    let (optimizer, model) = save(&nor, &start);
    assert_eq!(
        load(&ada, &model, optimizer.into_bytes().unwrap()).err().unwrap().to_string(),
        "the optimizer state of `first.weight` has shape [1, 1, 5], expected [1, 4, 5]"
    );
}

#[test]
fn master_weights_are_saved_and_loaded() {
    let step = |optimizer: &mut ModuleOptimizer, pair: Pair| bf16_step(optimizer, 1e-4, pair);
    let values = |pair: &Pair| -> Vec<f32> { pair.second.weight.val().into_data().iter::<f32>().collect() };
    let rules = ParameterRules::new()
        .group("muon", MuonConfig::new().with_rounding(Rounding::MasterWeights))
        .group("adamw", AdamWConfig::new().with_rounding(Rounding::MasterWeights))
        .rule(Rule::to("muon").path("first.weight"))
        .rule(Rule::to("adamw").path("second.weight"));
    let mut model = in_bf16(pair(4));
    let mut optimizer = rules.assign(&model).unwrap().to_module_optimizer();
    for _ in 0..3 {
        model = step(&mut optimizer, model);
    }
    let mut resumed = in_bf16(with_new_ids(&model));
    let bytes = optimizer.into_bytes().unwrap();
    let mut restored = load(&rules.assign(&resumed).unwrap(), bytes).unwrap();
    for _ in 0..30 {
        model = step(&mut optimizer, model);
        resumed = step(&mut restored, resumed);
        assert_eq!(values(&resumed), values(&model));
    }
}

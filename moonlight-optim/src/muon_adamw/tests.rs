//! One rank, compared with Burn's optimizer.

use std::path::PathBuf;

use burn::module::{ModuleMapper, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::ModuleOptimizer;
use burn::tensor::{DType, Device, Distribution};

use super::*;
use crate::{AdamWConfig, Blocks, GroupOptimizer, MuonConfig, ParameterRules, Rounding, Rule};

fn build(assignment: &Assignment) -> MuonAdamW {
    assignment.build(OptimizerOptions::new()).unwrap()
}

/// The two kinds of optimizer, each loaded from the file that the other saved.
fn swapped(assignment: &Assignment, plain: &ModuleOptimizer, batched: &MuonAdamW) -> (ModuleOptimizer, MuonAdamW) {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| -> PathBuf { dir.path().join(name) };
    plain.save(file("plain.bpk")).unwrap();
    batched.save(file("batched.bpk")).unwrap();
    let back = assignment.load_module_optimizer(&[file("batched.bpk")]).unwrap();
    (back, assignment.load(&[file("plain.bpk")], OptimizerOptions::new()).unwrap())
}

#[derive(Module, Debug)]
struct Net {
    first: Vec<Linear>,
    experts: Param<Tensor<3>>,
    narrow: Linear,
}

fn net() -> Net {
    let device = &Device::default().autodiff();
    let experts = Tensor::<3>::random([3, 6, 6], Distribution::Default, device);
    Net {
        first: (0..4).map(|_| LinearConfig::new(6, 6).init(device)).collect(),
        experts: Param::from_tensor(experts),
        narrow: LinearConfig::new(6, 4).init(device),
    }
}

fn rules(adaptive: Adaptive) -> ParameterRules {
    ParameterRules::new()
        .group("muon", GroupOptimizer::from(MuonConfig::new().with_adaptive(adaptive)).with_learning_rate_factor(0.5))
        .group("adamw", AdamWConfig::new())
        .rule(Rule::to("muon").path("first.3.weight").blocks(Blocks::Columns(vec![2])))
        .rule(Rule::to("muon").rank(2..=3))
        .rule(Rule::to("adamw").rank(1..=1))
}

fn gradients(net: &Net, seed: u64) -> GradientsParams {
    let device = &Device::default().autodiff();
    let x = Tensor::<2>::ones([3, 6], device).cumsum(0).mul_scalar(0.1 * seed as f64 + 0.1);
    let mut hidden = x.clone();
    for layer in &net.first {
        hidden = layer.forward(hidden).tanh();
    }
    let experts = hidden.clone().unsqueeze::<3>().matmul(net.experts.val().narrow(0, 0, 1)).sum();
    let loss = net.narrow.forward(hidden).powi_scalar(2).mean().add(experts.clone().mul(experts));
    GradientsParams::from_grads(loss.backward(), net)
}

fn values(net: &Net) -> Vec<f32> {
    let mut all = Vec::new();
    for layer in net.first.iter().chain([&net.narrow]) {
        all.extend(layer.weight.val().into_data().iter::<f32>());
        all.extend(layer.bias.as_ref().unwrap().val().into_data().iter::<f32>());
    }
    all.extend(net.experts.val().into_data().iter::<f32>());
    all
}

#[test]
fn steps_equal_those_of_burns_optimizer_bit_for_bit() {
    for adaptive in [Adaptive::Off, Adaptive::nor_muon(), Adaptive::ada_muon()] {
        let start = net();
        let assignment = rules(adaptive).assign(&start).unwrap();
        let (mut one, mut other) = (start.clone(), start.clone());
        let (mut plain, mut batched) = (assignment.to_module_optimizer(), build(&assignment));
        for seed in 0..4 {
            let taken = gradients(&one, seed);
            one = plain.step(0.05, one, taken);
            let taken = gradients(&other, seed);
            other = batched.step(0.05, other, taken).unwrap();
            assert_eq!(values(&one), values(&other), "{adaptive:?} step {seed}");
        }
        assert_ne!(values(&one), values(&start));

        // Each loads what the other saved.
        let (mut back, mut other_back) = swapped(&assignment, &plain, &batched);
        for seed in 4..6 {
            let taken = gradients(&one, seed);
            one = back.step(0.05, one, taken);
            let taken = gradients(&other, seed);
            other = other_back.step(0.05, other, taken).unwrap();
            assert_eq!(values(&one), values(&other), "{adaptive:?} step {seed}");
        }
    }
}

#[test]
fn either_kind_keeps_saves_and_loads_master_weights() {
    let narrow = |net: Net| {
        struct Narrow;
        impl ModuleMapper for Narrow {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                param.map(|tensor| tensor.cast(DType::BF16).detach().require_grad())
            }
        }
        net.map(&mut Narrow)
    };
    let wide = net();
    let start = narrow(wide.clone());
    let taken = |seed: u64| {
        let mut narrow = GradientsParams::new();
        let all = gradients(&wide, seed);
        struct Cast<'a>(GradientsParams, &'a mut GradientsParams);
        impl ModuleVisitor for Cast<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                if let Some(gradient) = self.0.remove::<D>(param.id) {
                    self.1.register(param.id, gradient.cast(DType::BF16));
                }
            }
        }
        wide.visit(&mut Cast(all, &mut narrow));
        narrow
    };
    let muon = MuonConfig::new().with_rounding(Rounding::MasterWeights);
    let adamw = AdamWConfig::new().with_rounding(Rounding::MasterWeights);
    let assignment = ParameterRules::new()
        .group("muon", muon)
        .group("adamw", adamw)
        .rule(Rule::to("muon").rank(2..=3))
        .rule(Rule::to("adamw").rank(1..=1))
        .assign(&start)
        .unwrap();
    let (mut one, mut other) = (start.clone(), start.clone());
    let (mut plain, mut batched) = (assignment.to_module_optimizer(), build(&assignment));
    for seed in 0..6 {
        one = plain.step(1e-3, one, taken(seed));
        other = batched.step(1e-3, other, taken(seed)).unwrap();
        assert_eq!(values(&one), values(&other), "step {seed}");
        if seed == 2 {
            (plain, batched) = swapped(&assignment, &plain, &batched);
        }
    }
    assert_ne!(values(&one), values(&start));
}

#[test]
fn parameters_still_require_gradients_after_a_step() {
    let start = net();
    let mut batched = build(&rules(Adaptive::Off).assign(&start).unwrap());
    let taken = gradients(&start, 0);
    let stepped = batched.step(0.05, start, taken).unwrap();
    assert!(stepped.first.iter().all(|layer| layer.weight.val().is_require_grad()));
    assert!(stepped.experts.val().is_require_grad());
}

/// With the gradients of some parameters at a time, as in a backward pass that updates each layer.
#[test]
fn a_step_in_parts_equals_the_whole_step() {
    struct Split<'a> {
        from: &'a mut GradientsParams,
        parts: Vec<GradientsParams>,
    }
    impl ModuleVisitor for Split<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let Some(gradient) = self.from.remove::<D>(param.id) else { return };
            let mut part = GradientsParams::new();
            part.register(param.id, gradient);
            self.parts.push(part);
        }
    }
    let start = net();
    let assignment = rules(Adaptive::nor_muon()).assign(&start).unwrap();
    let (mut whole, mut parts, mut added) = (build(&assignment), build(&assignment), build(&assignment));
    assert!(whole.supports_partial_steps());
    let (mut one, mut other, mut third) = (start.clone(), start.clone(), start.clone());
    for seed in 0..3 {
        let taken = gradients(&one, seed);
        one = whole.step(0.05, one, taken).unwrap();
        let split = |net: &Net| {
            let mut taken = gradients(net, seed);
            let mut split = Split { from: &mut taken, parts: Vec::new() };
            net.visit(&mut split);
            split.parts
        };
        let all = split(&other);
        assert!(all.len() > 5);
        for part in all {
            other = parts.step(0.05, other, part).unwrap();
        }
        assert_eq!(values(&one), values(&other), "step {seed}");
        for part in split(&third) {
            added.add_gradients(&third, part);
        }
        third = added.apply(0.05, 1.0, third).unwrap();
        assert_eq!(values(&one), values(&third), "step {seed}");
    }
}

/// Clipping multiplies the gradient by a factor, in the gradient's own dtype.
#[test]
fn a_scaled_step_is_the_step_of_the_scaled_gradient() {
    struct ScaleBy<'a>(&'a mut GradientsParams, f64, f64);
    impl ModuleVisitor for ScaleBy<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let Some(gradient) = self.0.remove::<D>(param.id) else { return };
            self.2 += crate::distributed::sum_of_squares(gradient.clone());
            self.0.register(param.id, gradient * self.1);
        }
    }
    let start = net();
    let assignment = rules(Adaptive::Off).assign(&start).unwrap();
    let (mut one, mut other) = (start.clone(), start.clone());
    let (mut scaled, mut plain) = (build(&assignment), build(&assignment));
    for seed in 0..3 {
        let mut taken = gradients(&one, seed);
        let mut scale = ScaleBy(&mut taken, 0.3, 0.0);
        one.visit(&mut scale);
        let squares = scale.2;
        one = plain.step(0.05, one, taken).unwrap();
        let taken = gradients(&other, seed);
        scaled.add_gradients(&other, taken);
        assert_eq!(scaled.local_sum_of_squares(&other).unwrap(), squares);
        other = scaled.apply(0.05, 0.3, other).unwrap();
        assert_eq!(values(&one), values(&other), "step {seed}");
    }
}

#[test]
#[should_panic(expected = "`first.3.weight` has a gradient but no optimizer")]
fn a_module_with_another_parameter_is_refused() {
    let start = net();
    let smaller = Net { first: start.first[..3].to_vec(), ..start.clone() };
    let assignment = ParameterRules::muon_except(["narrow.*"], MuonConfig::new(), AdamWConfig::new());
    let mut optimizer = build(&assignment.assign(&smaller).unwrap());
    let taken = gradients(&start, 0);
    let _ = optimizer.step(0.05, start, taken);
}

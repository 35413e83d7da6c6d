//! The module and the gradients of the optimizer states in `fixtures/optimizer-state`. Every value is a small multiple of 1/16 or
//! 1/64, exact in bf16, and so is every sum of gradients: the input of a step has the same bits for any order of sums and any
//! number of ranks.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor, TensorData};
use moonlight_optim::{
    AdamWConfig, Adaptive, Blocks, GroupOptimizer, MomentumPrecision, MuonConfig, ParameterRules, Rounding, Rule,
};

/// Micro-batches of a step, which 1, 2, 3 or 6 ranks divide evenly.
pub(crate) const MICRO_BATCHES: usize = 6;
/// Learning rate of every step.
pub(crate) const RATE: f64 = 0.03;
/// The number of steps before the state was written, and again after it is loaded.
pub(crate) const STEPS: usize = 3;

#[derive(Module, Debug)]
pub(crate) struct Net {
    embedding: Param<Tensor<2>>,
    hidden: Vec<Param<Tensor<2>>>,
    heads: Param<Tensor<2>>,
    experts: Param<Tensor<3>>,
    gain: Param<Tensor<1>>,
}

/// Values `k * unit` with `|k| <= 40`, different for each seed.
fn pattern<const D: usize>(shape: [usize; D], seed: usize, unit: f32) -> Tensor<D> {
    let count: usize = shape.iter().product();
    let value = |i: usize| ((((i * i * 7 + i * 37 + seed * 101) ^ (seed * 13 + i)) % 81) as f32 - 40.0) * unit;
    let data = TensorData::new((0..count).map(value).collect::<Vec<f32>>(), shape);
    Tensor::from_data(data, (&Device::default(), DType::F32))
}

fn parameter<const D: usize>(shape: [usize; D], seed: usize, dtype: DType) -> Param<Tensor<D>> {
    Param::from_tensor(Tensor::from_inner(pattern(shape, seed, 1.0 / 64.0).cast(dtype)).require_grad())
}

/// The module before its first step.
pub(crate) fn net(dtype: DType) -> Net {
    Net {
        embedding: parameter([7, 4], 1, dtype),
        hidden: (0..3).map(|index| parameter([4, 6], 2 + index, dtype)).collect(),
        heads: parameter([4, 8], 6, dtype),
        experts: parameter([3, 4, 6], 7, dtype),
        gain: parameter([6], 8, dtype),
    }
}

/// Muon for matrices except the embedding, `heads` in blocks of four columns.
pub(crate) fn rules(muon: MuonConfig, adamw: AdamWConfig) -> ParameterRules {
    ParameterRules::new()
        .group("muon", GroupOptimizer::from(muon).with_learning_rate_factor(0.5))
        .group("adamw", adamw)
        .rule(Rule::to("adamw").path("embedding"))
        .rule(Rule::to("muon").path("heads").blocks(Blocks::Columns(vec![4])))
        .rule(Rule::to("muon").rank(2..=3))
        .rule(Rule::to("adamw").rank(1..=1))
}

/// f32 masters of bf16 parameters, bf16 momentum, and NorMuon's second moments or none.
pub(crate) fn half_precision(adaptive: Adaptive) -> ParameterRules {
    let muon = MuonConfig::new()
        .with_rounding(Rounding::MasterWeights)
        .with_momentum_precision(MomentumPrecision::Bf16)
        .with_adaptive(adaptive);
    rules(muon, AdamWConfig::new().with_rounding(Rounding::MasterWeights))
}

/// The sum of the gradients of some of a step's micro-batches, in the parameters' dtype.
pub(crate) fn gradients(net: &Net, step: usize, micro_batches: std::ops::Range<usize>) -> GradientsParams {
    struct Register {
        gradients: GradientsParams,
        place: usize,
        step: usize,
        micro_batches: std::ops::Range<usize>,
    }
    impl ModuleVisitor for Register {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val();
            let (shape, dtype) = (value.dims(), value.dtype());
            let of = |micro| pattern(shape, self.place * 50 + self.step * 7 + micro * 3 + 11, 1.0 / 16.0);
            let sum = self.micro_batches.clone().map(of).reduce(|sum, more| sum + more);
            self.gradients.register(param.id, sum.unwrap().cast(dtype));
            self.place += 1;
        }
    }
    let mut register = Register { gradients: GradientsParams::new(), place: 0, step, micro_batches };
    net.visit(&mut register);
    register.gradients
}

/// Every value of every parameter.
pub(crate) fn values(net: &Net) -> Vec<f32> {
    struct All(Vec<f32>);
    impl ModuleVisitor for All {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.extend(param.val().inner().into_data().iter::<f32>());
        }
    }
    let mut all = All(Vec::new());
    net.visit(&mut all);
    all.0
}

/// The module with other values, in the order of [`values`].
pub(crate) fn with_values(net: Net, values: &[f32]) -> Net {
    struct Fill<'a>(&'a [f32]);
    impl ModuleMapper for Fill<'_> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|old| {
                let (shape, dtype) = (old.dims(), old.dtype());
                let (own, rest) = self.0.split_at(shape.iter().product());
                self.0 = rest;
                let data = TensorData::new(own.to_vec(), shape);
                let new = Tensor::<D>::from_data(data, (&Device::default(), DType::F32)).cast(dtype);
                Tensor::from_inner(new).require_grad()
            })
        }
    }
    net.map(&mut Fill(values))
}

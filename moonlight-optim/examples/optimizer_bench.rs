//! Whole optimizer steps of a module, Muon and AdamW, on one rank, without forward and backward:
//! `cargo run --release --example optimizer_bench -- [STEPS] [bf16]`.
//!
//! 8 layers, each with four [512, 512] and two [512, 1408] matrices, a stack of 16 [512, 352] and a norm, and an embedding of
//! 8,000 tokens. Prints one line of JSON: seconds of each step after the first, and the peak memory.

use std::time::Instant;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Distribution, Tensor};
use moonlight_optim::{AdamWConfig, MuonConfig, OptimizerOptions, ParameterRules, Rounding, Rule};

#[derive(Module, Debug)]
struct Layer {
    attention: Vec<Param<Tensor<2>>>,
    mlp: Vec<Param<Tensor<2>>>,
    experts: Param<Tensor<3>>,
    norm: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct Net {
    embedding: Param<Tensor<2>>,
    layers: Vec<Layer>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let steps: usize = arguments.next().map_or(Ok(10), |steps| steps.parse())?;
    let dtype = if arguments.next().as_deref() == Some("bf16") { DType::BF16 } else { DType::F32 };
    let device = Device::default();
    device.seed(1);
    let mut model = net(dtype, &device);
    let muon = MuonConfig::new().with_rounding(Rounding::MasterWeights);
    let adamw = AdamWConfig::new().with_rounding(Rounding::MasterWeights);
    let rules = ParameterRules::new()
        .group("muon", muon)
        .group("adamw", adamw)
        .rule(Rule::to("adamw").path("embedding"))
        .rule(Rule::to("muon").rank(2..=3))
        .rule(Rule::to("adamw").rank(1..=1));
    let mut optimizer = rules.assign(&model)?.build(OptimizerOptions::new())?;
    let mut times = Vec::new();
    for step in 0..=steps {
        let gradients = gradients(&model);
        let start = Instant::now();
        model = optimizer.step(1e-3, model, gradients)?;
        if step > 0 {
            times.push(format!("{:.5}", start.elapsed().as_secs_f64()));
        }
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).map_or("null", str::trim);
    println!(r#"{{"seconds": [{}], "peak": "{peak}"}}"#, times.join(", "));
    Ok(())
}

fn net(dtype: DType, device: &Device) -> Net {
    fn random<const D: usize>(shape: [usize; D], dtype: DType, device: &Device) -> Param<Tensor<D>> {
        let values = Tensor::<D>::random(shape, Distribution::Normal(0.0, 0.02), device).cast(dtype);
        Param::from_tensor(Tensor::from_inner(values).require_grad())
    }
    let layer = |_| Layer {
        attention: (0..4).map(|_| random([512, 512], dtype, device)).collect(),
        mlp: (0..2).map(|_| random([512, 1408], dtype, device)).collect(),
        experts: random([16, 512, 352], dtype, device),
        norm: random([512], dtype, device),
    };
    Net { embedding: random([8000, 512], dtype, device), layers: (0..8).map(layer).collect() }
}

/// A gradient that costs next to nothing: half of each parameter.
fn gradients(model: &Net) -> GradientsParams {
    struct Register(GradientsParams);
    impl ModuleVisitor for Register {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.register(param.id, param.val().inner().mul_scalar(0.5));
        }
    }
    let mut register = Register(GradientsParams::new());
    model.visit(&mut register);
    register.0
}

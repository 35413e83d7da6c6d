//! A Muon step on the matrices of three workloads: `cargo run --release --example muon_bench -- WORKLOAD f32|bf16 [STEPS]`.
//!
//! `dense`: the 84 matrices of a dense model of 100 M parameters (12 layers, 768 wide, MLPs of 2048). `experts`: one stack of
//! 64 matrices of [2048, 1408]. `small`: 1,000 matrices of [64, 128]. Equal matrices are stepped together, by
//! `Muon::step_batch`. Prints one line of JSON; `scripts/bench/bench_muon.py` runs it side by side with PyTorch's Muon.

use std::time::Instant;

use burn::optim::Optimizer;
use burn::tensor::{Device, Distribution, Tensor};
use moonlight_optim::{MuonConfig, MuonState, Precision};

/// `(number of matrices, [rows, columns])` of a workload.
fn workload(name: &str) -> Option<Vec<(usize, [usize; 2])>> {
    match name {
        "dense" => Some(vec![(48, [768, 768]), (24, [768, 2048]), (12, [2048, 768])]),
        "experts" => Some(vec![(64, [2048, 1408])]),
        "small" => Some(vec![(1000, [64, 128])]),
        _ => None,
    }
}

/// A field of `/proc/self/status` in MiB; `None` on systems other than Linux.
fn memory(field: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024.0)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let usage = "usage: muon_bench dense|experts|small f32|bf16 [STEPS]";
    let (Some(name), Some(precision)) = (arguments.first(), arguments.get(1)) else { return Err(usage.into()) };
    let matrices = workload(name).ok_or(usage)?;
    let precision = match precision.as_str() {
        "f32" => Precision::F32,
        "bf16" => Precision::Bf16,
        _ => return Err(usage.into()),
    };
    let steps: usize = arguments.get(2).map_or(Ok(3), |steps| steps.parse())?;
    let device = Device::default();
    let muon = MuonConfig::new().with_precision(precision).build();
    let flops: f64 = matrices
        .iter()
        .map(|&(count, [rows, columns])| count as f64 * muon.newton_schulz().flops(rows, columns, true))
        .sum();

    let seconds = if name == "experts" {
        let (count, [rows, columns]) = matrices[0];
        let random = || Tensor::<3>::random([count, rows, columns], Distribution::Normal(0.0, 1.0), &device);
        let (gradient, mut held) = (random(), Some((random(), None)));
        fastest(steps, || {
            if let Some((weight, state)) = held.take() {
                held = Some(muon.step(1e-3, weight, gradient.clone(), state));
            }
        })
    } else {
        type Held = Vec<(Tensor<2>, Option<MuonState<2>>)>;
        let random = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
        let mut groups: Vec<(Vec<Tensor<2>>, Held)> = matrices
            .iter()
            .map(|&(count, shape)| {
                let gradients = (0..count).map(|_| random(shape)).collect();
                (gradients, (0..count).map(|_| (random(shape), None)).collect())
            })
            .collect();
        fastest(steps, || {
            for (gradients, held) in &mut groups {
                let parameters = held.drain(..).zip(gradients.iter());
                let batch = parameters.map(|((weight, state), gradient)| (weight, gradient.clone(), state)).collect();
                let stepped = muon.step_batch(1e-3, batch);
                held.extend(stepped.into_iter().map(|(weight, state)| (weight, Some(state))));
            }
        })
    };
    let memory = |field| memory(field).map_or("null".to_string(), |mib| format!("{mib:.0}"));
    println!(
        r#"{{"seconds": {seconds:.4}, "flops": {flops:.4e}, "peak_mib": {}, "gram": {}}}"#,
        memory("VmHWM"),
        matrices.iter().any(|&(_, [rows, columns])| muon.newton_schulz().uses_gram(rows, columns)),
    );
    Ok(())
}

/// The fastest of several runs after one to warm up, in seconds.
fn fastest(steps: usize, mut run: impl FnMut()) -> f64 {
    run();
    (0..steps)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

//! How long a Muon step takes: `cargo run --release --example newton_schulz_time [BATCH ROWS COLUMNS]`.
//!
//! Prints the time and the FLOP/s of five Newton-Schulz steps, and the time of a whole optimizer step.

use std::time::Instant;

use burn::optim::Optimizer;
use burn::tensor::{Device, Distribution, Tensor};
use moonlight_optim::{Coefficients, MuonConfig, newton_schulz};

/// The fastest of five runs after one to warm up, in seconds.
fn fastest(mut run: impl FnMut()) -> f64 {
    run();
    (0..5)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let given = std::env::args().skip(1).map(|size| size.parse()).collect::<Result<Vec<usize>, _>>()?;
    let shape @ [batch, rows, columns] = match given[..] {
        [batch, rows, columns] => [batch, rows, columns],
        [] => [32, 512, 352],
        _ => return Err("expected three sizes: BATCH ROWS COLUMNS".into()),
    };
    let device = Device::default();
    let gradient = Tensor::<3>::random(shape, Distribution::Normal(0.0, 1.0), &device);
    let seconds = fastest(|| {
        newton_schulz(gradient.clone(), &Coefficients::Report, 5);
        device.sync().ok();
    });
    let (short, long) = (rows.min(columns) as f64, rows.max(columns) as f64);
    // The Gram matrix, its square, and their product with X.
    let operations = 5.0 * batch as f64 * (4.0 * short * short * long + 2.0 * short.powi(3));
    println!("{batch} x [{rows}, {columns}], f32");
    println!("newton_schulz  {:8.1} ms  {:6.1} GFLOP/s", seconds * 1e3, operations / seconds / 1e9);

    let muon = MuonConfig::new().build();
    let mut held = Some((gradient.clone(), None));
    let seconds = fastest(|| {
        if let Some((weight, state)) = held.take() {
            held = Some(muon.step(1e-3, weight, gradient.clone(), state));
        }
        device.sync().ok();
    });
    println!("whole step     {:8.1} ms", seconds * 1e3);
    Ok(())
}

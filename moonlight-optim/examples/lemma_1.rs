//! The report's Lemma 1, measured: `cargo run --release --example lemma_1`.
//!
//! An orthogonal `[A, B]` update has an RMS of `1 / sqrt(max(A, B))` at full rank, and of `sqrt(r / (A B))` at rank `r`. For
//! gradients of full rank and of an eighth of it, prints how far the RMS of the orthogonalized update is from that, as a ratio.

use burn::tensor::{Device, Distribution, Tensor};
use moonlight_optim::{Coefficients, NewtonSchulz};

fn main() {
    let device = Device::default();
    let normal = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
    let report = NewtonSchulz::new(&Coefficients::Report, 5);
    let exact = NewtonSchulz::new(&Coefficients::PolarExpress, 12);
    println!("| A | B | rank | lemma | report, 5 steps: ratio | Polar Express, 12 steps: ratio |");
    println!("|---|---|---|---|---|---|");
    for [rows, columns] in [[64, 64], [64, 256], [256, 64], [256, 256], [128, 1024], [512, 352], [1024, 1024]] {
        let short = rows.min(columns);
        for rank in [short, short / 8] {
            let gradient = if rank == short {
                normal([rows, columns])
            } else {
                normal([rows, rank]).matmul(normal([rank, columns]))
            };
            let lemma = (rank as f64 / (rows * columns) as f64).sqrt();
            let ratio = |iteration: &NewtonSchulz| {
                let update = iteration.apply(gradient.clone().unsqueeze());
                f64::from(update.square().mean().sqrt().into_scalar::<f32>()) / lemma
            };
            println!("| {rows} | {columns} | {rank} | {lemma:.5} | {:.3} | {:.4} |", ratio(&report), ratio(&exact));
        }
    }
}

//! Five Newton-Schulz steps on the stacks of matrices of `bench-small`: `cargo bench -p moonlight-optim`.
//!
//! "elem/s" is FLOP/s. Each step counts the Gram matrix, its square and the product with `X` in full, although two of the three
//! are symmetric.

use std::time::Duration;

use burn::tensor::{Device, Distribution, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moonlight_optim::{Coefficients, newton_schulz};

const STEPS: usize = 5;

fn stacks(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("newton_schulz");
    for shape @ [batch, rows, columns] in [[32, 512, 352], [1, 512, 512], [1, 512, 1408]] {
        let (short, long) = (rows.min(columns), rows.max(columns));
        let operations = STEPS * batch * (4 * short * short * long + 2 * short.pow(3));
        group.throughput(Throughput::Elements(operations as u64));
        let gradient = Tensor::<3>::random(shape, Distribution::Normal(0.0, 1.0), &Device::default());
        let name = format!("{batch} x {rows} x {columns}");
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter_with_large_drop(|| newton_schulz(gradient.clone(), &Coefficients::Report, STEPS));
        });
    }
    group.finish();
}

fn settings() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
}

criterion_group!(name = newton_schulz_steps; config = settings(); targets = stacks);
criterion_main!(newton_schulz_steps);

//! Measurements for the benchmarks.

use std::time::Instant;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor};

/// The error of a benchmark.
pub(crate) type Failure = Box<dyn std::error::Error>;

/// The seconds of `repeats` steps, in ascending order, after a warm-up step, which also draws the parameters.
pub(crate) fn seconds(repeats: usize, mut step: impl FnMut() -> Result<(), Failure>) -> Result<Vec<f64>, Failure> {
    step()?;
    let mut seconds = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        let start = Instant::now();
        step()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds)
}

/// The median of values in ascending order.
pub(crate) fn median(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}

/// Parses a dtype.
pub(crate) fn dtype(name: &str) -> Result<DType, String> {
    match name {
        "f32" => Ok(DType::F32),
        "bf16" => Ok(DType::BF16),
        other => Err(format!("unknown dtype `{other}`: use f32 or bf16")),
    }
}

/// Casts the parameters that require a gradient to `dtype`.
pub(crate) fn cast<M: Module>(module: M, dtype: DType) -> M {
    struct Cast(DType);
    impl ModuleMapper for Cast {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if param.is_require_grad() {
                param.map(|tensor| tensor.cast(self.0).detach().require_grad())
            } else {
                param
            }
        }
    }
    if dtype == DType::F32 { module } else { module.map(&mut Cast(dtype)) }
}

/// The peak memory of the process in MiB; `None` without `/proc`.
pub(crate) fn peak_rss_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib / 1024)
}

//! What kernels do, counted: launches, bytes, operations, and how often the host waits.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;

/// How many kinds of counts a kernel has.
pub const KINDS: usize = 16;

/// What is counted while a kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Instructions of threads.
    Instructions,
    /// Bytes of global memory that threads read.
    GlobalRead,
    /// Bytes of global memory that threads write.
    GlobalWritten,
    /// Bytes of global memory that atomic operations change.
    GlobalAtomic,
    /// Bytes of shared memory that threads read.
    SharedRead,
    /// Bytes of shared memory that threads write.
    SharedWritten,
    /// Operations on f16 and bf16.
    F16,
    /// Operations on f32; a fused multiplication and addition is two.
    F32,
    /// Operations on f64.
    F64,
    /// `ex2`, `rcp`, `sqrt` and others.
    Special,
    /// Operations of matrix units on f16.
    MatrixF16,
    /// Operations of matrix units on bf16.
    MatrixBf16,
    /// Operations of matrix units on tf32.
    MatrixTf32,
    /// Operations of matrix units on int8.
    MatrixInt8,
    /// Bytes of global memory that a launch reads, each counted once, in sectors of 32 bytes. Counted if counts are written.
    DistinctRead,
    /// Bytes of global memory that a launch writes, each counted once.
    DistinctWritten,
}

const NAMES: [&str; KINDS] = [
    "instructions",
    "global_bytes_read",
    "global_bytes_written",
    "global_bytes_atomic",
    "shared_bytes_read",
    "shared_bytes_written",
    "flops_f16",
    "flops_f32",
    "flops_f64",
    "special_functions",
    "matrix_flops_f16",
    "matrix_flops_bf16",
    "matrix_flops_tf32",
    "matrix_ops_int8",
    "distinct_bytes_read",
    "distinct_bytes_written",
];

#[derive(Clone, Default)]
struct KernelCounts {
    launches: u64,
    blocks: u64,
    threads: u64,
    seconds: f64,
    kinds: [u64; KINDS],
}

#[derive(Default)]
struct All {
    kernels: BTreeMap<String, KernelCounts>,
    /// Calls of the driver by name, with the bytes that they moved.
    calls: BTreeMap<&'static str, (u64, u64)>,
}

static ALL: Mutex<All> = Mutex::new(All { kernels: BTreeMap::new(), calls: BTreeMap::new() });

fn all() -> std::sync::MutexGuard<'static, All> {
    ALL.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Adds a launch.
pub(crate) fn launch(name: &str, blocks: u64, threads: u64, seconds: f64, kinds: &[u64; KINDS]) {
    let mut all = all();
    if !all.kernels.contains_key(name) {
        all.kernels.insert(name.to_owned(), KernelCounts::default());
    }
    let Some(counts) = all.kernels.get_mut(name) else { return };
    counts.launches += 1;
    counts.blocks += blocks;
    counts.threads += threads;
    counts.seconds += seconds;
    for (sum, more) in counts.kinds.iter_mut().zip(kinds) {
        *sum += more;
    }
}

/// Adds a call of the driver that moves `bytes` or makes the host wait.
pub(crate) fn call(name: &'static str, bytes: u64) {
    let mut all = all();
    let entry = all.calls.entry(name).or_default();
    entry.0 += 1;
    entry.1 += bytes;
}

/// Forgets all counts, so that a part of a program can be counted.
pub fn reset() {
    *all() = All::default();
}

/// The count of a kernel since the start or the last `reset`.
pub fn of_kernel(name: &str, kind: Kind) -> u64 {
    all().kernels.get(name).map_or(0, |counts| counts.kinds[kind as usize])
}

/// How often the host called a function that is counted: `cuStreamSynchronize`.
pub fn of_call(name: &str) -> u64 {
    all().calls.get(name).map_or(0, |call| call.0)
}

/// All counts as JSON.
pub fn json() -> String {
    let all = all();
    let mut out = String::from("{\n  \"host\": {");
    let waits = ["cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize"];
    let total: u64 = waits.iter().filter_map(|name| all.calls.get(name)).map(|call| call.0).sum();
    let _ = write!(out, "\n    \"synchronizations\": {total}");
    for (name, (count, bytes)) in &all.calls {
        let _ = write!(out, ",\n    \"{name}\": {{\"calls\": {count}, \"bytes\": {bytes}}}");
    }
    out.push_str("\n  },\n  \"kernels\": {");
    let mut sum = KernelCounts::default();
    for (i, (name, counts)) in all.kernels.iter().enumerate() {
        let comma = if i > 0 { "," } else { "" };
        let _ = write!(out, "{comma}\n    \"{}\": ", name.replace(['"', '\\'], "'"));
        object(&mut out, counts);
        sum.launches += counts.launches;
        sum.blocks += counts.blocks;
        sum.threads += counts.threads;
        sum.seconds += counts.seconds;
        for (sum, more) in sum.kinds.iter_mut().zip(&counts.kinds) {
            *sum += more;
        }
    }
    out.push_str("\n  },\n  \"total\": ");
    object(&mut out, &sum);
    out.push_str("\n}\n");
    out
}

fn object(out: &mut String, counts: &KernelCounts) {
    let _ = write!(
        out,
        "{{\"launches\": {}, \"blocks\": {}, \"threads\": {}, \"host_seconds\": {:.6}",
        counts.launches, counts.blocks, counts.threads, counts.seconds
    );
    for (name, count) in NAMES.iter().zip(&counts.kinds) {
        let _ = write!(out, ", \"{name}\": {count}");
    }
    out.push('}');
}

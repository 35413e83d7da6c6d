//! `moonlight-convert inspect`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use moonlight_convert::{Checkpoint, companions_in};

/// Prints what a checkpoint holds; every problem goes to stderr, and any of them is a failure.
pub(crate) fn inspect(checkpoint: &Checkpoint) -> ExitCode {
    let config = checkpoint.config();
    let count = config.parameter_count();
    println!("{}", checkpoint.dir().display());
    println!("architecture   {}", config.model_type.architecture());
    println!(
        "parameters     {} in all, {} activated, {} without embeddings",
        count.total,
        count.activated,
        count.total - count.embeddings
    );
    let mut dtypes: BTreeMap<String, (usize, u64)> = BTreeMap::new();
    for (_, tensor) in checkpoint.tensors() {
        let of_dtype = dtypes.entry(format!("{:?}", tensor.dtype)).or_default();
        *of_dtype = (of_dtype.0 + 1, of_dtype.1 + tensor.bytes());
    }
    for (dtype, (tensors, bytes)) in dtypes {
        println!("dtype          {dtype}: {tensors} tensors, {bytes} bytes");
    }
    for file in checkpoint.files() {
        println!("file           {} ({} bytes)", file.name, file.bytes);
    }
    for name in companions_in(checkpoint.dir()).unwrap_or_default() {
        println!("beside         {name}");
    }
    for (reason, names) in checkpoint.skipped() {
        println!("not needed     {} tensors: {}", names.len(), reason.describe());
    }
    let problems = checkpoint.problems();
    for problem in &problems {
        eprintln!("problem: {problem}");
    }
    if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

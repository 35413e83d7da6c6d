//! `moonlight-convert inspect`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use moonlight_convert::report::{CheckpointState, Summary, unfinished_downloads};
use moonlight_convert::{Checkpoint, CheckpointError};
use serde_json::json;

/// What to look at.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// The directory.
    dir: PathBuf,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Prints what a checkpoint holds; every problem goes to stderr, and any of them is a failure.
pub(crate) fn run(arguments: &Inspect) -> Result<ExitCode, CheckpointError> {
    let Inspect { dir, json } = arguments;
    let summary = match Checkpoint::open(dir) {
        Ok(checkpoint) => checkpoint.summary()?,
        Err(error) => return unopened(dir, error, *json),
    };
    if *json {
        println!("{}", serde_json::to_string_pretty(&summary).expect("a summary is plain data"));
    } else {
        print(&summary);
    }
    Ok(if summary.state == CheckpointState::Complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A directory without a configuration or weights may still be on its way.
fn unopened(dir: &Path, error: CheckpointError, json: bool) -> Result<ExitCode, CheckpointError> {
    let unfinished = unfinished_downloads(dir);
    if json {
        let state = if unfinished.is_empty() { CheckpointState::Broken } else { CheckpointState::Downloading };
        let problems = json!([{"file": null, "problem": error.to_string()}]);
        let summary = json!({"directory": dir, "state": state, "unfinished": unfinished, "problems": problems});
        println!("{}", serde_json::to_string_pretty(&summary).expect("a summary is plain data"));
        return Ok(ExitCode::FAILURE);
    }
    if !unfinished.is_empty() {
        eprintln!("{} is still downloading: {}", dir.display(), unfinished.join(", "));
    }
    Err(error)
}

fn print(summary: &Summary) {
    let Summary { parameters, .. } = summary;
    let billions = |count: u64| format!("{count} ({:.2} B)", count as f64 / 1e9);
    println!("{}", summary.directory.display());
    println!(
        "state          {}",
        match summary.state {
            CheckpointState::Complete => "complete",
            CheckpointState::Downloading => "still downloading",
            CheckpointState::Broken => "broken",
        }
    );
    println!("architecture   {} (model_type {})", summary.architecture, summary.model_type);
    match summary.experts {
        Some([experts, chosen]) => println!("layers         {}, {experts} experts, {chosen} a token", summary.layers),
        None => println!("layers         {}, dense", summary.layers),
    }
    println!("parameters     {} in all", billions(parameters.total));
    println!("               {} activated", billions(parameters.activated));
    println!("               {} without embeddings", billions(parameters.without_embeddings));
    println!("               {} activated, without embeddings", billions(parameters.activated_without_embeddings));
    if let Some(method) = &summary.quantization {
        println!("quantised      {method}");
    }
    for dtype in &summary.dtypes {
        println!("dtype          {}: {} tensors, {} bytes", dtype.dtype, dtype.tensors, dtype.bytes);
    }
    println!("format         {}, {} tensors in {} file(s)", summary.format, summary.tensors, summary.files.len());
    for file in &summary.files {
        match (file.bytes, file.tensors) {
            (Some(bytes), Some(tensors)) => println!("file           {}: {bytes} bytes, {tensors} tensors", file.name),
            (Some(bytes), None) => println!("file           {}: {bytes} bytes, cannot be read", file.name),
            (None, _) => println!("file           {}: absent", file.name),
        }
    }
    println!("tokenizer      {}", summary.tokenizer.as_deref().unwrap_or("none"));
    for name in &summary.sidecars {
        println!("beside         {name}");
    }
    for skipped in &summary.skipped {
        println!("not needed     {} tensors: {}", skipped.tensors.len(), skipped.reason);
    }
    for name in &summary.unfinished {
        println!("on its way     {name}");
    }
    for wrong in &summary.problems {
        eprintln!("problem: {}", wrong.problem);
    }
}

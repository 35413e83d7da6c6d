//! `moonlight-convert inspect`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use moonlight_convert::report::{CheckpointState, CheckpointSummary, unfinished_downloads};
use moonlight_convert::{Checkpoint, CheckpointError};
use serde_json::json;

use super::output::{Output, note};
use crate::Failure;

/// What to look at.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The directory.
    dir: PathBuf,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Prints what a checkpoint holds; every problem goes to stderr, and any of them is a failure.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let Arguments { dir, json } = arguments;
    let summary = match Checkpoint::open(dir) {
        Ok(checkpoint) => checkpoint.summary()?,
        Err(error) => return unopened(dir, error, *json),
    };
    let mut output = Output::new();
    if *json {
        output.json(&summary);
    } else {
        print(&summary, &mut output);
    }
    output.finish()?;
    for wrong in summary.problems.iter().filter(|_| !*json) {
        note(format_args!("problem: {}", wrong.problem));
    }
    Ok(if summary.state == CheckpointState::Complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A directory without a configuration or weights may still be on its way.
fn unopened(dir: &Path, error: CheckpointError, json: bool) -> Result<ExitCode, Failure> {
    let unfinished = unfinished_downloads(dir);
    if json {
        let state = if unfinished.is_empty() { CheckpointState::Broken } else { CheckpointState::Downloading };
        let problems = json!([{"file": null, "problem": error.to_string()}]);
        let summary = json!({"directory": dir.display().to_string(), "state": state, "unfinished": unfinished, "problems": problems});
        let mut output = Output::new();
        output.json(&summary);
        output.finish()?;
        return Ok(ExitCode::FAILURE);
    }
    if !unfinished.is_empty() {
        note(format_args!("{} is still downloading: {}", dir.display(), unfinished.join(", ")));
    }
    Err(error.into())
}

fn print(summary: &CheckpointSummary, output: &mut Output) {
    let mut line = |line: std::fmt::Arguments<'_>| output.line(line);
    let CheckpointSummary { parameters, .. } = summary;
    let billions = |count: u64| format!("{count} ({:.2} B)", count as f64 / 1e9);
    line(format_args!("{}", summary.directory.display()));
    line(format_args!(
        "state          {}",
        match summary.state {
            CheckpointState::Complete => "complete",
            CheckpointState::Downloading => "still downloading",
            CheckpointState::Broken => "broken",
        }
    ));
    line(format_args!("architecture   {} (model_type {})", summary.architecture, summary.model_type));
    match summary.experts {
        Some([experts, chosen]) => {
            line(format_args!("layers         {}, {experts} experts, {chosen} a token", summary.layers))
        }
        None => line(format_args!("layers         {}, dense", summary.layers)),
    }
    line(format_args!("parameters     {} in all", billions(parameters.total)));
    line(format_args!("               {} activated", billions(parameters.activated)));
    line(format_args!("               {} without embeddings", billions(parameters.without_embeddings)));
    line(format_args!(
        "               {} activated, without embeddings",
        billions(parameters.activated_without_embeddings)
    ));
    if let Some(method) = &summary.quantization {
        line(format_args!("quantized      {method}"));
    }
    for form in &summary.quantized_forms {
        line(format_args!("               {}: {} matrices", form.form, form.tensors));
    }
    for dtype in &summary.dtypes {
        line(format_args!("dtype          {}: {} tensors, {} bytes", dtype.dtype, dtype.tensors, dtype.bytes));
    }
    line(format_args!(
        "format         {}, {} tensors in {} file(s)",
        summary.format,
        summary.tensors,
        summary.files.len()
    ));
    for file in &summary.files {
        match (file.bytes, file.tensors) {
            (Some(bytes), Some(tensors)) => {
                line(format_args!("file           {}: {bytes} bytes, {tensors} tensors", file.name))
            }
            (Some(bytes), None) => line(format_args!("file           {}: {bytes} bytes, cannot be read", file.name)),
            (None, _) => line(format_args!("file           {}: absent", file.name)),
        }
    }
    line(format_args!("tokenizer      {}", summary.tokenizer.as_deref().unwrap_or("none")));
    for name in &summary.sidecars {
        line(format_args!("beside         {name}"));
    }
    for skipped in &summary.skipped {
        let tensor = if skipped.tensors.len() == 1 { "tensor" } else { "tensors" };
        line(format_args!("not needed     {} {tensor}: {}", skipped.tensors.len(), skipped.reason));
    }
    for (reason, keys) in &summary.ignored_keys {
        line(format_args!("passed over    {} ({reason})", keys.join(", ")));
    }
    for note in &summary.notes {
        line(format_args!("note           {note}"));
    }
    for name in &summary.unfinished {
        line(format_args!("on its way     {name}"));
    }
}

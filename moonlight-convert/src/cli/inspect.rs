//! `moonlight-convert inspect`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::report::{CheckpointState, CheckpointSummary, ParameterCounts, unfinished_downloads};
use crate::{Checkpoint, CheckpointError};
use clap::Args;
use indicatif::DecimalBytes;
use serde_json::json;

use super::Failure;
use super::output::{Output, note};
use super::units::{Count, plural};

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The checkpoint's directory, a GGUF file, or a model in the Hub's cache
    dir: PathBuf,
    /// Print a JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Prints the contents of a checkpoint. Problems are printed on stderr, and make the exit code 1.
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

/// Reports a directory that cannot be opened; without a config or weights it may still be downloading.
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

/// Names in a list before the rest is only counted.
const LISTED: usize = 20;

fn print(summary: &CheckpointSummary, output: &mut Output) {
    let mut row = |label: &str, value: fmt::Arguments<'_>| output.line(format_args!("{label:<15}{value}"));
    let place = if summary.format == "gguf" { "model file" } else { "directory" };
    row(place, format_args!("{}", summary.directory.display()));
    let state = match summary.state {
        CheckpointState::Complete => "complete",
        CheckpointState::Downloading => "still downloading",
        CheckpointState::Broken => "broken",
    };
    row("state", format_args!("{state}"));
    row("architecture", format_args!("{} (model_type {})", summary.architecture, summary.model_type));
    let layers = plural(summary.layers, "layer");
    match summary.experts {
        Some([experts, per_token]) => row("layers", format_args!("{layers}, {experts} experts, {per_token} per token")),
        None => row("layers", format_args!("{layers}, dense")),
    }
    let ParameterCounts { total, activated, without_embeddings, activated_without_embeddings } = summary.parameters;
    row("parameters", format_args!("{}, {} without embeddings", Count(total), Count(without_embeddings)));
    if activated != total {
        let rest = Count(activated_without_embeddings);
        row("per token", format_args!("{}, {rest} without embeddings", Count(activated)));
    }
    if let Some(method) = &summary.quantization {
        row("quantization", format_args!("{method}"));
    }
    for form in &summary.quantized_forms {
        row("", format_args!("{}: {} matrices", form.form, form.tensors));
    }
    for dtype in &summary.dtypes {
        row(
            "dtype",
            format_args!("{}: {}, {}", dtype.dtype, plural(dtype.tensors, "tensor"), DecimalBytes(dtype.bytes)),
        );
    }
    let (tensors, files) = (plural(summary.tensors, "tensor"), plural(summary.files.len(), "file"));
    row("format", format_args!("{}, {tensors} in {files}", summary.format));
    for file in &summary.files {
        match (file.bytes, file.tensors) {
            (Some(bytes), Some(tensors)) => {
                row("file", format_args!("{}: {}, {}", file.name, DecimalBytes(bytes), plural(tensors, "tensor")));
            }
            (Some(bytes), None) => row("file", format_args!("{}: {}, damaged", file.name, DecimalBytes(bytes))),
            (None, _) => row("file", format_args!("{}: missing", file.name)),
        }
    }
    row("tokenizer", format_args!("{}", summary.tokenizer.as_deref().unwrap_or("none")));
    for name in &summary.sidecars {
        row("sidecar", format_args!("{name}"));
    }
    for skipped in &summary.skipped {
        row("ignored", format_args!("{}: {}", plural(skipped.tensors.len(), "tensor"), skipped.reason));
    }
    if !summary.ignored_files.is_empty() {
        row("ignored", format_args!("files: {}", listed(&summary.ignored_files)));
    }
    for (reason, keys) in &summary.ignored_keys {
        row("ignored", format_args!("config keys: {} ({reason})", keys.join(", ")));
    }
    for note in &summary.notes {
        row("note", format_args!("{note}"));
    }
    for name in &summary.unfinished {
        row("downloading", format_args!("{name}"));
    }
}

fn listed(names: &[String]) -> String {
    match names.len().checked_sub(LISTED) {
        None | Some(0) => names.join(", "),
        Some(more) => format!("{} and {more} more", names[..LISTED].join(", ")),
    }
}

//! `moonlight plot`.

use std::path::PathBuf;

use clap::Args;

use super::output::refuse_input;
use crate::analysis::plots::{Axis, RunComparison, plot_runs};
use crate::error::TrainError;

/// Draw a metric of several runs into one figure
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Folders of runs, or their metrics.jsonl
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The metric: loss, lr, grad_norm, tokens_per_second, or another of metrics.jsonl
    #[arg(long, default_value = "loss")]
    metric: String,
    /// The file, .svg or .png [default: METRIC.svg in the working directory]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The horizontal axis: step, tokens or seconds
    #[arg(long, default_value = "step")]
    x: Axis,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let output = arguments.output.clone().unwrap_or_else(|| format!("{}.svg", arguments.metric).into());
    refuse_input(&output, &arguments.runs)?;
    let comparison =
        RunComparison { runs: arguments.runs.clone(), metric: arguments.metric.clone(), axis: arguments.x };
    plot_runs(&comparison, &output)?;
    tracing::info!("wrote `{}`", output.display());
    Ok(())
}

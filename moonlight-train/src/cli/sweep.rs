//! `moonlight sweep`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;

use super::output::print;
use super::signals::{self, Response};
use super::{INTERRUPTED, units};
use crate::error::TrainError;
use crate::study::budget::Budget;
use crate::study::cost::Cost;
use crate::study::study_file::{SMALL_TIER, Study};
use crate::study::sweep::{SweepOptions, SweepOutcome, estimate, sweep};

/// Run a study: train every run that it compares and that is missing
///
/// A study is a TOML file with a base recipe, axes that change its keys, a key to tune and seeds. Every run that ends adds a line to
/// the study's table, `results/NAME.TIER.jsonl` next to the file. A sweep may be stopped or killed at any time: started again, it
/// trains what is missing.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The study, a TOML file
    study: PathBuf,
    /// The size of the study: `small`, or a name from the file's `[tiers]`
    #[arg(long, default_value = SMALL_TIER)]
    tier: String,
    /// The time, operations or optimizer steps after which no further run is started: 90m, 2h, 1e15flop or 20000steps [default: the
    /// study's `budget`]
    #[arg(long)]
    budget: Option<Budget>,
    /// Runs at once on the CPU [default: one for each core]
    #[arg(long, value_name = "N", conflicts_with = "devices", value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,
    /// Devices, separated by commas, with one run at a time on each: cuda:0,cuda:1
    #[arg(long, value_name = "DEVICES", value_delimiter = ',')]
    devices: Vec<String>,
    /// The command that starts each run, such as `mpirun -n 4`, for recipes with `[distributed]`
    #[arg(long, value_name = "COMMAND", default_value = "")]
    launcher: String,
    /// Print the points with their tokens and operations, and train nothing
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, TrainError> {
    let study = Study::open(&arguments.study, &arguments.tier)?;
    if arguments.dry_run {
        return print(&table(&study)?).map(|()| ExitCode::SUCCESS);
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = arguments.jobs.map_or(cores, usize::from);
    let devices = match arguments.devices.as_slice() {
        [] => vec!["cpu".to_owned(); jobs],
        devices => devices.to_vec(),
    };
    let options = SweepOptions {
        threads: (cores / devices.len()).max(1),
        devices,
        launcher: arguments.launcher.split_whitespace().map(str::to_owned).collect(),
        budget: arguments.budget.unwrap_or(study.tier.budget),
    };
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    // The first signal is passed to the runs, which write a checkpoint; the second ends the program.
    signals::handle(move |_| if flag.swap(true, Ordering::Relaxed) { Response::End } else { Response::Handled });
    let SweepOutcome { added, missing, interrupted } = sweep(&study, &options, &stop)?;
    let rest = if missing == 0 { "the study is complete".to_owned() } else { format!("{missing} runs are missing") };
    tracing::info!("added {added} runs; {rest}; table `{}`", study.table_path().display());
    Ok(if interrupted { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
}

fn table(study: &Study) -> Result<String, TrainError> {
    let points = estimate(study)?;
    let mut text =
        format!("{:<44} {:>5} {:>10} {:>12} {:>14}\n", "point", "runs", "tokens", "operations", "Newton-Schulz");
    let (mut runs, mut total) = (0, 0.0);
    for point in points {
        let names = point.point.values().map(String::as_str).collect::<Vec<_>>().join(" ");
        let Cost { tokens, flops, newton_schulz_flops } = point.cost;
        let tokens = units::count(tokens as f64);
        text += &format!("{names:<44} {:>5} {tokens:>10} {flops:>12.2e} {newton_schulz_flops:>14.2e}\n", point.runs);
        runs += point.runs;
        total += point.runs as f64 * (flops + newton_schulz_flops);
    }
    Ok(text + &format!("at least {runs} runs, {total:.2e} operations\n"))
}

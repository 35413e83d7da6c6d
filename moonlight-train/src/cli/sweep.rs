//! `moonlight sweep`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;

use super::output::print;
use super::signals::{self, Response};
use super::{INTERRUPTED, units};
use crate::error::TrainError;
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
    /// The time after which no further run is started, such as 90m, 2h or 1.5h [default: the study's `budget_hours`]
    #[arg(long, value_parser = duration)]
    budget: Option<Duration>,
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

fn duration(text: &str) -> Result<Duration, String> {
    let split = text.len() - text.chars().last().map_or(0, char::len_utf8);
    let (number, unit) = text.split_at(split);
    let seconds = match unit {
        "h" => 3600.0,
        "m" => 60.0,
        "s" => 1.0,
        _ => return Err("write a number and h, m or s, such as 2h".into()),
    };
    let number = number.parse::<f64>().ok().filter(|number| *number >= 0.0 && *number < 1e6);
    number.map(|number| Duration::from_secs_f64(number * seconds)).ok_or_else(|| "not a time".into())
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
        budget: arguments.budget.unwrap_or_else(|| Duration::from_secs_f64(study.tier.budget_hours * 3600.0)),
    };
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    // The first signal waits for the runs, which get it from the terminal as well and write a checkpoint; the second ends the program.
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
        let tokens = units::count(point.tokens as f64);
        text += &format!(
            "{names:<44} {:>5} {tokens:>10} {:>12.2e} {:>14.2e}\n",
            point.runs, point.flops, point.newton_schulz_flops
        );
        runs += point.runs;
        total += point.runs as f64 * (point.flops + point.newton_schulz_flops);
    }
    Ok(text + &format!("at least {runs} runs, {total:.2e} operations\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_have_units() {
        assert_eq!(duration("1.5h").unwrap(), Duration::from_secs(5400));
        assert_eq!(duration("90m").unwrap(), Duration::from_secs(5400));
        assert!(duration("90").is_err() && duration("").is_err() && duration("h").is_err() && duration("-1h").is_err());
    }
}

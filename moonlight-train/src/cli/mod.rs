//! The command line of `moonlight`.

mod chat;
mod completions;
mod data;
mod doctor;
mod eval;
mod generate;
mod init;
mod logging;
mod merge;
mod model;
mod old_names;
mod output;
mod plan;
mod plot;
#[cfg(test)]
mod reference;
mod report;
mod score;
#[cfg(feature = "server")]
mod serve;
mod signals;
mod spectrum;
mod sweep;
mod train;
mod units;

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use logging::Verbosity;

/// Exit code of a command that was interrupted: 128 + SIGINT.
const INTERRUPTED: u8 = 130;

const EXIT_CODES: &str = "Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted; a run that is interrupted \
in its training loop has written a checkpoint.";

/// Train and run language models of the Moonlight family
#[derive(Debug, Parser)]
#[command(name = "moonlight", version, max_term_width = 100, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: LogArguments,
}

/// How much is logged to stderr.
#[derive(Debug, Args)]
struct LogArguments {
    /// Log only warnings and errors
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Log")]
    quiet: bool,
    /// Log details, with the time since the start
    #[arg(short, long, global = true, help_heading = "Log")]
    verbose: bool,
}

impl LogArguments {
    fn verbosity(&self) -> Verbosity {
        match (self.quiet, self.verbose) {
            (true, _) => Verbosity::Quiet,
            (false, true) => Verbosity::Verbose,
            (false, false) => Verbosity::Normal,
        }
    }
}

// The doc comment of each `Arguments` is the help of its command.
#[derive(Debug, Subcommand)]
enum Command {
    Init(init::Arguments),
    Plan(plan::Arguments),
    #[command(subcommand)]
    Data(data::Command),
    Train(train::Arguments),
    Plot(plot::Arguments),
    Sweep(sweep::Arguments),
    Report(report::Arguments),
    Chat(chat::Arguments),
    Generate(generate::Arguments),
    #[cfg(feature = "server")]
    Serve(serve::Arguments),
    Score(score::Arguments),
    Eval(eval::Arguments),
    Merge(merge::Arguments),
    Spectrum(spectrum::Arguments),
    Doctor(doctor::Arguments),
    Completions(completions::Arguments),
}

/// Runs the program and returns its exit code: 0 for success, also if the reader of stdout closes it early; 1 for a failure; 2 for
/// wrong usage; 130 for an interrupted run, or a chat that was ended by Ctrl-C.
pub fn main() -> ExitCode {
    let Arguments { command, log } = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(usage) => return print_usage(&usage),
    };
    logging::install(log.verbosity());
    // A vector level that the processor lacks is an error: if it were ignored, the user would measure something else. `doctor` runs
    // and reports it.
    #[cfg(feature = "cpu")]
    if !matches!(command, Command::Doctor(_))
        && let Err(error) = moonlight_model::simd::from_environment()
    {
        tracing::error!("{error}\nhint: {}", error.hint().unwrap_or_default());
        return ExitCode::from(2);
    }
    tracing::debug!("moonlight {}, {} threads", env!("CARGO_PKG_VERSION"), rayon::current_num_threads());
    let is_run = matches!(command, Command::Train(_));
    let result = signals::install().and_then(|()| match command {
        Command::Init(arguments) => init::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Plan(arguments) => plan::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Data(command) => data::run(&command).map(|()| ExitCode::SUCCESS),
        Command::Train(arguments) => train::run(&arguments),
        Command::Plot(arguments) => plot::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Sweep(arguments) => sweep::run(&arguments),
        Command::Report(arguments) => report::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Chat(arguments) => chat::run(&arguments),
        Command::Generate(arguments) => generate::run(&arguments).map(|()| ExitCode::SUCCESS),
        #[cfg(feature = "server")]
        Command::Serve(arguments) => serve::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Score(arguments) => score::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Eval(arguments) => eval::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Merge(arguments) => merge::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Spectrum(arguments) => spectrum::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Completions(arguments) => completions::run(&arguments).map(|()| ExitCode::SUCCESS),
    });
    result.unwrap_or_else(|error| {
        if output::is_closed_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        if is_run {
            error.report()
        } else {
            error.report_without_run()
        }
        ExitCode::FAILURE
    })
}

/// Prints help and version to stdout, wrong usage to stderr.
fn print_usage(usage: &clap::Error) -> ExitCode {
    match usage.print() {
        // Help that could not be printed is a failure. Wrong usage keeps its exit code, printed or not.
        Err(error) if !usage.use_stderr() && error.kind() != ErrorKind::BrokenPipe => ExitCode::FAILURE,
        _ => u8::try_from(usage.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn options_of_earlier_versions_are_read() {
        for (command, option, value) in [
            (["plan", "r.toml"].as_slice(), old_names::GPUS, "4"),
            (&["generate", "--model", "m", "--prompt", "p"], old_names::QUANTIZE, "int8"),
        ] {
            let option = format!("--{option}");
            let arguments = ["moonlight"].iter().chain(command).copied().chain([option.as_str(), value]);
            Arguments::try_parse_from(arguments).unwrap();
        }
    }
}

//! The command line of `moonlight`.

mod chat;
mod data;
mod eval;
mod generate;
mod logging;
mod merge;
mod model;
mod output;
mod plan;
mod plot;
#[cfg(test)]
mod reference;
mod score;
mod signals;
mod spectrum;
mod train;

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Exit code of what was interrupted (128 + SIGINT); the checkpoint of a run is written.
const INTERRUPTED: u8 = 130;

/// Train and run language models of the Moonlight family.
#[derive(Debug, Parser)]
#[command(name = "moonlight", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train as a recipe says.
    Train(train::Arguments),
    /// Go on from a prompt.
    Generate(generate::Arguments),
    /// Add an adapter to the weights of its model.
    Merge(merge::Arguments),
    /// Talk to a model in its own chat template.
    Chat(chat::Arguments),
    /// Multiple choice, perplexity and exact answers, from local files.
    Eval(eval::Arguments),
    /// Curves of several runs over each other.
    Plot(plot::Arguments),
    /// Look at the data of a recipe.
    #[command(subcommand)]
    Data(data::Command),
    /// Log-probabilities of given texts or tokens.
    Score(score::Arguments),
    /// Parameters, operations and memory of a run or a model, before it is started.
    Plan(plan::Arguments),
    /// SVD entropy and stable rank of the weights, by the report's six groups.
    Spectrum(spectrum::Arguments),
}

/// Runs the program: 0 for done, also where nobody reads its output to the end, 1 for a failure, 2 for wrong usage, 130 for
/// a training that was interrupted or a chat that was left by Ctrl-C.
pub fn main() -> ExitCode {
    logging::install();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(usage) => return tell(&usage),
    };
    // A level of vector instructions that cannot be had is not replaced in silence.
    #[cfg(feature = "cpu")]
    if let Err(error) = moonlight_model::simd::from_environment() {
        tracing::error!("{error}\nhint: {}", error.hint().unwrap_or_default());
        return ExitCode::from(2);
    }
    let resumes = matches!(arguments.command, Command::Train(_));
    let result = signals::install().and_then(|()| match arguments.command {
        Command::Train(arguments) => train::run(&arguments),
        Command::Generate(arguments) => generate::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Merge(arguments) => merge::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Chat(arguments) => chat::run(&arguments),
        Command::Eval(arguments) => eval::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Plot(arguments) => plot::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Data(command) => data::run(&command).map(|()| ExitCode::SUCCESS),
        Command::Score(arguments) => score::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Plan(arguments) => plan::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Spectrum(arguments) => spectrum::run(&arguments).map(|()| ExitCode::SUCCESS),
    });
    result.unwrap_or_else(|error| {
        if output::is_closed_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        if resumes {
            error.report()
        } else {
            error.report_without_run()
        }
        ExitCode::FAILURE
    })
}

/// Prints what clap has to say: help and version on stdout, wrong usage on stderr.
fn tell(usage: &clap::Error) -> ExitCode {
    match usage.print() {
        // Help that did not arrive; the rest has an exit code of its own.
        Err(error) if !usage.use_stderr() && error.kind() != ErrorKind::BrokenPipe => ExitCode::FAILURE,
        _ => u8::try_from(usage.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from),
    }
}

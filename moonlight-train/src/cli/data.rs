//! `moonlight data`.

mod corpus;
mod inspect;

use clap::Subcommand;

use crate::error::TrainError;

/// Look at the data of a recipe, or make a corpus
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Inspect(inspect::Arguments),
    Corpus(corpus::Arguments),
}

pub(super) fn run(command: &Command) -> Result<(), TrainError> {
    match command {
        Command::Inspect(arguments) => inspect::run(arguments),
        Command::Corpus(arguments) => corpus::run(arguments),
    }
}

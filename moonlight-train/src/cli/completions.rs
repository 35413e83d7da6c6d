//! `moonlight completions`.

use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate};

use super::output::print_bytes;
use crate::error::TrainError;

/// Print a completion script for a shell
///
/// For bash: `moonlight completions bash > ~/.local/share/bash-completion/completions/moonlight`.
/// For zsh: write `_moonlight` into a directory of `$fpath`. For fish: `~/.config/fish/completions/moonlight.fish`.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let mut script = Vec::new();
    generate(arguments.shell, &mut super::Arguments::command(), "moonlight", &mut script);
    print_bytes(&script)
}

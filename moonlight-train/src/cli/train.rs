//! `moonlight train`.

use std::path::PathBuf;
use std::process::ExitCode;

use burn::train::Interrupter;
use clap::Args;
use moonlight_infer::device::Target;

use super::INTERRUPTED;
use crate::error::TrainError;
use crate::recipe::Recipe;
use crate::trainer::{self, Finished};

/// Train as a recipe says.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The recipe, a TOML file.
    recipe: PathBuf,
    /// Lay a value over the recipe's, e.g. `--set train.steps=200`; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Go on from the newest checkpoint of the run, or start where there is none.
    #[arg(long)]
    resume: bool,
    /// cpu, cuda[:N], wgpu[:N], vulkan[:N], metal, or auto for the first that this build has; over `run.device`.
    #[arg(long)]
    device: Option<String>,
    /// f32, bf16, f16, or auto: f32 on the CPU, as stored elsewhere; over `model.dtype`.
    #[arg(long)]
    dtype: Option<String>,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, TrainError> {
    let mut sets = arguments.sets.clone();
    for (key, value) in [("run.device", &arguments.device), ("model.dtype", &arguments.dtype)] {
        sets.extend(value.iter().map(|value| format!("{key}=\"{value}\"")));
    }
    let recipe = Recipe::load(&arguments.recipe, &sets)?;
    let target = Target::open(&recipe.run.device)?;
    let interrupter = stop_on_signals()?;
    let finished = trainer::train(&recipe, &target, arguments.resume, interrupter)?;
    if !finished.leads {
        return Ok(if finished.interrupted { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS });
    }
    if finished.interrupted {
        let Finished { step, checkpoint, .. } = finished;
        eprintln!("stopped behind step {step}; checkpoint `{}`; go on by `--resume`", checkpoint.display());
        return Ok(ExitCode::from(INTERRUPTED));
    }
    trainer::conclude(&recipe, &target, &finished)?;
    Ok(ExitCode::SUCCESS)
}

/// The first Ctrl-C, or request to end, stops the run behind its step; the second ends the program at once.
fn stop_on_signals() -> Result<Interrupter, TrainError> {
    let interrupter = Interrupter::new();
    let handle = interrupter.clone();
    ctrlc::set_handler(move || {
        if handle.should_stop() {
            trainer::restore_terminal();
            std::process::exit(INTERRUPTED.into());
        }
        handle.stop(Some("interrupted"));
    })
    .map_err(|error| TrainError::Stage(format!("signals cannot be handled: {error}")))?;
    Ok(interrupter)
}

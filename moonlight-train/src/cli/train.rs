//! `moonlight train`.

use std::path::PathBuf;
use std::process::ExitCode;

use burn::train::Interrupter;
use clap::Args;
use moonlight_infer::device::{ComputeDevice, Workload};

use super::INTERRUPTED;
use super::signals::{self, Response};
use crate::error::TrainError;
use crate::recipe::Recipe;
use crate::trainer::{self, Outcome};

/// Train a model by a recipe
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The recipe, a TOML file
    recipe: PathBuf,
    /// Override a value of the recipe, e.g. `--set train.steps=200`; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Resume from the newest checkpoint of the run, or start if there is none
    #[arg(long)]
    resume: bool,
    /// cpu, cuda[:N], wgpu[:N], vulkan[:N], metal, or auto for the first that this build has; overrides `run.device`
    #[arg(long)]
    device: Option<String>,
    /// f32, bf16, f16, or auto (f32 on the CPU, as stored on GPUs); overrides `model.dtype`
    #[arg(long)]
    dtype: Option<String>,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, TrainError> {
    let mut sets = arguments.sets.clone();
    for (key, value) in [("run.device", &arguments.device), ("model.dtype", &arguments.dtype)] {
        sets.extend(value.iter().map(|value| format!("{key}=\"{value}\"")));
    }
    let recipe = Recipe::load(&arguments.recipe, &sets)?;
    let target = ComputeDevice::open_for(&recipe.run.device, Workload::Training)?;
    let interrupter = stop_on_signals();
    let outcome = trainer::train(&recipe, &target, arguments.resume, &interrupter)?;
    if !outcome.interrupted {
        trainer::final_report(&recipe, outcome)?;
        return Ok(ExitCode::SUCCESS);
    }
    if outcome.trained.is_some() {
        let Outcome { step, checkpoint, .. } = outcome;
        tracing::info!("stopped after step {step}; checkpoint `{}`; resume with `--resume`", checkpoint.display());
    }
    Ok(ExitCode::from(INTERRUPTED))
}

/// During the training loop the first signal stops the run after the current step, with a checkpoint. A second signal, and any signal
/// outside the loop, end the program at once.
fn stop_on_signals() -> Interrupter {
    let interrupter = Interrupter::new();
    let handle = interrupter.clone();
    signals::handle(move |_| {
        if trainer::is_training() && !handle.should_stop() {
            handle.stop(Some("interrupted"));
            return Response::Handled;
        }
        trainer::restore_terminal();
        signals::exit(INTERRUPTED)
    });
    interrupter
}

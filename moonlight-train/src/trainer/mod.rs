//! `moonlight train`: from a recipe to a trained model.
//!
//! A run with one rank takes the same path as a run with many. The files, in the order of a run:
//!
//! * `process_group.rs`: the ranks, from the recipe or a launcher, and what happens when one fails.
//! * `setup.rs`: data, model, optimizer, and the checkpoint to resume from. `run_folder.rs` locks the run's folder,
//!   `same_run.rs` compares the run with its checkpoint, `fingerprint.rs` hashes a base model, `freeze.rs` freezes parameters.
//! * `train_loop.rs`: the loop: step, report, validate, save.
//! * `rank_trainer.rs`: what the loop calls, on one rank. `step.rs` takes a step, `backward.rs` runs its passes in stages,
//!   `step_result.rs` is what it measures, `qk_clip.rs` bounds attention logits after it, `save.rs` writes a checkpoint.
//! * `sample.rs` writes texts of the model at each validation;
//!   `run_eval.rs` evaluates before and after the run; `comm_report.rs` counts what the ranks sent; `final_report.rs` ends
//!   the run with plots, results and a sample.
//!
//! `exchange.rs` sends values other than tensors between ranks. `model_cell.rs` holds the model while a step replaces it,
//! `terminal.rs` handles the terminal under the dashboard, and `in_loop.rs` records whether an interrupt has to save first.

mod backward;
mod comm_report;
mod exchange;
mod final_report;
mod fingerprint;
mod freeze;
mod in_loop;
mod model_cell;
mod nccl;
mod outcome;
mod process_group;
mod qk_clip;
mod rank_trainer;
mod run_eval;
mod run_folder;
mod same_run;
mod sample;
mod save;
mod setup;
mod step;
mod step_error;
mod step_result;
#[cfg(unix)]
pub(crate) mod terminal;
#[cfg(not(unix))]
#[path = "terminal_other.rs"]
pub(crate) mod terminal;
#[cfg(test)]
mod tests;
mod train_loop;

use std::io::IsTerminal;

use burn::train::Interrupter;
use moonlight_infer::device::ComputeDevice;
use tracing::Level;

use crate::error::TrainError;
use crate::recipe::Recipe;

pub use backward::MemoryOptions;
pub use final_report::final_report;
pub(crate) use in_loop::is_training;
pub use outcome::{Outcome, Trained};
#[cfg(feature = "server")]
pub(crate) use run_folder::LOCK_FILE;
pub use terminal::restore as restore_terminal;

use process_group::{Display, ProcessGroup};

/// Runs the training that a recipe describes, from its start or, with `resume`, from the newest complete checkpoint of the
/// run. If the recipe or a launcher (`mpirun`, `srun`) asks for several ranks, this process runs its share of them.
///
/// The dashboard shows the metrics if stdout and stderr are a terminal that can draw it and keys can be read. Otherwise they
/// are logged, one line a step ([`tracing`], level `info`). With a subscriber that drops `info` but keeps warnings there is
/// neither. Stopping `interrupter` ends the run after the current step, with a checkpoint.
///
/// # Errors
///
/// [`TrainError`]. The checkpoints that were written before the error stay complete.
pub fn train(
    recipe: &Recipe,
    target: &ComputeDevice,
    resume: bool,
    interrupter: &Interrupter,
) -> Result<Outcome, TrainError> {
    let display = if shows_dashboard() { Display::Dashboard } else { Display::Lines };
    ProcessGroup::open(recipe)?.train(recipe, target, resume, display, interrupter)
}

/// Whether a run in this process shows its metrics on the dashboard.
pub(crate) fn shows_dashboard() -> bool {
    let terminal = std::io::stdout().is_terminal() && std::io::stderr().is_terminal() && terminal::has_keys();
    // A program that logs warnings but not `info` was asked to be quiet. One without a subscriber was not.
    let is_quiet = tracing::enabled!(Level::WARN) && !tracing::enabled!(Level::INFO);
    terminal && !is_quiet && can_draw(|name| std::env::var_os(name))
}

/// Whether the terminal understands cursor movement and colors, and the user has not turned colors off
/// (<https://no-color.org>).
fn can_draw(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> bool {
    let no_color = variable("NO_COLOR").is_some_and(|value| !value.is_empty());
    let is_capable = match variable("TERM") {
        Some(name) => !name.is_empty() && name != "dumb",
        None => cfg!(not(unix)),
    };
    is_capable && !no_color
}

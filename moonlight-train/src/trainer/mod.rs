//! `moonlight train`: from a recipe to a trained model.
//!
//! [`train`] opens the run ([`setup`]), on each of its ranks ([`process_group`]), and runs the training loop
//! ([`train_loop`]), whose steps are [`step`]. One rank takes the same path as many.

mod backward;
mod comm_report;
mod exchange;
mod final_report;
mod freeze;
mod model_cell;
mod process_group;
mod qk_clip;
mod rank_trainer;
mod run_eval;
mod save;
mod setup;
mod step;
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
use moonlight_infer::device::Target;

use crate::error::TrainError;
use crate::recipe::Recipe;

pub use backward::MemoryOptions;
pub use final_report::{Trained, final_report};
pub use terminal::restore as restore_terminal;
pub use train_loop::Outcome;

use process_group::{Display, ProcessGroup};

/// Trains as a recipe says, from its start or, with `resume`, from the newest complete checkpoint of the run. If the recipe
/// or a launcher (`mpirun`, `srun`) asks for several ranks, this process runs its share of them.
///
/// Metrics go to the dashboard if stdout and stderr are a terminal, else to the log, a line a step. Stopping `interrupter`
/// ends the run after the current step, with a checkpoint.
///
/// # Errors
///
/// [`TrainError`]. The newest checkpoint is complete in every case.
pub fn train(recipe: &Recipe, target: &Target, resume: bool, interrupter: &Interrupter) -> Result<Outcome, TrainError> {
    let terminal = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
    let display = if terminal { Display::Dashboard } else { Display::Lines };
    ProcessGroup::open(recipe)?.train(recipe, target, resume, display, interrupter)
}

//! `moonlight train`: a recipe becomes a run.

mod backward;
mod conclude;
mod freeze;
mod judge;
mod qk_clip;
mod renderer;
mod start;
mod step;
mod stepper;
mod strategy;
#[cfg(unix)]
mod terminal;
#[cfg(not(unix))]
#[path = "terminal_other.rs"]
mod terminal;
#[cfg(test)]
mod tests;
mod together;
mod trainee;
mod world;

use std::io::IsTerminal;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::data::dataset::DatasetError;
use burn::tensor::Device;
use burn::train::logger::InMemoryMetricLogger;
use burn::train::renderer::default_renderer;
use burn::train::{Interrupter, Learner, SupervisedTraining, TrainingStrategy};

use crate::device::Target;
use crate::error::TrainError;
use crate::metrics;
use crate::recipe::Recipe;

pub use backward::Sparing;
pub use conclude::conclude;
pub use start::Prepared;
pub use strategy::Finished;
pub use terminal::restore as restore_terminal;
pub use trainee::{MicroBatch, MicroOutcome, Trainee};

use strategy::{Run, StepStrategy};
use world::World;

/// Trains as a recipe says, from its start or, with `resume`, from the newest whole checkpoint of the run: alone, or where
/// the recipe or a launcher (`mpirun`, `srun`) wants several workers, as one process of theirs.
///
/// Figures go to the dashboard where stdout is a terminal, else to stderr, a line a step; `interrupter` stops the run
/// behind the step that it is in, with a checkpoint.
///
/// # Errors
///
/// [`TrainError`]. The newest checkpoint is whole in every case.
pub fn train(recipe: &Recipe, target: &Target, resume: bool, interrupter: Interrupter) -> Result<Finished, TrainError> {
    let dashboard = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
    match World::open(recipe)? {
        None => {
            let Prepared { trainee, run } = start::prepare(recipe, target, resume, !dashboard)?;
            on_stage(trainee, run, dashboard, interrupter)
        }
        Some(world) => {
            let handle = interrupter.clone();
            let lead = |trainee, run| on_stage(trainee, run, dashboard, interrupter);
            world.train(recipe, resume, !dashboard, &handle, lead)
        }
    }
}

/// Runs the loop on burn-train's stage.
fn on_stage(trainee: Trainee, run: Run, dashboard: bool, interrupter: Interrupter) -> Result<Finished, TrainError> {
    let epoch_steps = Run::epoch_steps(&run.recipe);
    let epochs = run.recipe.train.steps.div_ceil(epoch_steps) as usize;
    let starting_epoch = (run.state.step / epoch_steps) as usize;
    // burn-train wants an optimizer of its kind; the strategy steps with its own.
    let optimizer = run.assignment.to_module_optimizer();
    let of = run.recipe.run.clone();
    let strategy = Arc::new(StepStrategy::new(run));
    let training = SupervisedTraining::new(of.folder(), NoLoader::train(), NoLoader::valid())
        .with_training_strategy(TrainingStrategy::Custom(strategy.clone()))
        .with_application_logger(None)
        .with_metric_logger(InMemoryMetricLogger::default())
        .with_interrupter(interrupter.clone())
        .num_epochs(epochs)
        .label(&of.name);
    let training = if starting_epoch > 0 { training.checkpoint(starting_epoch) } else { training };
    let training = match dashboard {
        true => {
            terminal::remember();
            training.renderer(default_renderer(interrupter, None))
        }
        false => training.renderer(Box::new(renderer::Silent)),
    };
    let learner = Learner::new(trainee, optimizer, 0.0);
    let launched = catch_unwind(AssertUnwindSafe(|| metrics::register(training).launch(learner)));
    let result = match launched {
        Ok(result) => result,
        // The dashboard's own way to end a run at once, chosen by the user.
        Err(panic) if panic.downcast_ref::<&str>().is_some_and(|text| text.contains("user input")) => {
            return Err(TrainError::Killed);
        }
        Err(panic) => resume_unwind(panic),
    };
    drop(result.renderer); // the dashboard gives the terminal back
    if let Some(error) = result.error {
        return Err(TrainError::Stage(error.to_string()));
    }
    strategy.take_outcome().unwrap_or_else(|| Err(TrainError::Stage("the loop did not run".into())))
}

/// Stands where burn-train wants a data loader. Its loaders count the items of an epoch; the strategy reads its own
/// stream, which can be resumed in the middle.
struct NoLoader;

impl NoLoader {
    fn train() -> Arc<dyn DataLoader<MicroBatch>> {
        Arc::new(Self)
    }

    fn valid() -> Arc<dyn DataLoader<moonlight_model::LmBatch>> {
        Arc::new(Self)
    }
}

impl<T: Send + 'static> DataLoader<T> for NoLoader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<T> + 'a> {
        Box::new(NoItems(PhantomData))
    }

    fn num_items(&self) -> usize {
        0
    }

    fn to_device(&self, _device: &Device) -> Arc<dyn DataLoader<T>> {
        Arc::new(Self)
    }

    fn slice(&self, _start: usize, _end: usize) -> Arc<dyn DataLoader<T>> {
        Arc::new(Self)
    }
}

struct NoItems<T>(PhantomData<fn() -> T>);

impl<T> Iterator for NoItems<T> {
    type Item = Result<T, DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        None
    }
}

impl<T> DataLoaderIterator<T> for NoItems<T> {
    fn progress(&self) -> Progress {
        Progress { items_processed: 0, items_total: 0, unit: None }
    }
}

//! The training loop.

use burn::train::Interrupter;
use moonlight_optim::distributed::BytesSent;

use super::comm_report::comm_report;
use super::outcome::Outcome;
use super::rank_trainer::RankTrainer;
use crate::error::TrainError;
use crate::metrics::Reporter;

/// Trains from the trainer's current step to the last one of its recipe, or until `interrupter` is stopped, and saves.
///
/// Every rank runs this loop, and all of them must take the same branches: a collective waits for every rank, so a rank that
/// skips one leaves the others waiting.
pub(super) fn train_loop(
    trainer: &mut RankTrainer,
    reporter: &mut dyn Reporter,
    interrupter: &Interrupter,
) -> Result<Outcome, TrainError> {
    let settings = trainer.recipe.train.clone();
    let first = trainer.state.step;
    let (mut valid_loss, mut saved) = (None, None);
    let mut sent = BytesSent::default();

    // Only the first rank of a process sees the user's interrupt, so the ranks agree before each step whether to stop.
    while trainer.state.step < settings.steps && !trainer.any_rank_stops(interrupter)? {
        reporter.begin_step();
        let before = trainer.communicator().bytes_sent();
        let metrics = trainer.step()?;
        sent = sent + (trainer.communicator().bytes_sent() - before); // without validations and checkpoints
        reporter.report(&metrics)?;

        // `state.step` counts from 1 here: "every 100" validates after the hundredth step and not after the 101st.
        let step = trainer.state.step;
        let is_due = |every: u64| step == settings.steps || (every > 0 && step.is_multiple_of(every));
        if is_due(settings.validate_every) {
            if let Some(metrics) = trainer.validate()? {
                valid_loss = metrics.loss;
                reporter.report(&metrics)?;
            }
            trainer.write_sample();
        }
        // After the validation, so that the checkpoint records the best loss, and `keep_best` keeps the right one.
        saved = is_due(settings.checkpoint_every).then(|| trainer.save()).transpose()?;
    }

    // The last step is not saved yet if the run was interrupted, or was resumed with no step left.
    let checkpoint = saved.map_or_else(|| trainer.save(), Ok)?;
    let comm_report = match trainer.distributed {
        true => Some(comm_report(&trainer.optimizer, &trainer.model, sent, trainer.state.step - first)?),
        false => None,
    };
    reporter.finish()?;
    Ok(Outcome {
        step: trainer.state.step,
        tokens: trainer.state.tokens,
        valid_loss,
        interrupted: trainer.state.step < settings.steps,
        checkpoint,
        comm_report,
        trained: None,
    })
}

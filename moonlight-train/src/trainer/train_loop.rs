//! The training loop.

use burn::train::Interrupter;
use moonlight_optim::distributed::BytesSent;

use super::comm_report::comm_report;
use super::outcome::Outcome;
use super::rank_trainer::RankTrainer;
use crate::error::TrainError;
use crate::metrics::Reporter;

/// Trains from the trainer's step to the last one of its recipe, or until `interrupter` is stopped, and saves.
///
/// This is the loop of one rank. With several, each runs it and all of them do the same at each line.
pub(super) fn train_loop(
    trainer: &mut RankTrainer,
    reporter: &mut dyn Reporter,
    interrupter: &Interrupter,
) -> Result<Outcome, TrainError> {
    let settings = trainer.recipe.train.clone();
    let first = trainer.state.step;
    let (mut valid_loss, mut saved) = (None, None);
    let mut sent = BytesSent::default();

    // All ranks agree before each step whether to stop: one that left the loop alone would leave the others in a collective.
    while trainer.state.step < settings.steps && !trainer.any_rank_stops(interrupter)? {
        reporter.begin_step();
        let before = trainer.communicator().bytes_sent();
        let metrics = trainer.step()?;
        sent = sent + (trainer.communicator().bytes_sent() - before); // of steps alone, not of validations and checkpoints
        reporter.report(&metrics)?;

        // Counted from 1, so that step 100 of "every 100" is the hundredth.
        let step = trainer.state.step;
        let is_due = |every: u64| step == settings.steps || (every > 0 && step.is_multiple_of(every));
        if is_due(settings.validate_every)
            && let Some(metrics) = trainer.validate()?
        {
            valid_loss = metrics.loss;
            reporter.report(&metrics)?;
        }
        // After the validation, which may have found the best loss so far: the checkpoint records it.
        saved = is_due(settings.checkpoint_every).then(|| trainer.save()).transpose()?;
    }

    // An interrupted run saves where it is; one that resumed after its last step saves again.
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

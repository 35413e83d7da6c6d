//! The end of a run: plots, its validation loss next to that of a bigram model, evaluation, and a sample.

use std::borrow::Cow;
use std::io::{IsTerminal, Write};

use burn::module::Module;
use moonlight_convert::printable_lines;

use super::outcome::{Outcome, Trained};
use super::run_eval::{self, run_eval};
use super::sample::sample_text;
use crate::analysis::plots::write_plots;
use crate::error::TrainError;
use crate::metrics::peak_memory_mib;
use crate::recipe::Recipe;

/// The largest vocabulary for which the bigram model is counted; beyond it most pairs are never seen.
const BIGRAM_VOCAB: usize = 4096;

/// Draws the plots, logs the results of the run, and prints a sample of the trained model to stdout. Does nothing in a
/// process without rank 0.
///
/// The run is already saved, so a plot or sample that cannot be written is a warning and not an error.
///
/// # Errors
///
/// [`TrainError`] for a model that cannot be evaluated or that generates nothing.
pub fn final_report(recipe: &Recipe, outcome: Outcome) -> Result<(), TrainError> {
    let Some(Trained { model, dataset, tokenizer, .. }) = outcome.trained else { return Ok(()) };
    let folder = recipe.run.folder();
    if recipe.train.plots
        && let Err(error) = write_plots(&folder.join("metrics.jsonl"), &folder.join("plots"))
    {
        tracing::warn!("the plots cannot be drawn: {error}");
    }
    tracing::info!("finished {} steps, {} tokens", outcome.step, outcome.tokens);
    if let Some(report) = &outcome.comm_report {
        tracing::info!("{report}");
    }
    if let Some(peak) = peak_memory_mib() {
        tracing::info!("peak memory: {peak:.0} MiB");
    }
    let model = model.valid();
    if let Some(loss) = outcome.valid_loss {
        let bigram = if model.config().vocab_size <= BIGRAM_VOCAB { dataset.bigram() } else { None };
        let baseline = bigram.map(|bigram| format!("; a bigram model of the same text: {bigram:.4}"));
        tracing::info!("validation loss: {loss:.4}{}", baseline.unwrap_or_default());
    }
    tracing::info!("checkpoint: `{}`", outcome.checkpoint.display());
    if let Some(results) = run_eval(recipe, &model, tokenizer.as_ref())? {
        run_eval::record(&folder, "after", results)?;
    }
    let sample = &recipe.sample;
    if let Some(tokenizer) = tokenizer.filter(|_| !sample.prompt.is_empty()) {
        let text = sample_text(&model, &tokenizer, sample)?;
        tracing::info!("sample:");
        let mut stdout = std::io::stdout();
        // A model may generate escape sequences, which a terminal would execute; a file gets the text unchanged.
        let shown = if stdout.is_terminal() { printable_lines(&text) } else { Cow::Borrowed(text.as_str()) };
        let written = writeln!(stdout, "{}{shown}", sample.prompt).and_then(|()| stdout.flush());
        if let Err(error) = written {
            tracing::warn!("the sample cannot be written to stdout: {error}");
        }
    }
    Ok(())
}

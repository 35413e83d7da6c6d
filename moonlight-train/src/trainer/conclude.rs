//! What a finished run shows: its validation loss beside that of a bigram model, plots, and a sample.

use std::io::Write;

use super::judge::{self, judge};
use super::strategy::Finished;
use crate::analysis::plots::write_plots;
use crate::data::Dataset;
use crate::device::{self, Target};
use crate::error::TrainError;
use crate::generate::{Sampling, generate};
use crate::metrics::peak_memory_mib;
use crate::recipe::{NO_TOKENIZER, Recipe};
use crate::tokenizer::Tokenizer;
use moonlight_infer::load_model;

/// The largest vocabulary that a table of bigrams is counted for.
const BIGRAM_VOCAB: usize = 4096;

/// Draws the plots, prints the figures of the run, and lets the model of its last checkpoint write.
///
/// # Errors
///
/// [`TrainError`]; the run itself is finished and saved.
pub fn conclude(recipe: &Recipe, target: &Target, finished: &Finished) -> Result<(), TrainError> {
    let folder = recipe.run.folder();
    if recipe.train.plots {
        write_plots(&folder.join("metrics.jsonl"), &folder.join("plots"))?;
    }
    let tokenizer = match recipe.data.tokenizer.as_str() {
        NO_TOKENIZER => None,
        name => Some(Tokenizer::open(name)?),
    };
    eprintln!("finished: {} steps, {} tokens", finished.step, finished.tokens);
    if let Some(account) = &finished.account {
        eprintln!("{account}");
    }
    if let Some(peak) = peak_memory_mib() {
        eprintln!("peak memory: {peak:.0} MiB");
    }
    // Weights are as they were saved; a base that adapters stand beside is as the run had it.
    let dtype = match recipe.lora {
        Some(_) => device::dtype(&recipe.model.dtype, target)?,
        None => None,
    };
    let model = load_model(&finished.checkpoint, None, &target.device, dtype, recipe.model.quantise.bits())?.model;
    if let Some(loss) = finished.valid_loss {
        let vocab_size = model.config().vocab_size;
        let bigram = if vocab_size <= BIGRAM_VOCAB {
            Dataset::open(&recipe.data, tokenizer.as_ref(), vocab_size, recipe.run.seed)?.bigram()
        } else {
            None
        };
        let beside = bigram.map(|bigram| format!("; a bigram model of the same text: {bigram:.4}"));
        eprintln!("validation loss: {loss:.4}{}", beside.unwrap_or_default());
    }
    eprintln!("checkpoint: {}", finished.checkpoint.display());
    if let Some((table, found)) = judge(recipe, &model, tokenizer.as_ref())? {
        judge::keep(&folder, "after", found)?;
        eprint!("evaluation after:\n{table}");
    }
    let sample = &recipe.sample;
    if let Some(tokenizer) = tokenizer.filter(|_| !sample.prompt.is_empty()) {
        let prompt = tokenizer.encode(&sample.prompt);
        let sampling =
            Sampling { temperature: sample.temperature, top_p: sample.top_p, top_k: sample.top_k, seed: sample.seed };
        let eos: Vec<u32> = tokenizer.eos().into_iter().collect();
        let generated = generate(&model, &prompt, sample.max_new_tokens, sampling, &eos, |_| {})?;
        let text = tokenizer.decode(&generated.tokens);
        eprintln!("sample:");
        writeln!(std::io::stdout(), "{}{text}", sample.prompt).map_err(TrainError::write("stdout"))?;
    }
    Ok(())
}

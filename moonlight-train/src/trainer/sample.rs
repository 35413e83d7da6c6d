//! The sample of a run: what its model adds to the recipe's prompt, at each validation and at the end.

use std::path::Path;
use std::time::Instant;

use moonlight_infer::InferError;
use moonlight_infer::generate::{Sampling, generate};
use moonlight_infer::tokenizer::Tokenizer;
use moonlight_model::CausalLm;
use serde::Serialize;

use crate::error::TrainError;
use crate::metrics::RecordFile;
use crate::recipe::{Recipe, SampleConfig};

/// The file in the run's folder.
const FILE: &str = "samples.jsonl";

/// The text that `model` adds to the prompt.
///
/// The sampler has its own random numbers, from `sample.seed`, and takes none of the device's: a run with samples takes the
/// same steps as one without.
pub(super) fn sample_text(
    model: &CausalLm,
    tokenizer: &Tokenizer,
    sample: &SampleConfig,
) -> Result<String, InferError> {
    let tokenizer = tokenizer.clone().for_prompts();
    let prompt = tokenizer.encode_text(&sample.prompt)?;
    let sampling =
        Sampling { temperature: sample.temperature, top_p: sample.top_p, top_k: sample.top_k, seed: sample.seed };
    let eos: Vec<u32> = tokenizer.eos().into_iter().collect();
    let generated = generate(model, &prompt, sample.max_new_tokens, sampling, &eos, |_| {})?;
    Ok(tokenizer.decode(&generated.tokens))
}

/// A line of `samples.jsonl`.
#[derive(Debug, Serialize)]
struct SampleRecord<'a> {
    step: u64,
    prompt: &'a str,
    /// What the model added to the prompt.
    text: &'a str,
}

/// Writes the samples of a run's validations into `samples.jsonl`.
#[derive(Debug)]
pub(super) struct SampleWriter {
    config: SampleConfig,
    tokenizer: Tokenizer,
    file: RecordFile,
    /// Whether a sample failed. The next ones most likely fail too, and one warning is enough.
    failed: bool,
}

impl SampleWriter {
    /// Opens the file for a run that resumes after `step`, and drops the samples of later steps from it. `None` if the recipe
    /// asks for no samples, or the run has no tokenizer.
    pub(super) fn open(recipe: &Recipe, tokenizer: Option<&Tokenizer>, step: u64) -> Result<Option<Self>, TrainError> {
        let config = recipe.sample.clone();
        let path = recipe.run.folder().join(FILE);
        let tokenizer = tokenizer.filter(|_| config.at_validation && !config.prompt.is_empty());
        // Samples of steps that the run takes again would be wrong, even if it writes no new ones.
        let open = |path: &Path| RecordFile::open(path, step);
        let Some(tokenizer) = tokenizer else {
            if path.exists() {
                open(&path)?;
            }
            return Ok(None);
        };
        Ok(Some(Self { config, tokenizer: tokenizer.clone(), file: open(&path)?, failed: false }))
    }

    /// Writes the sample of a model, which has no gradients. A sample that fails is a warning: the run is worth more.
    pub(super) fn write(&mut self, model: &CausalLm, step: u64) {
        if self.failed {
            return;
        }
        let started = Instant::now();
        match sample_text(model, &self.tokenizer, &self.config) {
            Ok(text) => {
                self.file.append(&SampleRecord { step, prompt: &self.config.prompt, text: &text });
                tracing::debug!("wrote a sample in {:.1} s", started.elapsed().as_secs_f64());
            }
            Err(error) => {
                self.failed = true;
                tracing::warn!("no samples are written: {error}; the run continues");
            }
        }
    }
}

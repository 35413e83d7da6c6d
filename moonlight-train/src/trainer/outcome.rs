//! The result of a run.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use moonlight_infer::tokenizer::Tokenizer;
use moonlight_model::CausalLm;

use super::run_folder::RunFolder;
use crate::data::Dataset;

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Steps taken since the run's start, including those before it was resumed.
    pub step: u64,
    /// Training tokens read over all ranks, without padding.
    pub tokens: u64,
    /// The last validation loss, in nats per token; `None` without validation data.
    pub valid_loss: Option<f64>,
    /// Whether the run was stopped before its last step.
    pub interrupted: bool,
    /// The folder of the last step's checkpoint.
    pub checkpoint: PathBuf,
    /// Bytes that the ranks of a distributed run sent and held, as text.
    pub comm_report: Option<String>,
    /// The trained model and its data; `None` in a process without rank 0, which writes the final report.
    pub trained: Option<Trained>,
}

/// What a finished run keeps in memory for the final report, in the process of rank 0.
pub struct Trained {
    /// The weights of the last checkpoint, on the run's device with autodiff.
    pub model: CausalLm,
    pub(super) dataset: Arc<Dataset>,
    pub(super) tokenizer: Option<Tokenizer>,
    /// Keeps the lock on the run's folder until the final report is written.
    pub(super) _folder: Option<RunFolder>,
}

impl fmt::Debug for Trained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trained").field("model", &self.model).finish_non_exhaustive()
    }
}

//! What a run leaves behind.

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
    /// Steps taken.
    pub step: u64,
    /// Tokens read.
    pub tokens: u64,
    /// The last validation loss, nats.
    pub valid_loss: Option<f64>,
    /// Whether it was stopped before its last step.
    pub interrupted: bool,
    /// The checkpoint of the last step.
    pub checkpoint: PathBuf,
    /// What the ranks of a distributed run sent and held.
    pub comm_report: Option<String>,
    /// The trained model; `None` on a rank that does not lead, and leaves the final report to the one that does.
    pub trained: Option<Trained>,
}

/// What a finished run leaves in memory, on its leading rank.
pub struct Trained {
    /// The model of the last checkpoint.
    pub model: CausalLm,
    pub(super) dataset: Arc<Dataset>,
    pub(super) tokenizer: Option<Tokenizer>,
    /// The run's folder is this process's until the final report is written.
    pub(super) _folder: Option<RunFolder>,
}

impl fmt::Debug for Trained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trained").field("model", &self.model).finish_non_exhaustive()
    }
}

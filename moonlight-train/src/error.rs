//! What can go wrong in a run.

use std::io;
use std::path::{Path, PathBuf};

use moonlight_convert::CheckpointError;
use moonlight_convert::adapter::AdapterError;
use moonlight_model::lora::LoraError;
use moonlight_optim::distributed::CollectiveError;
use moonlight_optim::{OptimizerError, RuleError, StateError};

use crate::chat::ChatError;
use crate::data::DataError;
use crate::recipe::RecipeError;
use crate::tokenizer::TokenizerError;

/// Why a program stopped. Every message is one sentence for the person who started it.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The recipe.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The weights, read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An adapter, read or written.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// Adapters that the model cannot have.
    #[error("`lora.targets`: {0}")]
    Lora(#[from] LoraError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A conversation, or the template for it.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The division of the parameters among the optimizers.
    #[error(transparent)]
    Rules(#[from] RuleError),
    /// The optimizer's state.
    #[error("the optimizer's state `{}`: {source}", path.display())]
    OptimizerState {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: StateError,
    },
    /// A file of the run cannot be read.
    #[error("`{}` cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the run cannot be written.
    #[error("`{}` cannot be written: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The run's folder is there already.
    #[error("the run `{}` exists", .0.display())]
    RunExists(PathBuf),
    /// A loss or gradient that is no number.
    #[error("step {step}: the {what} is {value}{}{}", worker.map(|worker| format!(" on worker {worker}"))
        .unwrap_or_default(), last_checkpoint.as_ref()
        .map(|path| format!("; the last good checkpoint is `{}`", path.display())).unwrap_or_default())]
    NotFinite {
        /// The step, counted from 1.
        step: u64,
        /// The loss or the gradient norm.
        what: &'static str,
        /// Its value.
        value: f64,
        /// Which of several workers had it, where that is known.
        worker: Option<usize>,
        /// The newest checkpoint.
        last_checkpoint: Option<PathBuf>,
    },
    /// A device that does not exist, or that this build has not.
    #[error("{problem}")]
    Device {
        /// The sentence.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// Arguments that do not go together with the model.
    #[error("{problem}")]
    Request {
        /// The sentence.
        problem: String,
        /// What to do, where we know.
        hint: Option<String>,
    },
    /// The dashboard's `k`.
    #[error("killed from the dashboard")]
    Killed,
    /// Several workers lost each other.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// An optimizer that cannot be divided among workers.
    #[error(transparent)]
    Distributed(#[from] OptimizerError),
    /// One of several workers failed.
    #[error("worker {rank}: {source}")]
    Worker {
        /// Its number.
        rank: usize,
        /// Why.
        source: Box<TrainError>,
    },
    /// Another worker failed, and says so itself.
    #[error("another worker failed")]
    Elsewhere,
    /// burn-train's machinery failed.
    #[error("training stopped: {0}")]
    Stage(String),
}

impl TrainError {
    /// What to do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Recipe(error) => error.hint(),
            Self::Checkpoint(error) => error.hint(),
            Self::Adapter(error) => error.hint(),
            Self::Lora(error) => error.hint(),
            Self::Tokenizer(error) => error.hint(),
            Self::Data(error) => error.hint(),
            Self::Chat(error) => error.hint(),
            Self::OptimizerState { source, .. } => source.hint(),
            Self::RunExists(_) => Some("go on with it by `--resume`, or choose another `--set run.name=...`".into()),
            Self::NotFinite { .. } => {
                Some("lower `optimizer.learning_rate`, lengthen the warm-up, or look at the batch of that step".into())
            }
            Self::Collective(error) => error.hint(),
            Self::Worker { source, .. } => source.hint(),
            Self::Killed => Some("go on from the newest checkpoint by `--resume`".into()),
            Self::Device { hint, .. } => Some(hint.clone()),
            Self::Request { hint, .. } => hint.clone(),
            Self::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("free some space and go on by `--resume`".into())
            }
            _ => None,
        }
    }

    /// Says it on stderr, in one line and one more for the hint. What another worker says is not said again.
    pub(crate) fn report(&self) {
        if matches!(self, Self::Elsewhere) {
            return;
        }
        // One line each, whatever a nested message holds.
        let line = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
        eprintln!("error: {}", line(self.to_string()));
        if let Some(hint) = self.hint() {
            eprintln!("hint: {}", line(hint));
        }
    }

    pub(crate) fn read(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Read { path, source }
    }

    pub(crate) fn write(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Write { path, source }
    }

    /// What is wrong with a line of a file that the user gave.
    pub(crate) fn at_line(path: &Path, line: usize, problem: impl std::fmt::Display, hint: Option<String>) -> Self {
        Self::Request { problem: format!("{}:{line}: {problem}", path.display()), hint }
    }
}

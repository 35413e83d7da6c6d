//! What can go wrong in a run.

use std::io;
use std::path::PathBuf;

use moonlight_convert::adapter::AdapterError;
use moonlight_convert::{CheckpointError, FileError};
use moonlight_infer::InferError;
use moonlight_infer::chat::ChatError;
use moonlight_infer::device::DeviceError;
use moonlight_infer::tokenizer::TokenizerError;
use moonlight_model::lora::LoraError;
use moonlight_optim::distributed::CollectiveError;
use moonlight_optim::{OptimizerError, RuleError, StateError};

use crate::checkpoint::{DamagedCheckpoint, Difference};
use crate::data::DataError;
use crate::hints::infer_hint;
use crate::recipe::RecipeError;

/// Why a program stopped. Every message is one sentence for the person who started it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The recipe.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A model that cannot be opened, run or saved: weights, adapter, tokenizer, chat template or device.
    #[error(transparent)]
    Infer(#[from] InferError),
    /// Adapters that the model cannot have.
    #[error("`lora.targets`: {0}")]
    Lora(#[from] LoraError),
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
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
    /// A file of the run cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The run's folder is there already.
    #[error("the run `{}` exists", .0.display())]
    RunExists(PathBuf),
    /// Another process trains there.
    #[error("the run `{}` is in use{}", folder.display(), by(holder))]
    RunLocked {
        /// The run's folder.
        folder: PathBuf,
        /// The process that has it, its host, and since when.
        holder: String,
    },
    /// The run has checkpoints, and none of them is whole.
    #[error("no checkpoint to resume from is whole: {}", damaged.iter()
        .map(|it| format!("`{}`: {}", it.path.display(), it.problem)).collect::<Vec<_>>().join("; "))]
    NoCompleteCheckpoint {
        /// All of them.
        damaged: Vec<DamagedCheckpoint>,
    },
    /// A checkpoint of a newer program.
    #[error("`{}` was written by a newer version of this program (its `trainer.json` has the version {version})",
        path.display())]
    NewerCheckpoint {
        /// The checkpoint.
        path: PathBuf,
        /// The version of its `trainer.json`.
        version: u64,
    },
    /// The run to resume is not the one that the checkpoint is of.
    #[error("this is not the run that `{}` is a checkpoint of: {}", checkpoint.display(), differences.iter()
        .map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    OtherRun {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// What differs.
        differences: Vec<Difference>,
    },
    /// A non-finite loss or gradient.
    #[error("step {step}: the {what} is {value}{}{}", worker.map(|worker| format!(" on worker {worker}"))
        .unwrap_or_default(), last_checkpoint.as_ref()
        .map(|path| format!("; the last good checkpoint is `{}`", path.display())).unwrap_or_default())]
    NonFinite {
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
    /// A matrix without singular values.
    #[error("`layers.{layer}.{path}` has no singular values: it is not finite")]
    NotFiniteMatrix {
        /// The decoder layer, from 0.
        layer: usize,
        /// The matrix, by its path inside the layer.
        path: String,
    },
    /// A plot in a file of no known kind.
    #[error("`{}` is neither an SVG nor a PNG", .0.display())]
    PlotFormat(PathBuf),
    /// A metric that no run has.
    #[error("none of the runs has the figure `{metric}`")]
    UnknownMetric {
        /// The metric that was asked for.
        metric: String,
        /// Those that the runs have, with commas between.
        known: String,
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
    /// An optimizer that cannot be built for these ranks.
    #[error(transparent)]
    Optimizer(#[from] OptimizerError),
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
    RemoteFailure,
    /// burn-train's machinery failed.
    #[error("training stopped: {0}")]
    Stage(String),
}

impl TrainError {
    /// What to do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Recipe(error) => error.hint(),
            Self::Infer(error) => infer_hint(error),
            Self::Lora(error) => error.hint(),
            Self::Data(error) => error.hint(),
            Self::OptimizerState { source, .. } => source.hint(),
            Self::RunExists(_) => Some("resume it with `--resume`, or choose another `--set run.name=...`".into()),
            Self::RunLocked { .. } => Some("wait for it, stop it, or choose another `--set run.name=...`".into()),
            Self::NoCompleteCheckpoint { .. } => {
                Some("restore one of them from a copy, or start anew with another `--set run.name=...`".into())
            }
            Self::NewerCheckpoint { .. } => Some("resume with that version".into()),
            Self::OtherRun { .. } => Some(
                "resume with what the checkpoint was made with, or start another run from it by `model.path`".into(),
            ),
            Self::NonFinite { .. } => {
                Some("lower `optimizer.learning_rate`, lengthen the warm-up, or look at the batch of that step".into())
            }
            Self::Collective(error) => error.hint(),
            Self::Optimizer(error) => error.hint(),
            Self::Worker { source, .. } => source.hint(),
            Self::Killed => Some("resume from the newest checkpoint with `--resume`".into()),
            Self::Request { hint, .. } => hint.clone(),
            Self::File(error) if error.is_full() => Some("free some space and resume with `--resume`".into()),
            Self::PlotFormat(_) => Some("let the name end in .svg or .png".into()),
            Self::UnknownMetric { known, .. } => Some(format!("they have: {known}")),
            _ => None,
        }
    }

    /// Logs it in one line, and its hint in another. The failure of another rank is not repeated.
    pub(crate) fn report(&self) {
        self.report_with(self.hint());
    }

    /// [`report`](Self::report) for a command that is no run, and has nothing to resume.
    pub(crate) fn report_without_run(&self) {
        self.report_with(match self {
            Self::File(error) | Self::Infer(InferError::File(error)) if error.is_full() => {
                Some("free some space, and start again".into())
            }
            error => error.hint(),
        });
    }

    fn report_with(&self, hint: Option<String>) {
        if matches!(self, Self::RemoteFailure) {
            return;
        }
        // One line each, whatever a nested message contains.
        let line = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let hint = hint.map(|hint| format!("\nhint: {}", line(hint))).unwrap_or_default();
        tracing::error!("{}{hint}", line(self.to_string()));
    }

    pub(crate) fn read(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        FileError::read(path)
    }

    pub(crate) fn write(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        FileError::write(path)
    }
}

/// ` by HOLDER`, or nothing.
fn by(holder: &str) -> String {
    if holder.is_empty() { String::new() } else { format!(" by {holder}") }
}

/// The errors of opening and running a model, by their own types.
macro_rules! from_infer {
    ($($error:ty),*) => {
        $(impl From<$error> for TrainError {
            fn from(error: $error) -> Self {
                Self::Infer(error.into())
            }
        })*
    };
}
from_infer!(CheckpointError, AdapterError, TokenizerError, ChatError, DeviceError);

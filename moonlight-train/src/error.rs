//! Why a run or a command of `moonlight` fails.

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

/// Why a run or a command failed. Each message is one sentence, and [`hint`](TrainError::hint) says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A recipe that cannot be read or asks for something impossible.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A model that cannot be opened, run or saved: its weights, adapter, tokenizer, chat template or device.
    #[error(transparent)]
    Infer(#[from] InferError),
    /// Adapters that the model cannot have.
    #[error("`lora.targets`: {0}")]
    Lora(#[from] LoraError),
    /// Data that cannot be read or do not fit the recipe.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Rules that do not assign every parameter to an optimizer.
    #[error(transparent)]
    Rules(#[from] RuleError),
    /// The optimizer's state in a checkpoint is damaged, or that of another model or optimizer.
    #[error("the optimizer's state `{}`: {source}", path.display())]
    OptimizerState {
        /// The file.
        path: PathBuf,
        /// Why it cannot be loaded.
        source: StateError,
    },
    /// A file of the run cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The run's folder exists, and the run is not resumed.
    #[error("the run `{}` exists", .0.display())]
    RunExists(PathBuf),
    /// Another process holds the lock on the run's folder.
    #[error("the run `{}` is in use{}", folder.display(), by(holder))]
    RunLocked {
        /// The run's folder.
        folder: PathBuf,
        /// The process, its host, and since when it holds the lock; may be empty.
        holder: String,
    },
    /// The run has checkpoints, and all of them are damaged.
    #[error("the run has no complete checkpoint to resume from: {}", damaged.iter()
        .map(|it| format!("`{}`: {}", it.path.display(), it.problem)).collect::<Vec<_>>().join("; "))]
    NoCompleteCheckpoint {
        /// Every checkpoint of the run.
        damaged: Vec<DamagedCheckpoint>,
    },
    /// A checkpoint that a newer version of the program wrote.
    #[error("`{}` was written by a newer version of this program: its `trainer.json` has the version {version}",
        path.display())]
    NewerCheckpoint {
        /// The checkpoint.
        path: PathBuf,
        /// The version of its `trainer.json`.
        version: u64,
    },
    /// The recipe differs from the checkpoint's in what may not change when a run is resumed.
    #[error("`{}` is a checkpoint of another run: {}", checkpoint.display(), differences.iter()
        .map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    OtherRun {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// The differences with which the run may not resume.
        differences: Vec<Difference>,
    },
    /// A non-finite loss or gradient.
    #[error("step {step}: the {what} is {value}{}{}", rank.map(|rank| format!(" on rank {rank}"))
        .unwrap_or_default(), last_checkpoint.as_ref()
        .map(|path| format!("; the newest checkpoint is `{}`", path.display())).unwrap_or_default())]
    NonFinite {
        /// The step, counted from 1.
        step: u64,
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// NaN or an infinity.
        value: f64,
        /// The rank that computed it; `None` with one rank, and for the gradient norm, a sum over all ranks.
        rank: Option<usize>,
        /// The newest complete checkpoint, written before this step.
        last_checkpoint: Option<PathBuf>,
    },
    /// A weight matrix without singular values, because it has non-finite elements.
    #[error("`layers.{layer}.{path}` has no singular values: it contains NaN or infinity")]
    NonFiniteMatrix {
        /// The decoder layer, counted from 0.
        layer: usize,
        /// The path of the matrix inside the layer.
        path: String,
    },
    /// A study, its recipe or its table that cannot be read.
    #[error("`{}`: {problem}", path.display())]
    Study {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the line.
        problem: String,
    },
    /// A plot in a file whose name ends in neither `.svg` nor `.png`.
    #[error("`{}` is neither an SVG nor a PNG", .0.display())]
    PlotFormat(PathBuf),
    /// A metric that none of the plotted runs has.
    #[error("none of the runs has the metric `{metric}`")]
    UnknownMetric {
        /// The metric that was asked for.
        metric: String,
        /// The metrics that the runs have, separated by commas.
        known: String,
    },
    /// A request that cannot be fulfilled, such as options that the model does not support.
    #[error("{problem}")]
    Request {
        /// The whole message.
        problem: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// The user pressed `k` on the dashboard.
    #[error("the run was killed from the dashboard")]
    Killed,
    /// A collective failed: a rank ended or stopped responding.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// An optimizer that cannot be built, or not for several ranks.
    #[error(transparent)]
    Optimizer(#[from] OptimizerError),
    /// One of several ranks failed.
    #[error("rank {rank}: {source}")]
    Rank {
        /// The rank, counted from 0.
        rank: usize,
        /// Why it failed.
        source: Box<TrainError>,
    },
    /// Another rank failed and reports its own error.
    #[error("another rank failed")]
    RemoteFailure,
    /// The program cannot run here, or has a defect: a rank panicked, or signals cannot be handled.
    #[error("{0}")]
    Internal(String),
}

impl TrainError {
    /// What to do about the error, if that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Recipe(error) => error.hint(),
            Self::Infer(error) => infer_hint(error),
            Self::Lora(error) => error.hint(),
            Self::Data(error) => error.hint(),
            Self::OptimizerState { source, .. } => source.hint(),
            Self::RunExists(_) => Some("resume with `--resume`, or choose another `run.name`".into()),
            Self::RunLocked { .. } => Some("wait for that run, stop it, or choose another `run.name`".into()),
            Self::NoCompleteCheckpoint { .. } => {
                Some("restore a checkpoint from a copy, or start again with another `run.name`".into())
            }
            Self::NewerCheckpoint { .. } => Some("resume with the version that wrote the checkpoint".into()),
            Self::OtherRun { .. } => Some(
                "resume with the values of the checkpoint, or start another run from its weights by `model.path`"
                    .into(),
            ),
            Self::NonFinite { .. } => Some(
                "lower `optimizer.learning_rate`, raise `schedule.warmup_steps`, or inspect the batch of that step"
                    .into(),
            ),
            Self::Collective(error) => error.hint(),
            Self::Optimizer(error) => error.hint(),
            Self::Rank { source, .. } => source.hint(),
            Self::Killed => Some("resume from the newest checkpoint with `--resume`".into()),
            Self::Request { hint, .. } => hint.clone(),
            Self::File(error) if error.is_full() => Some("free disk space and resume with `--resume`".into()),
            Self::PlotFormat(_) => Some("end the file name in `.svg` or `.png`".into()),
            Self::UnknownMetric { known, .. } => Some(format!("choose one of: {known}")),
            _ => None,
        }
    }

    /// Logs the error in one line and its hint in another. The failure of another rank is not repeated.
    pub(crate) fn report(&self) {
        self.report_with(self.hint());
    }

    /// Like [`report`](Self::report), for a command other than `train`, which has no run to resume.
    pub(crate) fn report_without_run(&self) {
        self.report_with(match self {
            Self::File(error) | Self::Infer(InferError::File(error)) if error.is_full() => {
                Some("free disk space and start again".into())
            }
            error => error.hint(),
        });
    }

    fn report_with(&self, hint: Option<String>) {
        if matches!(self, Self::RemoteFailure) {
            return;
        }
        // Programs that read stderr rely on one line for each, so line breaks in nested messages become spaces.
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

/// ` by HOLDER`, or an empty text for an unknown holder.
fn by(holder: &str) -> String {
    if holder.is_empty() { String::new() } else { format!(" by {holder}") }
}

/// Converts the errors of opening and running a model, so that `?` takes each by its own type.
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

/// An error as the program prints it, for the snapshots of messages.
#[cfg(test)]
pub(crate) fn rendered(error: &dyn std::error::Error, hint: Option<String>) -> String {
    let hint = hint.map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
    format!("error: {error}{hint}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the message is written here. The compiler demands an arm for each variant, and so an example in the test.
    fn has_own_message(error: &TrainError) -> bool {
        match error {
            TrainError::OptimizerState { .. }
            | TrainError::RunExists(_)
            | TrainError::RunLocked { .. }
            | TrainError::NoCompleteCheckpoint { .. }
            | TrainError::NewerCheckpoint { .. }
            | TrainError::OtherRun { .. }
            | TrainError::NonFinite { .. }
            | TrainError::NonFiniteMatrix { .. }
            | TrainError::PlotFormat(_)
            | TrainError::Study { .. }
            | TrainError::UnknownMetric { .. }
            | TrainError::Request { .. }
            | TrainError::Killed
            | TrainError::Rank { .. }
            | TrainError::RemoteFailure
            | TrainError::Internal(_)
            | TrainError::File(_) => true,
            // The texts of the libraries have snapshots of their own.
            TrainError::Recipe(_)
            | TrainError::Infer(_)
            | TrainError::Lora(_)
            | TrainError::Data(_)
            | TrainError::Rules(_)
            | TrainError::Collective(_)
            | TrainError::Optimizer(_) => false,
        }
    }

    fn examples() -> Vec<TrainError> {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        let damaged = |step: u32, problem: &str| DamagedCheckpoint {
            path: format!("runs/a/checkpoints/step-{step:08}").into(),
            problem: problem.into(),
        };
        let difference =
            |key: &str, now: &str, then: &str| Difference { key: key.into(), now: now.into(), then: then.into() };
        vec![
            TrainError::OptimizerState {
                path: "runs/a/checkpoints/step-00000100/optimizer-00000-of-00001.bpk".into(),
                source: StateError::Unreadable("it ends too early".into()),
            },
            TrainError::write("runs/a/metrics.jsonl")(full),
            TrainError::RunExists("runs/a".into()),
            TrainError::RunLocked { folder: "runs/a".into(), holder: "process 7 on host, since 10:00".into() },
            TrainError::RunLocked { folder: "runs/a".into(), holder: String::new() },
            TrainError::NoCompleteCheckpoint {
                damaged: vec![
                    damaged(100, "`model.safetensors` is missing"),
                    damaged(50, "`manifest.json` is missing"),
                ],
            },
            TrainError::NewerCheckpoint { path: "runs/a/checkpoints/step-00000100".into(), version: 9 },
            TrainError::OtherRun {
                checkpoint: "runs/a/checkpoints/step-00000100".into(),
                differences: vec![
                    difference("`run.seed`", "2", "1"),
                    difference("the tokenizer", "`bytes`", "`bytes-chat`"),
                ],
            },
            TrainError::NonFinite {
                step: 101,
                what: "loss",
                value: f64::NAN,
                rank: Some(1),
                last_checkpoint: Some("runs/a/checkpoints/step-00000100".into()),
            },
            TrainError::NonFinite {
                step: 1,
                what: "gradient norm",
                value: f64::INFINITY,
                rank: None,
                last_checkpoint: None,
            },
            TrainError::NonFiniteMatrix { layer: 3, path: "self_attn.o_proj".into() },
            TrainError::PlotFormat("loss.jpg".into()),
            TrainError::Study { path: "study.toml".into(), problem: "line 3: unknown field `axis`".into() },
            TrainError::UnknownMetric { metric: "los".into(), known: "loss, lr".into() },
            TrainError::Request { problem: "a step needs 9.00 GB of memory".into(), hint: Some("lower it".into()) },
            TrainError::Killed,
            TrainError::Rank { rank: 2, source: Box::new(TrainError::RunExists("runs/a".into())) },
            TrainError::RemoteFailure,
            TrainError::Internal("a rank panicked".into()),
        ]
    }

    #[test]
    fn messages_and_hints() {
        let examples = examples();
        assert!(examples.iter().all(has_own_message));
        let text: Vec<String> = examples.iter().map(|error| rendered(error, error.hint())).collect();
        insta::assert_snapshot!(text.join("\n"));
    }
}

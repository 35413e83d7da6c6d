//! Reports on a checkpoint: its contents, its problems, and its differences from another.
//!
//! | question | answered by | with |
//! |---|---|---|
//! | What does it contain, can it be used? | [`Checkpoint::summary`](crate::Checkpoint::summary) | [`CheckpointSummary`] |
//! | What is wrong with it? | [`Checkpoint::problems`](crate::Checkpoint::problems) | [`Problem`] |
//! | Are these the published files? | [`check_digests`] | [`CheckedFile`] |
//! | How far are two checkpoints apart? | [`Checkpoint::compare`](crate::Checkpoint::compare) | [`Comparison`] |

pub(crate) mod compare;
pub(crate) mod digests;
pub(crate) mod summary;
pub(crate) mod validation;

pub use compare::{Comparison, TensorDifference, UnusedDifference, UnusedTensor, ValueDistance};
pub use digests::{CheckedFile, check_digests};
pub use summary::{
    CheckpointState, CheckpointSummary, DtypeSummary, FileSummary, ParameterCounts, QuantizedForm, ReportedProblem,
    SkippedTensors, unfinished_downloads,
};
pub use validation::{Problem, ProblemList};

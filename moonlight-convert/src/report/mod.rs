//! What is in a checkpoint, what is wrong with it, and how far two of them are apart.
//!
//! | question | answered by | with |
//! |---|---|---|
//! | What is in it, can it be used? | [`Checkpoint::summary`](crate::Checkpoint::summary) | [`CheckpointSummary`] |
//! | What is wrong with it? | [`Checkpoint::problems`](crate::Checkpoint::problems) | [`Problem`] |
//! | Are these the files that were published? | [`check_digests`] | [`CheckedFile`] |
//! | How far are two apart? | [`Checkpoint::compare`](crate::Checkpoint::compare) | [`Comparison`] |

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

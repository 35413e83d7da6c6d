//! Why a step fails.

use moonlight_optim::distributed::CollectiveError;

/// A non-finite loss or gradient.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NonFinite {
    pub(crate) what: &'static str,
    pub(crate) value: f64,
    /// The rank that computed it; `None` with one rank, and for the gradient norm, a sum over all ranks.
    pub(crate) rank: Option<usize>,
}

/// Why a step failed.
#[derive(Debug)]
pub(crate) enum StepError {
    /// Every rank has this error. The model is unchanged, except by [`UpdateMode::DuringBackward`](super::step::UpdateMode).
    NonFinite(NonFinite),
    /// A collective failed in the middle of an update, so the model is lost.
    Collective(CollectiveError),
}

impl From<CollectiveError> for StepError {
    fn from(error: CollectiveError) -> Self {
        Self::Collective(error)
    }
}

impl From<NonFinite> for StepError {
    fn from(error: NonFinite) -> Self {
        Self::NonFinite(error)
    }
}

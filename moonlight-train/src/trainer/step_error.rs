//! Why a step fails.

use moonlight_optim::distributed::CollectiveError;

/// A non-finite loss or gradient.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NonFinite {
    pub(crate) what: &'static str,
    pub(crate) value: f64,
    /// The rank it was found on; `None` with one rank, and for what is known of the sum over all ranks only.
    pub(crate) rank: Option<usize>,
}

/// Why a step failed.
#[derive(Debug)]
pub(crate) enum StepError {
    /// On all ranks alike. The model is unchanged, except by [`UpdateMode::DuringBackward`].
    NonFinite(NonFinite),
    /// The ranks lost each other. The model is lost.
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

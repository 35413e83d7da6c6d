//! Who updates the model: this process alone, or several workers together.

use moonlight_optim::MuonAdamW;
use moonlight_optim::distributed::Worker;

/// The optimizer of a run.
pub(super) enum Stepper {
    /// One worker, which has everything.
    Alone(Box<MuonAdamW>),
    /// One of several workers.
    Together(Box<MuonAdamW>),
}

impl Stepper {
    /// This worker, where there are several.
    pub(super) fn worker(&self) -> Option<&Worker> {
        match self {
            Self::Alone(_) => None,
            Self::Together(optimizer) => Some(optimizer.worker()),
        }
    }
}

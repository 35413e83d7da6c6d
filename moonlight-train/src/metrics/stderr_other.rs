//! Standard error under the dashboard, where it cannot be replaced.

/// Nothing is held back.
pub(super) struct HeldStderr;

impl HeldStderr {
    pub(super) fn hold() -> Option<Self> {
        None
    }
}

//! Standard error under the dashboard, on systems where it cannot be redirected: it stays as it is.

/// Holds nothing back.
pub(super) struct HeldStderr;

impl HeldStderr {
    pub(super) fn hold() -> Option<Self> {
        None
    }
}

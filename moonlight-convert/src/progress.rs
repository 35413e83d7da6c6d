//! Progress of a conversion or comparison, and how a caller stops it.

use std::ops::ControlFlow;

/// Receives the progress of a conversion or a comparison. `()` ignores it and never stops the work.
pub trait Progress: Sync {
    /// The work begins; it has this many bytes in all.
    fn begin(&self, bytes: u64);
    /// This many more bytes are done. `Break` stops the work with
    /// [`CheckpointError::Interrupted`](crate::CheckpointError::Interrupted), and the files written so far are removed.
    fn advance(&self, bytes: u64) -> ControlFlow<()>;
}

impl Progress for () {
    fn begin(&self, _bytes: u64) {}

    fn advance(&self, _bytes: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

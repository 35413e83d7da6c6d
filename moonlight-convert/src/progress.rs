//! Progress of a conversion or comparison, and how a caller stops it.

use std::ops::ControlFlow;

/// Is called with the progress of a conversion or a comparison. `()` ignores it and never stops.
pub trait Progress: Sync {
    /// The total, in bytes.
    fn begin(&self, bytes: u64);
    /// That many more bytes are done. `Break` stops the work with
    /// [`CheckpointError::Interrupted`](crate::CheckpointError::Interrupted), and what was written is removed.
    fn advance(&self, bytes: u64) -> ControlFlow<()>;
}

impl Progress for () {
    fn begin(&self, _bytes: u64) {}

    fn advance(&self, _bytes: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

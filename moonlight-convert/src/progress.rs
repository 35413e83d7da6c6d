//! What a long piece of work tells its caller, and how the caller stops it.

use std::ops::ControlFlow;

/// Hears how far a conversion or a comparison has come. `()` listens to nothing and never stops.
pub trait Progress: Sync {
    /// The work is going to be `bytes` long.
    fn begin(&self, bytes: u64);
    /// So many more are done. `Break` ends the work with
    /// [`CheckpointError::Interrupted`](crate::CheckpointError::Interrupted), and what was written is removed.
    fn advance(&self, bytes: u64) -> ControlFlow<()>;
}

impl Progress for () {
    fn begin(&self, _bytes: u64) {}

    fn advance(&self, _bytes: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

//! Whether this process is in its training loop. In the loop, an interrupt lets the run save a checkpoint. Before the loop
//! there is nothing to save and after it everything is saved, so an interrupt ends the process at once.

use std::sync::atomic::{AtomicUsize, Ordering};

/// A count and not a flag, because tests run several loops in one process.
static RUNNING_LOOPS: AtomicUsize = AtomicUsize::new(0);

/// Marks the loop as running, from before its first step until after its last checkpoint.
pub(super) struct InLoop(());

impl InLoop {
    pub(super) fn enter() -> Self {
        RUNNING_LOOPS.fetch_add(1, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for InLoop {
    fn drop(&mut self) {
        RUNNING_LOOPS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Whether an interrupt should let the run end with a checkpoint.
pub(crate) fn is_training() -> bool {
    RUNNING_LOOPS.load(Ordering::SeqCst) > 0
}

//! Whether this process is in its training loop. Only there an interrupt stops the run with a checkpoint; elsewhere there is
//! nothing to save, and it ends the process.

use std::sync::atomic::{AtomicUsize, Ordering};

static LOOPS: AtomicUsize = AtomicUsize::new(0);

/// Lives while the loop runs, from before its first step until after its last checkpoint. A count, because tests run
/// several loops in one process.
pub(super) struct InLoop(());

impl InLoop {
    pub(super) fn enter() -> Self {
        LOOPS.fetch_add(1, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for InLoop {
    fn drop(&mut self) {
        LOOPS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Whether an interrupt should let the run end with a checkpoint. Before the loop there is nothing to save, and after it
/// everything is saved.
pub(crate) fn is_training() -> bool {
    LOOPS.load(Ordering::SeqCst) > 0
}

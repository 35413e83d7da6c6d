//! Whether this process is in its training loop: only there a run that is asked to stop does so, and saves.

use std::sync::atomic::{AtomicUsize, Ordering};

static LOOPS: AtomicUsize = AtomicUsize::new(0);

/// Held while the loop runs, from before its first step until after its last checkpoint.
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

/// Whether a run that is asked to stop ends with a checkpoint. Before its loop there is nothing to save, and after it all is.
pub(crate) fn is_training() -> bool {
    LOOPS.load(Ordering::SeqCst) > 0
}

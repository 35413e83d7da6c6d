//! Handling of Ctrl-C, SIGTERM and SIGHUP: the work is asked to stop, and removes the files that it has written so far.
//! If it does not respond, for example because a disk hangs, the program exits anyway.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The exit code after an interruption, as in shells.
pub(crate) const INTERRUPTED: u8 = 130;
/// How long the work may take to stop.
const PATIENCE: Duration = Duration::from_secs(5);

/// Installs the handler; returns the flag that is set when the work should stop. A second signal ends the program
/// immediately.
pub(crate) fn listen() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let end = || std::process::exit(i32::from(INTERRUPTED));
    // A failure is ignored: without a handler, a signal ends the program immediately, and the next write of the
    // directory removes the incomplete sibling.
    let _ = on_signal(move || {
        if flag.swap(true, Ordering::Relaxed) {
            end();
        }
        std::thread::spawn(move || {
            std::thread::sleep(PATIENCE);
            end()
        });
    });
    stop
}

/// Calls `on_request` on a separate thread for each signal that asks the program to end.
#[cfg(unix)]
fn on_signal(mut on_request: impl FnMut() + Send + 'static) -> std::io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    // `nohup` sets SIGHUP to ignored; a handler would override that.
    let signals = [SIGINT, SIGTERM, SIGHUP].into_iter();
    let signals = signals.filter(|&signal| signal != SIGHUP || !crate::hangup_is_ignored());
    let mut signals = signal_hook::iterator::Signals::new(signals)?;
    std::thread::spawn(move || signals.forever().for_each(|_| on_request()));
    Ok(())
}

#[cfg(not(unix))]
fn on_signal(on_request: impl FnMut() + Send + 'static) -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(on_request)
}

//! Ctrl-C, SIGTERM and SIGHUP: the work is asked to end and removes what it has half written. Work that does not hear, say
//! because a disk does not answer, is ended with the program.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The exit code of work that was interrupted, as shells have it.
pub(crate) const INTERRUPTED: u8 = 130;
/// How long work may go on after it was asked to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whether the work shall end, from now on. A second signal ends the program at once.
pub(crate) fn listen() -> Arc<AtomicBool> {
    let asked = Arc::new(AtomicBool::new(false));
    let flag = asked.clone();
    let end = || std::process::exit(i32::from(INTERRUPTED));
    // Without a handler, the program ends at once; the half-written sibling goes when the directory is next written.
    let _ = on_signal(move || {
        if flag.swap(true, Ordering::Relaxed) {
            end();
        }
        std::thread::spawn(move || {
            std::thread::sleep(PATIENCE);
            end()
        });
    });
    asked
}

/// Calls `heard` for each signal that asks the program to end, on a thread of its own.
#[cfg(unix)]
fn on_signal(mut heard: impl FnMut() + Send + 'static) -> std::io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    // `nohup` has the end of the terminal ignored, and means it.
    let signals = [SIGINT, SIGTERM, SIGHUP].into_iter();
    let signals = signals.filter(|&signal| signal != SIGHUP || !moonlight_convert::hangup_is_ignored());
    let mut signals = signal_hook::iterator::Signals::new(signals)?;
    std::thread::spawn(move || signals.forever().for_each(|_| heard()));
    Ok(())
}

#[cfg(not(unix))]
fn on_signal(heard: impl FnMut() + Send + 'static) -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(heard)
}

//! Ctrl-C, SIGTERM and SIGHUP.
//!
//! A separate thread waits for signals, so that they are received even if all other threads are busy. A command may [handle] them.
//! If it does not, or if its handler returns [`Response::End`], the program removes half-written files and ends at once.

use std::sync::{Mutex, PoisonError};

#[cfg(unix)]
use moonlight_convert::hangup_is_ignored;

use crate::error::TrainError;
use crate::output_file::remove_unfinished;

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signal {
    /// Ctrl-C.
    Interrupt,
    /// SIGTERM or SIGHUP.
    Terminate,
}

/// Whether a handler has handled a signal, or the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Response {
    Handled,
    End,
}

type Handler = Box<dyn FnMut(Signal) -> Response + Send>;

static HANDLER: Mutex<Option<Handler>> = Mutex::new(None);

/// Passes all signals from now on to `handler`.
pub(super) fn handle(handler: impl FnMut(Signal) -> Response + Send + 'static) {
    *HANDLER.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(handler));
}

fn respond(signal: Signal) -> Response {
    let mut handler = HANDLER.lock().unwrap_or_else(PoisonError::into_inner);
    handler.as_mut().map_or(Response::End, |handler| handler(signal))
}

/// Removes half-written files, and ends the program with an exit code.
pub(super) fn exit(code: u8) -> ! {
    remove_unfinished();
    std::process::exit(code.into())
}

/// Starts the thread.
#[cfg(unix)]
pub(super) fn install() -> Result<(), TrainError> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    // `nohup` starts the program with SIGHUP ignored; installing a handler would undo that.
    let handled = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|&signal| signal != SIGHUP || !hangup_is_ignored());
    let mut signals = signal_hook::iterator::Signals::new(handled).map_err(failed)?;
    let listen = move || {
        for signal in signals.forever() {
            let asked = if signal == SIGINT { Signal::Interrupt } else { Signal::Terminate };
            if respond(asked) == Response::End {
                remove_unfinished();
                // The process ends by the signal itself, so that its parent sees which one it was.
                let _ = signal_hook::low_level::emulate_default_handler(signal);
                exit(super::INTERRUPTED);
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(listen).map_err(failed)?;
    Ok(())
}

/// Starts to listen for Ctrl-C, the only signal on this system.
#[cfg(not(unix))]
pub(super) fn install() -> Result<(), TrainError> {
    let handler = || {
        if respond(Signal::Interrupt) == Response::End {
            exit(super::INTERRUPTED);
        }
    };
    ctrlc::set_handler(handler).map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> TrainError {
    TrainError::Internal(format!("signals cannot be handled: {error}"))
}

//! What ends the program from outside: Ctrl-C, a request to terminate, a terminal that goes away.
//!
//! A thread waits for signals, so that they are heard whatever the others do. A command may [handle] them; where it does not,
//! or where its handler leaves one to us, the program ends at once, without what is half written.

use std::sync::{Mutex, PoisonError};

#[cfg(unix)]
use moonlight_convert::hangup_is_ignored;

use crate::error::TrainError;
use crate::output_file::remove_unfinished;

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signal {
    /// Ctrl-C.
    Interrupt,
    /// SIGTERM or SIGHUP.
    Terminate,
}

/// Whether a handler has seen to a signal; else the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Response {
    Handled,
    End,
}

type Handler = Box<dyn FnMut(Signal) -> Response + Send>;

static HANDLER: Mutex<Option<Handler>> = Mutex::new(None);

/// From now on signals are the command's.
pub(super) fn handle(handler: impl FnMut(Signal) -> Response + Send + 'static) {
    *HANDLER.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(handler));
}

fn respond(signal: Signal) -> Response {
    let mut handler = HANDLER.lock().unwrap_or_else(PoisonError::into_inner);
    handler.as_mut().map_or(Response::End, |handler| handler(signal))
}

/// Ends the program with an exit code, without what is half written.
pub(super) fn exit(code: u8) -> ! {
    remove_unfinished();
    std::process::exit(code.into())
}

/// Starts to listen.
#[cfg(unix)]
pub(super) fn install() -> Result<(), TrainError> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    // `nohup` has the end of the terminal ignored, and means it.
    let heard = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|&signal| signal != SIGHUP || !hangup_is_ignored());
    let mut signals = signal_hook::iterator::Signals::new(heard).map_err(failed)?;
    let listen = move || {
        for signal in signals.forever() {
            let asked = if signal == SIGINT { Signal::Interrupt } else { Signal::Terminate };
            if respond(asked) == Response::End {
                remove_unfinished();
                // The program that started this one sees which signal it was.
                let _ = signal_hook::low_level::emulate_default_handler(signal);
                exit(super::INTERRUPTED);
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(listen).map_err(failed)?;
    Ok(())
}

/// Starts to listen; there is only Ctrl-C and its like.
#[cfg(not(unix))]
pub(super) fn install() -> Result<(), TrainError> {
    let heard = || {
        if respond(Signal::Interrupt) == Response::End {
            exit(super::INTERRUPTED);
        }
    };
    ctrlc::set_handler(heard).map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> TrainError {
    TrainError::Internal(format!("signals cannot be handled: {error}"))
}

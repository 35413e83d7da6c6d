//! The terminal under the dashboard: its interrupt key, and the mode to restore.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::pipe;
use rustix::stdio::{dup2_stdin, stdin};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

/// The terminal's mode before the dashboard.
static ORIGINAL_MODE: OnceLock<Termios> = OnceLock::new();

/// Remembers the terminal's mode, for [`restore`].
pub(crate) fn remember() {
    if let Ok(state) = tcgetattr(stdin()) {
        ORIGINAL_MODE.get_or_init(|| state);
    }
}

/// Whether keys can be read, from stdin or from the controlling terminal of this process. Under a service manager or
/// `docker run -t` without `-i`, stdout is a terminal although neither exists, and the dashboard would fail when it starts.
pub(crate) fn has_keys() -> bool {
    std::io::stdin().is_terminal() || File::options().read(true).write(true).open("/dev/tty").is_ok()
}

/// Makes Ctrl-C send a signal again. The dashboard puts the terminal into raw mode, where Ctrl-C is an ordinary key that it
/// ignores.
pub(crate) fn keep_interrupt_key() {
    if let Ok(mut state) = tcgetattr(stdin())
        && !state.local_modes.contains(LocalModes::ISIG)
    {
        state.local_modes.insert(LocalModes::ISIG);
        let _ = tcsetattr(stdin(), OptionalActions::Now, &state);
    }
}

/// Whether stdin is a terminal that has been closed.
pub(crate) fn is_gone() -> bool {
    matches!(tcgetattr(stdin()), Err(Errno::IO))
}

/// Replaces stdin with a pipe that is never written to. crossterm, which reads keys for the dashboard, does not handle the end
/// of its input, and would read from a terminal that is gone in an endless loop.
pub(crate) fn stop_reading_keys() {
    static WRITER: OnceLock<OwnedFd> = OnceLock::new(); // kept open, since without a writer the pipe is at its end
    if let Ok((reader, writer)) = pipe()
        && fcntl_setfl(&reader, OFlags::NONBLOCK).is_ok()
        && WRITER.set(writer).is_ok()
    {
        let _ = dup2_stdin(&reader);
    }
}

/// Restores the terminal's mode if a dashboard was open.
pub(crate) fn restore_mode() {
    if let Some(state) = ORIGINAL_MODE.get() {
        let _ = tcsetattr(stdin(), OptionalActions::Now, state);
    }
}

/// Restores the terminal's mode and screen, for a program that exits without dropping the dashboard. Does nothing if no
/// dashboard was open.
pub fn restore() {
    if ORIGINAL_MODE.get().is_some() {
        restore_mode();
        leave_screen();
    }
}

/// Undoes the dashboard's settings: turns mouse reports off, leaves the alternate screen, shows the cursor.
pub(crate) fn leave_screen() {
    let _ = std::io::stdout().write_all(b"\x1b[?1006l\x1b[?1015l\x1b[?1003l\x1b[?1002l\x1b[?1000l\x1b[?1049l\x1b[?25h");
    let _ = std::io::stdout().flush();
}

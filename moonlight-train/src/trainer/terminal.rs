//! The terminal under the dashboard: its interrupt key, and its mode before.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::sync::OnceLock;

use rustix::stdio::stdin;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

static BEFORE: OnceLock<Termios> = OnceLock::new();

/// Remembers the terminal as it is now, for [`restore`].
pub(crate) fn remember() {
    if let Ok(state) = tcgetattr(stdin()) {
        BEFORE.get_or_init(|| state);
    }
}

/// Whether keys can be read: from stdin, or else from the terminal that controls this process. Under a service manager or
/// `docker run -t` without `-i` stdout may be a terminal while there is neither, and the dashboard would fail at its start.
pub(crate) fn has_keys() -> bool {
    std::io::stdin().is_terminal() || File::options().read(true).write(true).open("/dev/tty").is_ok()
}

/// Makes Ctrl-C a signal again. The dashboard reads keys in raw mode, where Ctrl-C is a key like any other, and ignores
/// it.
pub(crate) fn keep_interrupt_key() {
    if let Ok(mut state) = tcgetattr(stdin())
        && !state.local_modes.contains(LocalModes::ISIG)
    {
        state.local_modes.insert(LocalModes::ISIG);
        let _ = tcsetattr(stdin(), OptionalActions::Now, &state);
    }
}

/// Restores the terminal's mode, if there was a dashboard.
pub(crate) fn restore_mode() {
    if let Some(state) = BEFORE.get() {
        let _ = tcsetattr(stdin(), OptionalActions::Now, state);
    }
}

/// Restores the terminal's mode and screen, for a program that exits at once. Does nothing if there was no dashboard.
pub fn restore() {
    if BEFORE.get().is_some() {
        restore_mode();
        leave_screen();
    }
}

/// Switches back what the dashboard has switched: mouse reports, the other screen, the hidden cursor.
pub(crate) fn leave_screen() {
    let _ = std::io::stdout().write_all(b"\x1b[?1006l\x1b[?1015l\x1b[?1003l\x1b[?1002l\x1b[?1000l\x1b[?1049l\x1b[?25h");
    let _ = std::io::stdout().flush();
}

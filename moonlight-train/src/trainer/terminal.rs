//! The terminal under the dashboard: its interrupt key, and its mode before.

use std::io::Write;
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
        // Mouse reports off, the main screen, the cursor: what the dashboard switched.
        let _ =
            std::io::stdout().write_all(b"\x1b[?1006l\x1b[?1015l\x1b[?1003l\x1b[?1002l\x1b[?1000l\x1b[?1049l\x1b[?25h");
        let _ = std::io::stdout().flush();
    }
}

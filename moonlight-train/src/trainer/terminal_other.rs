//! The terminal under the dashboard on systems other than Unix, where the key `q` stops a run.

use std::io::IsTerminal;

pub(crate) fn remember() {}

pub(crate) fn has_keys() -> bool {
    std::io::stdin().is_terminal()
}

pub(crate) fn keep_interrupt_key() {}

pub(crate) fn is_gone() -> bool {
    false
}

pub(crate) fn stop_reading_keys() {}

pub(crate) fn restore_mode() {}

pub(crate) fn leave_screen() {}

/// Does nothing here.
pub fn restore() {}

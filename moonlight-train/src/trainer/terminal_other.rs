//! The terminal under the dashboard, where it is not a Unix one: stop a run by `q`.

pub(super) fn remember() {}

pub(super) fn keep_interrupt_key() {}

/// Does nothing here.
pub fn restore() {}

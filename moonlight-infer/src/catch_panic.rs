//! Libraries that panic at what a file holds.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

/// What `read` comes to; `None` where it panicked. The panic is the answer to a file that is not what it says, so nothing
/// of it is shown.
///
/// What `read` had borrowed mutably must not be used after a `None`.
pub(crate) fn catch_panic<T>(read: impl FnOnce() -> T) -> Option<T> {
    thread_local! {
        static READING: Cell<bool> = const { Cell::new(false) };
    }
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let shown = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !READING.get() {
                shown(info)
            }
        }));
    });
    let outer = READING.replace(true);
    let read = panic::catch_unwind(AssertUnwindSafe(read));
    READING.set(outer);
    read.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_none() {
        assert_eq!(catch_panic(|| 3), Some(3));
        assert_eq!(catch_panic(|| catch_panic(|| panic!("inner")).unwrap_or(4)), Some(4));
        assert_eq!(catch_panic(|| if true { panic!("no") } else { 1 }), None);
    }
}

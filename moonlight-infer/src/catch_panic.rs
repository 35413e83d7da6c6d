//! Calls into libraries that panic on damaged files.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

/// The result of `call`; `None` if it panics. A panic is an expected reaction to a damaged file, so its message is not
/// printed.
///
/// After a `None`, whatever `call` borrowed mutably may be in any state, and must not be used again.
pub(crate) fn catch_panic<T>(call: impl FnOnce() -> T) -> Option<T> {
    thread_local! {
        static IN_CALL: Cell<bool> = const { Cell::new(false) };
    }
    static HOOK: Once = Once::new();
    // The hook is global: it is silent on threads that are in a call, and runs the previous hook on all others.
    HOOK.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !IN_CALL.get() {
                previous(info)
            }
        }));
    });
    let outer = IN_CALL.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(call));
    IN_CALL.set(outer);
    result.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_none() {
        assert_eq!(catch_panic(|| 3), Some(3));
        assert_eq!(catch_panic(|| catch_panic(|| panic!("inner")).unwrap_or(4)), Some(4));
        assert_eq!(catch_panic(|| if true { panic!("outer") } else { 1 }), None);
    }
}

//! Support for tests: runs kernels at every available level, and reports the levels that were skipped.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Mutex;

use rayon::ThreadPoolBuilder;

use crate::{LEVEL, Level};

/// The environment variable with the path of a file to which [`skipped`] appends, so that a run of many tests can show all skipped
/// tests at its end.
pub const SKIPPED: &str = "MOONLIGHT_SKIPPED";

/// Runs `work` in a pool of two threads whose kernels use `level`.
///
/// # Panics
///
/// If the processor does not have the level, if threads cannot be started, or if `work` panics.
pub fn at_level<R: Send>(level: Level, work: impl FnOnce() -> R + Send) -> R {
    assert!(level.is_available(), "this processor has no {level}");
    let pool = ThreadPoolBuilder::new().num_threads(2).start_handler(move |_| LEVEL.set(Some(level)));
    pool.build().expect("two threads can be started").install(work)
}

/// Runs `work` at each level that the processor has, lowest first, and reports the others by [`skipped`].
///
/// # Panics
///
/// As [`at_level`].
pub fn at_each_level(what: &str, mut work: impl FnMut(Level) + Send) {
    for &level in Level::ALL {
        if level.is_available() {
            at_level(level, || work(level));
        } else {
            skipped(what, &format!("this processor has no {level}"));
        }
    }
}

/// Prints the line `SKIPPED: what, for why`, each line once, and appends it to the file named by [`SKIPPED`]. It writes to stderr
/// directly, because the test harness captures `eprintln!` in tests that pass.
pub fn skipped(what: &str, why: &str) {
    static PRINTED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let line = format!("SKIPPED: {what}, for {why}\n");
    let mut printed = PRINTED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if printed.contains(&line) {
        return;
    }
    drop(std::io::stderr().write_all(line.as_bytes()));
    if let Some(path) = std::env::var_os(SKIPPED) {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        drop(file.and_then(|mut file| file.write_all(line.as_bytes())));
    }
    printed.insert(line);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_at_a_level_fails_the_test() {
        let caught = std::panic::catch_unwind(|| at_level(Level::Scalar, || panic!("on purpose")));
        assert!(caught.is_err());
    }
}

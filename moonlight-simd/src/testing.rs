//! For tests: kernels at every level that there is, and a word about those that are not.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Mutex;

use rayon::ThreadPoolBuilder;

use crate::{LEVEL, Level};

/// The environment variable that names a file which [`skipped`] adds its lines to, so that a run of many tests can show them
/// together at its end.
pub const SKIPPED: &str = "MOONLIGHT_SKIPPED";

/// Runs `work` in a pool of two threads whose kernels keep to `level`.
///
/// # Panics
///
/// Where the processor lacks the level, where there can be no threads, and where `work` panics.
pub fn at_level<R: Send>(level: Level, work: impl FnOnce() -> R + Send) -> R {
    assert!(level.is_available(), "this processor has no {level}");
    let pool = ThreadPoolBuilder::new().num_threads(2).start_handler(move |_| LEVEL.set(Some(level)));
    pool.build().expect("a test may have two threads").install(work)
}

/// Runs `work` at each level that the processor has, lowest first; of others [`skipped`] speaks.
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

/// Says `SKIPPED: what, for why`, once: past the test harness, which hides what tests that pass have printed, and into the file
/// that [`SKIPPED`] names.
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
    fn a_panic_at_a_level_is_the_tests() {
        let caught = std::panic::catch_unwind(|| at_level(Level::Scalar, || panic!("on purpose")));
        assert!(caught.is_err());
    }
}

//! The folder of a run. One process at a time may train in it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use moonlight_convert::storage;

use crate::error::TrainError;
use crate::output_file::Unfinished;

/// The locked file in the run's folder. The operating system releases the lock when the process ends; the file stays.
pub(crate) const LOCK_FILE: &str = "run.lock";
/// How often a claim tries again before the folder counts as locked. A reader that looks whether a training is in progress
/// holds a shared lock for an instant.
const ATTEMPTS: usize = 5;
const PAUSE: Duration = Duration::from_millis(20);
/// Bytes of the lock file that are shown; it is not trusted to be short.
const MAX_HOLDER_BYTES: u64 = 400;

/// A run's folder, locked by this process. If the claim made the folder and [`begin`](Self::begin) was not called, dropping
/// it removes the folder again: otherwise a run that was refused could not be started later without `--resume`.
#[derive(Debug)]
pub(super) struct RunFolder {
    path: PathBuf,
    /// Held for its lock; `None` if the file system has no locks.
    _lock: Option<File>,
    /// Set until the run begins, so that an interrupt removes the folder as well.
    fresh: Option<Unfinished>,
}

impl RunFolder {
    /// Creates and locks the folder, or with `resume` locks the existing one.
    ///
    /// # Errors
    ///
    /// [`TrainError::RunExists`] if the folder exists and `resume` is not given, [`TrainError::RunLocked`] if another process
    /// trains in it, and an error for a folder that cannot be created.
    pub(super) fn claim(path: &Path, resume: bool) -> Result<Self, TrainError> {
        if let Some(parent) = path.parent() {
            storage::create_dir_all(parent).map_err(TrainError::write(parent))?;
        }
        // Creating the folder is the check for its existence: of two processes that start at once, one creates it.
        let fresh = match storage::create_dir(path) {
            Ok(()) => {
                // After a power failure a folder whose entry was never flushed is gone, with the checkpoints in it.
                let parent = path.parent().unwrap_or(Path::new(""));
                storage::sync_dir(parent).map_err(TrainError::write(parent))?;
                true
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => false,
            Err(error) => return Err(TrainError::write(path)(error)),
        };
        if !fresh && !resume && !holds_only_the_lock(path) {
            // If the run is in progress, `RunLocked` explains more than `RunExists`.
            lock(path)?;
            return Err(TrainError::RunExists(path.to_owned()));
        }
        let lock = lock(path)?;
        // Another process may have locked the folder, trained in it and ended since it was created above.
        if !resume && !holds_only_the_lock(path) {
            return Err(TrainError::RunExists(path.to_owned()));
        }
        let fresh = fresh || holds_only_the_lock(path);
        let fresh = fresh.then(|| Unfinished::new(path));
        Ok(Self { path: path.to_owned(), _lock: lock, fresh })
    }

    /// Keeps the folder from now on: the run is about to write into it.
    pub(super) fn begin(&mut self) {
        self.fresh = None;
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if self.fresh.is_some() && holds_only_the_lock(&self.path) {
            let _ = fs::remove_file(self.path.join(LOCK_FILE));
            let _ = fs::remove_dir(&self.path);
        }
    }
}

fn holds_only_the_lock(path: &Path) -> bool {
    fs::read_dir(path)
        .is_ok_and(|mut entries| entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == LOCK_FILE)))
}

/// Locks a run's folder and writes this process into the lock file.
fn lock(folder: &Path) -> Result<Option<File>, TrainError> {
    let path = folder.join(LOCK_FILE);
    let mut attempt = 1;
    let mut file = loop {
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = options.map_err(TrainError::write(&path))?;
        match file.try_lock() {
            // Another process gave up its claim and removed this file after it was opened here. A lock on it excludes no one.
            Ok(()) if !is_at(&file, &path) => {}
            Ok(()) => break file,
            Err(TryLockError::WouldBlock) if attempt < ATTEMPTS => {
                attempt += 1;
                sleep(PAUSE);
            }
            Err(TryLockError::WouldBlock) => {
                let holder = holder(&path);
                return Err(TrainError::RunLocked { folder: folder.to_owned(), holder });
            }
            Err(TryLockError::Error(error)) => {
                tracing::warn!(
                    "`{}` cannot be locked ({error}); make sure that no other process trains there",
                    folder.display()
                );
                return Ok(None);
            }
        }
    };
    // Another process prints this if it is refused; the run does not depend on it.
    let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", this_process()));
    Ok(Some(file))
}

/// Whether an open file is the one at a path.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |data: fs::Metadata| (data.dev(), data.ino());
    file.metadata().map(id).ok() == fs::metadata(path).map(id).ok()
}

#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true // an open file cannot be removed there
}

/// The process that holds the lock, as it describes itself in the file. It writes that right after it locks the file, so a
/// short wait may be needed.
fn holder(lock: &Path) -> String {
    for _ in 0..50 {
        let mut text = String::new();
        // A file that is not UTF-8 leaves the text empty.
        let _ = File::open(lock).and_then(|file| file.take(MAX_HOLDER_BYTES).read_to_string(&mut text));
        if text.ends_with('\n') {
            return text.trim().to_owned();
        }
        sleep(Duration::from_millis(10));
    }
    String::new()
}

fn this_process() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    format!("process {} on {}, since {}", std::process::id(), host(), utc(seconds))
}

#[cfg(unix)]
fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(not(unix))]
fn host() -> String {
    std::env::var("COMPUTERNAME").unwrap_or_else(|_| "this host".into())
}

/// `2026-11-30 14:05:09 UTC`, by the civil calendar (Howard Hinnant's `civil_from_days`).
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468; // from March 1 of the year 0, so that a leap day ends a year
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = 400 * era + year_of_era + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_process_is_refused_and_the_error_names_the_first() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("runs/a");
        let mut first = RunFolder::claim(&path, false).unwrap();
        for resume in [false, true] {
            let error = RunFolder::claim(&path, resume).unwrap_err();
            assert!(matches!(&error, TrainError::RunLocked { .. }), "{error}");
            assert!(error.to_string().contains(&format!("process {} on ", std::process::id())), "{error}");
        }
        first.begin();
        fs::write(path.join("recipe.toml"), "").unwrap();
        drop(first);
        assert!(matches!(RunFolder::claim(&path, false), Err(TrainError::RunExists(_))));
        RunFolder::claim(&path, true).unwrap();
        assert!(path.join("recipe.toml").exists());
    }

    #[test]
    fn a_run_that_does_not_begin_leaves_no_folder() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("a");
        drop(RunFolder::claim(&path, false).unwrap());
        assert!(!path.exists());
        // A run that was killed before it began leaves a folder with only the lock file, and can be started again.
        fs::create_dir(&path).unwrap();
        fs::write(path.join(LOCK_FILE), "process 1 on nowhere").unwrap();
        let mut folder = RunFolder::claim(&path, false).unwrap();
        folder.begin();
        drop(folder);
        assert!(path.exists());
    }

    #[test]
    fn of_many_claims_at_once_exactly_one_succeeds() {
        let home = tempfile::tempdir().unwrap();
        for round in 0..20 {
            let path = home.path().join(round.to_string());
            let claims: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| RunFolder::claim(&path, false))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            // All claims stay alive until here, so no lock was free for a second one.
            assert_eq!(claims.iter().filter(|claim| claim.is_ok()).count(), 1, "round {round}");
        }
    }

    #[test]
    fn unix_time_is_formatted_as_utc() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_827_696), "2000-02-29 12:34:56 UTC");
        assert_eq!(utc(1_795_996_799), "2026-11-29 23:59:59 UTC");
    }
}

//! The folder of a run, which one process has at a time.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use moonlight_convert::storage;

use crate::error::TrainError;
use crate::output_file::Unfinished;

/// The file in the run's folder that is locked. The kernel releases the lock with the process; the file stays.
const LOCK_FILE: &str = "run.lock";
/// Of a longer one, the beginning is shown.
const MAX_HOLDER_BYTES: u64 = 400;

/// A run's folder, claimed by this process. Where nothing was begun in a folder that the claim made, dropping it removes the
/// folder again, so that a run that was refused can be started.
#[derive(Debug)]
pub(super) struct RunFolder {
    path: PathBuf,
    /// Held, not used; `None` where the file system has no locks.
    _lock: Option<File>,
    /// While the folder is this claim's own and empty but for the lock: a program that ends at once removes it, too.
    fresh: Option<Unfinished>,
}

impl RunFolder {
    /// Claims a folder: makes it, or with `resume` takes the one that is there.
    ///
    /// # Errors
    ///
    /// [`TrainError::RunExists`] where it is there, [`TrainError::RunLocked`] where another process has it, and a folder that
    /// cannot be made.
    pub(super) fn claim(path: &Path, resume: bool) -> Result<Self, TrainError> {
        if let Some(parent) = path.parent() {
            storage::create_dir_all(parent).map_err(TrainError::write(parent))?;
        }
        // Making it is the check: of two that start at once, one makes it.
        let fresh = match storage::create_dir(path) {
            Ok(()) => {
                // Durable as well: what is saved in it later is no more so than its name.
                let parent = path.parent().unwrap_or(Path::new(""));
                storage::sync_dir(parent).map_err(TrainError::write(parent))?;
                true
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => false,
            Err(error) => return Err(TrainError::write(path)(error)),
        };
        if !fresh && !resume && !holds_only_the_lock(path) {
            // One that is running is the better explanation.
            lock(path)?;
            return Err(TrainError::RunExists(path.to_owned()));
        }
        let lock = lock(path)?;
        // Between making and locking, another process may have taken it and begun.
        if !resume && !holds_only_the_lock(path) {
            return Err(TrainError::RunExists(path.to_owned()));
        }
        let fresh = fresh || holds_only_the_lock(path);
        let fresh = fresh.then(|| Unfinished::new(path));
        Ok(Self { path: path.to_owned(), _lock: lock, fresh })
    }

    /// From now on the folder stays.
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

/// Locks a run's folder and writes down who holds it.
fn lock(folder: &Path) -> Result<Option<File>, TrainError> {
    let path = folder.join(LOCK_FILE);
    let mut file = loop {
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = options.map_err(TrainError::write(&path))?;
        match file.try_lock() {
            // A claim that was given up meanwhile has removed the file: a lock on that one is worth nothing.
            Ok(()) if !is_at(&file, &path) => {}
            Ok(()) => break file,
            Err(TryLockError::WouldBlock) => {
                let holder = holder(&path);
                return Err(TrainError::RunLocked { folder: folder.to_owned(), holder });
            }
            Err(TryLockError::Error(error)) => {
                tracing::warn!(
                    "`{}` cannot be locked ({error}): see to it yourself that no other process trains there",
                    folder.display()
                );
                return Ok(None);
            }
        }
    };
    // For whoever comes second; the run does not depend on it.
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

/// What the process that holds a lock says of itself. It does so right after it has locked the file, so a short wait may be
/// needed.
fn holder(lock: &Path) -> String {
    for _ in 0..50 {
        let mut text = String::new();
        // Anything else than text says nothing.
        let _ = File::open(lock).and_then(|file| file.take(MAX_HOLDER_BYTES).read_to_string(&mut text));
        if text.ends_with('\n') {
            return text.trim().to_owned();
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
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
    fn a_folder_has_one_process_and_the_second_is_told_who() {
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
        // Killed before it began, it leaves a folder with the lock alone, which is nobody's.
        fs::create_dir(&path).unwrap();
        fs::write(path.join(LOCK_FILE), "process 1 on nowhere").unwrap();
        let mut folder = RunFolder::claim(&path, false).unwrap();
        folder.begin();
        drop(folder);
        assert!(path.exists());
    }

    #[test]
    fn of_many_at_once_one_has_it() {
        let home = tempfile::tempdir().unwrap();
        for round in 0..20 {
            let path = home.path().join(round.to_string());
            let claims: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| RunFolder::claim(&path, false))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            // Held until all have tried.
            assert_eq!(claims.iter().filter(|claim| claim.is_ok()).count(), 1, "round {round}");
        }
    }

    #[test]
    fn a_time_is_that_of_the_calendar() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_827_696), "2000-02-29 12:34:56 UTC");
        assert_eq!(utc(1_795_996_799), "2026-11-29 23:59:59 UTC");
    }
}

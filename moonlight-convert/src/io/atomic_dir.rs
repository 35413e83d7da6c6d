//! Replaces a directory so that, whenever a crash happens, the old or the new one is complete.
//!
//! A checkpoint `DIR` is written into a hidden sibling, which is then renamed:
//!
//! 1. Everything is written into `.DIR.moonlight-saving`; each file and then the folder itself is flushed to the disk.
//!    A crash up to here leaves `DIR` unchanged, and the next save removes the sibling. An error removes it
//!    immediately.
//! 2. If `DIR` does not exist, the sibling is renamed to it, which is atomic.
//! 3. If `DIR` exists, Linux and macOS exchange the two names atomically, and the old files, now in the sibling, are
//!    removed. At every moment `DIR` is complete: the old or the new.
//! 4. If the file system cannot exchange names, three renames do it: the sibling to `.DIR.moonlight-new`, which marks
//!    it as complete; `DIR` to `.DIR.moonlight-old`; `.DIR.moonlight-new` to `DIR`. Between the last two, `DIR` does
//!    not exist and both siblings are complete: opening `DIR` reads the new one under its hidden name
//!    ([`complete_path`]), and the next save of `DIR` finishes the replacement ([`recover`]). A reader renames nothing.
//!
//! The names of the siblings are specific to this program, so that no folder of the user is mistaken for one. A writer
//! holds a lock on the folder that it fills: a second writer is refused, and a folder without a lock is left over from
//! a crash.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::CheckpointError;
use crate::io::file_error::FileError;
use crate::io::storage;

/// The suffixes of siblings, one for each state.
const SAVING: &str = "moonlight-saving";
const NEW: &str = "moonlight-new";
const OLD: &str = "moonlight-old";
const REMOVED: &str = "moonlight-removed";
/// The suffixes of earlier versions. The user's own folders may have them, too, so that only [`clean_leftovers`] looks
/// for them, and only for the names that its caller owns.
const EARLIER_NAMES: [(&str, &str); 4] = [("saving", SAVING), ("new", NEW), ("old", OLD), ("removed", REMOVED)];

/// Fills a new directory with `fill`, and replaces `dir` with it in one step.
///
/// # Errors
///
/// Errors of `fill`, [`CheckpointError::Busy`] if another process is saving the same directory, or
/// [`CheckpointError::File`]. `dir` is then unchanged and the new files are removed, unless the only failure is to flush
/// the parent folder after the rename.
pub fn replace_directory(
    dir: &Path,
    fill: impl FnOnce(&Path) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let staging = AtomicDir::begin(dir)?;
    fill(staging.path())?;
    staging.commit()
}

/// Renames a directory and then removes it, so that after a crash `dir` is complete or gone, never with files missing.
///
/// # Errors
///
/// A failed rename, or files that cannot be removed. Such files keep a hidden name, under which [`clean_leftovers`]
/// finds them.
pub fn remove_directory(dir: &Path) -> Result<(), FileError> {
    let hidden = sibling(dir, REMOVED);
    storage::rename(dir, &hidden).map_err(FileError::write(dir))?;
    // Durable before the first file is removed: otherwise the old name could reappear after a power loss, with files
    // missing.
    let parent = dir.parent().unwrap_or(Path::new(""));
    storage::sync_dir(parent).map_err(FileError::write(parent))?;
    storage::remove_dir_all(&hidden).map_err(FileError::write(&hidden))
}

/// Cleans up after killed saves in `parent`: finishes or removes the siblings of directories whose names `owned`
/// accepts. The caller ensures that no process is saving them. Returns the siblings that could not be renamed or
/// removed, with their errors.
///
/// # Errors
///
/// A `parent` that cannot be read.
pub fn clean_leftovers(parent: &Path, owned: impl Fn(&str) -> bool) -> Result<Vec<FileError>, FileError> {
    let mut failures = Vec::new();
    let mut leftovers: Vec<(PathBuf, &str, PathBuf)> = Vec::new();
    for path in storage::read_dir(parent).map_err(FileError::read(parent))? {
        if let Some((name, state)) = path.file_name().and_then(|name| name.to_str()).and_then(leftover)
            && owned(name)
            && path.symlink_metadata().is_ok_and(|data| data.is_dir())
        {
            let target = parent.join(name);
            leftovers.push((path, state, target));
        }
    }
    // If both siblings of a missing target are complete, the new one is renamed to it and the old one removed.
    leftovers.sort_by_key(|(_, state, _)| [NEW, OLD].iter().position(|first| first == state).unwrap_or(2));
    for (path, state, target) in leftovers {
        let done = match state {
            NEW | OLD if !target.exists() => storage::rename(&path, &target).and_then(|()| storage::sync_dir(parent)),
            _ => storage::remove_dir_all(&path),
        };
        failures.extend(done.map_err(FileError::write(&path)).err());
    }
    Ok(failures)
}

/// The directory that a sibling belongs to, and its state.
fn leftover(name: &str) -> Option<(&str, &'static str)> {
    let (target, state) = name.strip_prefix('.')?.rsplit_once('.')?;
    let known = EARLIER_NAMES.iter().find(|(earlier, now)| state == *earlier || state == *now)?;
    Some((target, known.1))
}

/// A directory that is being written. Dropping it without a commit removes it.
#[derive(Debug)]
pub(crate) struct AtomicDir {
    target: PathBuf,
    saving: PathBuf,
    committed: bool,
    /// Held while it is written; `None` if the file system has no locks.
    _lock: Option<File>,
}

impl AtomicDir {
    /// Creates the empty sibling for the files.
    pub(crate) fn begin(target: &Path) -> Result<Self, CheckpointError> {
        let target = resolve(target)?;
        if let Some(parent) = target.parent() {
            storage::create_dir_all(parent).map_err(CheckpointError::write(parent))?;
        }
        let saving = sibling(&target, SAVING);
        if saving.exists() {
            // Left over from a crash, unless another process holds its lock.
            lock(&saving, &target)?;
        }
        // Only after the lock: otherwise the siblings could be those of a running save.
        recover(&target).map_err(CheckpointError::write(&target))?;
        for stale in [&saving, &sibling(&target, NEW), &sibling(&target, OLD)] {
            if stale.exists() {
                storage::remove_dir_all(stale).map_err(CheckpointError::write(stale))?;
            }
        }
        // Two processes may get here at the same time; the second one fails to create the folder.
        match storage::create_dir(&saving) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(CheckpointError::Busy { dir: target });
            }
            created => created.map_err(CheckpointError::write(&saving))?,
        }
        let lock = lock(&saving, &target)?;
        Ok(Self { target, saving, committed: false, _lock: lock })
    }

    /// The directory to write the files to.
    pub(crate) fn path(&self) -> &Path {
        &self.saving
    }

    /// Flushes the directory and renames it to the target.
    pub(crate) fn commit(mut self) -> Result<(), CheckpointError> {
        let (saving, target) = (self.saving.clone(), self.target.clone());
        // Everything is on the disk before the rename: after a power loss a renamed directory could otherwise contain
        // empty files.
        let placed = flush(&saving).and_then(|()| {
            if !target.exists() {
                storage::rename(&saving, &target)
            } else {
                storage::exchange(&saving, &target).or_else(|_| replace_in_steps(&saving, &target))
            }
        });
        placed.map_err(CheckpointError::write(&target))?;
        // From here on the target is the new directory: dropping must not remove anything.
        self.committed = true;
        if let Some(parent) = target.parent() {
            storage::sync_dir(parent).map_err(CheckpointError::write(parent))?;
        }
        // The new directory is in place. A failure to remove the old one is not an error: the next save tries again.
        for old in [saving, sibling(&target, OLD)] {
            let _ = storage::remove_dir_all(&old);
        }
        Ok(())
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.committed {
            // The caller reports the error that led here.
            let _ = storage::remove_dir_all(&self.saving);
        }
    }
}

/// Locks the folder that a save of `target` fills.
fn lock(saving: &Path, target: &Path) -> Result<Option<File>, CheckpointError> {
    // Only Unix opens a directory as a file.
    let Ok(folder) = File::open(saving) else { return Ok(None) };
    match folder.try_lock() {
        Ok(()) => Ok(Some(folder)),
        Err(TryLockError::WouldBlock) => Err(CheckpointError::Busy { dir: target.to_owned() }),
        // Some network file systems have no locks.
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

/// Step 4 of the protocol above. A failed rename is rolled back.
fn replace_in_steps(saving: &Path, target: &Path) -> io::Result<()> {
    let (new, old) = (sibling(target, NEW), sibling(target, OLD));
    storage::rename(saving, &new)?;
    if let Err(error) = storage::rename(target, &old) {
        let _ = storage::rename(&new, saving);
        return Err(error);
    }
    if let Err(error) = storage::rename(&new, target) {
        let _ = storage::rename(&old, target);
        let _ = storage::rename(&new, saving);
        return Err(error);
    }
    Ok(())
}

/// Finishes a replacement that crashed between two renames. Only a process that is about to save `target` calls it.
fn recover(target: &Path) -> io::Result<()> {
    if target.exists() || target.file_name().is_none() {
        return Ok(());
    }
    match complete_sibling(target) {
        Some(complete) => storage::rename(&complete, target),
        None => Ok(()),
    }
}

/// The directory with the files of `target`: itself, or the complete sibling after a crash between two renames.
pub(crate) fn complete_path(target: &Path) -> PathBuf {
    match complete_sibling(target) {
        Some(complete) if !target.exists() && target.file_name().is_some() => complete,
        _ => target.to_owned(),
    }
}

/// The complete sibling of a `target` that does not exist. The new one gets its name only when it is complete; without
/// it, the old one is what a failed replacement left.
fn complete_sibling(target: &Path) -> Option<PathBuf> {
    [sibling(target, NEW), sibling(target, OLD)].into_iter().find(|path| path.is_dir())
}

/// Resolves links and dots, so that the path ends in a name from which those of its siblings are made. A path that does
/// not exist only becomes absolute.
fn resolve(target: &Path) -> Result<PathBuf, CheckpointError> {
    let resolved = match fs::canonicalize(target) {
        Ok(path) => Ok(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => std::path::absolute(target),
        Err(error) => Err(error),
    };
    let path = resolved.map_err(CheckpointError::read(target))?;
    if path.file_name().is_none() || (path.exists() && !path.is_dir()) {
        return Err(CheckpointError::not_a_directory(target));
    }
    Ok(path)
}

fn sibling(target: &Path, state: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(".");
    name.push(state);
    target.with_file_name(name)
}

/// Flushes a directory and everything in it to the disk.
fn flush(dir: &Path) -> io::Result<()> {
    for path in storage::read_dir(dir)? {
        if path.is_dir() {
            flush(&path)?;
        } else {
            storage::sync_file(&path)?;
        }
    }
    storage::sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A temporary directory, and a directory in it that contains one file.
    fn home() -> (tempfile::TempDir, PathBuf) {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("checkpoint");
        write(&dir, "old");
        (home, dir)
    }

    fn write(dir: &Path, text: &str) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("file"), text).unwrap();
    }

    fn text(dir: &Path) -> String {
        fs::read_to_string(dir.join("file")).unwrap()
    }

    fn replace(dir: &Path, text: &str) -> Result<(), CheckpointError> {
        replace_directory(dir, |new| fs::write(new.join("file"), text).map_err(CheckpointError::write(new)))
    }

    fn names(dir: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    fn alone(dir: &Path) -> bool {
        fs::read_dir(dir.parent().unwrap()).unwrap().count() == 1
    }

    #[test]
    fn the_new_directory_takes_the_place_of_the_old() {
        let (_home, dir) = home();
        for new in ["one", "two"] {
            replace(&dir, new).unwrap();
            assert_eq!(text(&dir), new);
            assert!(alone(&dir), "no sibling is left");
        }
    }

    #[test]
    fn a_failure_leaves_the_old_directory_and_nothing_else() {
        let (_home, dir) = home();
        let error = replace_directory(&dir, |new| {
            write(new, "half");
            Err(CheckpointError::write(new)(io::ErrorKind::StorageFull.into()))
        });
        assert!(error.unwrap_err().hint().unwrap().contains("free some disk space"));
        assert_eq!(text(&dir), "old");
        assert!(alone(&dir));
    }

    /// Every state that a crash can leave: the old or the new directory is found complete, and the next save cleans up.
    #[test]
    fn after_a_crash_between_any_two_steps_one_is_complete() {
        type State<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str);
        let states: [State<'_>; 6] = [
            ("while writing", &[("checkpoint", "old"), (".checkpoint.moonlight-saving", "half")], "old"),
            ("while writing the first", &[(".checkpoint.moonlight-saving", "half")], ""),
            ("after the exchange", &[("checkpoint", "new"), (".checkpoint.moonlight-saving", "old")], "new"),
            ("after the first rename", &[("checkpoint", "old"), (".checkpoint.moonlight-new", "new")], "old"),
            (
                "after the second rename",
                &[(".checkpoint.moonlight-old", "old"), (".checkpoint.moonlight-new", "new")],
                "new",
            ),
            ("after the third rename", &[("checkpoint", "new"), (".checkpoint.moonlight-old", "old")], "new"),
        ];
        for (when, state, whole) in states {
            let home = tempfile::tempdir().unwrap();
            for (name, text) in state {
                write(&home.path().join(name), text);
            }
            let dir = home.path().join("checkpoint");
            let before: Vec<_> = names(home.path());
            match whole {
                "" => assert!(!complete_path(&dir).exists(), "{when}"),
                whole => assert_eq!(text(&complete_path(&dir)), whole, "{when}"),
            }
            assert_eq!(names(home.path()), before, "{when}: a reader changes nothing");
            recover(&dir).unwrap();
            match whole {
                "" => assert!(!dir.exists(), "{when}"),
                whole => assert_eq!(text(&dir), whole, "{when}"),
            }
            replace(&dir, "newer").unwrap();
            assert_eq!(text(&dir), "newer", "{when}");
            assert!(alone(&dir), "{when}");
        }
    }

    /// The protocol for file systems that cannot exchange names.
    #[test]
    fn three_renames_replace_a_directory_as_well() {
        let (_home, dir) = home();
        let staging = AtomicDir::begin(&dir).unwrap();
        write(staging.path(), "new");
        replace_in_steps(staging.path(), &dir).unwrap();
        assert_eq!(text(&dir), "new");
        assert_eq!(text(&sibling(&dir, OLD)), "old");
        drop(staging);
        replace(&dir, "newer").unwrap();
        assert!(alone(&dir));
    }

    #[test]
    fn a_file_is_not_replaced() {
        let (home, _dir) = home();
        let file = home.path().join("checkpoint/file");
        assert!(matches!(replace(&file, "new"), Err(CheckpointError::NotADirectory { .. })));
    }

    #[test]
    fn folders_of_the_user_are_left_alone() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("checkpoint");
        for state in ["saving", "new", "old", "removed"] {
            write(&home.path().join(format!(".checkpoint.{state}")), "mine");
        }
        assert_eq!(complete_path(&dir), dir);
        replace(&dir, "new").unwrap();
        assert_eq!(text(&dir), "new");
        assert_eq!(names(home.path()).len(), 5);
    }

    #[test]
    fn a_second_writer_of_the_same_directory_is_refused() {
        let (_home, dir) = home();
        let first = AtomicDir::begin(&dir).unwrap();
        write(first.path(), "first");
        assert!(matches!(replace(&dir, "second"), Err(CheckpointError::Busy { .. })));
        first.commit().unwrap();
        assert_eq!(text(&dir), "first");
        replace(&dir, "third").unwrap();
        assert_eq!(text(&dir), "third");
    }

    #[test]
    fn leftovers_are_finished_or_removed_and_other_folders_stay() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        // Two complete copies and no target, with the suffixes of earlier versions; the new one is the newer.
        write(&at(".step-1.new"), "new");
        write(&at(".step-1.old"), "old");
        write(&at(".step-2.moonlight-old"), "old");
        write(&at(".step-3.moonlight-saving"), "half");
        write(&at(".step-4.removed"), "half");
        write(&at("step-5"), "whole");
        write(&at(".step-5.moonlight-new"), "newer");
        write(&at(".notes.old"), "mine");
        fs::write(at(".step-6.moonlight-saving"), "a file").unwrap();
        let failures = clean_leftovers(home.path(), |name| name.starts_with("step-")).unwrap();
        assert!(failures.is_empty(), "{failures:?}");
        assert_eq!(text(&at("step-1")), "new");
        assert_eq!(text(&at("step-2")), "old");
        assert_eq!(text(&at("step-5")), "whole");
        assert_eq!(names(home.path()), [".notes.old", ".step-6.moonlight-saving", "step-1", "step-2", "step-5"]);
    }
}

//! Putting a directory in the place of another so that a crash leaves one of them whole.
//!
//! A checkpoint `DIR` is written into a hidden sibling and takes its place by renaming:
//!
//! 1. Everything is written into `.DIR.saving`, each file and then the folder itself flushed to the disk. A crash so far
//!    leaves `DIR` as it was; the next save removes the sibling. An error removes it at once.
//! 2. Where there is no `DIR` yet, `.DIR.saving` is renamed to it: one step, which happens or does not.
//! 3. Where there is one, Linux and macOS exchange the two names in one step, and the old files, now in `.DIR.saving`,
//!    are removed. At every moment `DIR` is whole: the old or the new.
//! 4. Where the file system cannot exchange names, three renamings do it: `.DIR.saving` to `.DIR.new`, which marks it as
//!    whole; `DIR` to `.DIR.old`; `.DIR.new` to `DIR`. Between the last two there is no `DIR`, and both siblings are
//!    whole: opening or saving `DIR` finishes the job ([`recover`]).
//!
//! One process may save a directory at a time.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::CheckpointError;

/// Fills a new directory by `fill` and puts it in the place of `dir`, whatever stood there, in one step.
///
/// # Errors
///
/// Whatever `fill` says, or [`CheckpointError::File`]. What stood at `dir` is then untouched, and what was written is
/// removed.
pub fn replace_directory(
    dir: &Path,
    fill: impl FnOnce(&Path) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let staging = AtomicDir::begin(dir)?;
    fill(staging.path())?;
    staging.commit()
}

/// A directory being written, removed again unless it is committed.
#[derive(Debug)]
pub(crate) struct AtomicDir {
    target: PathBuf,
    saving: PathBuf,
    committed: bool,
}

impl AtomicDir {
    /// Makes the empty sibling that the files go to.
    pub(crate) fn begin(target: &Path) -> Result<Self, CheckpointError> {
        let target = resolve(target)?;
        recover(&target);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(CheckpointError::write(parent))?;
        }
        let saving = sibling(&target, "saving");
        // Left behind by a save that crashed: the first was never whole, the others have been replaced.
        for stale in [&saving, &sibling(&target, "new"), &sibling(&target, "old")] {
            remove(stale).map_err(CheckpointError::write(stale))?;
        }
        fs::create_dir(&saving).map_err(CheckpointError::write(&saving))?;
        Ok(Self { target, saving, committed: false })
    }

    /// Where the files go.
    pub(crate) fn path(&self) -> &Path {
        &self.saving
    }

    /// Puts the directory in its place.
    pub(crate) fn commit(mut self) -> Result<(), CheckpointError> {
        let (saving, target) = (self.saving.clone(), self.target.clone());
        let placed = flush(&saving).and_then(|()| {
            if !target.exists() {
                fs::rename(&saving, &target)
            } else {
                exchange(&saving, &target).or_else(|_| replace_in_steps(&saving, &target))
            }
        });
        placed.map_err(CheckpointError::write(&target))?;
        self.committed = true;
        if let Some(parent) = target.parent() {
            sync_directory(parent).map_err(CheckpointError::write(parent))?;
        }
        // The new directory stands; what is left of the old one is only in the way, and the next save tries again.
        for old in [saving, sibling(&target, "old")] {
            let _ = remove(&old);
        }
        Ok(())
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.committed {
            // The error that led here is the one to report.
            let _ = remove(&self.saving);
        }
    }
}

/// Step 4 of the protocol.
fn replace_in_steps(saving: &Path, target: &Path) -> io::Result<()> {
    let (new, old) = (sibling(target, "new"), sibling(target, "old"));
    fs::rename(saving, &new)?;
    if let Err(error) = fs::rename(target, &old) {
        let _ = fs::rename(&new, saving);
        return Err(error);
    }
    if let Err(error) = fs::rename(&new, target) {
        let _ = fs::rename(&old, target);
        let _ = fs::rename(&new, saving);
        return Err(error);
    }
    Ok(())
}

/// Finishes a replacement that crashed between two renamings. Does nothing where nothing is to be done or it cannot be.
pub(crate) fn recover(target: &Path) {
    if target.exists() || target.file_name().is_none() {
        return;
    }
    // `.new` is only there when it is whole; without it, `.old` is what a failed replacement put aside.
    for whole in [sibling(target, "new"), sibling(target, "old")] {
        if whole.is_dir() && fs::rename(&whole, target).is_ok() {
            return;
        }
    }
}

/// Exchanges two directories' names in one step.
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn exchange(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// The path with links and dots resolved as far as it exists, so that it has a name and siblings.
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

fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes durable what a directory holds.
fn flush(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            flush(&path)?;
        } else {
            File::open(&path)?.sync_all()?;
        }
    }
    sync_directory(dir)
}

/// Makes the names in a directory as durable as the files are.
fn sync_directory(dir: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A home with a directory that holds one file, and the file's text.
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

    fn alone(dir: &Path) -> bool {
        fs::read_dir(dir.parent().unwrap()).unwrap().count() == 1
    }

    #[test]
    fn the_new_directory_takes_the_place_of_the_old() {
        let (_home, dir) = home();
        for new in ["one", "two"] {
            replace(&dir, new).unwrap();
            assert_eq!(text(&dir), new);
            assert!(alone(&dir), "nothing is left beside it");
        }
    }

    #[test]
    fn a_failure_leaves_the_old_directory_and_nothing_else() {
        let (_home, dir) = home();
        let error = replace_directory(&dir, |new| {
            write(new, "half");
            Err(CheckpointError::write(new)(io::ErrorKind::StorageFull.into()))
        });
        assert!(error.unwrap_err().hint().unwrap().contains("free some space"));
        assert_eq!(text(&dir), "old");
        assert!(alone(&dir));
    }

    /// Each state that a crash can leave, by what stands where: the old or the new is found whole, and the next save
    /// cleans up.
    #[test]
    fn after_a_crash_between_any_two_steps_one_is_whole() {
        type State<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str);
        let states: [State<'_>; 6] = [
            ("while writing", &[("checkpoint", "old"), (".checkpoint.saving", "half")], "old"),
            ("while writing the first", &[(".checkpoint.saving", "half")], ""),
            ("behind the exchange", &[("checkpoint", "new"), (".checkpoint.saving", "old")], "new"),
            ("behind the first renaming", &[("checkpoint", "old"), (".checkpoint.new", "new")], "old"),
            ("behind the second", &[(".checkpoint.old", "old"), (".checkpoint.new", "new")], "new"),
            ("behind the third", &[("checkpoint", "new"), (".checkpoint.old", "old")], "new"),
        ];
        for (when, state, whole) in states {
            let home = tempfile::tempdir().unwrap();
            for (name, text) in state {
                write(&home.path().join(name), text);
            }
            let dir = home.path().join("checkpoint");
            recover(&dir);
            match whole {
                "" => assert!(!dir.exists(), "{when}"),
                whole => assert_eq!(text(&dir), whole, "{when}"),
            }
            replace(&dir, "newer").unwrap();
            assert_eq!(text(&dir), "newer", "{when}");
            assert!(alone(&dir), "{when}");
        }
    }

    /// The way of file systems that cannot exchange names.
    #[test]
    fn three_renamings_replace_as_well() {
        let (_home, dir) = home();
        let staging = AtomicDir::begin(&dir).unwrap();
        write(staging.path(), "new");
        replace_in_steps(staging.path(), &dir).unwrap();
        assert_eq!(text(&dir), "new");
        assert_eq!(text(&sibling(&dir, "old")), "old");
        drop(staging);
        replace(&dir, "newer").unwrap();
        assert!(alone(&dir));
    }

    #[test]
    fn a_file_is_no_directory_to_replace() {
        let (home, _dir) = home();
        let file = home.path().join("checkpoint/file");
        assert!(matches!(replace(&file, "new"), Err(CheckpointError::NotADirectory { .. })));
    }
}

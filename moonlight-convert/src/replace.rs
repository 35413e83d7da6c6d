//! Putting a finished directory in the place of an old one, so that no crash leaves half of either.
//!
//! The new directory is filled beside its place under a hidden name, every file is flushed to the disk, and then the
//! two names are exchanged in one step (Linux) or the old one is moved aside first (elsewhere: a crash between the two
//! moves leaves the old checkpoint whole under `.NAME.replaced`).

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::CheckpointError;

/// Fills a new directory by `fill` and puts it at `dir`.
///
/// # Errors
///
/// Whatever `fill` says, or [`CheckpointError::Write`]. What stood at `dir` is then untouched, and the unfinished
/// directory is removed.
pub fn replace_directory(
    dir: &Path,
    fill: impl FnOnce(&Path) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let incomplete = sibling(dir, "incomplete")?;
    let _ = fs::remove_dir_all(&incomplete); // left by a process of the same name that was killed
    let result = fs::create_dir_all(&incomplete)
        .map_err(CheckpointError::write(&incomplete))
        .and_then(|()| fill(&incomplete))
        .and_then(|()| flush(&incomplete))
        .and_then(|()| exchange(&incomplete, dir));
    let _ = fs::remove_dir_all(&incomplete); // what was replaced, or what could not be finished
    result
}

/// `.NAME.WORD` beside `dir`.
fn sibling(dir: &Path, word: &str) -> Result<PathBuf, CheckpointError> {
    let name = dir.file_name().ok_or(io::ErrorKind::InvalidInput.into()).map_err(CheckpointError::write(dir))?;
    Ok(dir.with_file_name(format!(".{}.{word}", name.to_string_lossy())))
}

/// Makes sure that every file of the directory is on the disk, and the directory itself.
fn flush(dir: &Path) -> Result<(), CheckpointError> {
    for entry in fs::read_dir(dir).map_err(CheckpointError::write(dir))? {
        let path = entry.map_err(CheckpointError::write(dir))?.path();
        if path.is_dir() {
            flush(&path)?;
        } else {
            File::open(&path).and_then(|file| file.sync_all()).map_err(CheckpointError::write(&path))?;
        }
    }
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(CheckpointError::write(dir))
}

fn exchange(new: &Path, dir: &Path) -> Result<(), CheckpointError> {
    let moved = if dir.exists() { exchange_names(new, dir) } else { fs::rename(new, dir) };
    moved.map_err(CheckpointError::write(dir))?;
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(CheckpointError::write(parent))?;
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn exchange_names(new: &Path, dir: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, new, CWD, dir, RenameFlags::EXCHANGE)?)
}

#[cfg(not(target_os = "linux"))]
fn exchange_names(new: &Path, dir: &Path) -> io::Result<()> {
    let name = dir.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy().into_owned();
    let old = dir.with_file_name(format!(".{name}.replaced"));
    let _ = fs::remove_dir_all(&old);
    fs::rename(dir, &old)?;
    fs::rename(new, dir)?;
    fs::remove_dir_all(&old)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, text: &str) -> Result<(), CheckpointError> {
        fs::write(dir.join("file"), text).map_err(CheckpointError::write(dir))
    }

    #[test]
    fn the_new_directory_takes_the_place_of_the_old() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("checkpoint");
        for text in ["one", "two"] {
            replace_directory(&dir, |new| write(new, text)).unwrap();
            assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), text);
            assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1, "nothing is left beside it");
        }
    }

    #[test]
    fn a_failure_leaves_the_old_directory_and_nothing_else() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("checkpoint");
        replace_directory(&dir, |new| write(new, "one")).unwrap();
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let error = replace_directory(&dir, |new| {
            write(new, "half")?;
            Err(CheckpointError::write(new)(full()))
        });
        assert!(error.unwrap_err().hint().unwrap().contains("free some space"));
        assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), "one");
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
    }
}

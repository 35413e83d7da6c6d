//! Files of a checkpoint's directory, and nothing else: a link in a directory that others made may lead anywhere.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::error::CheckpointError;

/// A directory that others made, as the one door to its files: none that links lead out of it, none that is a pipe or a
/// device, none longer than its reader expects.
///
/// Links may lead about in the directory itself, and from a snapshot of the Hub's cache to the `blobs` of its repository.
#[derive(Debug)]
pub struct ConfinedDir {
    dir: PathBuf,
    /// `dir`, and for a snapshot of the Hub's cache the `blobs` of the same repository, which its links lead to. Without
    /// links, as the operating system sees them.
    allowed: Vec<PathBuf>,
}

impl ConfinedDir {
    /// The directory `dir`, which may itself be reached by a link.
    ///
    /// # Errors
    ///
    /// A directory that is not there or cannot be read.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let real = fs::canonicalize(dir)?;
        let mut allowed = vec![real.clone()];
        if let Some(snapshots) = real.parent()
            && snapshots.file_name().is_some_and(|name| name == "snapshots")
            && let Some(repo) = snapshots.parent()
        {
            // A `blobs` that is itself a link out of the cache is not followed.
            allowed.extend(fs::canonicalize(repo.join("blobs")).ok().filter(|blobs| *blobs == repo.join("blobs")));
        }
        Ok(Self { dir: dir.to_owned(), allowed })
    }

    /// The path of a plain file, `None` where there is none. `name` has been checked to be relative and without `..`.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Link`] where links lead elsewhere, [`CheckpointError::File`] for what is no plain file (a pipe
    /// would be waited on for ever).
    pub fn file(&self, name: &str) -> Result<Option<PathBuf>, CheckpointError> {
        let path = self.dir.join(name);
        let real = match fs::canonicalize(&path) {
            Ok(real) => real,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(error) => return Err(CheckpointError::read(&path)(error)),
        };
        if !self.allowed.iter().any(|folder| real.starts_with(folder)) {
            return Err(CheckpointError::Link { path });
        }
        if !fs::metadata(&path).map_err(CheckpointError::read(&path))?.is_file() {
            return Err(CheckpointError::read(&path)(io::Error::other("it is not a plain file")));
        }
        Ok(Some(path))
    }

    /// The bytes of a file that has at most `most` of them; `None` where there is no such file.
    ///
    /// # Errors
    ///
    /// As [`file`](ConfinedDir::file), and [`CheckpointError::TooLong`].
    pub fn read(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
        let Some((file, path)) = self.open(name, most)? else { return Ok(None) };
        let bytes = file.metadata().map_err(CheckpointError::read(&path))?.len();
        let mut contents = Vec::with_capacity(bytes.min(most) as usize);
        // A file that grows meanwhile is not read to its new end.
        file.take(most).read_to_end(&mut contents).map_err(CheckpointError::read(&path))?;
        Ok(Some(contents))
    }

    /// A file that has at most `most` bytes, open for reading, and its path; `None` where there is no such file.
    ///
    /// # Errors
    ///
    /// As [`file`](ConfinedDir::file), and [`CheckpointError::TooLong`].
    pub fn open(&self, name: &str, most: u64) -> Result<Option<(File, PathBuf)>, CheckpointError> {
        let Some(path) = self.file(name)? else { return Ok(None) };
        let (file, metadata) = open_plain(&path).map_err(CheckpointError::read(&path))?;
        let bytes = metadata.len();
        if bytes > most {
            return Err(CheckpointError::TooLong { path, bytes, most });
        }
        Ok(Some((file, path)))
    }
}

/// Opens a plain file for reading. A pipe that stands there is an error and not waited on, also where it has taken a
/// file's place since that was looked at.
pub(crate) fn open_plain(path: &Path) -> io::Result<(File, Metadata)> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // It means nothing to a plain file.
        options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed());
    }
    let file = options.open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_file() { Ok((file, metadata)) } else { Err(io::Error::other("it is not a plain file")) }
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_may_lead_about_in_the_directory_and_not_out_of_it() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("model");
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("a"), "a").unwrap();
        fs::write(home.path().join("secret"), "s").unwrap();
        symlink("../a", dir.join("sub").join("b")).unwrap();
        symlink("../secret", dir.join("out")).unwrap();
        symlink(home.path().join("secret"), dir.join("far")).unwrap();
        symlink("..", dir.join("up")).unwrap();
        symlink("nowhere", dir.join("dangling")).unwrap();
        symlink("loop", dir.join("loop")).unwrap();
        // The directory itself may be reached by a link.
        symlink("model", home.path().join("alias")).unwrap();
        for dir in [dir, home.path().join("alias")] {
            let confined = ConfinedDir::new(&dir).unwrap();
            assert_eq!(confined.read("sub/b", 9).unwrap().unwrap(), b"a");
            assert!(matches!(confined.read("a", 0), Err(CheckpointError::TooLong { bytes: 1, most: 0, .. })));
            for name in ["out", "far", "up/secret"] {
                assert!(matches!(confined.file(name), Err(CheckpointError::Link { .. })), "{name}");
            }
            for name in ["absent", "dangling", "a/below"] {
                assert!(confined.file(name).unwrap().is_none(), "{name}");
            }
            for name in ["loop", "sub"] {
                assert!(matches!(confined.file(name), Err(CheckpointError::File(_))), "{name}");
            }
        }
    }

    #[test]
    fn a_snapshot_links_to_the_blobs_of_its_own_repository() {
        let home = tempfile::tempdir().unwrap();
        let repo = |name: &str| home.path().join(name);
        for name in ["models--a--b", "models--c--d"] {
            fs::create_dir_all(repo(name).join("blobs")).unwrap();
            fs::create_dir_all(repo(name).join("snapshots").join("1")).unwrap();
            fs::write(repo(name).join("blobs").join("x"), name).unwrap();
        }
        let snapshot = repo("models--a--b").join("snapshots").join("1");
        symlink("../../blobs/x", snapshot.join("own")).unwrap();
        symlink("../../../models--c--d/blobs/x", snapshot.join("other")).unwrap();
        let confined = ConfinedDir::new(&snapshot).unwrap();
        assert_eq!(confined.read("own", 100).unwrap().unwrap(), b"models--a--b");
        assert!(matches!(confined.file("other"), Err(CheckpointError::Link { .. })));
        // And no `blobs` that leads out.
        fs::remove_dir_all(repo("models--a--b").join("blobs")).unwrap();
        symlink(repo("models--c--d").join("blobs"), repo("models--a--b").join("blobs")).unwrap();
        let confined = ConfinedDir::new(&snapshot).unwrap();
        assert!(matches!(confined.file("own"), Err(CheckpointError::Link { .. })));
    }
}

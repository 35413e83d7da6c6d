//! Access to the files of an untrusted directory and to nothing outside it: a link in it may point anywhere.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::error::CheckpointError;

/// An untrusted directory. Its files are opened only through this type, which refuses links out of the directory, pipes
/// and devices, and files that are longer than the caller expects.
///
/// Links within the directory are allowed. A snapshot in the Hub's cache may also link to the `blobs` of its repository.
#[derive(Debug)]
pub struct ConfinedDir {
    dir: PathBuf,
    /// `dir`, and for a snapshot in the Hub's cache the `blobs` of its repository, to which its links point. Canonical
    /// paths.
    allowed: Vec<PathBuf>,
}

impl ConfinedDir {
    /// The directory `dir`, which may itself be a link.
    ///
    /// # Errors
    ///
    /// If the directory does not exist or cannot be read.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let real = fs::canonicalize(dir)?;
        let mut allowed = vec![real.clone()];
        if let Some(snapshots) = real.parent()
            && snapshots.file_name().is_some_and(|name| name == "snapshots")
            && let Some(repo) = snapshots.parent()
        {
            // If `blobs` is itself a link out of the repository, it is not followed.
            allowed.extend(fs::canonicalize(repo.join("blobs")).ok().filter(|blobs| *blobs == repo.join("blobs")));
        }
        Ok(Self { dir: dir.to_owned(), allowed })
    }

    /// The path of a plain file, `None` if it does not exist. The caller has checked that `name` is relative and has no
    /// `..`.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Link`] if links lead out of the directory; [`CheckpointError::File`] for anything that is not
    /// a plain file (reading a pipe could wait forever).
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

    /// Reads a file of at most `most` bytes; `None` if it does not exist.
    ///
    /// # Errors
    ///
    /// Those of [`file`](ConfinedDir::file), and [`CheckpointError::TooLong`].
    pub fn read(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
        let Some((file, path)) = self.open(name, most)? else { return Ok(None) };
        let bytes = file.metadata().map_err(CheckpointError::read(&path))?.len();
        let mut contents = Vec::with_capacity(bytes.min(most) as usize);
        // `take` keeps to the limit even if the file has grown since its length was checked.
        file.take(most).read_to_end(&mut contents).map_err(CheckpointError::read(&path))?;
        Ok(Some(contents))
    }

    /// Opens a file of at most `most` bytes for reading; `None` if it does not exist.
    ///
    /// # Errors
    ///
    /// Those of [`file`](ConfinedDir::file), and [`CheckpointError::TooLong`].
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

/// Opens a plain file for reading. A pipe is an error and never blocks, even if it has replaced the file since
/// [`ConfinedDir::file`] checked it.
pub(crate) fn open_plain(path: &Path) -> io::Result<(File, Metadata)> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // Opening a pipe does not block with this flag. It has no effect on plain files.
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
    fn links_within_the_directory_are_followed_and_links_out_of_it_are_not() {
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
        // The directory itself may be a link.
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
    fn a_snapshot_may_link_to_the_blobs_of_its_own_repository() {
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
        // A `blobs` that leads out is not followed.
        fs::remove_dir_all(repo("models--a--b").join("blobs")).unwrap();
        symlink(repo("models--c--d").join("blobs"), repo("models--a--b").join("blobs")).unwrap();
        let confined = ConfinedDir::new(&snapshot).unwrap();
        assert!(matches!(confined.file("own"), Err(CheckpointError::Link { .. })));
    }
}

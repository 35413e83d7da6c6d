//! The identity of a file, independent of its path.

use std::fs::Metadata;
use std::io;
use std::path::Path;

/// Identifies a file, whichever path, link or hard link leads to it: device and inode on Unix, elsewhere its path with links
/// resolved.
///
/// The crate `same-file` is not used because it opens the files that it compares, and opening a pipe blocks until its other
/// end is opened.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct FileId(Id);

#[cfg(unix)]
type Id = (u64, u64);
#[cfg(not(unix))]
type Id = std::path::PathBuf;

impl FileId {
    /// The identity of the file at a path, and its metadata.
    pub(crate) fn of(path: &Path) -> io::Result<(Self, Metadata)> {
        let metadata = std::fs::metadata(path)?;
        #[cfg(unix)]
        let id = {
            use std::os::unix::fs::MetadataExt;
            (metadata.dev(), metadata.ino())
        };
        #[cfg(not(unix))]
        let id = path.canonicalize()?;
        Ok((Self(id), metadata))
    }

    /// Whether both paths lead to the same regular file. Devices and pipes do not count: reading and writing one at the same
    /// time does no harm.
    pub(crate) fn is_same_file(one: &Path, other: &Path) -> bool {
        match (Self::of(one), Self::of(other)) {
            (Ok((one, metadata)), Ok((other, _))) => metadata.is_file() && one == other,
            _ => false,
        }
    }
}

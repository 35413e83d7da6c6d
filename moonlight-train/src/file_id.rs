//! Which file a path leads to.

use std::fs::Metadata;
use std::io;
use std::path::Path;

/// What tells a file from all others, by whatever path, link or hard link it is reached: device and inode; elsewhere than on
/// Unix its path without links.
///
/// The crate `same-file` compares open files, and to open a pipe is to wait for its other end.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct FileId(Id);

#[cfg(unix)]
type Id = (u64, u64);
#[cfg(not(unix))]
type Id = std::path::PathBuf;

impl FileId {
    /// Of the file at a path, with what the system says of it.
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

    /// Whether both paths lead to one plain file. Devices and pipes may well be read and written at once.
    pub(crate) fn is_same_file(one: &Path, other: &Path) -> bool {
        match (Self::of(one), Self::of(other)) {
            (Ok((one, metadata)), Ok((other, _))) => metadata.is_file() && one == other,
            _ => false,
        }
    }
}

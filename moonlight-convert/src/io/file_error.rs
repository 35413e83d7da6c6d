//! Errors of reading and writing files.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::printable::Printable;

/// A file or directory that could not be read or written, with its path: [`io::Error`] alone does not name it.
#[derive(Debug, thiserror::Error)]
#[error("`{}` cannot be {access}: {source}", Printable(path.display()))]
#[non_exhaustive]
pub struct FileError {
    /// The file or directory.
    pub path: PathBuf,
    /// The kind of access that failed.
    pub access: Access,
    /// The system's error.
    pub source: io::Error,
}

/// The kind of access that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Writing, creating, renaming or removing.
    Write,
}

impl fmt::Display for Access {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Read => "read",
            Self::Write => "written",
        })
    }
}

impl FileError {
    /// For `map_err` after reading `path`.
    pub fn read<E: From<Self>>(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> E {
        Self::from_io(path.into(), Access::Read)
    }

    /// For `map_err` after writing `path`.
    pub fn write<E: From<Self>>(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> E {
        Self::from_io(path.into(), Access::Write)
    }

    fn from_io<E: From<Self>>(path: PathBuf, access: Access) -> impl FnOnce(io::Error) -> E {
        move |source| Self { path, access, source }.into()
    }

    /// Whether writing failed because a disk or a quota is full.
    pub fn is_full(&self) -> bool {
        self.access == Access::Write && is_full(&self.source)
    }
}

/// Whether a disk or a quota is full.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_names_the_file_and_the_access() {
        let error: FileError = FileError::read("a/b")(io::ErrorKind::PermissionDenied.into());
        assert_eq!(error.to_string(), "`a/b` cannot be read: permission denied");
        let full: FileError = FileError::write("c")(io::ErrorKind::StorageFull.into());
        assert_eq!(full.to_string(), "`c` cannot be written: no storage space");
        assert!(full.is_full() && !error.is_full());
        let unreadable: FileError = FileError::read("c")(io::ErrorKind::StorageFull.into());
        assert!(!unreadable.is_full());
    }
}

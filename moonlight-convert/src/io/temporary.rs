//! Temporary files with unique names, which are renamed when they are complete.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use tempfile::{Builder, NamedTempFile};

use crate::io::storage::{self, Call};

/// Creates an empty file in a directory; the file is removed unless it is persisted. Its name is unique among all
/// processes, also on other hosts that share the directory. Its permissions follow the process's umask like those of
/// other files (`tempfile` would make it private to the user).
pub fn new_file(dir: &Path, prefix: &str, suffix: &str) -> io::Result<NamedTempFile> {
    let mut builder = Builder::new();
    builder.prefix(prefix).suffix(suffix);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The system clears the bits of the umask.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(dir)
}

/// Creates an empty file, replacing an existing file or link. The old one is removed first: a read-only file could not
/// be opened, and a link would be written through.
pub(crate) fn create_anew(path: &Path) -> io::Result<File> {
    storage::announce(Call::Write(path))?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => File::create_new(path),
    }
}

/// Writes a file, replacing an existing file or link.
pub(crate) fn write_anew(path: &Path, bytes: &[u8]) -> io::Result<()> {
    create_anew(path)?.write_all(bytes)
}

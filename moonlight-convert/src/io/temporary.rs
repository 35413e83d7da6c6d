//! Files under names that nobody else has, which become others when they are whole.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use tempfile::{Builder, NamedTempFile};

use crate::io::storage::{self, Call};

/// A new, empty file in a directory, removed again unless it is persisted. No process on any host that shares the directory
/// makes another of the same name. What it becomes may be read by whom the process lets read its files, as with every other
/// file.
pub fn new_file(dir: &Path, prefix: &str, suffix: &str) -> io::Result<NamedTempFile> {
    let mut builder = Builder::new();
    builder.prefix(prefix).suffix(suffix);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Less what the process's mask takes.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(dir)
}

/// A new, empty file in the place of whatever file or link stands there, which may be read-only or stand for another file.
pub(crate) fn create_anew(path: &Path) -> io::Result<File> {
    storage::announce(Call::Write(path))?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => File::create_new(path),
    }
}

/// Writes a file in the place of whatever file or link stands there.
pub(crate) fn write_anew(path: &Path, bytes: &[u8]) -> io::Result<()> {
    create_anew(path)?.write_all(bytes)
}

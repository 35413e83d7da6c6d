//! Output files that appear complete or not at all: they are written under a temporary name in the same folder, and renamed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use moonlight_convert::new_file;
use tempfile::NamedTempFile;

/// The files and folders of this process that do not have their final names yet.
static UNFINISHED: LazyLock<Mutex<Vec<PathBuf>>> = LazyLock::new(Mutex::default);

fn unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Marks a file or folder as unfinished while it lives: [`remove_unfinished`] removes it.
#[derive(Debug)]
pub(crate) struct Unfinished(PathBuf);

impl Unfinished {
    pub(crate) fn new(path: &Path) -> Self {
        unfinished().push(path.to_owned());
        Self(path.to_owned())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        unfinished().retain(|path| *path != self.0);
    }
}

/// Removes unfinished files and folders. A program that exits on a signal calls this, because destructors do not run then.
pub(crate) fn remove_unfinished() {
    for path in unfinished().drain(..) {
        remove(&path);
    }
}

/// Removes a file or a folder. Another thread may still be writing to the folder, so the removal is tried several times. The
/// process exits next, so an error is ignored.
fn remove(path: &Path) {
    if fs::remove_file(path).is_err() {
        for _ in 0..20 {
            match fs::remove_dir_all(path) {
                Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
                _ => break,
            }
        }
    }
}

/// A file that is being written.
pub(crate) struct OutputFile(Destination);

enum Destination {
    /// A temporary file, to be renamed to `path`. It is removed if it is dropped without [`OutputFile::finish`].
    Temporary { out: BufWriter<NamedTempFile>, path: PathBuf, unfinished: Unfinished },
    /// The file itself. It cannot be replaced by a rename if it is a device or a pipe, a link to a file that does not exist, or
    /// in a folder in which no file can be created.
    InPlace(BufWriter<File>),
}

impl OutputFile {
    /// Starts to write a file. An existing file at `path` is unchanged until [`finish`](Self::finish).
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let existing = match fs::metadata(path) {
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let in_place = || Ok(Self(Destination::InPlace(BufWriter::new(File::create(path)?))));
        let is_dangling_link = existing.is_none() && path.is_symlink();
        if is_dangling_link || existing.as_ref().is_some_and(|existing| !existing.is_file()) {
            return in_place();
        }
        if existing.is_some() {
            // A rename needs write access only to the folder: without this check a read-only file would be replaced.
            OpenOptions::new().write(true).open(path)?;
        }
        // The file that a link points to is replaced, and not the link.
        let path = if existing.is_some() { path.canonicalize()? } else { path.to_owned() };
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let short: String = name.chars().take(40).collect();
        let created = new_file(folder, &format!(".{short}."), ".tmp").and_then(|file| {
            if let Some(existing) = &existing {
                file.as_file().set_permissions(existing.permissions())?;
            }
            Ok(file)
        });
        match created {
            Ok(file) => {
                let unfinished = Unfinished::new(file.path());
                Ok(Self(Destination::Temporary { out: BufWriter::new(file), path, unfinished }))
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied && existing.is_some() => in_place(),
            Err(error) => Err(error),
        }
    }

    /// Writes what is still buffered, and renames the file.
    pub(crate) fn finish(self) -> io::Result<()> {
        match self.0 {
            Destination::InPlace(mut out) => out.flush(),
            Destination::Temporary { out, path, unfinished } => {
                let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
                // Before the rename: after a power failure the file with the final name must not be empty.
                file.as_file().sync_all()?;
                file.persist(path).map_err(|error| error.error)?;
                drop(unfinished);
                Ok(())
            }
        }
    }

    /// Writes a file at once.
    pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = Self::create(path)?;
        file.write_all(bytes)?;
        file.finish()
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Destination::Temporary { out, .. } => out.write(bytes),
            Destination::InPlace(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.0 {
            Destination::Temporary { out, .. } => out.flush(),
            Destination::InPlace(out) => out.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    #[cfg(unix)]
    use std::fs::Permissions;

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_completely_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        fs::write(&path, "before").unwrap();
        let mut file = OutputFile::create(&path).unwrap();
        file.write_all(b"aft").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        drop(file);
        assert_eq!((fs::read_to_string(&path).unwrap().as_str(), names(dir.path()).len()), ("before", 1));
        OutputFile::write(&path, b"after").unwrap();
        assert_eq!((fs::read_to_string(&path).unwrap().as_str(), names(dir.path()).len()), ("after", 1));
        OutputFile::write(&dir.path().join("new"), b"new").unwrap();
        assert_eq!(names(dir.path()), ["new", "x.jsonl"]);
        assert!(OutputFile::create(&dir.path().join("nowhere/x")).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn modes_and_links_are_kept_and_devices_are_written_to() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        fs::write(dir.path().join("plain"), "").unwrap();
        OutputFile::write(&path, b"1").unwrap();
        assert_eq!(mode(&path), mode(&dir.path().join("plain")), "as for any new file");
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let link = dir.path().join("link");
        symlink(&path, &link).unwrap();
        OutputFile::write(&link, b"2").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!((fs::read(&path).unwrap(), mode(&path)), (b"2".to_vec(), 0o640));
        OutputFile::write(Path::new("/dev/null"), b"3").unwrap();
    }

    #[test]
    fn unfinished_files_are_removed_when_the_program_exits() {
        let dir = tempfile::tempdir().unwrap();
        let file = OutputFile::create(&dir.path().join("x")).unwrap();
        assert_eq!(names(dir.path()).len(), 1);
        // This file only, since other tests write at the same time.
        let Destination::Temporary { unfinished: Unfinished(path), .. } = &file.0 else {
            panic!("expected a regular file")
        };
        assert!(unfinished().contains(path));
        let path = path.clone();
        drop(file);
        assert!(!unfinished().contains(&path) && names(dir.path()).is_empty());
        fs::create_dir_all(dir.path().join("folder/in")).unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        ["folder", "file", "nothing"].iter().for_each(|name| remove(&dir.path().join(name)));
        assert!(names(dir.path()).is_empty());
    }
}

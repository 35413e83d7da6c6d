//! Files that are there whole or not at all: written under another name, beside their place, and renamed into it.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use tempfile::NamedTempFile;

/// The files of this process that are not in their places yet.
static UNFINISHED: LazyLock<Mutex<Vec<PathBuf>>> = LazyLock::new(Mutex::default);

fn unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file or a folder that [`remove_unfinished`] removes for as long as this lives.
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

/// Removes what is half written, for a program that ends at once: nothing is dropped then.
pub(crate) fn remove_unfinished() {
    for path in unfinished().drain(..) {
        remove(&path);
    }
}

/// Removes a file, or a folder that another thread may still be writing to. Nobody is left to tell if this fails.
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

/// A new file in `folder`, under a name that nobody has, with the mode of files that are made for others to read.
pub(crate) fn temporary(folder: &Path, prefix: &str, mode: Option<Permissions>) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix).suffix(".tmp").rand_bytes(12);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The user's mask is taken off, as from every file that is made.
        builder.permissions(Permissions::from_mode(0o666));
    }
    let file = builder.tempfile_in(folder)?;
    if let Some(mode) = mode {
        file.as_file().set_permissions(mode)?;
    }
    Ok(file)
}

/// A file that is written.
pub(crate) struct OutputFile(To);

enum To {
    /// Beside its place; dropped without [`OutputFile::finish`], it is removed.
    Beside { out: BufWriter<NamedTempFile>, place: PathBuf, unfinished: Unfinished },
    /// A device or a pipe, which has no place to be renamed to, a link to nothing, or a file in a folder that takes no other.
    InPlace(BufWriter<File>),
}

impl OutputFile {
    /// Begins a file; what stands at `path` stays as it is until [`finish`](Self::finish).
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let there = match fs::metadata(path) {
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let in_place = || Ok(Self(To::InPlace(BufWriter::new(File::create(path)?))));
        let leads_nowhere = there.is_none() && path.is_symlink();
        if leads_nowhere || there.as_ref().is_some_and(|there| !there.is_file()) {
            return in_place();
        }
        if there.is_some() {
            // What must not be written to is not replaced either.
            OpenOptions::new().write(true).open(path)?;
        }
        // A link stays one, and the file that it leads to is replaced.
        let place = if there.is_some() { path.canonicalize()? } else { path.to_owned() };
        let folder = place.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let name = place.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let short: String = name.chars().take(40).collect();
        let mode = there.as_ref().map(fs::Metadata::permissions);
        match temporary(folder, &format!(".{short}."), mode) {
            Ok(file) => {
                let unfinished = Unfinished::new(file.path());
                Ok(Self(To::Beside { out: BufWriter::new(file), place, unfinished }))
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied && there.is_some() => in_place(),
            Err(error) => Err(error),
        }
    }

    /// Writes what is left and puts the file into its place.
    pub(crate) fn finish(self) -> io::Result<()> {
        match self.0 {
            To::InPlace(mut out) => out.flush(),
            To::Beside { out, place, unfinished } => {
                let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
                file.as_file().sync_all()?;
                file.persist(place).map_err(|error| error.error)?;
                drop(unfinished);
                Ok(())
            }
        }
    }

    /// A whole file at once.
    pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = Self::create(path)?;
        file.write_all(bytes)?;
        file.finish()
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            To::Beside { out, .. } => out.write(bytes),
            To::InPlace(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.0 {
            To::Beside { out, .. } => out.flush(),
            To::InPlace(out) => out.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
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
    fn modes_and_links_stay_and_devices_are_written_to() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        fs::write(dir.path().join("plain"), "").unwrap();
        OutputFile::write(&path, b"1").unwrap();
        assert_eq!(mode(&path), mode(&dir.path().join("plain")), "as any file that is made");
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let link = dir.path().join("link");
        symlink(&path, &link).unwrap();
        OutputFile::write(&link, b"2").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!((fs::read(&path).unwrap(), mode(&path)), (b"2".to_vec(), 0o640));
        OutputFile::write(Path::new("/dev/null"), b"3").unwrap();
    }

    #[test]
    fn what_is_half_written_is_removed_at_a_sudden_end() {
        let dir = tempfile::tempdir().unwrap();
        let file = OutputFile::create(&dir.path().join("x")).unwrap();
        assert_eq!(names(dir.path()).len(), 1);
        // Not all of them: other tests write at the same time.
        let To::Beside { unfinished: Unfinished(path), .. } = &file.0 else { panic!("it is a plain file") };
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

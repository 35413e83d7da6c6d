//! All file-system calls of saving and resuming, so that a test can observe each of them and make it fail.
//!
//! Without observers, that is, outside of tests, each function only makes its call.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::io::temporary::write_anew;

/// A file-system call that is about to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call<'a> {
    /// Create a directory.
    CreateDir(&'a Path),
    /// Create a file or open it for writing; its contents follow.
    Write(&'a Path),
    /// Flush the contents of a file.
    SyncFile(&'a Path),
    /// Flush the entries of a directory.
    SyncDir(&'a Path),
    /// Rename within a directory.
    Rename(&'a Path, &'a Path),
    /// Exchange two names in a directory.
    Exchange(&'a Path, &'a Path),
    /// Remove a directory and its contents.
    RemoveDir(&'a Path),
    /// Read a file or the entries of a directory.
    Read(&'a Path),
}

impl Call<'_> {
    /// The path of the call; the first of two.
    pub fn path(&self) -> &Path {
        match self {
            Self::CreateDir(path) | Self::Write(path) | Self::SyncFile(path) | Self::SyncDir(path) => path,
            Self::Rename(path, _) | Self::Exchange(path, _) | Self::RemoveDir(path) | Self::Read(path) => path,
        }
    }
}

/// Runs before each file-system call. An error that it returns is the result, and the call is not made.
pub type Observer = dyn Fn(Call<'_>) -> io::Result<()> + Send + Sync;

/// An observer and the directory below which it observes calls.
type Entry = (PathBuf, Arc<Observer>);

static OBSERVERS: RwLock<Vec<Entry>> = RwLock::new(Vec::new());
/// The number of observers: while it is zero, calls take no lock.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// A registered observer; dropping it ends the observation.
#[must_use = "the observer is removed when this is dropped"]
pub struct Observation(Arc<Observer>);

/// Registers `observer` for all calls on paths below `root`.
pub fn observe(root: impl Into<PathBuf>, observer: Arc<Observer>) -> Observation {
    let mut observers = OBSERVERS.write().unwrap_or_else(PoisonError::into_inner);
    observers.push((root.into(), observer.clone()));
    COUNT.store(observers.len(), Ordering::Release);
    Observation(observer)
}

impl Drop for Observation {
    fn drop(&mut self) {
        let mut observers = OBSERVERS.write().unwrap_or_else(PoisonError::into_inner);
        observers.retain(|(_, observer)| !Arc::ptr_eq(observer, &self.0));
        COUNT.store(observers.len(), Ordering::Release);
    }
}

/// Announces a call that is made elsewhere, for example by a library that writes a file itself.
///
/// # Errors
///
/// The error of an observer.
pub fn announce(call: Call<'_>) -> io::Result<()> {
    if COUNT.load(Ordering::Acquire) == 0 {
        return Ok(());
    }
    // Cloned to release the lock: an observer may itself call this module.
    let observers: Vec<Entry> = OBSERVERS.read().unwrap_or_else(PoisonError::into_inner).clone();
    observers.iter().filter(|(root, _)| call.path().starts_with(root)).try_for_each(|(_, observer)| observer(call))
}

/// [`fs::create_dir`].
///
/// # Errors
///
/// Those of the call.
pub fn create_dir(path: &Path) -> io::Result<()> {
    announce(Call::CreateDir(path))?;
    fs::create_dir(path)
}

/// Creates a directory and its missing parents, and flushes each entry to the disk.
///
/// # Errors
///
/// Those of the calls.
pub fn create_dir_all(path: &Path) -> io::Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().unwrap_or(Path::new(""));
    create_dir_all(parent)?;
    match create_dir(path) {
        Ok(()) => sync_dir(parent),
        // Another process created it first.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Writes a file, replacing an existing file or link, which may be read-only.
///
/// # Errors
///
/// Those of the calls.
pub fn write(path: &Path, contents: &[u8]) -> io::Result<()> {
    write_anew(path, contents)
}

/// [`fs::read`].
///
/// # Errors
///
/// Those of the call.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    announce(Call::Read(path))?;
    fs::read(path)
}

/// The paths in a directory, in no particular order.
///
/// # Errors
///
/// Those of the call.
pub fn read_dir(path: &Path) -> io::Result<Vec<PathBuf>> {
    announce(Call::Read(path))?;
    fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect()
}

/// Flushes the contents of a file to the disk.
///
/// # Errors
///
/// Those of the call.
pub fn sync_file(path: &Path) -> io::Result<()> {
    announce(Call::SyncFile(path))?;
    File::open(path)?.sync_all()
}

/// Flushes the entries of a directory to the disk, so that a new or renamed file survives a power loss.
///
/// # Errors
///
/// Those of the call.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    announce(Call::SyncDir(path))?;
    // Only Unix opens a directory as a file.
    if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
}

/// [`fs::rename`].
///
/// # Errors
///
/// Those of the call.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    announce(Call::Rename(from, to))?;
    fs::rename(from, to)
}

/// Exchanges the names of two directories atomically.
///
/// # Errors
///
/// Those of the call, and [`io::ErrorKind::Unsupported`] if the system has no such call.
pub fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    announce(Call::Exchange(a, b))?;
    exchange_names(a, b)
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn exchange_names(a: &Path, b: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn exchange_names(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// [`fs::remove_dir_all`]; a missing directory is not an error.
///
/// # Errors
///
/// Those of the call.
pub fn remove_dir_all(path: &Path) -> io::Result<()> {
    announce(Call::RemoveDir(path))?;
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn an_observer_sees_its_directory_and_can_fail_a_call() {
        let (home, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let record = seen.clone();
        let observation = observe(
            home.path(),
            Arc::new(move |call: Call<'_>| {
                record.lock().unwrap().push(call.path().file_name().unwrap().to_owned());
                if call == Call::Write(call.path()) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
            }),
        );
        create_dir(&home.path().join("a")).unwrap();
        create_dir(&other.path().join("b")).unwrap();
        let error = write(&home.path().join("c"), b"text").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(!home.path().join("c").exists(), "a call for which the observer returns an error is not made");
        assert_eq!(*seen.lock().unwrap(), ["a", "c"]);
        drop(observation);
        write(&home.path().join("c"), b"text").unwrap();
    }

    #[test]
    fn missing_parents_are_created_and_flushed() {
        let home = tempfile::tempdir().unwrap();
        let synced = Arc::new(Mutex::new(0));
        let count = synced.clone();
        let _observation = observe(
            home.path(),
            Arc::new(move |call: Call<'_>| {
                if matches!(call, Call::SyncDir(_)) {
                    *count.lock().unwrap() += 1;
                }
                Ok(())
            }),
        );
        let deep = home.path().join("a/b/c");
        create_dir_all(&deep).unwrap();
        assert!(deep.is_dir());
        assert_eq!(*synced.lock().unwrap(), 3);
        create_dir_all(&deep).unwrap();
        assert_eq!(*synced.lock().unwrap(), 3);
    }
}

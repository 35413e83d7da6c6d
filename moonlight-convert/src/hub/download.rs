//! Downloading a model from the Hub into the cache.

use std::fs;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use glob::Pattern;
use hf_hub::Cache;
use tempfile::Builder;

use super::client::{Client, Settings};
use super::error::DownloadError;
use super::event::DownloadEvent;
use super::file_download::{FileDownload, partial};
use super::listing::{FileSelection, Listing, RemoteFile};
use super::{MAIN, RepoId, is_commit, is_revision, snapshot};
use crate::io::disk_space;

/// Files downloaded at the same time: a single connection rarely uses the full bandwidth.
const CONCURRENT_FILES: usize = 4;

/// What to download.
#[derive(Debug, Clone, Default)]
pub struct DownloadRequest {
    /// `organization/model`.
    pub repo: String,
    /// A branch, tag or commit; `main` by default.
    pub revision: Option<String>,
    /// Globs of file names. If empty, the files of a checkpoint: config, index, safetensors, tokenizer and remote code.
    pub include: Vec<String>,
}

/// The result of a download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Downloaded {
    /// The snapshot: a directory with every file under its name in the repository.
    pub dir: PathBuf,
    /// Number of requested files.
    pub files: usize,
    /// How many of them had to be downloaded, at least in part.
    pub fetched: usize,
    /// Total size of the files in bytes.
    pub bytes: u64,
}

/// Downloads a model into the Hub's cache and returns its snapshot.
///
/// Every file is checked by size and digest before it gets its name, including those already in the cache. Partial
/// files are resumed. The branch's ref is set to the new commit after all files are complete; until then, a lookup of
/// the model finds the previous snapshot. With `HF_HUB_OFFLINE` nothing is requested, and the cached snapshot is
/// returned.
///
/// # Errors
///
/// [`DownloadError`]. What was received stays in the cache, and the next call resumes from it.
pub fn download(
    request: &DownloadRequest,
    watch: &(dyn Fn(DownloadEvent<'_>) + Sync),
) -> Result<Downloaded, DownloadError> {
    let repo = &request.repo;
    let id = RepoId::parse(repo).ok_or_else(|| DownloadError::Name { repo: repo.clone() })?;
    let revision = request.revision.as_deref().unwrap_or(MAIN);
    if !is_revision(revision) {
        return Err(DownloadError::Revision { revision: revision.to_owned() });
    }
    let wanted = wanted(&request.include)?;
    let settings = Settings::from_env()?;
    let cache = &settings.cache;
    if settings.offline {
        return offline(cache, &id, revision);
    }
    let client = Client::new(&settings, &id, revision)?;
    let Listing { commit, files } = client.list(&wanted)?;
    if files.is_empty() {
        return Err(DownloadError::NoMatch { repo: repo.clone() });
    }
    let folders = RepoFolders::new(cache, &id, &commit);
    // Before the first file is requested: otherwise a full disk would be noticed only after gigabytes.
    folders.check_room(&files)?;
    for folder in [&folders.snapshot, &folders.folder.join("refs")] {
        remove_stale(folder);
    }
    let bytes = files.iter().map(|file| file.size).sum();
    watch(DownloadEvent::Started { files: files.len(), bytes });
    let fetched = fetch_all(&client, &folders, &commit, &files, watch)?;
    // A commit needs no ref. The ref is written last: a reader must not find an incomplete snapshot.
    if !is_commit(revision) {
        let reference = folders.folder.join("refs").join(revision);
        replace(&reference, |partial| fs::File::create_new(partial)?.write_all(commit.as_bytes()))?;
    }
    Ok(Downloaded { dir: folders.snapshot, files: files.len(), fetched, bytes })
}

fn wanted(include: &[String]) -> Result<FileSelection, DownloadError> {
    let pattern = |text: &String| {
        Pattern::new(text)
            .map_err(|error| DownloadError::Pattern { pattern: text.clone(), problem: error.msg.to_owned() })
    };
    let patterns = include.iter().map(pattern).collect::<Result<Vec<_>, _>>()?;
    Ok(if patterns.is_empty() { FileSelection::Checkpoint } else { FileSelection::Matching(patterns) })
}

fn offline(cache: &Cache, id: &RepoId, revision: &str) -> Result<Downloaded, DownloadError> {
    let Some(dir) = snapshot(cache, id, revision)? else {
        let (repo, revision, cache) = (id.to_string(), revision.to_owned(), cache.path().clone());
        return Err(DownloadError::Offline { repo, revision, cache });
    };
    let entries = fs::read_dir(&dir).map_err(DownloadError::read(&dir))?;
    let sizes: Vec<u64> = entries.flatten().filter_map(|entry| Some(fs::metadata(entry.path()).ok()?.len())).collect();
    Ok(Downloaded { dir, files: sizes.len(), fetched: 0, bytes: sizes.iter().sum() })
}

/// Downloads all files, a few at a time; the first failure stops the others. Returns how many were downloaded.
fn fetch_all(
    client: &Client,
    folders: &RepoFolders,
    commit: &str,
    files: &[RemoteFile],
    watch: &(dyn Fn(DownloadEvent<'_>) + Sync),
) -> Result<usize, DownloadError> {
    let (next, fetched, stop) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
    let failure = Mutex::new(None);
    let fetch_one = |file: &RemoteFile| {
        let blob = folders.folder.join("blobs").join(file.digest.text());
        let lock = folders.locks.join(format!("{}.lock", file.digest.text()));
        let new = FileDownload { client, file, commit, blob, lock, watch, stop: &stop }.run()?;
        folders.link(file)?;
        watch(DownloadEvent::Finished { file: &file.name, bytes: file.size, fetched: new });
        Ok(new)
    };
    let work = || {
        while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            match fetch_one(file) {
                Ok(new) => {
                    fetched.fetch_add(usize::from(new), Ordering::Relaxed);
                }
                Err(error) => {
                    // Later errors may be consequences of the stop, so that only the first is reported.
                    let first = !stop.swap(true, Ordering::SeqCst);
                    if first && let Ok(mut failure) = failure.lock() {
                        *failure = Some(error);
                    }
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..CONCURRENT_FILES.min(files.len()) {
            scope.spawn(work);
        }
    });
    match failure.into_inner().unwrap_or(Some(DownloadError::Aborted)) {
        Some(error) => Err(error),
        None => Ok(fetched.into_inner()),
    }
}

/// The folders of a repository in the cache.
struct RepoFolders {
    folder: PathBuf,
    snapshot: PathBuf,
    locks: PathBuf,
}

impl RepoFolders {
    fn new(cache: &Cache, id: &RepoId, commit: &str) -> Self {
        Self {
            folder: cache.path().join(id.folder_name()),
            snapshot: id.in_cache(cache, commit).pointer_path(commit),
            locks: cache.path().join(".locks").join(id.folder_name()),
        }
    }

    /// Checks that the disk has space for the missing files.
    fn check_room(&self, files: &[RemoteFile]) -> Result<(), DownloadError> {
        fs::create_dir_all(&self.folder).map_err(DownloadError::write(&self.folder))?;
        let length = |path: &Path| fs::metadata(path).map_or(0, |metadata| metadata.len());
        let missing = |file: &RemoteFile| {
            let blob = self.folder.join("blobs").join(file.digest.text());
            file.size.saturating_sub(length(&blob).max(length(&partial(&blob))))
        };
        let needed = files.iter().map(missing).fold(0, u64::saturating_add);
        match disk_space::free(&self.folder) {
            Some(free) if needed > free => Err(DownloadError::Full { cache: self.folder.clone(), needed, free }),
            _ => Ok(()),
        }
    }

    /// Links a blob to its name in the snapshot.
    fn link(&self, file: &RemoteFile) -> Result<(), DownloadError> {
        let link = self.snapshot.join(&file.name);
        let depth = Path::new(&file.name).components().filter(|part| matches!(part, Component::Normal(_))).count();
        let mut target = PathBuf::from_iter(vec![".."; depth + 1]);
        target.push("blobs");
        target.push(file.digest.text());
        if fs::read_link(&link).is_ok_and(|old| old == target) {
            return Ok(());
        }
        replace(&link, |partial| link_to_blob(partial, &target, &self.folder.join("blobs").join(file.digest.text())))
    }
}

#[cfg(unix)]
fn link_to_blob(link: &Path, target: &Path, _blob: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

/// Windows requires a privilege for symbolic links; a hard link serves as well.
#[cfg(not(unix))]
fn link_to_blob(link: &Path, _target: &Path, blob: &Path) -> io::Result<()> {
    fs::hard_link(blob, link)
        .or_else(|_| io::copy(&mut fs::File::open(blob)?, &mut fs::File::create_new(link)?).map(drop))
}

/// Prefix and suffix of temporary names.
const TEMPORARY_NAME: (&str, &str) = (".moonlight-", ".partial");
/// Temporary files older than this are left over from a killed process: normally they exist for milliseconds.
const STALE_AFTER: Duration = Duration::from_secs(3600);

/// Creates a file or link under a unique temporary name in the same folder, and renames it to `path`, so that it is
/// never incomplete.
fn replace(path: &Path, mut make: impl FnMut(&Path) -> io::Result<()>) -> Result<(), DownloadError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let make = |new: &Path| {
        make(new).inspect_err(|error| {
            // An incomplete file is removed, but not one of another process with the same name.
            if error.kind() != io::ErrorKind::AlreadyExists {
                let _ = fs::remove_file(new);
            }
        })
    };
    let made = fs::create_dir_all(folder)
        .and_then(|()| Builder::new().prefix(TEMPORARY_NAME.0).suffix(TEMPORARY_NAME.1).make_in(folder, make))
        .and_then(|new| new.into_temp_path().persist(path).map_err(|error| error.error));
    made.map_err(DownloadError::write(path))
}

/// Removes temporary files of processes that were killed within [`replace`]. (Partial blobs are kept and resumed, under
/// a lock.)
fn remove_stale(folder: &Path) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let ours =
            name.to_str().is_some_and(|name| name.starts_with(TEMPORARY_NAME.0) && name.ends_with(TEMPORARY_NAME.1));
        // The metadata of the link itself.
        let age = entry.metadata().and_then(|metadata| metadata.modified()).ok().and_then(|time| time.elapsed().ok());
        if ours && age.is_some_and(|age| age > STALE_AFTER) {
            // A failure is harmless: the next download tries again.
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn temporary_names_are_unique_and_nothing_is_left() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("refs").join("main");
        // A temporary name derived from the process ID would collide with this one.
        fs::create_dir_all(home.path().join("refs").join(format!("main.{}.partial", std::process::id()))).unwrap();
        for commit in ["one", "two"] {
            replace(&path, |partial| fs::write(partial, commit)).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), commit);
        }
        replace(&path, |link| link_to_blob(link, Path::new("nowhere"), Path::new("nowhere"))).unwrap();
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("nowhere"));
        let failed = replace(&path, |partial| fs::write(partial, "half").and(Err(io::ErrorKind::StorageFull.into())));
        assert!(failed.is_err());
        assert_eq!(fs::read_dir(home.path().join("refs")).unwrap().count(), 2);
    }

    #[test]
    fn leftovers_of_killed_processes_are_removed_when_old() {
        let home = tempfile::tempdir().unwrap();
        let file = |name: &str, age: Duration| {
            let file = fs::File::create(home.path().join(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - age).unwrap();
        };
        let (old, new) = (STALE_AFTER * 2, STALE_AFTER / 2);
        file(".moonlight-abc.partial", old);
        file(".moonlight-def.partial", new);
        file("model.safetensors.partial", old);
        remove_stale(home.path());
        let mut left: Vec<_> = fs::read_dir(home.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".moonlight-def.partial", "model.safetensors.partial"]);
        remove_stale(&home.path().join("absent"));
    }
}

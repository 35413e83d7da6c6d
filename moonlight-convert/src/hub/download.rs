//! A model from the Hub into the cache.

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

/// Files that are fetched at a time: one connection rarely fills a line.
const CONCURRENT_FILES: usize = 4;

/// What is to be fetched.
#[derive(Debug, Clone, Default)]
pub struct DownloadRequest {
    /// `organization/model`.
    pub repo: String,
    /// A branch, tag or commit; `main` where it is not given.
    pub revision: Option<String>,
    /// Globs of file names. Empty for what a checkpoint is made of: configuration, index, safetensors, tokenizer and
    /// remote code.
    pub include: Vec<String>,
}

/// What was fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Downloaded {
    /// The snapshot: a directory with every file under its name.
    pub dir: PathBuf,
    /// Files that were asked for.
    pub files: usize,
    /// Those of them that had to be fetched, or part of them.
    pub fetched: usize,
    /// Bytes of all files.
    pub bytes: u64,
}

/// Fetches a model into the Hub's cache and gives its snapshot.
///
/// Every file is checked by size and digest before it gets its name, those that are there from before, too. What is there
/// in part is gone on from. The branch's name is set to the new commit when all of it is there: until then, whoever looks
/// for the model finds what was there before. With `HF_HUB_OFFLINE` nothing is asked of the network, and the snapshot
/// that is there is given.
///
/// # Errors
///
/// [`DownloadError`]. What was fetched stays in the cache, and the next call goes on from it.
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
    let place = RepoFolders::new(cache, &id, &commit);
    place.check_room(&files)?;
    for folder in [&place.snapshot, &place.folder.join("refs")] {
        remove_stale(folder);
    }
    let bytes = files.iter().map(|file| file.size).sum();
    watch(DownloadEvent::Started { files: files.len(), bytes });
    let fetched = fetch_all(&client, &place, &commit, &files, watch)?;
    if !is_commit(revision) {
        let reference = place.folder.join("refs").join(revision);
        replace(&reference, |partial| fs::File::create_new(partial)?.write_all(commit.as_bytes()))?;
    }
    Ok(Downloaded { dir: place.snapshot, files: files.len(), fetched, bytes })
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

/// All files, a few at a time; the first failure ends the others. Gives how many were fetched.
fn fetch_all(
    client: &Client,
    place: &RepoFolders,
    commit: &str,
    files: &[RemoteFile],
    watch: &(dyn Fn(DownloadEvent<'_>) + Sync),
) -> Result<usize, DownloadError> {
    let (next, fetched, stop) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
    let failure = Mutex::new(None);
    let one = |file: &RemoteFile| {
        let blob = place.folder.join("blobs").join(file.digest.text());
        let lock = place.locks.join(format!("{}.lock", file.digest.text()));
        let new = FileDownload { client, file, commit, blob, lock, watch, stop: &stop }.run()?;
        place.link(file)?;
        watch(DownloadEvent::Finished { file: &file.name, bytes: file.size, fetched: new });
        Ok(new)
    };
    let work = || {
        while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            match one(file) {
                Ok(new) => {
                    fetched.fetch_add(usize::from(new), Ordering::Relaxed);
                }
                Err(error) => {
                    // Those that end because of it come later and are not kept.
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

    /// Whether the disk can hold what is missing.
    fn check_room(&self, files: &[RemoteFile]) -> Result<(), DownloadError> {
        fs::create_dir_all(&self.folder).map_err(DownloadError::write(&self.folder))?;
        let length = |path: &Path| fs::metadata(path).map_or(0, |metadata| metadata.len());
        let missing = |file: &RemoteFile| {
            let blob = self.folder.join("blobs").join(file.digest.text());
            file.size.saturating_sub(length(&blob).max(length(&partial(&blob))))
        };
        let needed = files.iter().map(missing).fold(0, u64::saturating_add);
        match free_bytes(&self.folder) {
            Some(free) if needed > free => Err(DownloadError::Full { cache: self.folder.clone(), needed, free }),
            _ => Ok(()),
        }
    }

    /// Gives a blob its name in the snapshot.
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

/// Without a privilege, Windows has no symbolic links; a second name does as well.
#[cfg(not(unix))]
fn link_to_blob(link: &Path, _target: &Path, blob: &Path) -> io::Result<()> {
    fs::hard_link(blob, link)
        .or_else(|_| io::copy(&mut fs::File::open(blob)?, &mut fs::File::create_new(link)?).map(drop))
}

/// How names begin and end that a file or link has before it gets its own.
const TEMPORARY_NAME: (&str, &str) = (".moonlight-", ".partial");
/// Nobody needs a tenth of a second for what is made under such a name.
const STALE_AFTER: Duration = Duration::from_secs(3600);

/// Makes something beside a path, under a name that no other process on any host has, and then gives it the path's name,
/// so that there is never half of it.
fn replace(path: &Path, mut make: impl FnMut(&Path) -> io::Result<()>) -> Result<(), DownloadError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let make = |new: &Path| {
        make(new).inspect_err(|error| {
            // What is there of it helps nobody; but one that was there already is another's.
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

/// Removes what processes that were killed between the two steps of [`replace`] have left. (What they left of blobs is gone
/// on from, under a lock.)
fn remove_stale(folder: &Path) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let ours =
            name.to_str().is_some_and(|name| name.starts_with(TEMPORARY_NAME.0) && name.ends_with(TEMPORARY_NAME.1));
        // Of the link, where it is one.
        let age = entry.metadata().and_then(|metadata| metadata.modified()).ok().and_then(|time| time.elapsed().ok());
        if ours && age.is_some_and(|age| age > STALE_AFTER) {
            // It is only in the way.
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn free_bytes(path: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(path).ok()?;
    disk.f_bavail.checked_mul(disk.f_frsize)
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn free_bytes(_path: &Path) -> Option<u64> {
    None
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_beside_has_a_name_of_its_own_and_nothing_is_left() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("refs").join("main");
        // Where names came from the number of the process, this one was in the way.
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
    fn what_a_killed_process_left_is_removed_when_it_is_old() {
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

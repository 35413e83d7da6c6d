//! The Hub's cache on this machine, and downloads into it.
//!
//! The layout is that of `huggingface_hub`, so that either finds what the other downloaded:
//!
//! ```text
//! $HF_HOME/hub/models--moonshotai--Moonlight-16B-A3B/
//!     refs/main               the commit of the branch when it was downloaded
//!     snapshots/COMMIT/…      links to the blobs, with the names of the repository
//!     blobs/DIGEST            the files: SHA-256 of LFS files, git's SHA-1 of others
//! ```

#[cfg(feature = "download")]
mod client;
#[cfg(feature = "download")]
mod digest;
#[cfg(feature = "download")]
mod download;
#[cfg(feature = "download")]
mod error;
#[cfg(feature = "download")]
mod event;
#[cfg(feature = "download")]
mod file_download;
#[cfg(feature = "download")]
mod listing;
#[cfg(feature = "download")]
mod url;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use crate::error::CheckpointError;
use crate::io::confined_dir::ConfinedDir;

#[cfg(feature = "download")]
pub use download::{DownloadRequest, Downloaded, download};
#[cfg(feature = "download")]
pub use error::DownloadError;
#[cfg(feature = "download")]
pub use event::DownloadEvent;

/// The branch that is used if none is named.
pub(crate) const MAIN: &str = "main";
/// Length of a commit in hexadecimal digits.
const COMMIT: usize = 40;
/// Size limit of a file in `refs`, which contains a commit.
const LONGEST_REFERENCE: u64 = 1_000;

/// The number of checkpoint files in the Hub's list, for fuzzing.
#[cfg(feature = "download")]
pub(crate) fn parse_list(answer: &[u8]) -> Result<usize, String> {
    listing::Listing::parse(answer, &listing::FileSelection::Checkpoint).map(|listing| listing.files.len())
}

/// The directory for a model as a user names it: an existing directory, or else the snapshot of `org/name` (or
/// `org/name@revision`) in the Hub's cache. Nothing is downloaded.
///
/// An existing directory takes precedence. A name that is not valid for a repository is returned unchanged, so that
/// opening it reports the error.
///
/// # Errors
///
/// [`CheckpointError::NotCached`] if the cache has no snapshot of that repository, and errors of the cache.
pub fn resolve(model: impl AsRef<Path>) -> Result<PathBuf, CheckpointError> {
    resolve_in(model.as_ref(), &cache_dir(|name| std::env::var_os(name)))
}

fn resolve_in(path: &Path, cache: &Path) -> Result<PathBuf, CheckpointError> {
    let Some(model) = path.to_str().filter(|_| !path.exists()) else { return Ok(path.to_owned()) };
    let (repo, revision) = model.split_once('@').unwrap_or((model, MAIN));
    let Some(id) = RepoId::parse(repo).filter(|_| is_revision(revision)) else { return Ok(path.to_owned()) };
    match snapshot(&Cache::new(cache.to_owned()), &id, revision)? {
        Some(snapshot) => Ok(snapshot),
        // A single word is more likely a misspelled directory than one of the few repositories without an organization.
        None if !repo.contains('/') => Ok(path.to_owned()),
        None => Err(CheckpointError::NotCached { model: model.to_owned(), cache: cache.to_owned() }),
    }
}

/// The snapshot of a revision, if it is in the cache.
///
/// # Errors
///
/// If the branch's commit cannot be read (a link out of the repository's folder, a pipe, a file longer than a commit),
/// or the snapshot is a link out of the folder.
pub(crate) fn snapshot(cache: &Cache, id: &RepoId, revision: &str) -> Result<Option<PathBuf>, CheckpointError> {
    snapshot_in(&cache.path().join(id.folder_name()), revision)
}

/// The snapshot of `main`, if `folder` is the top folder of a repository in the cache (`models--org--name`). Errors are
/// reported by [`Checkpoint::open`](crate::Checkpoint::open).
pub fn newest_snapshot(folder: &Path) -> Option<PathBuf> {
    snapshot_of_main(folder).ok().flatten()
}

/// [`newest_snapshot`] with its errors.
pub(crate) fn snapshot_of_main(folder: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    snapshot_in(folder, MAIN)
}

fn snapshot_in(folder: &Path, revision: &str) -> Result<Option<PathBuf>, CheckpointError> {
    if !folder.is_dir() {
        return Ok(None);
    }
    let commit = if is_commit(revision) {
        revision.to_owned()
    } else {
        let confined = ConfinedDir::new(folder).map_err(CheckpointError::read(folder))?;
        let name = format!("refs/{revision}");
        let Some(bytes) = confined.read(&name, LONGEST_REFERENCE)? else { return Ok(None) };
        match std::str::from_utf8(&bytes).map(str::trim) {
            Ok(commit) if is_commit(commit) => commit.to_owned(),
            _ => return Ok(None),
        }
    };
    let path = folder.join("snapshots").join(&commit);
    let Ok(real) = fs::canonicalize(&path) else { return Ok(None) };
    let expected = fs::canonicalize(folder).map_err(CheckpointError::read(folder))?.join("snapshots").join(&commit);
    match real == expected {
        true => Ok(Some(path).filter(|path| path.is_dir())),
        // The target of a link is not what was downloaded for this commit.
        false => Err(CheckpointError::Link { path }),
    }
}

/// The folder of the Hub's cache, from the environment variables that `huggingface_hub` reads. It need not exist.
pub fn cache_folder() -> PathBuf {
    cache_dir(|name| std::env::var_os(name))
}

/// Where a download would read the user's token: the name of an environment variable, or the path of a file; `None`
/// without a token. The token itself is not read.
pub fn token_source() -> Option<String> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(name) = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].into_iter().find(|name| set(name).is_some()) {
        return Some(name.to_owned());
    }
    let file =
        set("HF_TOKEN_PATH").map_or_else(|| home_dir(|name| std::env::var_os(name)).join("token"), PathBuf::from);
    file.is_file().then(|| file.display().to_string())
}

/// `HF_HUB_CACHE`, or the older `HUGGINGFACE_HUB_CACHE`, or `hub` in the Hub's [home](home_dir).
pub(crate) fn cache_dir(variable: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]
        .iter()
        .find_map(|name| variable(name).filter(|value| !value.is_empty()))
        .map_or_else(|| home_dir(&variable).join("hub"), PathBuf::from)
}

/// `HF_HOME`, or `huggingface` in `XDG_CACHE_HOME` or `~/.cache`.
pub(crate) fn home_dir(variable: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("HF_HOME").unwrap_or_else(|| {
        let user = || set("HOME").or_else(|| set("USERPROFILE")).unwrap_or_default().join(".cache");
        set("XDG_CACHE_HOME").unwrap_or_else(user).join("huggingface")
    })
}

/// A valid name of a model repository, `org/name` or `name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RepoId(String);

impl RepoId {
    /// The Hub's rule: one or two parts of letters, digits, `-`, `_` and `.`, without `--` and `..`, and neither `-`
    /// nor `.` at either end of a part.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let part = |part: &str| {
            !part.is_empty()
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
                && !part.starts_with(['-', '.'])
                && !part.ends_with(['-', '.'])
        };
        let valid = text.len() <= 96 && !text.contains("--") && !text.contains("..");
        (valid && text.split('/').count() <= 2 && text.split('/').all(part)).then(|| Self(text.to_owned()))
    }

    pub(crate) fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.0.clone(), RepoType::Model, revision.to_owned())
    }

    #[cfg_attr(not(feature = "download"), allow(dead_code, reason = "used by downloads only"))]
    pub(crate) fn in_cache(&self, cache: &Cache, revision: &str) -> CacheRepo {
        cache.repo(self.repo(revision))
    }

    /// `models--org--name`.
    pub(crate) fn folder_name(&self) -> String {
        self.repo(MAIN).folder_name()
    }
}

impl std::fmt::Display for RepoId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// Whether the text is a full commit and not a branch or tag.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == COMMIT && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether the text may be a branch, tag or commit, and as a path stays below `refs`.
pub(crate) fn is_revision(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte))
    };
    text.len() <= 200 && text.split('/').all(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA: &str = "4e735b07a89f73647dfab71ab91b840f362ede5b";

    /// A cache with one snapshot.
    fn cache() -> (tempfile::TempDir, PathBuf) {
        let home = tempfile::tempdir().unwrap();
        let model = home.path().join("models--moonshotai--Moonlight");
        let snapshot = model.join("snapshots").join(SHA);
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(model.join("refs").join("pr")).unwrap();
        fs::write(model.join("refs").join("main"), SHA).unwrap();
        fs::write(model.join("refs").join("pr").join("1"), format!("{SHA}\n")).unwrap();
        fs::write(model.join("refs").join("broken"), "../../../etc").unwrap();
        (home, snapshot)
    }

    #[test]
    fn a_name_stands_for_its_snapshot() {
        let (home, snapshot) = cache();
        for model in ["moonshotai/Moonlight", "moonshotai/Moonlight@main", "moonshotai/Moonlight@pr/1"] {
            assert_eq!(resolve_in(Path::new(model), home.path()).unwrap(), snapshot, "{model}");
        }
        assert_eq!(resolve_in(Path::new(&format!("moonshotai/Moonlight@{SHA}")), home.path()).unwrap(), snapshot);
        for model in ["moonshotai/Kimi", "moonshotai/Moonlight@v2", "moonshotai/Moonlight@broken"] {
            let error = resolve_in(Path::new(model), home.path()).unwrap_err();
            assert!(error.to_string().contains(model), "{error}");
            assert!(error.hint().unwrap().contains("moonshotai/"), "{:?}", error.hint());
        }
    }

    #[test]
    fn the_top_folder_of_a_model_is_its_newest_snapshot() {
        let (home, snapshot) = cache();
        let folder = home.path().join("models--moonshotai--Moonlight");
        assert_eq!(newest_snapshot(&folder), Some(snapshot));
        fs::write(folder.join("refs").join("main"), "../../../etc").unwrap();
        assert_eq!(newest_snapshot(&folder), None);
        assert_eq!(newest_snapshot(home.path()), None);
    }

    /// An untrusted cache: links out of it, pipes, huge files.
    #[cfg(unix)]
    #[test]
    fn links_out_of_a_repository_and_pipes_are_refused() {
        use std::os::unix::fs::symlink;
        let (home, snapshot) = cache();
        let folder = home.path().join("models--moonshotai--Moonlight");
        let main = folder.join("refs").join("main");
        let refused = |what: &str| {
            let error = resolve_in(Path::new("moonshotai/Moonlight"), home.path()).unwrap_err().to_string();
            assert!(error.contains("main"), "{what}: {error}");
            assert_eq!(newest_snapshot(&folder), None, "{what}");
            let error = crate::Checkpoint::open(&folder).unwrap_err().to_string();
            assert!(error.contains("main"), "{what}: {error}");
        };
        fs::remove_file(&main).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&main).status().unwrap().success());
        refused("a pipe");
        for leads in ["/dev/zero", "/etc/hostname"] {
            fs::remove_file(&main).unwrap();
            symlink(leads, &main).unwrap();
            refused(leads);
        }
        fs::remove_file(&main).unwrap();
        fs::File::create(&main).unwrap().set_len(1 << 40).unwrap();
        refused("a hole");
        fs::write(&main, SHA).unwrap();
        assert_eq!(newest_snapshot(&folder), Some(snapshot.clone()));
        // A snapshot that is a link, by its branch and by its commit.
        fs::rename(&snapshot, home.path().join("elsewhere")).unwrap();
        symlink(home.path().join("elsewhere"), &snapshot).unwrap();
        for model in ["moonshotai/Moonlight".to_owned(), format!("moonshotai/Moonlight@{SHA}")] {
            let error = resolve_in(Path::new(&model), home.path()).unwrap_err();
            assert!(matches!(error, CheckpointError::Link { .. }), "{model}: {error}");
        }
        // The repository's folder may be a link to another disk.
        fs::remove_file(&snapshot).unwrap();
        fs::create_dir(&snapshot).unwrap();
        fs::rename(&folder, home.path().join("disk")).unwrap();
        symlink("disk", &folder).unwrap();
        assert_eq!(newest_snapshot(&folder), Some(snapshot));
    }

    #[test]
    fn a_directory_takes_precedence_and_an_invalid_name_is_a_path() {
        let (home, _) = cache();
        assert_eq!(resolve_in(home.path(), home.path()).unwrap(), home.path());
        for path in ["/nowhere/at-all", "./here", "../there", "a/b/c", "word", "org/..", "org/name@../main", ""] {
            assert_eq!(resolve_in(Path::new(path), home.path()).unwrap(), Path::new(path), "{path}");
        }
    }

    #[test]
    fn the_environment_decides_where_the_cache_is() {
        let cache = |set: &[(&str, &str)]| {
            let set: Vec<(String, OsString)> = set.iter().map(|&(name, value)| (name.into(), value.into())).collect();
            cache_dir(|name| set.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone()))
        };
        let home = ("HOME", "/home/me");
        assert_eq!(cache(&[home]), Path::new("/home/me/.cache/huggingface/hub"));
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/cache")]), Path::new("/cache/huggingface/hub"));
        assert_eq!(cache(&[home, ("HF_HOME", "/hf"), ("XDG_CACHE_HOME", "/cache")]), Path::new("/hf/hub"));
        assert_eq!(cache(&[home, ("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/models")]), Path::new("/models"));
        assert_eq!(cache(&[home, ("HF_HOME", "")]), Path::new("/home/me/.cache/huggingface/hub"));
    }

    #[test]
    fn names_of_repositories_and_revisions() {
        for good in ["moonshotai/Moonlight-16B-A3B", "gpt2", "a/b.c_d-1"] {
            assert!(RepoId::parse(good).is_some(), "{good}");
        }
        for bad in ["", "/", "a/", "/a", "a/b/c", "a/..", "../a", "a--b/c", "a/-b", "a/b.", "a b/c", "a/é", "a\\b"] {
            assert!(RepoId::parse(bad).is_none(), "{bad}");
        }
        for good in ["main", "refs/pr/3", "v1.0", SHA] {
            assert!(is_revision(good), "{good}");
        }
        for bad in ["", "..", "a/../b", "/a", "a//b", "a b", "a?b", ".hidden"] {
            assert!(!is_revision(bad), "{bad}");
        }
    }
}

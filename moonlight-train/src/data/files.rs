//! Globs to files.
//!
//! The crate `glob` matches names. Folders are walked here, because the crate skips names that are not UTF-8 and follows links
//! that form a loop.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};
use std::time::UNIX_EPOCH;

use glob::Pattern;
use moonlight_infer::expand_env;

use super::DataError;
use super::hash::Hash;
use crate::file_id::FileId;

/// A file to read, and how much of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SourceFile {
    pub(super) path: PathBuf,
    /// The identity of the file, whatever its path.
    pub(super) id: FileId,
    /// In bytes.
    pub(super) size: u64,
    /// The time of the last change, in nanoseconds of Unix time.
    pub(super) changed: u128,
    /// Bytes to read from the start; less than `size` only in the file that reaches `data.max_bytes`.
    pub(super) read: u64,
}

/// The files that match any of the globs, in the order of their paths. Each is listed once, by its shortest path, even if
/// several links or globs lead to it: a file that was read twice would be learned twice.
pub(super) fn find(key: &'static str, globs: &[String]) -> Result<Vec<SourceFile>, DataError> {
    let mut files: HashMap<FileId, SourceFile> = HashMap::new();
    for glob in globs {
        let fault = |problem: String| DataError::Glob { key, glob: glob.clone(), problem };
        let unset = |name| fault(format!("the environment variable `{name}` is not set"));
        let pattern = expand_env(glob).map_err(unset)?;
        let mut found = false;
        for path in matches(&pattern).map_err(fault)? {
            // Folders, pipes, devices and links to nothing are not files.
            let Some(file) = SourceFile::at(path) else { continue };
            found = true;
            match files.entry(file.id.clone()) {
                Entry::Vacant(entry) => drop(entry.insert(file)),
                Entry::Occupied(mut entry) => {
                    // Equally short paths are compared by name, so that the order of the globs does not matter.
                    let order = |file: &SourceFile| (file.path.components().count(), file.path.clone());
                    if order(&file) < order(entry.get()) {
                        entry.insert(file);
                    }
                }
            }
        }
        if !found {
            return Err(DataError::EmptyGlob { key, glob: glob.clone() });
        }
    }
    let mut files: Vec<SourceFile> = files.into_values().collect();
    files.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

impl SourceFile {
    fn at(path: PathBuf) -> Option<Self> {
        let (id, metadata) = FileId::of(&path).ok().filter(|(_, metadata)| metadata.is_file())?;
        // On a file system without times this is 0, and only a change of the size is noticed.
        let changed = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let (size, changed) = (metadata.len(), changed.map_or(0, |time| time.as_nanos()));
        Some(Self { path, id, size, changed, read: size })
    }
}

/// A component of a glob, between two slashes.
enum Part {
    Literal(PathBuf),
    Pattern(Pattern),
    /// `**`: any number of folders.
    Folders,
}

impl Part {
    fn of(component: Component<'_>) -> Result<Self, String> {
        match component.as_os_str().to_str() {
            Some("**") => Ok(Self::Folders),
            Some(text) if text.contains(['*', '?', '[']) => {
                Pattern::new(text).map(Self::Pattern).map_err(|error| error.to_string())
            }
            _ => Ok(Self::Literal(component.as_os_str().into())),
        }
    }
}

/// The paths that match a glob, shorter ones first. In names that are not UTF-8, U+FFFD stands for each invalid byte sequence.
fn matches(glob: &str) -> Result<Vec<PathBuf>, String> {
    Pattern::new(glob).map_err(|error| error.to_string())?;
    let parts = Path::new(glob).components().filter(|component| *component != Component::CurDir);
    let parts = parts.map(Part::of).collect::<Result<Vec<_>, _>>()?;
    let mut found = Vec::new();
    let mut todo = VecDeque::from([(PathBuf::new(), 0)]);
    // The folders that each `**` has visited, because links may lead to them again.
    let mut seen = HashSet::new();
    while let Some((path, at)) = todo.pop_front() {
        match parts.get(at) {
            None => found.push(path),
            Some(Part::Literal(name)) => todo.push_back((path.join(name), at + 1)),
            Some(Part::Pattern(pattern)) => {
                for name in names(&path)? {
                    let path = path.join(&name);
                    if pattern.matches(&name.to_string_lossy()) && (at + 1 == parts.len() || path.is_dir()) {
                        todo.push_back((path, at + 1));
                    }
                }
            }
            Some(Part::Folders) => {
                let Ok((id, _)) = FileId::of(or_current_dir(&path)) else { continue };
                if seen.insert((id, at)) {
                    let folders = names(&path)?.into_iter().map(|name| path.join(name)).filter(|path| path.is_dir());
                    let folders: Vec<_> = folders.map(|path| (path, at)).collect();
                    todo.push_back((path, at + 1));
                    todo.extend(folders);
                }
            }
        }
    }
    Ok(found)
}

/// The path of a folder for the operating system: an empty path means the working directory.
fn or_current_dir(path: &Path) -> &Path {
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

/// The sorted names in a folder; none if it is not a folder.
fn names(folder: &Path) -> Result<Vec<std::ffi::OsString>, String> {
    let fault = |error: std::io::Error| format!("`{}` cannot be read: {error}", or_current_dir(folder).display());
    let entries = match fs::read_dir(or_current_dir(folder)) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        entries => entries.map_err(fault)?,
    };
    let names = entries.map(|entry| entry.map(|entry| entry.file_name()).map_err(fault));
    let mut names = names.collect::<Result<Vec<_>, _>>()?;
    names.sort_unstable();
    Ok(names)
}

/// Chooses files in the order of a hash of their paths until `max_bytes` are reached, with the last file cut short, and sorts
/// the chosen ones by path. The hash spreads a small share over all folders. 0 is no limit.
pub(super) fn limit(mut files: Vec<SourceFile>, max_bytes: u64) -> Vec<SourceFile> {
    if max_bytes == 0 {
        return files;
    }
    files.sort_by_cached_key(|file| {
        let mut hash = Hash::new(0);
        hash.bytes(file.path.as_os_str().as_encoded_bytes());
        (hash.finish(), file.path.clone())
    });
    let mut left = max_bytes;
    files.retain_mut(|file| {
        file.read = file.size.min(left);
        left -= file.read;
        file.read > 0
    });
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, size: u64) -> SourceFile {
        let (id, _) = FileId::of(Path::new(".")).unwrap();
        SourceFile { path: name.into(), id, size, changed: 0, read: size }
    }

    fn find_in(dir: &Path, globs: &[&str]) -> Vec<PathBuf> {
        let globs: Vec<String> = globs.iter().map(|glob| dir.join(glob).to_string_lossy().into_owned()).collect();
        let files = find("train", &globs).unwrap();
        files.iter().map(|file| file.path.strip_prefix(dir).unwrap().to_owned()).collect()
    }

    #[test]
    fn globs_match_what_the_crate_matches() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["a.txt", "b.md", ".c.txt", "x/a.txt", "x/y/a.txt", "x/y/b1.txt", "x/.z/b2.txt", "[q]/a.txt"] {
            fs::create_dir_all(dir.path().join(path).parent().unwrap()).unwrap();
            fs::write(dir.path().join(path), path).unwrap();
        }
        for glob in [
            "*.txt",
            "**/*.txt",
            "x/**/*.txt",
            "x/**/b?.txt",
            "x/*/b[0-9].txt",
            "**/y/*",
            "x/./y/../a.txt",
            "[[]q]/*",
            "*/a.txt",
        ] {
            let pattern = dir.path().join(glob).to_string_lossy().into_owned();
            let mut expected: Vec<PathBuf> = glob::glob(&pattern)
                .unwrap()
                .map(|path| path.unwrap())
                .filter(|path| path.is_file())
                .map(|path| path.strip_prefix(dir.path()).unwrap().to_owned())
                .collect();
            expected.sort();
            assert!(!expected.is_empty());
            assert_eq!(find_in(dir.path(), &[glob]), expected, "{glob}");
        }
        assert!(matches("x/a**").is_err() && matches("x/[").is_err());
        assert!(matches("").unwrap().iter().all(|path| !path.is_file()));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_with_many_paths_is_listed_once_by_the_shortest() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| dir.path().join(name);
        fs::create_dir(place("text")).unwrap();
        for name in ["1.txt", "2.txt"] {
            fs::write(place("text").join(name), name).unwrap();
        }
        // Two loops in one folder: the number of paths grows exponentially with their depth.
        symlink("../text", place("text/loop")).unwrap();
        symlink(".", place("text/round")).unwrap();
        symlink("self", place("text/self")).unwrap();
        symlink("nowhere", place("text/3.txt")).unwrap();
        fs::hard_link(place("text/1.txt"), place("text/one.txt")).unwrap();
        symlink(place("text/2.txt"), place("two.txt")).unwrap();
        symlink(place("text"), place("zzz")).unwrap();
        let expected: Vec<PathBuf> = ["text/1.txt", "two.txt"].map(PathBuf::from).to_vec();
        assert_eq!(find_in(dir.path(), &["**/*.txt"]), expected);
        let globs = ["zzz/**/*.txt", "text/../text/*.txt", "*.txt", "./text/1.txt"];
        assert_eq!(find_in(dir.path(), &globs), expected);
        assert_eq!(find_in(dir.path(), &["text/loop/**/2.txt"]), ["text/loop/2.txt"].map(PathBuf::from));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn names_that_are_not_utf_8_are_found() {
        use std::os::unix::ffi::OsStrExt;
        let dir = tempfile::tempdir().unwrap();
        let [folder, name] = [&b"d\xfe"[..], b"n\xff.txt"].map(std::ffi::OsStr::from_bytes);
        fs::create_dir(dir.path().join(folder)).unwrap();
        fs::write(dir.path().join(folder).join(name), "x").unwrap();
        for glob in ["*/*.txt", "**/n*.txt", "d?/n?.txt"] {
            assert_eq!(find_in(dir.path(), &[glob]), [Path::new(folder).join(name)], "{glob}");
        }
    }

    #[test]
    fn max_bytes_is_exact_and_spreads_over_the_files() {
        let files: Vec<SourceFile> = (0..100).map(|index| file(&format!("{index:03}"), 10)).collect();
        let some = limit(files.clone(), 205);
        assert_eq!(some.iter().map(|file| file.read).sum::<u64>(), 205);
        assert_eq!(some.len(), 21);
        assert!(some.is_sorted_by(|a, b| a.path < b.path));
        let late = some.iter().filter(|file| file.path >= Path::new("050")).count();
        assert!((3..19).contains(&late), "{late} of 21 are in the second half");
        assert_eq!(limit(files.clone(), 0), files);
        assert_eq!(limit(files.clone(), 5000), files);
    }

    #[test]
    fn a_glob_without_a_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("b.txt"), "b").unwrap();
        std::fs::write(dir.path().join("a.txt"), "a").unwrap();
        std::fs::create_dir(dir.path().join("c.txt")).unwrap();
        let glob = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        let found = find("train", &[glob("*.txt"), glob("a*")]).unwrap();
        let names: Vec<_> = found.iter().map(|file| file.path.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, ["a.txt", "b.txt"]);
        let error = find("valid", &[glob("*.txt"), glob("c*")]).unwrap_err();
        assert_eq!(error, DataError::EmptyGlob { key: "valid", glob: glob("c*") });
        let unset = find("valid", &["$NO_SUCH_VARIABLE/x".to_owned()]).unwrap_err();
        assert!(unset.to_string().contains("`NO_SUCH_VARIABLE`"), "{unset}");
    }
}

//! Globs to files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use moonlight_infer::expand;

use super::DataError;
use super::hash::Hash;

/// A file to read, and how much of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SourceFile {
    pub(super) path: PathBuf,
    /// Its size in bytes.
    pub(super) size: u64,
    /// When it was last changed, in nanoseconds of Unix time.
    pub(super) changed: u128,
    /// Bytes to read from its beginning; less than `size` only where `max_bytes` ends in it.
    pub(super) read: u64,
}

/// The files of all globs, in the order of their paths, each once.
pub(super) fn find(key: &'static str, globs: &[String]) -> Result<Vec<SourceFile>, DataError> {
    let mut paths = BTreeSet::new();
    for glob in globs {
        let fault = |problem: String| DataError::Glob { key, glob: glob.clone(), problem };
        let pattern = expand(glob).map_err(|name| fault(format!("the environment has no `{name}`")))?;
        let mut found = false;
        for path in glob::glob(&pattern).map_err(|error| fault(error.to_string()))? {
            let path = path.map_err(|error| fault(error.to_string()))?;
            if path.is_file() {
                found = true;
                paths.insert(path);
            }
        }
        if !found {
            return Err(DataError::EmptyGlob { key, glob: glob.clone() });
        }
    }
    paths.into_iter().map(|path| describe(&path)).collect()
}

fn describe(path: &Path) -> Result<SourceFile, DataError> {
    let metadata = std::fs::metadata(path).map_err(|error| DataError::io("read", path, &error))?;
    // A file system without times gives 0: then only the size tells a changed file.
    let changed = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok(SourceFile {
        path: path.to_owned(),
        size: metadata.len(),
        changed: changed.map_or(0, |time| time.as_nanos()),
        read: metadata.len(),
    })
}

/// Files in the order of a hash of their paths until `max_bytes` are reached, the last cut short; then in the order of
/// their paths again. So a small share of many folders has something of each. 0 is no limit.
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
        SourceFile { path: name.into(), size, changed: 0, read: size }
    }

    #[test]
    fn max_bytes_is_kept_exactly_and_spreads_over_the_files() {
        let files: Vec<SourceFile> = (0..100).map(|index| file(&format!("{index:03}"), 10)).collect();
        let some = limit(files.clone(), 205);
        assert_eq!(some.iter().map(|file| file.read).sum::<u64>(), 205);
        assert_eq!(some.len(), 21);
        assert!(some.is_sorted_by(|a, b| a.path < b.path));
        let late = some.iter().filter(|file| file.path >= Path::new("050")).count();
        assert!((3..19).contains(&late), "{late} of 21 lie in the second half");
        assert_eq!(limit(files.clone(), 0), files);
        assert_eq!(limit(files.clone(), 5000), files);
    }

    #[test]
    fn a_glob_without_a_file_is_named() {
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

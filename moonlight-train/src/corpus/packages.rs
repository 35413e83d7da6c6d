//! The packages of a corpus: folders that are in one split as a whole.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::error::TrainError;

/// A folder that is in one split as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Package {
    /// The name of the folder without a version.
    pub(super) name: String,
    pub(super) folder: PathBuf,
}

/// The packages of some folders, sorted by name, each in its newest version.
pub(super) fn find_packages(from: &[PathBuf]) -> Result<Vec<Package>, TrainError> {
    let mut found: BTreeMap<String, (Version, PathBuf)> = BTreeMap::new();
    for folder in from {
        for folder in subfolders(folder).map_err(TrainError::read(folder))? {
            let full = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let (name, version) = split_version(&full);
            let candidate = (Version::parse(version), folder);
            match found.entry(name.to_owned()) {
                Entry::Occupied(mut entry) if *entry.get() < candidate => drop(entry.insert(candidate)),
                Entry::Occupied(_) => {}
                Entry::Vacant(entry) => drop(entry.insert(candidate)),
            }
        }
    }
    Ok(found.into_iter().map(|(name, (_, folder))| Package { name, folder }).collect())
}

/// The folders in a folder, sorted, without hidden ones.
pub(super) fn subfolders(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() && !is_hidden(&path) {
            folders.push(path);
        }
    }
    folders.sort();
    Ok(folders)
}

pub(super) fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// `serde-1.0.2-rc.1` is `serde` and `1.0.2-rc.1`.
fn split_version(full: &str) -> (&str, &str) {
    for (at, _) in full.match_indices('-').filter(|(at, _)| *at > 0) {
        let version = &full[at + 1..];
        let mut parts = version.splitn(3, '.');
        let mut is_number =
            || parts.next().is_some_and(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
        if is_number() && is_number() && parts.next().is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        {
            return (&full[..at], version);
        }
    }
    (full, "")
}

/// Ordered by the three numbers, then a release after its candidates, then by the text.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(Vec<u64>, bool, String);

impl Version {
    fn parse(text: &str) -> Self {
        let release = text.split(['-', '+']).next().unwrap_or_default();
        let numbers = release.split('.').map(|part| part.parse().unwrap_or(u64::MAX)).collect();
        Self(numbers, !text.contains('-'), text.to_owned())
    }
}

/// A number that determines the split of a package: it is in the validation text if it is less than `valid_fraction`.
pub(super) fn is_valid(name: &str, valid_fraction: f64, seed: u64) -> bool {
    // 53 bits, which a f64 represents exactly.
    let share = (xxh3_64_with_seed(name.as_bytes(), seed) >> 11) as f64 / (1_u64 << 53) as f64;
    share < valid_fraction
}

/// A number by which packages are ordered; independent of their split.
pub(super) fn order(name: &str, seed: u64) -> u64 {
    xxh3_64_with_seed(format!("order of {name}").as_bytes(), seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_not_part_of_the_name() {
        for (full, name, version) in [
            ("serde-1.0.2", "serde", "1.0.2"),
            ("burn-nn-0.22.1-rc.1", "burn-nn", "0.22.1-rc.1"),
            ("wasi-0.11.0+wasi-snapshot-preview1", "wasi", "0.11.0+wasi-snapshot-preview1"),
            ("sha-1", "sha-1", ""),
            ("x-1.2", "x-1.2", ""),
            ("-1.2.3", "-1.2.3", ""),
            ("plain", "plain", ""),
        ] {
            assert_eq!(split_version(full), (name, version));
        }
    }

    #[test]
    fn the_newest_version_of_a_package_is_used() {
        let home = tempfile::tempdir().unwrap();
        for folder in
            ["a/x-0.9.0", "a/x-0.10.0", "a/x-0.10.0-rc.1", "b/x-0.2.0", "b/y", "b/.hidden", "a/z-1.0.0-beta.2"]
        {
            std::fs::create_dir_all(home.path().join(folder)).unwrap();
        }
        std::fs::write(home.path().join("a/file"), "").unwrap();
        let found = find_packages(&[home.path().join("a"), home.path().join("b")]).unwrap();
        let names = |package: &Package| {
            let folder = package.folder.strip_prefix(home.path()).unwrap().display().to_string();
            (package.name.clone(), folder.replace('\\', "/"))
        };
        let expected = [("x", "a/x-0.10.0"), ("y", "b/y"), ("z", "a/z-1.0.0-beta.2")];
        assert_eq!(
            found.iter().map(names).collect::<Vec<_>>(),
            expected.map(|(name, folder)| (name.to_owned(), folder.to_owned()))
        );
    }

    #[test]
    fn the_split_of_a_package_depends_on_its_name_and_the_seed_only() {
        let names: Vec<String> = (0..1000).map(|index| format!("crate-{index}")).collect();
        let count = |fraction, seed| names.iter().filter(|name| is_valid(name, fraction, seed)).count();
        assert!((70..130).contains(&count(0.1, 0)), "{}", count(0.1, 0));
        assert_eq!((count(0.0, 0), count(1.0, 0)), (0, 1000));
        // With a larger fraction, packages only move from training to validation.
        assert!(names.iter().all(|name| !is_valid(name, 0.1, 7) || is_valid(name, 0.2, 7)));
        assert!(names.iter().any(|name| is_valid(name, 0.1, 0) != is_valid(name, 0.1, 1)));
        // These values are in corpora that exist.
        assert_eq!(
            [("serde", 0), ("serde", 1)].map(|(name, seed)| order(name, seed)),
            [1058753846471857806, 17049425384061025909]
        );
    }
}

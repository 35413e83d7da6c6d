//! The manifest of a checkpoint: the size and a hash of each of its files, written last, so that a checkpoint that has one
//! was complete, and damage done to it later is seen.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::CheckpointError;
use crate::io::confined_dir::ConfinedDir;
use crate::io::file_error::FileError;
use crate::io::storage;

/// The file's name in a checkpoint.
pub const MANIFEST: &str = "manifest.json";

/// A manifest of more bytes is not one of ours: a checkpoint has some hundred files at most.
const LONGEST: u64 = 16 << 20;
const VERSION: u32 = 1;
/// Read at a time for hashing.
const CHUNK: usize = 1 << 20;

/// The files of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    version: u32,
    /// By name.
    files: BTreeMap<String, FileEntry>,
}

/// What a file was when the checkpoint was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileEntry {
    bytes: u64,
    /// XXH3, 128 bits, in hexadecimal digits.
    xxh3: String,
}

/// How much of a checkpoint is compared with its manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Whether each file is there, in its size: no contents are read.
    Sizes,
    /// Also every byte.
    Digests,
}

/// What is wrong with a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Damage {
    /// The manifest itself cannot be read as one.
    Manifest(String),
    /// A file is not there.
    Missing(String),
    /// A file has another size.
    Size {
        /// The file.
        name: String,
        /// Its bytes.
        found: u64,
        /// What they were.
        expected: u64,
    },
    /// A file has other contents.
    Contents(String),
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manifest(problem) => write!(f, "`{MANIFEST}` is no manifest: {problem}"),
            Self::Missing(name) => write!(f, "`{name}` is missing"),
            Self::Size { name, found, expected } => {
                write!(f, "`{name}` has {found} bytes and was written with {expected}")
            }
            Self::Contents(name) => write!(f, "`{name}` is not what was written (its digest differs)"),
        }
    }
}

impl Manifest {
    /// That of the files in `dir`, every one of which is read.
    ///
    /// # Errors
    ///
    /// A file that cannot be read.
    pub fn compute(dir: &Path) -> Result<Self, FileError> {
        let paths = storage::read_dir(dir).map_err(FileError::read(dir))?;
        let names = paths.iter().filter_map(|path| path.file_name()?.to_str()).filter(|name| *name != MANIFEST);
        let names: Vec<&str> = names.filter(|name| dir.join(name).is_file()).collect();
        let entry = |name: &&str| {
            let path = dir.join(name);
            let entry = storage::announce(storage::Call::Read(&path)).and_then(|()| hash(File::open(&path)?));
            Ok(((*name).to_owned(), entry.map_err(FileError::read(&path))?))
        };
        let files = names.par_iter().map(entry).collect::<Result<_, FileError>>()?;
        Ok(Self { version: VERSION, files })
    }

    /// Writes it beside the files.
    ///
    /// # Errors
    ///
    /// A file that cannot be written.
    pub fn write(&self, dir: &Path) -> Result<(), FileError> {
        let path = dir.join(MANIFEST);
        let mut text = serde_json::to_vec_pretty(self).expect("names and numbers are always JSON");
        text.push(b'\n');
        storage::write(&path, &text).map_err(FileError::write(&path))
    }

    /// Compares a checkpoint with the manifest in it; `None` where it has none.
    ///
    /// Files that the manifest does not name are nobody's damage.
    ///
    /// # Errors
    ///
    /// A file that is there and cannot be read, which is not damage: a disk or a right may be back later.
    pub fn check(dir: &Path, depth: Depth) -> Result<Option<Vec<Damage>>, CheckpointError> {
        let confined = ConfinedDir::new(dir).map_err(CheckpointError::read(dir))?;
        storage::announce(storage::Call::Read(&dir.join(MANIFEST))).map_err(CheckpointError::read(dir))?;
        let Some(text) = confined.read(MANIFEST, LONGEST)? else { return Ok(None) };
        let damage = |problem: String| Ok(Some(vec![Damage::Manifest(problem)]));
        let manifest: Self = match serde_json::from_slice(&text) {
            Ok(manifest) => manifest,
            Err(error) => return damage(error.to_string()),
        };
        if manifest.version != VERSION {
            return damage(format!("it has the version {}, and {VERSION} is known", manifest.version));
        }
        if let Some(name) = manifest.files.keys().find(|name| name.contains(['/', '\\']) || *name == "..") {
            return damage(format!("it names {name:?}"));
        }
        let check = |(name, entry): (&String, &FileEntry)| entry.check(&confined, dir, name, depth);
        let damages: Vec<Option<Damage>> = manifest.files.par_iter().map(check).collect::<Result<_, _>>()?;
        Ok(Some(damages.into_iter().flatten().collect()))
    }
}

impl FileEntry {
    fn check(
        &self,
        confined: &ConfinedDir,
        dir: &Path,
        name: &str,
        depth: Depth,
    ) -> Result<Option<Damage>, CheckpointError> {
        let path = dir.join(name);
        let read = CheckpointError::read(&path);
        if let Err(error) = storage::announce(storage::Call::Read(&path)) {
            return Err(read(error));
        }
        let Some((file, path)) = confined.open(name, u64::MAX)? else {
            return Ok(Some(Damage::Missing(name.to_owned())));
        };
        let found = file.metadata().map_err(CheckpointError::read(&path))?.len();
        if found != self.bytes {
            return Ok(Some(Damage::Size { name: name.to_owned(), found, expected: self.bytes }));
        }
        let same = depth == Depth::Sizes || hash(file).map_err(CheckpointError::read(&path))? == *self;
        Ok((!same).then(|| Damage::Contents(name.to_owned())))
    }
}

fn hash(mut file: File) -> io::Result<FileEntry> {
    let (mut hash, mut bytes) = (Xxh3::new(), 0);
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(FileEntry { bytes, xxh3: format!("{:032x}", hash.digest128()) }),
            read => {
                bytes += read as u64;
                hash.update(&chunk[..read]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn home() -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("a"), "some text").unwrap();
        fs::write(home.path().join("b"), "").unwrap();
        Manifest::compute(home.path()).unwrap().write(home.path()).unwrap();
        home
    }

    fn damage(home: &tempfile::TempDir, depth: Depth) -> Vec<Damage> {
        Manifest::check(home.path(), depth).unwrap().unwrap()
    }

    #[test]
    fn what_was_written_is_whole_and_files_of_others_do_not_matter() {
        let home = home();
        fs::write(home.path().join("notes"), "mine").unwrap();
        assert_eq!(damage(&home, Depth::Digests), []);
        fs::remove_file(home.path().join(MANIFEST)).unwrap();
        assert_eq!(Manifest::check(home.path(), Depth::Sizes).unwrap(), None);
    }

    #[test]
    fn every_damage_is_named() {
        let home = home();
        fs::write(home.path().join("a"), "some test").unwrap();
        assert_eq!(damage(&home, Depth::Sizes), []);
        assert_eq!(damage(&home, Depth::Digests), [Damage::Contents("a".into())]);
        fs::write(home.path().join("a"), "short").unwrap();
        let expected = Damage::Size { name: "a".into(), found: 5, expected: 9 };
        assert_eq!(damage(&home, Depth::Sizes), std::slice::from_ref(&expected));
        fs::remove_file(home.path().join("b")).unwrap();
        assert_eq!(damage(&home, Depth::Digests), [expected, Damage::Missing("b".into())]);
    }

    #[test]
    fn a_manifest_that_is_none_is_damage() {
        let home = home();
        for text in [
            "",
            "{",
            "{\"version\": 2, \"files\": {}}",
            r#"{"version": 1, "files": {"../a": {"bytes": 1, "xxh3": ""}}}"#,
        ] {
            fs::write(home.path().join(MANIFEST), text).unwrap();
            assert!(matches!(damage(&home, Depth::Sizes).as_slice(), [Damage::Manifest(_)]), "{text}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_out_of_the_checkpoint_is_not_followed() {
        let home = home();
        let secret = tempfile::NamedTempFile::new().unwrap();
        fs::remove_file(home.path().join("a")).unwrap();
        std::os::unix::fs::symlink(secret.path(), home.path().join("a")).unwrap();
        assert!(matches!(Manifest::check(home.path(), Depth::Sizes), Err(CheckpointError::Link { .. })));
    }
}

//! The manifest of a checkpoint: the size and a hash of each file. It is written last: a checkpoint with a manifest was
//! complete, and any difference from it is later damage.

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

/// The manifest's file name.
pub const MANIFEST: &str = "manifest.json";

/// Size limit in bytes; a checkpoint has a few hundred files at most.
const LONGEST: u64 = 16 << 20;
const VERSION: u32 = 1;
/// Bytes read at a time for hashing.
const CHUNK: usize = 1 << 20;

/// Sizes and hashes of the files of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    version: u32,
    /// By file name.
    files: BTreeMap<String, FileEntry>,
}

/// A file as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileEntry {
    bytes: u64,
    /// XXH3 with 128 bits, in hexadecimal. It detects damage, not tampering.
    xxh3: String,
}

/// How thoroughly a checkpoint is compared with its manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Existence and size of each file; no contents are read.
    Sizes,
    /// Also the hash of each file, for which every byte is read.
    Digests,
}

/// One way in which a checkpoint differs from its manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Damage {
    /// The manifest is invalid; what is wrong with it.
    Manifest(String),
    /// A file is missing; its name.
    Missing(String),
    /// A file has a different size.
    Size {
        /// The file.
        name: String,
        /// Its size in bytes.
        found: u64,
        /// The size in the manifest.
        expected: u64,
    },
    /// A file has the same size and different contents.
    Contents(String),
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manifest(problem) => write!(f, "`{MANIFEST}` is invalid: {problem}"),
            Self::Missing(name) => write!(f, "`{name}` is missing"),
            Self::Size { name, found, expected } => {
                write!(f, "`{name}` has {found} bytes and was written with {expected}")
            }
            Self::Contents(name) => write!(f, "`{name}` is not what was written (its digest differs)"),
        }
    }
}

impl Manifest {
    /// The manifest of the files in `dir`; reads all of them.
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

    /// Writes the manifest into the directory of the files.
    pub fn write(&self, dir: &Path) -> Result<(), FileError> {
        let path = dir.join(MANIFEST);
        let mut text = serde_json::to_vec_pretty(self).expect("names and numbers are always JSON");
        text.push(b'\n');
        storage::write(&path, &text).map_err(FileError::write(&path))
    }

    /// Compares a checkpoint with its manifest; `None` if it has none.
    ///
    /// Files that the manifest does not name are ignored: users may add their own notes.
    ///
    /// # Errors
    ///
    /// A file that exists and cannot be read. That is not damage: it may be readable again once a disk is back or a
    /// permission is restored.
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
            return damage(format!("it has version {}; this program reads version {VERSION}", manifest.version));
        }
        // A manifest lists the files of its own folder: any other path could lead out of it.
        if let Some(name) = manifest.files.keys().find(|name| name.contains(['/', '\\']) || *name == "..") {
            return damage(format!("it lists the file {name:?}"));
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
        // The entry also has the number of bytes that were hashed: the file may have grown since its size was checked.
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
    use crate::error::every_variant;

    #[test]
    fn messages() {
        let name = || "model.safetensors".to_owned();
        let examples = every_variant!(Damage:
            Damage::Manifest(_) => [Damage::Manifest("it has version 2; this program reads version 1".into())],
            Damage::Missing(_) => [Damage::Missing(name())],
            Damage::Size { .. } => [Damage::Size { name: name(), found: 5, expected: 9 }],
            Damage::Contents(_) => [Damage::Contents(name())],
        );
        let text: String = examples.iter().map(|damage| format!("{damage}\n")).collect();
        insta::assert_snapshot!(text);
    }

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
    fn a_checkpoint_as_written_is_complete_and_added_files_do_not_matter() {
        let home = home();
        fs::write(home.path().join("notes"), "mine").unwrap();
        assert_eq!(damage(&home, Depth::Digests), []);
        fs::remove_file(home.path().join(MANIFEST)).unwrap();
        assert_eq!(Manifest::check(home.path(), Depth::Sizes).unwrap(), None);
    }

    #[test]
    fn every_kind_of_damage_is_named() {
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
    fn an_invalid_manifest_is_damage() {
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

//! Files of a model's folder, all of them through one door: others made them.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use moonlight_convert::{CheckpointError, ConfinedDir};

/// The longest file of settings (`tokenizer_config.json` and the like); the published ones have a few hundred kB at most.
pub(crate) const MAX_SETTINGS_BYTES: u64 = 10_000_000;

/// A model's folder: no link out of it is followed, and nothing but plain files of a limited length is read. What is there
/// and cannot be read is an error, never absent.
pub(crate) struct ModelFiles<'a> {
    dir: &'a Path,
    confined: io::Result<ConfinedDir>,
}

impl<'a> ModelFiles<'a> {
    pub(crate) fn new(dir: &'a Path) -> Self {
        // The parent of `tokenizer.json` is nameless where the file is in the working directory.
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        Self { dir, confined: ConfinedDir::new(dir) }
    }

    /// The bytes of a file, `None` where there is none. The error is the file and what is wrong with it.
    pub(crate) fn read(&self, name: &str, most: u64) -> Result<Option<Vec<u8>>, (PathBuf, String)> {
        let path = self.dir.join(name);
        match &self.confined {
            Ok(confined) => confined.read(name, most).map_err(|error| (path, problem(error))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err((path, error.to_string())),
        }
    }
}

/// What is wrong with a file, as part of a sentence that names it.
fn problem(error: CheckpointError) -> String {
    match error {
        CheckpointError::Link { .. } => "it is a symbolic link that leads out of its folder".into(),
        CheckpointError::TooLong { bytes, most, .. } => too_long(bytes, most),
        CheckpointError::File(error) => error.source.to_string(),
        error => error.to_string(),
    }
}

fn too_long(bytes: u64, most: u64) -> String {
    format!("it has {bytes} bytes, and no such file has more than {most}")
}

/// The bytes of a file that was named itself, which may be a link; the error is what is wrong with it.
pub(crate) fn read_named(path: &Path, most: u64) -> Result<Vec<u8>, String> {
    let found = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !found.is_file() {
        return Err("it is not a plain file".into());
    }
    if found.len() > most {
        return Err(too_long(found.len(), most));
    }
    let mut contents = Vec::with_capacity(found.len() as usize);
    let read = File::open(path).and_then(|file| file.take(most).read_to_end(&mut contents));
    read.map_err(|error| error.to_string())?;
    Ok(contents)
}

//! The files of a model's directory. They are untrusted, and all of them are read through [`ModelFiles`].

use std::cell::OnceCell;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use moonlight_convert::{CheckpointError, ConfinedDir, gguf};

/// The limit of a file of settings (`tokenizer_config.json` and the like); the published ones have up to a few hundred kB.
pub(crate) const MAX_SETTINGS_BYTES: u64 = 10_000_000;

/// A model's directory. Only plain files up to a limit are read from it, and no link out of it is followed. A file that exists
/// but cannot be read is an error, and never treated as absent.
///
/// A GGUF file takes the place of a directory with the files that its metadata contains.
pub(crate) struct ModelFiles<'a> {
    dir: &'a Path,
    place: Place,
}

enum Place {
    Directory(io::Result<ConfinedDir>),
    /// A GGUF file and the files of its metadata, which are made when the first one is read.
    Gguf(PathBuf, OnceCell<Result<NamedFiles, String>>),
}

/// Names and contents.
type NamedFiles = Vec<(String, Vec<u8>)>;

impl<'a> ModelFiles<'a> {
    pub(crate) fn new(dir: &'a Path) -> Self {
        // The parent of the relative path `tokenizer.json` is the empty path.
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let place = match gguf::gguf_file(dir) {
            Some(file) => Place::Gguf(file, OnceCell::new()),
            None => Place::Directory(ConfinedDir::new(dir)),
        };
        Self { dir, place }
    }

    /// The bytes of a file; `None` if it does not exist. The error is the path of the file and what is wrong with it.
    pub(crate) fn read(&self, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, (PathBuf, String)> {
        let path = self.dir.join(name);
        match &self.place {
            Place::Directory(Ok(confined)) => confined.read(name, max_bytes).map_err(|error| (path, problem(error))),
            Place::Directory(Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Place::Directory(Err(error)) => Err((path, error.to_string())),
            Place::Gguf(file, contents) => {
                let made = contents.get_or_init(|| gguf::sidecar_files(file).map_err(problem));
                let files = made.as_ref().map_err(|problem| (file.clone(), problem.clone()))?;
                Ok(files.iter().find(|(other, _)| other == name).map(|(_, contents)| contents.clone()))
            }
        }
    }
}

/// The problem of a file, as part of a sentence that names the file.
fn problem(error: CheckpointError) -> String {
    match error {
        CheckpointError::Link { .. } => "it is a symbolic link that leads out of its directory".into(),
        CheckpointError::TooLong { bytes, most, .. } => too_long(bytes, most),
        CheckpointError::File(error) => error.source.to_string(),
        error => error.to_string(),
    }
}

fn too_long(bytes: u64, max_bytes: u64) -> String {
    format!("it has {bytes} bytes, more than the limit of {max_bytes}")
}

/// The bytes of a file that the user names directly. The file may be a link. The error is what is wrong with the file.
pub(crate) fn read_named(path: &Path, max_bytes: u64) -> Result<Vec<u8>, String> {
    let found = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !found.is_file() {
        return Err("it is not a plain file".into());
    }
    if found.len() > max_bytes {
        return Err(too_long(found.len(), max_bytes));
    }
    let mut contents = Vec::with_capacity(found.len() as usize);
    // `take`, because the file may have grown since its length was read.
    let read = File::open(path).and_then(|file| file.take(max_bytes).read_to_end(&mut contents));
    read.map_err(|error| error.to_string())?;
    Ok(contents)
}

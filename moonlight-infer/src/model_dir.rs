//! Finds the directory or GGUF file with the weights of the model that a user names.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use moonlight_convert::adapter::is_adapter;
use moonlight_convert::{CheckpointError, gguf, hub};

use crate::run_dir::{LockAttempt, ReadLock, TRAINER_STATE, newest_checkpoint};

/// A directory with weights, or a GGUF file. If it is a checkpoint of a run, the run does not remove it while this value exists.
#[derive(Debug, Clone)]
pub struct ModelDir {
    path: PathBuf,
    _lock: Option<ReadLock>,
}

impl ModelDir {
    /// The path of the directory or file. The lock is released.
    pub fn into_path(self) -> PathBuf {
        self.path
    }
}

impl Deref for ModelDir {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

impl AsRef<Path> for ModelDir {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

/// The directory with the weights of `model`, which is one of
///
/// * a directory with a `config.json`, or the directory of an adapter: itself;
/// * a GGUF file, or a directory whose only weights it is: the file, in the place of a directory;
/// * the folder of a training run: its newest complete checkpoint;
/// * the directory of a model in the Hub's cache (`models--org--name`): the snapshot of `main`;
/// * `org/name` or `org/name@revision`, if no such path exists: its snapshot in the Hub's cache. Nothing is downloaded.
///
/// Any other path is returned unchanged, so that the error comes from opening it. Nothing is written or removed.
///
/// # Errors
///
/// [`CheckpointError::NotCached`] for a repository that is not in the Hub's cache; an error for the folder of a run that
/// cannot be read.
pub fn resolve_model(model: impl AsRef<Path>) -> Result<ModelDir, CheckpointError> {
    resolve_weights(&hub::resolve(model)?)
}

/// As [`resolve_model`], for a path that is never the name of a repository, such as the directory of an adapter.
///
/// # Errors
///
/// The folder of a run cannot be read.
pub fn resolve_weights(dir: &Path) -> Result<ModelDir, CheckpointError> {
    let adapter = is_adapter(dir);
    if !adapter && let Some(path) = gguf::gguf_file(dir) {
        return Ok(ModelDir { path, _lock: None });
    }
    if adapter || dir.join("config.json").exists() {
        let lock = match dir.join(TRAINER_STATE).exists().then(|| ReadLock::acquire(dir)) {
            Some(LockAttempt::Held(lock)) => Some(lock),
            // The user named this checkpoint, so it is read even without a lock.
            _ => None,
        };
        return Ok(ModelDir { path: dir.to_owned(), _lock: lock });
    }
    if let Some((path, lock)) = newest_checkpoint(dir)? {
        return Ok(ModelDir { path, _lock: lock });
    }
    let path = hub::newest_snapshot(dir).unwrap_or_else(|| dir.to_owned());
    Ok(ModelDir { path, _lock: None })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use moonlight_convert::manifest::Manifest;

    use super::*;

    #[test]
    fn a_run_resolves_to_its_newest_checkpoint_and_a_checkpoint_to_itself() {
        let home = tempfile::tempdir().unwrap();
        let run = home.path();
        assert_eq!(&*resolve_model(run).unwrap(), run);
        let dir = run.join("checkpoints/step-00000010");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(TRAINER_STATE), r#"{"version": 2, "step": 10}"#).unwrap();
        fs::write(dir.join("config.json"), "{}").unwrap();
        Manifest::compute(&dir).unwrap().write(&dir).unwrap();
        assert_eq!(&*resolve_model(run).unwrap(), dir);
        assert_eq!(&*resolve_model(&dir).unwrap(), dir);
    }

    #[test]
    fn a_gguf_file_stands_for_itself_and_for_the_directory_whose_only_weights_it_is() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("model.gguf");
        fs::write(&file, "GGUF").unwrap();
        fs::write(home.path().join("config.json"), "{}").unwrap();
        assert_eq!(&*resolve_model(&file).unwrap(), file);
        assert_eq!(&*resolve_model(home.path()).unwrap(), file);
        // With other weights, or a second file, the directory is not taken for the file.
        for other in ["model.safetensors", "other.gguf"] {
            let other = home.path().join(other);
            fs::write(&other, "").unwrap();
            assert_eq!(&*resolve_model(home.path()).unwrap(), home.path());
            fs::remove_file(other).unwrap();
        }
    }

    #[test]
    fn a_directory_of_the_cache_resolves_to_the_snapshot_of_its_main_branch() {
        let home = tempfile::tempdir().unwrap();
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let snapshot = home.path().join("snapshots").join(commit);
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir(home.path().join("refs")).unwrap();
        fs::write(home.path().join("refs/main"), format!("{commit}\n")).unwrap();
        assert_eq!(&*resolve_model(home.path()).unwrap(), snapshot);
    }
}

//! The directory that holds the weights of what a user names as a model.

use std::fs;
use std::path::{Path, PathBuf};

use moonlight_convert::adapter::is_adapter;
use moonlight_convert::{CheckpointError, hub};
use serde_json::Value;

/// The version of a training run's `trainer.json` that is known.
const TRAINER_STATE_VERSION: u64 = 1;

/// The directory of the weights that `model` names, which is one of
///
/// * a directory with a `config.json`, or an adapter's: itself;
/// * the folder of a training run: its newest whole checkpoint;
/// * the folder of a model in the Hub's cache (`models--org--name`): the snapshot of `main`;
/// * `org/name` or `org/name@revision`, where no such path exists: its snapshot in the Hub's cache. Nothing is fetched.
///
/// Anything else is returned as it is, so that opening it says what is wrong with it.
///
/// # Errors
///
/// [`CheckpointError::NotCached`] for a repository that the Hub's cache does not have.
pub fn resolve_model(model: impl AsRef<Path>) -> Result<PathBuf, CheckpointError> {
    Ok(weights_in(&hub::resolve(model)?))
}

/// [`resolve_model`] for a path that is not a repository's name, such as an adapter's.
pub fn weights_in(dir: &Path) -> PathBuf {
    if dir.join("config.json").exists() || is_adapter(dir) {
        return dir.to_owned();
    }
    newest_checkpoint(dir).or_else(|| hub::newest_snapshot(dir)).unwrap_or_else(|| dir.to_owned())
}

/// The newest whole checkpoint of a training run: of the folders `checkpoints/step-*` with a readable `trainer.json` the
/// one of the largest step. Nothing is written or removed: the run may be in progress.
pub fn newest_checkpoint(run: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(run.join("checkpoints")).ok()?;
    let checkpoints = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("step-"));
    checkpoints.filter_map(|entry| Some((step_of(&entry.path())?, entry.path()))).max().map(|(_, path)| path)
}

/// The step of a checkpoint; `None` where its state cannot be read.
fn step_of(checkpoint: &Path) -> Option<u64> {
    let text = fs::read_to_string(checkpoint.join("trainer.json")).ok()?;
    let state: Value = serde_json::from_str(&text).ok()?;
    (state["version"].as_u64()? == TRAINER_STATE_VERSION).then(|| state["step"].as_u64())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(run: &Path, name: &str, state: &str) -> PathBuf {
        let dir = run.join("checkpoints").join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("trainer.json"), state).unwrap();
        fs::write(dir.join("config.json"), "{}").unwrap();
        dir
    }

    #[test]
    fn a_run_is_its_newest_whole_checkpoint_and_nothing_is_removed() {
        let home = tempfile::tempdir().unwrap();
        let run = home.path();
        assert_eq!(newest_checkpoint(run), None);
        assert_eq!(resolve_model(run).unwrap(), run);
        checkpoint(run, "step-00000009", r#"{"version": 1, "step": 9}"#);
        let newest = checkpoint(run, "step-00000010", r#"{"version": 1, "step": 10}"#);
        // Half written, half removed, damaged, and of another version.
        checkpoint(run, ".step-00000030.new", r#"{"version": 1, "step": 30}"#);
        checkpoint(run, "step-00000040", r#"{"version": 1, "st"#);
        checkpoint(run, "step-00000050", r#"{"version": 2, "step": 50}"#);
        fs::create_dir(run.join("checkpoints/step-00000060")).unwrap();
        assert_eq!(resolve_model(run).unwrap(), newest);
        assert!(run.join("checkpoints/.step-00000030.new").exists(), "a run in progress keeps what it writes");
        assert_eq!(resolve_model(&newest).unwrap(), newest);
    }

    #[test]
    fn a_folder_of_the_cache_is_the_snapshot_of_its_main_branch() {
        let home = tempfile::tempdir().unwrap();
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let snapshot = home.path().join("snapshots").join(commit);
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir(home.path().join("refs")).unwrap();
        fs::write(home.path().join("refs/main"), format!("{commit}\n")).unwrap();
        assert_eq!(resolve_model(home.path()).unwrap(), snapshot);
    }
}

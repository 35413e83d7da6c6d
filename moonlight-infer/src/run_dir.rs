//! Finds the checkpoints in the folder of a training run, and checks whether they are complete.
//!
//! Resuming, the removal of old checkpoints, and every reader of a run's folder use the same check, [`check_checkpoint`]. It
//! writes nothing, because the run may be in progress.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use moonlight_convert::adapter::is_adapter;
use moonlight_convert::manifest::{Depth, MANIFEST, Manifest};
use moonlight_convert::storage::{self, Call};
use moonlight_convert::{Checkpoint, CheckpointError, ConfinedDir, FileError};
use serde_json::Value;

/// The file of a checkpoint with the trainer's state.
pub const TRAINER_STATE: &str = "trainer.json";
/// The `version` in `trainer.json` of checkpoints without a manifest.
pub const FIRST_VERSION: u64 = 1;
/// The `version` in `trainer.json` that this program writes.
pub const NEWEST_VERSION: u64 = 2;
/// The single file with the optimizer's state, as programs before version 2 wrote it on one rank.
pub const SINGLE_OPTIMIZER: &str = "optimizer.bpk";
/// The prefix of the name of a file with one rank's part of the optimizer's state.
pub const OPTIMIZER_PART: &str = "optimizer-";
/// The prefix of the name of a checkpoint's directory, before the step.
const PREFIX: &str = "step-";
const MAX_STATE_BYTES: u64 = 16 << 20;
/// How often a reader tries again if checkpoints are removed while it opens them.
const ATTEMPTS: usize = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// Whether a checkpoint is complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckpointStatus {
    /// Every file exists and has its size, and its hash if hashes were checked.
    Complete {
        /// The step after which the checkpoint was written.
        step: u64,
    },
    /// Files are missing or differ from what was written. The problems of all files, separated by commas.
    Damaged(String),
    /// A newer program wrote the checkpoint, and this one cannot check it.
    Newer {
        /// The `version` in `trainer.json`.
        version: u64,
    },
}

/// Checks the checkpoint in a directory against its manifest, by size or, with [`Depth::Digests`], by hash. A checkpoint of
/// version 1 has no manifest; its list of files and their headers are checked instead.
///
/// # Errors
///
/// [`CheckpointError`] for a file that exists but cannot be read. This is not damage: a caller must not conclude that the
/// checkpoint is lost and remove it.
pub fn check_checkpoint(dir: &Path, depth: Depth) -> Result<CheckpointStatus, CheckpointError> {
    let confined = ConfinedDir::new(dir).map_err(FileError::read::<CheckpointError>(dir))?;
    let path = dir.join(TRAINER_STATE);
    storage::announce(Call::Read(&path)).map_err(FileError::read::<CheckpointError>(&path))?;
    let Some(text) = confined.read(TRAINER_STATE, MAX_STATE_BYTES)? else {
        return Ok(CheckpointStatus::Damaged(format!("`{TRAINER_STATE}` is missing")));
    };
    let state: Value = match serde_json::from_slice(&text) {
        Ok(state) => state,
        Err(error) => return Ok(CheckpointStatus::Damaged(format!("`{TRAINER_STATE}` cannot be parsed: {error}"))),
    };
    let (Some(version), Some(step)) = (state["version"].as_u64(), state["step"].as_u64()) else {
        return Ok(CheckpointStatus::Damaged(format!("`{TRAINER_STATE}` has no step")));
    };
    if version > NEWEST_VERSION {
        return Ok(CheckpointStatus::Newer { version });
    }
    let damages = match Manifest::check(dir, depth)? {
        Some(damages) => damages.iter().map(ToString::to_string).collect(),
        None if version > FIRST_VERSION => vec![format!("`{MANIFEST}` is missing")],
        None => damages_without_manifest(dir)?,
    };
    match damages.is_empty() {
        true => Ok(CheckpointStatus::Complete { step }),
        false => Ok(CheckpointStatus::Damaged(damages.join(", "))),
    }
}

/// The problems of a checkpoint of version 1, found from its file names and headers.
fn damages_without_manifest(dir: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut damages = Vec::new();
    if is_adapter(dir) {
        if !dir.join("adapter_model.safetensors").is_file() {
            damages.push("`adapter_model.safetensors` is missing".into());
        }
    } else {
        match Checkpoint::open(dir) {
            Ok(checkpoint) => damages.extend(checkpoint.problems().into_iter().map(|problem| problem.to_string())),
            // A file that cannot be read is not damage.
            Err(CheckpointError::File(error)) => return Err(error.into()),
            Err(error) => damages.push(error.to_string()),
        }
    }
    let missing = optimizer_files(dir).into_iter().filter(|file| !file.is_file());
    damages.extend(missing.map(|file| format!("`{}` is missing", file.file_name().unwrap_or_default().display())));
    Ok(damages)
}

/// The files of a checkpoint with the optimizer's state: one for each rank that wrote it, or the single file of version 1.
/// Parts that are missing are also listed.
pub fn optimizer_files(dir: &Path) -> Vec<PathBuf> {
    let paths = storage::read_dir(dir).unwrap_or_default();
    let mut names = paths.iter().filter_map(|path| path.file_name()?.to_str());
    // This program writes five digits. A file with a larger number is from elsewhere, and would yield a huge list.
    let world_size = names.find_map(|name| {
        let (_, size) = name.strip_prefix(OPTIMIZER_PART)?.strip_suffix(".bpk")?.split_once("-of-")?;
        if size.len() == 5 { size.parse::<usize>().ok() } else { None }
    });
    match world_size {
        Some(world_size) => (0..world_size).map(|rank| optimizer_part(dir, rank, world_size)).collect(),
        None => vec![dir.join(SINGLE_OPTIMIZER)],
    }
}

/// The file with one rank's part of the optimizer's state, in the directory of a checkpoint.
pub fn optimizer_part(dir: &Path, rank: usize, world_size: usize) -> PathBuf {
    dir.join(format!("{OPTIMIZER_PART}{rank:05}-of-{world_size:05}.bpk"))
}

/// The name of the directory of the checkpoint after `step`.
pub fn checkpoint_name(step: u64) -> String {
    format!("{PREFIX}{step:08}")
}

/// Whether a name is that of a checkpoint's directory: `step-` and digits.
pub fn is_checkpoint_name(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|step| !step.is_empty() && step.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The directories of all checkpoints, complete or damaged, in `dir` (the `checkpoints` of a run), with the highest step
/// first. Empty if `dir` does not exist.
///
/// # Errors
///
/// `dir` cannot be read.
pub fn checkpoint_folders(dir: &Path) -> Result<Vec<PathBuf>, FileError> {
    let paths = match storage::read_dir(dir) {
        Ok(paths) => paths,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(FileError::read(dir)(error)),
    };
    let name = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let mut folders: Vec<PathBuf> =
        paths.into_iter().filter(|path| is_checkpoint_name(&name(path)) && path.is_dir()).collect();
    folders.sort_by_cached_key(|path| {
        // Compared as digits rather than as numbers, because a name may have more digits than fit into a u64.
        let name = name(path);
        let digits = name[PREFIX.len()..].trim_start_matches('0').to_owned();
        std::cmp::Reverse((digits.len(), digits))
    });
    Ok(folders)
}

/// A shared lock on the directory of a checkpoint. A run does not remove the checkpoint while a reader holds the lock.
#[derive(Debug, Clone)]
pub struct ReadLock(#[allow(dead_code, reason = "held, not used")] Arc<File>);

/// The result of [`ReadLock::acquire`].
#[derive(Debug)]
pub enum LockAttempt {
    /// The directory is locked.
    Held(ReadLock),
    /// The run is removing the checkpoint, or still writing it.
    Busy,
    /// The file system does not support locks.
    Unsupported,
}

impl ReadLock {
    /// Tries to lock a directory without waiting.
    pub fn acquire(dir: &Path) -> LockAttempt {
        let Ok(file) = File::open(dir) else { return LockAttempt::Unsupported };
        match file.try_lock_shared() {
            Ok(()) => LockAttempt::Held(Self(Arc::new(file))),
            Err(TryLockError::WouldBlock) => LockAttempt::Busy,
            Err(TryLockError::Error(_)) => LockAttempt::Unsupported,
        }
    }
}

/// The newest complete checkpoint of a training run, locked for reading; `None` if `run` has none. Each newer checkpoint
/// that is damaged is logged as a warning.
///
/// # Errors
///
/// A directory or file that exists and cannot be read.
pub fn newest_checkpoint(run: &Path) -> Result<Option<(PathBuf, Option<ReadLock>)>, CheckpointError> {
    let dir = run.join("checkpoints");
    for attempt in 0.. {
        let mut damaged = Vec::new();
        let mut vanished = false;
        for path in checkpoint_folders(&dir)? {
            // The lock comes before the check, so that the checkpoint is not removed between the check and the reading.
            let lock = match ReadLock::acquire(&path) {
                LockAttempt::Held(lock) => Some(lock),
                LockAttempt::Busy if attempt < ATTEMPTS => {
                    vanished = true;
                    break;
                }
                LockAttempt::Busy | LockAttempt::Unsupported => None,
            };
            let status = check_checkpoint(&path, Depth::Sizes);
            // The checkpoint was removed since it was listed, so the list is outdated, whatever the check found.
            if !path.is_dir() && attempt < ATTEMPTS {
                vanished = true;
                break;
            }
            match status? {
                CheckpointStatus::Complete { .. } => {
                    for message in damaged {
                        tracing::warn!("{message}");
                    }
                    return Ok(Some((path, lock)));
                }
                CheckpointStatus::Damaged(problem) => {
                    damaged.push(format!("ignored the damaged checkpoint `{}`: {problem}", path.display()));
                }
                CheckpointStatus::Newer { version } => {
                    damaged.push(format!("ignored `{}`: a newer program wrote it (version {version})", path.display()));
                }
            }
        }
        if !vanished {
            for message in damaged {
                tracing::warn!("{message}");
            }
            return Ok(None);
        }
        sleep(PAUSE);
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A complete checkpoint.
    fn checkpoint(run: &Path, step: u64) -> PathBuf {
        let dir = run.join("checkpoints").join(checkpoint_name(step));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(TRAINER_STATE), format!(r#"{{"version": 2, "step": {step}}}"#)).unwrap();
        fs::write(dir.join("config.json"), "{}").unwrap();
        Manifest::compute(&dir).unwrap().write(&dir).unwrap();
        dir
    }

    fn newest(run: &Path) -> Option<PathBuf> {
        newest_checkpoint(run).unwrap().map(|(path, _)| path)
    }

    #[test]
    fn a_checkpoint_is_complete_by_its_manifest() {
        let home = tempfile::tempdir().unwrap();
        let dir = checkpoint(home.path(), 9);
        assert_eq!(check_checkpoint(&dir, Depth::Digests).unwrap(), CheckpointStatus::Complete { step: 9 });
        fs::write(dir.join("config.json"), "[]").unwrap();
        assert_eq!(check_checkpoint(&dir, Depth::Sizes).unwrap(), CheckpointStatus::Complete { step: 9 });
        let CheckpointStatus::Damaged(problem) = check_checkpoint(&dir, Depth::Digests).unwrap() else {
            panic!("it is damaged")
        };
        assert_eq!(problem, "`config.json` is not what was written (its digest differs)");
        fs::remove_file(dir.join(MANIFEST)).unwrap();
        assert_eq!(
            check_checkpoint(&dir, Depth::Sizes).unwrap(),
            CheckpointStatus::Damaged("`manifest.json` is missing".into())
        );
    }

    #[test]
    fn an_invalid_state_is_damage_and_one_of_a_newer_program_is_not() {
        let home = tempfile::tempdir().unwrap();
        let dir = checkpoint(home.path(), 1);
        for text in ["", "{\"version\": 2, \"st", "[1]", "{\"version\": 2}"] {
            fs::write(dir.join(TRAINER_STATE), text).unwrap();
            assert!(matches!(check_checkpoint(&dir, Depth::Sizes).unwrap(), CheckpointStatus::Damaged(_)), "{text}");
        }
        fs::write(dir.join(TRAINER_STATE), r#"{"version": 3, "step": 1}"#).unwrap();
        assert_eq!(check_checkpoint(&dir, Depth::Sizes).unwrap(), CheckpointStatus::Newer { version: 3 });
        fs::remove_file(dir.join(TRAINER_STATE)).unwrap();
        assert_eq!(
            check_checkpoint(&dir, Depth::Sizes).unwrap(),
            CheckpointStatus::Damaged("`trainer.json` is missing".into())
        );
    }

    #[test]
    fn a_run_resolves_to_its_newest_complete_checkpoint_and_nothing_is_changed() {
        let home = tempfile::tempdir().unwrap();
        let run = home.path();
        assert_eq!(newest(run), None);
        checkpoint(run, 9);
        let complete = checkpoint(run, 10);
        // Damaged, of a newer program, empty, set aside, being written, and a file of the user.
        fs::write(checkpoint(run, 40).join("config.json"), "").unwrap();
        fs::write(checkpoint(run, 50).join(TRAINER_STATE), r#"{"version": 3, "step": 50}"#).unwrap();
        fs::create_dir(run.join("checkpoints/step-00000060")).unwrap();
        fs::rename(checkpoint(run, 70), run.join("checkpoints/step-00000070.damaged")).unwrap();
        fs::create_dir(run.join("checkpoints/.step-00000030.moonlight-saving")).unwrap();
        fs::write(run.join("checkpoints/.step-notes"), "mine").unwrap();
        let count = fs::read_dir(run.join("checkpoints")).unwrap().count();
        assert_eq!(newest(run), Some(complete));
        assert_eq!(fs::read_dir(run.join("checkpoints")).unwrap().count(), count);
    }

    #[cfg(unix)]
    #[test]
    fn a_checkpoint_that_is_read_is_locked() {
        let home = tempfile::tempdir().unwrap();
        let dir = checkpoint(home.path(), 3);
        let (path, lock) = newest_checkpoint(home.path()).unwrap().unwrap();
        assert_eq!(path, dir);
        let exclusive = || File::open(&dir).unwrap().try_lock();
        assert!(lock.is_some() && matches!(exclusive(), Err(TryLockError::WouldBlock)));
        drop(lock);
        assert!(exclusive().is_ok());
    }

    #[test]
    fn parts_of_the_optimizer_are_found_by_their_names() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path();
        assert_eq!(optimizer_files(dir), [dir.join(SINGLE_OPTIMIZER)]);
        // A world size that no run has.
        fs::write(dir.join("optimizer-00000-of-99999999999.bpk"), "").unwrap();
        assert_eq!(optimizer_files(dir), [dir.join(SINGLE_OPTIMIZER)]);
        fs::write(optimizer_part(dir, 1, 2), "").unwrap();
        fs::write(dir.join(SINGLE_OPTIMIZER), "a stray file").unwrap();
        assert_eq!(optimizer_files(dir), [optimizer_part(dir, 0, 2), optimizer_part(dir, 1, 2)]);
    }

    #[test]
    fn checkpoints_are_sorted_by_step_and_not_by_name() {
        let home = tempfile::tempdir().unwrap();
        for name in ["step-99999999", "step-100000000", "step-00000002", "step-", "step-x", "step-00000003.damaged"] {
            fs::create_dir(home.path().join(name)).unwrap();
        }
        let folders = checkpoint_folders(home.path()).unwrap();
        let names: Vec<_> = folders.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["step-100000000", "step-99999999", "step-00000002"]);
    }
}

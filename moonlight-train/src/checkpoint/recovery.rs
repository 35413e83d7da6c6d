//! The checkpoints of a run that begins: what a killed one left is finished or removed, damaged ones are set aside by name,
//! and the newest whole one is found.
//!
//! Only the process that holds the run's lock may do this.

use std::path::{Path, PathBuf};

use moonlight_convert::manifest::Depth;
use moonlight_convert::{FileError, clean_leftovers, storage};
use moonlight_infer::run_dir::{CheckpointStatus, checkpoint_folders, is_checkpoint_name, check_checkpoint};

use super::{Checkpoints, FoundCheckpoint, TrainerState};
use crate::error::TrainError;

/// The end of the name of a checkpoint that was set aside.
const DAMAGED: &str = "damaged";

/// A checkpoint that is not whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedCheckpoint {
    /// Its folder.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: String,
}

impl Checkpoints {
    /// The newest whole checkpoint, with what `open` makes of it; `None` where the run has no checkpoint at all. Every byte
    /// of it has been compared with its manifest.
    ///
    /// `open` may find damage that no manifest tells, in checkpoints of earlier versions: `Err(Ok(problem))`. Damaged
    /// checkpoints are renamed to `step-N.damaged`, and a warning names each.
    ///
    /// # Errors
    ///
    /// [`TrainError::NoCompleteCheckpoint`] where there are checkpoints and all of them are damaged: then none is renamed.
    /// [`TrainError::NewerCheckpoint`] where a newer program wrote one. A folder or file that is there and cannot be read:
    /// nothing follows from that about the checkpoint.
    pub fn newest_complete<T>(
        &self,
        mut open: impl FnMut(&FoundCheckpoint) -> Result<T, Result<String, TrainError>>,
    ) -> Result<Option<(FoundCheckpoint, T)>, TrainError> {
        self.finish_leftovers()?;
        let mut damaged: Vec<DamagedCheckpoint> = Vec::new();
        let mut newest = None;
        for path in checkpoint_folders(&self.dir)? {
            // One of an earlier version, whose contents no digest vouches for, is only opened if it is to be resumed.
            let depth = if newest.is_none() { Depth::Digests } else { Depth::Sizes };
            let verdict = match check_checkpoint(&path, depth) {
                Ok(verdict) => verdict,
                // An older one that cannot be read today is no reason not to resume.
                Err(error) if newest.is_some() => {
                    tracing::warn!("`{}` is left as it is: {error}", path.display());
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let problem = match verdict {
                CheckpointStatus::Newer { .. } if newest.is_some() => continue,
                CheckpointStatus::Newer { version } => return Err(TrainError::NewerCheckpoint { path, version }),
                CheckpointStatus::Damaged(problem) => problem,
                CheckpointStatus::Complete { .. } if newest.is_some() => continue,
                CheckpointStatus::Complete { .. } => match TrainerState::read(&path)? {
                    Err(problem) => problem,
                    Ok(state) => {
                        let found = FoundCheckpoint { path: path.clone(), state };
                        match open(&found) {
                            Ok(opened) => {
                                newest = Some((found, opened));
                                continue;
                            }
                            Err(Ok(problem)) => problem,
                            Err(Err(error)) => return Err(error),
                        }
                    }
                },
            };
            damaged.push(DamagedCheckpoint { path, problem });
        }
        if newest.is_none() && !damaged.is_empty() {
            return Err(TrainError::NoCompleteCheckpoint { damaged });
        }
        damaged.iter().for_each(set_aside);
        Ok(newest)
    }

    /// Finishes or removes what a save or a rotation that was killed left behind. What cannot be removed is only in the way.
    fn finish_leftovers(&self) -> Result<(), TrainError> {
        if !self.dir.is_dir() {
            return Ok(());
        }
        for failure in clean_leftovers(&self.dir, is_checkpoint_name)? {
            tracing::warn!("left over from an earlier run, and not removed: {failure}");
        }
        Ok(())
    }
}

/// Renames a damaged checkpoint, so that it is neither counted nor overwritten.
fn set_aside(damaged: &DamagedCheckpoint) {
    let DamagedCheckpoint { path, problem } = damaged;
    let aside = free_name(path);
    match storage::rename(path, &aside).map_err(FileError::write::<FileError>(path)) {
        Ok(()) => tracing::warn!(
            "the checkpoint `{}` is damaged: {problem}; it is now `{}`",
            path.display(),
            aside.file_name().unwrap_or_default().display()
        ),
        Err(error) => {
            tracing::warn!(
                "the checkpoint `{}` is damaged: {problem}; it cannot be set aside: {error}",
                path.display()
            );
        }
    }
}

/// A name that no file has: `step-N.damaged`, or with a number.
fn free_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let numbered = (2u32..).map(|number| path.with_file_name(format!("{name}.{DAMAGED}-{number}")));
    let mut names = std::iter::once(path.with_file_name(format!("{name}.{DAMAGED}"))).chain(numbered);
    names.find(|name| name.symlink_metadata().is_err()).expect("numbers do not run out")
}

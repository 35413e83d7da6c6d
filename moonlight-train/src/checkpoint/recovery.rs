//! Finding the checkpoint to resume from. What a killed process left is finished or removed, damaged checkpoints are renamed,
//! and the newest complete one is opened.
//!
//! Only the process that holds the run's lock may do this.

use std::path::{Path, PathBuf};

use moonlight_convert::manifest::Depth;
use moonlight_convert::{FileError, clean_leftovers, storage};
use moonlight_infer::run_dir::{CheckpointStatus, check_checkpoint, checkpoint_folders, is_checkpoint_name};

use super::{Checkpoints, FoundCheckpoint, TrainerState};
use crate::error::TrainError;

/// The suffix of a damaged checkpoint's name.
const DAMAGED: &str = "damaged";

/// A checkpoint that is not complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedCheckpoint {
    /// The folder of the checkpoint.
    pub path: PathBuf,
    /// What is missing or changed in it.
    pub problem: String,
}

impl Checkpoints {
    /// The newest complete checkpoint, with the result of `open` for it; `None` if the run has no checkpoint. Every byte of it
    /// was compared with its manifest.
    ///
    /// `open` returns `Err(Ok(problem))` for damage that no manifest shows: checkpoints of earlier versions have none.
    /// Damaged checkpoints are renamed to `step-N.damaged`, and a warning names each.
    ///
    /// # Errors
    ///
    /// [`TrainError::NoCompleteCheckpoint`] if there are checkpoints and all of them are damaged; then none is renamed.
    /// [`TrainError::NewerCheckpoint`] if a newer version wrote the newest one. A file that exists but cannot be read is an
    /// error too, and not damage: it may be readable again later.
    pub fn newest_complete<T>(
        &self,
        mut open: impl FnMut(&FoundCheckpoint) -> Result<T, Result<String, TrainError>>,
    ) -> Result<Option<(FoundCheckpoint, T)>, TrainError> {
        self.finish_leftovers()?;
        let mut damaged: Vec<DamagedCheckpoint> = Vec::new();
        let mut newest = None;
        for path in checkpoint_folders(&self.dir)? {
            // Comparing every byte takes as long as reading the weights, so it is done only until the newest complete
            // checkpoint is found; of older ones sizes are enough.
            let depth = if newest.is_none() { Depth::Digests } else { Depth::Sizes };
            let status = match check_checkpoint(&path, depth) {
                Ok(status) => status,
                // An older checkpoint that cannot be read must not keep the run from resuming.
                Err(error) if newest.is_some() => {
                    tracing::warn!("the checkpoint `{}` is ignored: {error}", path.display());
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let problem = match status {
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
        damaged.iter().for_each(rename_damaged);
        Ok(newest)
    }

    /// Finishes or removes what a killed save or rotation left. What cannot be removed takes up space, but does no other harm.
    fn finish_leftovers(&self) -> Result<(), TrainError> {
        if !self.dir.is_dir() {
            return Ok(());
        }
        for failure in clean_leftovers(&self.dir, is_checkpoint_name)? {
            tracing::warn!("a file of an interrupted save cannot be removed: {failure}");
        }
        Ok(())
    }
}

/// Renames a damaged checkpoint, so that it is neither counted nor overwritten.
fn rename_damaged(damaged: &DamagedCheckpoint) {
    let DamagedCheckpoint { path, problem } = damaged;
    let aside = free_name(path);
    match storage::rename(path, &aside).map_err(FileError::write::<FileError>(path)) {
        Ok(()) => tracing::warn!(
            "the checkpoint `{}` is damaged: {problem}; renamed to `{}`",
            path.display(),
            aside.file_name().unwrap_or_default().display()
        ),
        Err(error) => {
            tracing::warn!("the checkpoint `{}` is damaged: {problem}; it cannot be renamed: {error}", path.display());
        }
    }
}

/// An unused name: `step-N.damaged`, or with a number appended.
fn free_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let numbered = (2u32..).map(|number| path.with_file_name(format!("{name}.{DAMAGED}-{number}")));
    let mut names = std::iter::once(path.with_file_name(format!("{name}.{DAMAGED}"))).chain(numbered);
    names.find(|name| name.symlink_metadata().is_err()).expect("fewer than 2^32 files in a folder")
}

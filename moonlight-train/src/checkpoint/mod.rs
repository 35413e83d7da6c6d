//! Checkpoints of a run: a Hugging Face directory that also contains the state of the optimizer and of the trainer.
//!
//! ```text
//! checkpoints/step-00000100/
//!     config.json, generation_config.json, model.safetensors, tokenizer files    what transformers opens
//!     optimizer-00000-of-00001.bpk                                               the optimizer's state, one part a rank
//!     trainer.json                                                               step, tokens, position in the data, recipe
//!     manifest.json                                                              size and hash of each file, written last
//! ```
//!
//! Each rank writes its part of the optimizer's state, `optimizer-00000-of-00004.bpk` and so on; a run resumes from them with
//! any world size. Checkpoints of earlier versions have no manifest, and those of one rank have the whole state in one
//! `optimizer.bpk`; a run resumes from these too.
//!
//! A checkpoint of a LoRA run has `adapter_config.json` and `adapter_model.safetensors`, in peft's layout, instead of the
//! model's config and weights.
//!
//! A checkpoint is written under a hidden name, flushed, and renamed, so that a folder with a step's name was complete when it
//! got that name. Its manifest proves that it still is. [`check_checkpoint`] compares files and manifest: when a run resumes
//! (`recovery.rs`), when old checkpoints are removed (`rotation.rs`), and when any other command reads a run's folder.
//! `identity.rs` decides whether a run that resumes is the same run.

mod identity;
mod recovery;
mod rotation;
mod state;

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Instant;

use moonlight_convert::adapter::write_adapter;
use moonlight_convert::manifest::{Depth, Manifest};
use moonlight_convert::{FileError, SaveOptions, remove_directory, replace_directory, storage, write_into};
use moonlight_infer::run_dir::{
    CheckpointStatus, check_checkpoint, checkpoint_folders, checkpoint_name, optimizer_files, optimizer_part,
};
use moonlight_infer::tokenizer::TokenizerFile;
use moonlight_model::CausalLm;

use crate::error::TrainError;

pub use identity::{ContentHash, Difference, Differences, RunIdentity, shape_differences};
pub use recovery::DamagedCheckpoint;
pub use state::{Best, TrainerState};

/// The checkpoints of one run.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
    keep_best: bool,
    companions: Vec<TokenizerFile>,
    companions_from: Option<PathBuf>,
    /// Whether only adapters are saved, without their base model.
    adapters: bool,
    /// The step of the checkpoint that the run resumed from.
    resumed_from: Option<u64>,
}

/// A checkpoint to resume from.
#[derive(Debug)]
pub struct FoundCheckpoint {
    /// The folder of the checkpoint.
    pub path: PathBuf,
    /// The progress of the run.
    pub state: TrainerState,
}

impl Checkpoints {
    /// The checkpoints in `dir`. The `keep` newest are kept (0 for all), and with `keep_best` the one with the lowest
    /// validation loss. Each contains the files `companions`, and those next to the weights in the folder `companions_from`.
    pub fn new(
        dir: PathBuf,
        keep: usize,
        keep_best: bool,
        companions: Vec<TokenizerFile>,
        companions_from: Option<PathBuf>,
    ) -> Self {
        Self { dir, keep, keep_best, companions, companions_from, adapters: false, resumed_from: None }
    }

    /// Saves adapters only; their base model is in `companions_from`.
    pub fn for_adapters(self) -> Self {
        Self { adapters: true, ..self }
    }

    /// Never removes the checkpoint of this step, from which the run resumed: if the run goes wrong after that, it is the one
    /// to return to.
    pub fn resumed_from(self, step: Option<u64>) -> Self {
        Self { resumed_from: step, ..self }
    }

    /// Writes the checkpoint of a step, removes old checkpoints, and returns the new folder.
    ///
    /// # Errors
    ///
    /// [`TrainError`] for a file that cannot be written; the checkpoints of earlier steps stay complete. An old checkpoint that
    /// cannot be removed is a warning.
    pub fn save(
        &self,
        model: &CausalLm,
        optimizer: &mut dyn StateWriter,
        state: &TrainerState,
    ) -> Result<PathBuf, TrainError> {
        storage::create_dir_all(&self.dir).map_err(TrainError::write(&self.dir))?;
        let started = Instant::now();
        let path = self.path(state.step);
        let mut failure = None;
        let result = replace_directory(&path, |new| {
            let written = optimizer.begin(new);
            let written =
                written.and_then(|()| self.write_model(model, new)).and_then(|()| self.write_state(new, state));
            let written = optimizer.end(new, written);
            // The manifest is written last, so that a checkpoint that has one was complete.
            let written = written.and_then(|()| Ok(Manifest::compute(new).and_then(|manifest| manifest.write(new))?));
            // `replace_directory` can return only the converter's error type, so the original error is kept here.
            failure = written.err();
            match &failure {
                None => Ok(()),
                Some(error) => Err(FileError::write(new)(std::io::Error::other(error.to_string()))),
            }
        });
        if let Some(error) = failure {
            return Err(error);
        }
        result?;
        tracing::debug!("wrote the checkpoint `{}` in {:.1} s", path.display(), started.elapsed().as_secs_f64());
        self.rotate(state);
        Ok(path)
    }

    fn write_model(&self, model: &CausalLm, dir: &Path) -> Result<(), TrainError> {
        let from = &self.companions_from;
        if self.adapters {
            let base = from.as_deref().unwrap_or(Path::new(""));
            // Absolute, because the adapter may be opened from another working directory.
            let base = std::path::absolute(base).map_err(TrainError::read(base))?;
            return Ok(write_adapter(model, dir, &base, from.as_deref())?);
        }
        let options = SaveOptions { sidecars_from: from.clone(), ..SaveOptions::default() };
        Ok(write_into(model, dir, &options)?)
    }

    fn write_state(&self, dir: &Path, state: &TrainerState) -> Result<(), TrainError> {
        for TokenizerFile { name, contents } in &self.companions {
            let path = dir.join(name);
            storage::write(&path, contents).map_err(TrainError::write(&path))?;
        }
        state.write(dir)
    }

    /// The folder of the newest checkpoint that is complete by the names and sizes of its files.
    pub fn newest(&self) -> Option<PathBuf> {
        let folders = checkpoint_folders(&self.dir).ok()?;
        folders
            .into_iter()
            .find(|path| matches!(check_checkpoint(path, Depth::Sizes), Ok(CheckpointStatus::Complete { .. })))
    }

    /// Opens the checkpoint of a step.
    ///
    /// # Errors
    ///
    /// [`TrainError`] if it is absent or damaged.
    pub fn at(&self, step: u64) -> Result<FoundCheckpoint, TrainError> {
        let path = self.path(step);
        if !path.exists() {
            return Err(TrainError::Request {
                problem: format!("this process cannot see the checkpoint `{}`", path.display()),
                hint: Some("use a `run.dir` that all machines share".into()),
            });
        }
        let damaged = |problem| TrainError::NoCompleteCheckpoint {
            damaged: vec![DamagedCheckpoint { path: path.clone(), problem }],
        };
        match check_checkpoint(&path, Depth::Sizes)? {
            CheckpointStatus::Complete { .. } => {}
            CheckpointStatus::Damaged(problem) => return Err(damaged(problem)),
            CheckpointStatus::Newer { version } => return Err(TrainError::NewerCheckpoint { path, version }),
        }
        match TrainerState::read(&path)? {
            Ok(state) => Ok(FoundCheckpoint { path, state }),
            Err(problem) => Err(damaged(problem)),
        }
    }

    /// Removes old checkpoints. One that cannot be removed is a warning: it is no reason to end the run.
    fn rotate(&self, state: &TrainerState) {
        let folders = match checkpoint_folders(&self.dir) {
            Ok(folders) => folders,
            Err(error) => return tracing::warn!("old checkpoints cannot be removed: {error}"),
        };
        // Damaged checkpoints do not count towards `keep` and are not removed: a user may still recover something from them.
        let complete: BTreeMap<u64, PathBuf> = folders
            .into_iter()
            .filter_map(|path| match check_checkpoint(&path, Depth::Sizes) {
                Ok(CheckpointStatus::Complete { step }) if path == self.path(step) => Some((step, path)),
                _ => None,
            })
            .collect();
        let best = state.best.filter(|_| self.keep_best).map(|best| best.step);
        let protected: Vec<u64> = [Some(state.step), self.resumed_from, best].into_iter().flatten().collect();
        for step in rotation::steps_to_remove(&complete.keys().copied().collect(), self.keep, &protected) {
            let path = &complete[&step];
            // A user makes a checkpoint read-only to keep it.
            if path.metadata().is_ok_and(|data| data.permissions().readonly()) {
                continue;
            }
            // Another process holds a lock while it reads the checkpoint; the next rotation tries again.
            let lock = File::open(path);
            if let Ok(lock) = &lock
                && matches!(lock.try_lock(), Err(TryLockError::WouldBlock))
            {
                continue;
            }
            if let Err(error) = remove_directory(path) {
                tracing::warn!("an old checkpoint cannot be removed: {error}");
            }
        }
    }

    /// The path of a rank's part of the optimizer's state in the checkpoint `dir`.
    pub fn part(dir: &Path, rank: usize, world_size: usize) -> PathBuf {
        optimizer_part(dir, rank, world_size)
    }

    /// The folder of a step's checkpoint.
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(checkpoint_name(step))
    }
}

impl FoundCheckpoint {
    /// The files of the optimizer's state: one part for each rank that wrote it, or the single file of earlier versions. A
    /// missing part is listed too, so that opening it is an error.
    pub fn optimizer(&self) -> Vec<PathBuf> {
        optimizer_files(&self.path)
    }
}

/// Writes the optimizer's state into a new checkpoint.
pub trait StateWriter {
    /// Called with the new folder, before any other file is written.
    ///
    /// # Errors
    ///
    /// [`TrainError`] for a file that cannot be written.
    fn begin(&mut self, dir: &Path) -> Result<(), TrainError>;

    /// Called with the result of writing all other files. The checkpoint gets its name if this succeeds.
    ///
    /// # Errors
    ///
    /// The error in `written`, that of a file that cannot be written, or the failure of another rank.
    fn end(&mut self, dir: &Path, written: Result<(), TrainError>) -> Result<(), TrainError>;
}

//! Checkpoints of a run: a Hugging Face directory with the optimizer's and the trainer's state beside the weights.
//!
//! ```text
//! checkpoints/step-00000100/
//!     config.json, generation_config.json, model.safetensors, tokenizer files    what transformers opens
//!     optimizer-00000-of-00001.bpk                                               the optimizer's state, one part a rank
//!     trainer.json                                                               step, tokens, position in the data, recipe
//!     manifest.json                                                              size and hash of each file, written last
//! ```
//!
//! Each rank writes the part of the optimizer's state that it holds, `optimizer-00000-of-00004.bpk` and so on; a run resumes
//! from them with any number of ranks. Checkpoints of earlier versions have no manifest, and the whole state in one
//! `optimizer.bpk` if one rank wrote them; a run resumes from these as well.
//!
//! The checkpoint of a run of adapters has `adapter_config.json` and `adapter_model.safetensors`, as peft lays them out, in
//! the place of the model's configuration and weights.
//!
//! A checkpoint is written under a hidden name, flushed, and renamed in one step, so that a folder with a step's name is
//! complete. Whether it still is what was written, its manifest tells: [`check_checkpoint`] is asked
//! when a run resumes (`recovery.rs`), when old checkpoints are removed (`rotation.rs`), and by whoever reads a run's folder.
//! `identity.rs` says whether a run that resumes is the same run.

mod identity;
mod recovery;
mod rotation;
mod state;

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use moonlight_convert::adapter::write_adapter;
use moonlight_convert::manifest::{Depth, Manifest};
use moonlight_convert::{FileError, SaveOptions, remove_directory, replace_directory, storage, write_into};
use moonlight_infer::run_dir::{CheckpointStatus, checkpoint_folders, checkpoint_name, check_checkpoint, optimizer_files, optimizer_part};
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
    /// Whether the adapters alone are saved, without their base model.
    adapters: bool,
    /// The step that the run resumed from.
    resumed_from: Option<u64>,
}

/// A checkpoint to resume from.
#[derive(Debug)]
pub struct FoundCheckpoint {
    /// Its folder.
    pub path: PathBuf,
    /// The run at its step.
    pub state: TrainerState,
}

impl Checkpoints {
    /// The checkpoints in `dir`. The `keep` newest are kept (0 for all), and with `keep_best` that with the lowest
    /// validation loss. Each contains `companions`, and the files beside the weights in the folder `companions_from`.
    pub fn new(
        dir: PathBuf,
        keep: usize,
        keep_best: bool,
        companions: Vec<TokenizerFile>,
        companions_from: Option<PathBuf>,
    ) -> Self {
        Self { dir, keep, keep_best, companions, companions_from, adapters: false, resumed_from: None }
    }

    /// Checkpoints of the adapters alone; their base model is in `companions_from`.
    pub fn for_adapters(self) -> Self {
        Self { adapters: true, ..self }
    }

    /// Never removes the checkpoint of this step, which the run resumed from: until the run has gone well, it is the one to
    /// come back to.
    pub fn resumed_from(self, step: Option<u64>) -> Self {
        Self { resumed_from: step, ..self }
    }

    /// Writes the checkpoint of a step and removes those that are not to be kept.
    ///
    /// # Errors
    ///
    /// A file that cannot be written; the checkpoints of earlier steps stay complete. A checkpoint that cannot be removed is
    /// a warning.
    pub fn save(
        &self,
        model: &CausalLm,
        optimizer: &mut dyn StateWriter,
        state: &TrainerState,
    ) -> Result<PathBuf, TrainError> {
        storage::create_dir_all(&self.dir).map_err(TrainError::write(&self.dir))?;
        let path = self.path(state.step);
        let mut failure = None;
        let result = replace_directory(&path, |new| {
            let written = optimizer.begin(new);
            let written =
                written.and_then(|()| self.write_model(model, new)).and_then(|()| self.write_state(new, state));
            let written = optimizer.end(new, written);
            // Last, so that a checkpoint with a manifest is complete.
            let written = written.and_then(|()| Ok(Manifest::compute(new).and_then(|manifest| manifest.write(new))?));
            // `replace_directory` knows the converter's errors only; ours is kept beside them.
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
        self.rotate(state);
        Ok(path)
    }

    fn write_model(&self, model: &CausalLm, dir: &Path) -> Result<(), TrainError> {
        let from = &self.companions_from;
        if self.adapters {
            let base = from.as_deref().unwrap_or(Path::new(""));
            // From wherever the adapter is opened.
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

    /// The newest whole checkpoint's folder, as far as names and sizes tell.
    pub fn newest(&self) -> Option<PathBuf> {
        let folders = checkpoint_folders(&self.dir).ok()?;
        folders.into_iter().find(|path| matches!(check_checkpoint(path, Depth::Sizes), Ok(CheckpointStatus::Complete { .. })))
    }

    /// The checkpoint of a step.
    ///
    /// # Errors
    ///
    /// One that is not there or not whole.
    pub fn at(&self, step: u64) -> Result<FoundCheckpoint, TrainError> {
        let path = self.path(step);
        if !path.exists() {
            return Err(TrainError::Request {
                problem: format!("this process does not see the checkpoint `{}`", path.display()),
                hint: Some("runs on several machines need a `run.dir` that all of them share".into()),
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

    /// Removes the checkpoints that are not to be kept. What stands in the way of that is not worth a run.
    fn rotate(&self, state: &TrainerState) {
        let folders = match checkpoint_folders(&self.dir) {
            Ok(folders) => folders,
            Err(error) => return tracing::warn!("old checkpoints are not removed: {error}"),
        };
        // Damaged ones neither count nor go: nobody knows what can still be saved of them.
        let whole: BTreeMap<u64, PathBuf> = folders
            .into_iter()
            .filter_map(|path| match check_checkpoint(&path, Depth::Sizes) {
                Ok(CheckpointStatus::Complete { step }) if path == self.path(step) => Some((step, path)),
                _ => None,
            })
            .collect();
        let best = state.best.filter(|_| self.keep_best).map(|best| best.step);
        let protected: Vec<u64> = [Some(state.step), self.resumed_from, best].into_iter().flatten().collect();
        for step in rotation::steps_to_remove(&whole.keys().copied().collect(), self.keep, &protected) {
            let path = &whole[&step];
            // Somebody write-protected it to keep it.
            if path.metadata().is_ok_and(|data| data.permissions().readonly()) {
                continue;
            }
            // Somebody may be reading it; the next rotation tries again.
            let lock = File::open(path);
            if let Ok(lock) = &lock
                && matches!(lock.try_lock(), Err(TryLockError::WouldBlock))
            {
                continue;
            }
            if let Err(error) = remove_directory(path) {
                tracing::warn!("an old checkpoint is not removed: {error}");
            }
        }
    }

    /// The file of a rank's part of the optimizer's state, in the folder of a checkpoint.
    pub fn part(dir: &Path, rank: usize, world_size: usize) -> PathBuf {
        optimizer_part(dir, rank, world_size)
    }

    /// The folder of a step's checkpoint.
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(checkpoint_name(step))
    }
}

impl FoundCheckpoint {
    /// The files of the optimizer's state: a part of each rank that wrote it, or the single file of earlier versions. A
    /// part that is missing is listed as well, so that opening it fails.
    pub fn optimizer(&self) -> Vec<PathBuf> {
        optimizer_files(&self.path)
    }
}

/// Writes the optimizer's state into a new checkpoint.
pub trait StateWriter {
    /// Called with the new folder, before anything else is written.
    ///
    /// # Errors
    ///
    /// A file that cannot be written.
    fn begin(&mut self, dir: &Path) -> Result<(), TrainError>;

    /// Called with the result of writing everything else; the checkpoint is renamed if this succeeds.
    ///
    /// # Errors
    ///
    /// That result's error, a file that cannot be written, or the failure of another rank.
    fn end(&mut self, dir: &Path, written: Result<(), TrainError>) -> Result<(), TrainError>;
}

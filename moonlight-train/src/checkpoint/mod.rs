//! Checkpoints of a run: a Hugging Face directory with the optimizer's and the trainer's state beside the weights.
//!
//! ```text
//! checkpoints/step-00000100/
//!     config.json, generation_config.json, model.safetensors, tokenizer files    what transformers opens
//!     optimizer-00000-of-00001.bpk                                               the optimizer's state, one part a rank
//!     trainer.json                                                               step, tokens, position in the data
//! ```
//!
//! Each rank writes the part of the optimizer's state that it holds, `optimizer-00000-of-00004.bpk` and so on; a run resumes
//! from them with any number of ranks. Checkpoints of earlier versions have the whole state in one `optimizer.bpk`, if one
//! rank wrote them; a run resumes from these as well.
//!
//! The checkpoint of a run of adapters has `adapter_config.json` and `adapter_model.safetensors`, as peft lays them out, in
//! the place of the model's configuration and weights.
//!
//! A checkpoint is written under a hidden name, flushed, and renamed in one step, so that a folder with a step's name is
//! complete. One that was damaged later is noticed when it is opened, and the one before it is used.

use std::fs;
use std::path::{Path, PathBuf};

use moonlight_convert::adapter::write_adapter;
use moonlight_convert::{FileError, SaveOptions, replace_directory, write_into};
use moonlight_infer::tokenizer::Companion;
use moonlight_model::CausalLm;
use serde::{Deserialize, Serialize};

use crate::data::DataPosition;
use crate::error::TrainError;

const STATE: &str = "trainer.json";
/// The whole state of the optimizer, as earlier versions wrote it with one rank; only read.
const SINGLE_OPTIMIZER: &str = "optimizer.bpk";
/// The start of the name of a rank's part of it.
const OPTIMIZER_PART: &str = "optimizer-";
const PREFIX: &str = "step-";
/// Raised when an older program could not resume from what a newer one wrote.
const VERSION: u32 = 1;

/// The progress of a run: everything to resume from but its weights and its optimizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    version: u32,
    /// Steps taken.
    pub step: u64,
    /// Tokens read.
    pub tokens: u64,
    /// Position in the data.
    pub data: DataPosition,
    /// The lowest validation loss so far.
    pub best: Option<Best>,
}

/// The lowest validation loss so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step after which it was measured.
    pub step: u64,
    /// The loss, nats.
    pub loss: f64,
}

impl TrainerState {
    /// The state before the first step.
    pub fn new(data: DataPosition) -> Self {
        Self { version: VERSION, step: 0, tokens: 0, data, best: None }
    }
}

/// The checkpoints of one run.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
    keep_best: bool,
    companions: Vec<Companion>,
    companions_from: Option<PathBuf>,
    /// Whether the adapters alone are saved, without their base model.
    adapters: bool,
}

/// A checkpoint to resume from.
#[derive(Debug)]
pub struct Found {
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
        companions: Vec<Companion>,
        companions_from: Option<PathBuf>,
    ) -> Self {
        Self { dir, keep, keep_best, companions, companions_from, adapters: false }
    }

    /// Checkpoints of the adapters alone; their base model is in `companions_from`.
    pub fn of_adapters(self) -> Self {
        Self { adapters: true, ..self }
    }

    /// Writes the checkpoint of a step and removes those that are not to be kept.
    ///
    /// # Errors
    ///
    /// A file that cannot be written; the checkpoints of earlier steps stay complete.
    pub fn save(
        &self,
        model: &CausalLm,
        optimizer: &mut dyn StateWriter,
        state: &TrainerState,
    ) -> Result<PathBuf, TrainError> {
        fs::create_dir_all(&self.dir).map_err(TrainError::write(&self.dir))?;
        let path = self.path(state.step);
        let mut failure = None;
        let result = replace_directory(&path, |new| {
            let written = optimizer.begin(new);
            let written =
                written.and_then(|()| self.write_model(model, new)).and_then(|()| self.write_state(new, state));
            // `replace_directory` knows the converter's errors only; ours is kept beside them.
            failure = optimizer.end(new, written).err();
            match &failure {
                None => Ok(()),
                Some(error) => Err(FileError::write(new)(std::io::Error::other(error.to_string()))),
            }
        });
        if let Some(error) = failure {
            return Err(error);
        }
        result?;
        self.rotate(state)?;
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
        for Companion { name, contents } in &self.companions {
            let path = dir.join(name);
            fs::write(&path, contents).map_err(TrainError::write(&path))?;
        }
        let path = dir.join(STATE);
        let mut text = serde_json::to_string_pretty(state).expect("numbers are always JSON");
        text.push('\n');
        fs::write(&path, text).map_err(TrainError::write(&path))
    }

    /// The checkpoints with a readable state, newest first. Half-written ones, left by a run that was killed, are
    /// removed.
    ///
    /// # Errors
    ///
    /// A folder that cannot be read.
    pub fn found(&self) -> Result<Vec<Found>, TrainError> {
        if !self.dir.exists() {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(TrainError::read(&self.dir))? {
            let path = entry.map_err(TrainError::read(&self.dir))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(&format!(".{PREFIX}")) {
                fs::remove_dir_all(&path).map_err(TrainError::write(&path))?;
            } else if name.starts_with(PREFIX)
                && let Some(state) = read_state(&path)
            {
                found.push(Found { path, state });
            }
        }
        found.sort_by_key(|found| std::cmp::Reverse(found.state.step));
        Ok(found)
    }

    /// The newest checkpoint's folder.
    pub fn newest(&self) -> Option<PathBuf> {
        self.found().ok()?.into_iter().next().map(|found| found.path)
    }

    fn rotate(&self, state: &TrainerState) -> Result<(), TrainError> {
        if self.keep == 0 {
            return Ok(());
        }
        for found in self.found()?.into_iter().skip(self.keep) {
            let best = self.keep_best && state.best.is_some_and(|best| best.step == found.state.step);
            if !best {
                remove(&found.path)?;
            }
        }
        Ok(())
    }

    /// The file of a rank's part of the optimizer's state, in the folder of a checkpoint.
    pub fn part(dir: &Path, rank: usize, world_size: usize) -> PathBuf {
        dir.join(format!("{OPTIMIZER_PART}{rank:05}-of-{world_size:05}.bpk"))
    }

    /// The folder of a step's checkpoint.
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("{PREFIX}{step:08}"))
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

impl Found {
    /// The files of the optimizer's state: a part of each rank that wrote it, or the single file of earlier versions. A
    /// part that is missing is listed as well, so that opening it fails.
    pub fn optimizer(&self) -> Vec<PathBuf> {
        let single = self.path.join(SINGLE_OPTIMIZER);
        let names = fs::read_dir(&self.path).into_iter().flatten().flatten().map(|entry| entry.file_name());
        let world_size = names.into_iter().find_map(|name| {
            let name = name.to_string_lossy().into_owned();
            name.strip_prefix(OPTIMIZER_PART)?.strip_suffix(".bpk")?.split_once("-of-")?.1.parse::<usize>().ok()
        });
        match world_size {
            Some(world_size) if !single.exists() => {
                (0..world_size).map(|rank| Checkpoints::part(&self.path, rank, world_size)).collect()
            }
            _ => vec![single],
        }
    }
}

/// Removes a checkpoint. It is renamed first: one that is half removed must not look complete.
fn remove(path: &Path) -> Result<(), TrainError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let hidden = path.with_file_name(format!(".{name}.removed"));
    fs::rename(path, &hidden).map_err(TrainError::write(path))?;
    fs::remove_dir_all(&hidden).map_err(TrainError::write(&hidden))
}

fn read_state(dir: &Path) -> Option<TrainerState> {
    let text = fs::read_to_string(dir.join(STATE)).ok()?;
    serde_json::from_str::<TrainerState>(&text).ok().filter(|state| state.version == VERSION)
}

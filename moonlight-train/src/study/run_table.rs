//! The table of a study's runs: a line of JSON for each run that ended. It contains everything that the report needs, so a report
//! needs no folder of a run.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::points::Wanted;
use super::settings::BaseRecipe;
use super::study_file::Study;
use crate::error::TrainError;

/// One run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RunRow {
    /// The run's name, which is its folder's.
    pub run: String,
    /// What the run was, as one hash: see [`BaseRecipe::run`].
    pub key: String,
    /// A hash of the text that it was trained and validated on.
    pub text: String,
    /// The name of its value for each axis.
    pub point: BTreeMap<String, String>,
    /// The value of the tuned key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuned: Option<f64>,
    /// The seed.
    pub seed: u64,
    /// The day that it ended, `YYYY-MM-DD`, UTC.
    pub date: String,
    /// The version of this program, and the commit of the working directory if that is a git repository.
    pub version: String,
    /// The processor, and the vector instructions that the kernels used; or the device.
    pub machine: String,
    /// Threads of the run.
    pub threads: usize,
    /// Why the run has no final loss: it diverged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diverged: Option<String>,
    /// What was measured; absent for a run that diverged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
}

/// What a run measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Optimizer steps.
    pub steps: u64,
    /// Training tokens.
    pub tokens: u64,
    /// Parameters: all, and those of a token's path without embedding and head.
    pub parameters: u64,
    /// `N` of `C = 6 N D`.
    pub active_parameters: u64,
    /// Floating-point operations of forward and backward passes, `6 N D` with `D` tokens.
    pub six_n_d: f64,
    /// The same, counted from the shapes of all products, with head and attention.
    pub flops: f64,
    /// Floating-point operations of Newton-Schulz.
    pub newton_schulz_flops: f64,
    /// Seconds in training steps: their number times the median.
    pub seconds: f64,
    /// Mean training loss over the last tenth of the steps, nats per token.
    pub train_loss: f64,
    /// Validation loss at the end.
    pub valid_loss: f64,
    /// `(tokens, loss)` of training, each the mean over a fortieth of the run.
    pub train_curve: Vec<(u64, f64)>,
    /// `(tokens, loss)` of each validation.
    pub valid_curve: Vec<(u64, f64)>,
    /// The largest attention logit of the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_attention_logit: Option<f64>,
    /// Mean RMS of Muon's update.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_rms_muon: Option<f64>,
    /// Mean RMS of AdamW's update.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_rms_adamw: Option<f64>,
    /// The mean over the last tenth of the steps of the busiest expert's load over the mean load.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert_imbalance: Option<f64>,
    /// Metrics of the tasks after the run: `TASK.METRIC`, and before it `before.TASK.METRIC`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tasks: BTreeMap<String, f64>,
    /// The weights of each measured checkpoint.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<WeightStatistics>,
}

/// The weights of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WeightStatistics {
    /// The step of the checkpoint.
    pub step: u64,
    /// RMS of the query projections.
    pub query_rms: f64,
    /// RMS of all matrices of MLPs and experts.
    pub mlp_rms: f64,
    /// By the name of a group of matrices (figure 4 of the report).
    pub groups: BTreeMap<String, GroupStatistics>,
}

/// The singular values of a group of matrices: means over layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupStatistics {
    /// SVD entropy.
    pub entropy: f64,
    /// Stable rank.
    pub stable_rank: f64,
    /// Effective rank.
    pub effective_rank: f64,
    /// Singular values over the largest, at equally spaced ranks.
    pub quantiles: Vec<f64>,
}

impl RunRow {
    /// The final validation loss; infinity for a run that diverged.
    pub fn final_loss(&self) -> f64 {
        self.measured.as_ref().map_or(f64::INFINITY, |measured| measured.valid_loss)
    }
}

/// The rows of a study's table that belong to it as it is now.
#[derive(Debug)]
pub struct RunTable {
    path: PathBuf,
    rows: HashMap<String, RunRow>,
    base: BaseRecipe,
    /// Rows of other text, and rows of settings that the study no longer has.
    pub other_text: usize,
    /// Held by the process that adds rows.
    file: Option<File>,
}

impl RunTable {
    /// Reads the rows with the hash `text`, or with the hash of the newest row.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, and a line that is not a row.
    pub fn read(study: &Study, text: Option<&str>) -> Result<Self, TrainError> {
        let path = study.table_path();
        let contents = match fs::read_to_string(&path) {
            Ok(contents) => contents,
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            Err(error) => return Err(TrainError::read(path)(error)),
        };
        let mut all: Vec<RunRow> = Vec::new();
        for (index, line) in contents.lines().enumerate().filter(|(_, line)| !line.is_empty()) {
            match serde_json::from_str(line) {
                Ok(row) => all.push(row),
                // A sweep that was killed while it wrote leaves such a line; its run is done again.
                Err(_) if index + 1 == contents.lines().count() && !contents.ends_with('\n') => {}
                Err(error) => {
                    let problem = format!("line {}: {error}", index + 1);
                    return Err(TrainError::Study { path, problem });
                }
            }
        }
        let newest = all.last().map(|row| row.text.clone());
        let text = text.map(str::to_owned).or(newest).unwrap_or_default();
        let count = all.len();
        let rows: HashMap<_, _> =
            all.into_iter().filter(|row| row.text == text).map(|row| (row.key.clone(), row)).collect();
        let other_text = count - rows.len();
        Ok(Self { path, rows, base: BaseRecipe::read(study)?, other_text, file: None })
    }

    /// Locks the file, so that one sweep at a time adds rows.
    ///
    /// # Errors
    ///
    /// A file that cannot be created, and one that another sweep has locked.
    pub fn lock(&mut self) -> Result<(), TrainError> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(TrainError::write(folder))?;
        let file =
            OpenOptions::new().create(true).append(true).open(&self.path).map_err(TrainError::write(&self.path))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(TrainError::Request {
                problem: format!("another sweep adds to `{}`", self.path.display()),
                hint: Some("wait for it, or stop it".into()),
            });
        }
        // A line without an end was cut short.
        let bytes = fs::read(&self.path).map_err(TrainError::read(&self.path))?;
        let complete = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        if complete < bytes.len() {
            file.set_len(complete as u64).map_err(TrainError::write(&self.path))?;
        }
        self.file = Some(file);
        Ok(())
    }

    /// Adds a row to the file.
    ///
    /// # Errors
    ///
    /// A file that cannot be written.
    pub fn append(&mut self, row: RunRow) -> Result<(), TrainError> {
        let line = serde_json::to_string(&row).map_err(|error| TrainError::Internal(error.to_string()))? + "\n";
        if let Some(file) = &mut self.file {
            file.write_all(line.as_bytes()).and_then(|()| file.sync_data()).map_err(TrainError::write(&self.path))?;
        }
        self.rows.insert(row.key.clone(), row);
        Ok(())
    }

    /// What all runs share.
    pub fn base(&self) -> &BaseRecipe {
        &self.base
    }

    /// The row of a run, if it is done.
    pub fn find(&self, study: &Study, wanted: &Wanted) -> Option<&RunRow> {
        self.rows.get(&self.base.run(study, wanted).key)
    }
}

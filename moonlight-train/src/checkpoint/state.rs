//! `trainer.json`: the progress of a run.

use std::path::Path;

use moonlight_convert::storage;
use moonlight_infer::run_dir::{NEWEST_VERSION, TRAINER_STATE};
use serde::{Deserialize, Deserializer, Serialize};

use super::identity::RunIdentity;
use crate::data::DataPosition;
use crate::error::TrainError;

/// The progress of a run: everything to resume from except the weights and the optimizer's state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    version: u64,
    /// Steps taken so far.
    pub step: u64,
    /// Training tokens read so far over all ranks, without padding.
    pub tokens: u64,
    /// Where the next batch starts in the training data.
    pub data: DataPosition,
    /// The lowest validation loss so far; `None` before the first validation.
    #[serde(default, deserialize_with = "finite_best")]
    pub best: Option<Best>,
    /// What the run consists of; `None` in checkpoints of format version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<RunIdentity>,
}

/// The lowest validation loss so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step after which it was measured.
    pub step: u64,
    /// In nats per token; finite.
    pub loss: f64,
}

impl TrainerState {
    /// The state before the first step.
    pub fn new(data: DataPosition) -> Self {
        Self { version: NEWEST_VERSION, step: 0, tokens: 0, data, best: None, identity: None }
    }

    /// Updates [`best`](Self::best) with a validation loss. A non-finite loss is never the best.
    pub fn update_best(&mut self, loss: f64) {
        if loss.is_finite() && self.best.is_none_or(|best| loss < best.loss) {
            self.best = Some(Best { step: self.step, loss });
        }
    }

    /// Reads the state of a checkpoint. The inner error says why the file is damaged.
    ///
    /// # Errors
    ///
    /// [`TrainError`] for a file that cannot be read.
    pub(super) fn read(dir: &Path) -> Result<Result<Self, String>, TrainError> {
        let path = dir.join(TRAINER_STATE);
        let text = storage::read(&path).map_err(TrainError::read(&path))?;
        Ok(serde_json::from_slice(&text).map_err(|error| format!("`{TRAINER_STATE}` cannot be parsed: {error}")))
    }

    /// Writes the state into a checkpoint.
    pub(super) fn write(&self, dir: &Path) -> Result<(), TrainError> {
        let path = dir.join(TRAINER_STATE);
        // A run that resumed from a checkpoint of an earlier version still has that version.
        let state = Self { version: NEWEST_VERSION, ..self.clone() };
        let mut text = serde_json::to_string_pretty(&state).expect("JSON holds finite numbers and texts");
        text.push('\n');
        storage::write(&path, text.as_bytes()).map_err(TrainError::write(&path))
    }
}

/// Earlier versions wrote a non-finite loss as `null`; there is no best loss then.
fn finite_best<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Best>, D::Error> {
    #[derive(Deserialize)]
    struct Stored {
        step: u64,
        loss: Option<f64>,
    }
    let stored = Option::<Stored>::deserialize(deserializer)?;
    Ok(stored.and_then(|Stored { step, loss }| loss.map(|loss| Best { step, loss })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> TrainerState {
        let mut state = TrainerState::new(DataPosition { epoch: 0, sequence: 0, data: 7 });
        state.step = 3;
        state
    }

    #[test]
    fn a_non_finite_loss_is_never_the_best() {
        let mut state = state();
        for loss in [f64::NAN, f64::INFINITY] {
            state.update_best(loss);
            assert_eq!(state.best, None);
        }
        state.update_best(2.0);
        state.step = 4;
        state.update_best(f64::NAN);
        state.update_best(2.5);
        assert_eq!(state.best, Some(Best { step: 3, loss: 2.0 }));
    }

    #[test]
    fn a_state_reads_back_and_so_does_the_null_of_earlier_versions() {
        let home = tempfile::tempdir().unwrap();
        let mut state = state();
        state.update_best(1.25);
        state.write(home.path()).unwrap();
        assert_eq!(TrainerState::read(home.path()).unwrap().unwrap(), state);
        let text = r#"{"version": 1, "step": 1, "tokens": 2, "data": {"epoch": 0, "sequence": 1, "data": 5}, "best": {"step": 1, "loss": null}}"#;
        std::fs::write(home.path().join(TRAINER_STATE), text).unwrap();
        assert_eq!(TrainerState::read(home.path()).unwrap().unwrap().best, None);
        std::fs::write(home.path().join(TRAINER_STATE), "{").unwrap();
        assert!(TrainerState::read(home.path()).unwrap().is_err());
    }
}

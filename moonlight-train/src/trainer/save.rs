//! Saving a checkpoint with all ranks: rank 0 writes the weights, and each rank its part of the optimizer's state at the
//! same time. The checkpoint is renamed when all of it is there.

use std::path::{Path, PathBuf};

use moonlight_convert::storage::{self, Call};
use moonlight_model::CausalLm;
use moonlight_optim::{MuonAdamW, StateError};

use super::exchange::{agree, broadcast_text};
use crate::checkpoint::{Checkpoints, StateWriter, TrainerState};
use crate::error::TrainError;

/// Writes the checkpoint of a step; its folder.
pub(super) fn save(
    checkpoints: &Checkpoints,
    model: &CausalLm,
    optimizer: &MuonAdamW,
    state: &TrainerState,
) -> Result<PathBuf, TrainError> {
    let worker = optimizer.communicator();
    if worker.rank() > 0 {
        let Some(dir) = broadcast_text(worker, None)? else { return Err(TrainError::RemoteFailure) };
        let written = {
            let _busy = worker.busy();
            write_part(Path::new(&dir), optimizer)
        };
        agree(worker, written)?;
        agree(worker, Ok(()))?;
        return Ok(checkpoints.path(state.step));
    }
    let mut writer = RankZeroWriter { optimizer, announced: false, disagreed: false };
    let saved = {
        let _busy = worker.busy();
        checkpoints.save(model, &mut writer, state)
    };
    if !writer.announced {
        // The others wait for a folder.
        broadcast_text(worker, None)?;
        return saved;
    }
    if writer.disagreed { saved } else { agree(worker, saved) }
}

/// Rank 0's side: tells the others the new folder, and waits for their parts.
struct RankZeroWriter<'a> {
    optimizer: &'a MuonAdamW,
    /// Whether the others know the folder.
    announced: bool,
    /// Whether a rank failed, which all know then.
    disagreed: bool,
}

impl StateWriter for RankZeroWriter<'_> {
    fn begin(&mut self, dir: &Path) -> Result<(), TrainError> {
        self.announced = true;
        // Other ranks may have other working directories.
        let dir = std::path::absolute(dir).map_err(TrainError::read(dir))?;
        broadcast_text(self.optimizer.communicator(), Some(&dir.to_string_lossy()))?;
        Ok(())
    }

    fn end(&mut self, dir: &Path, written: Result<(), TrainError>) -> Result<(), TrainError> {
        let written = written.and_then(|()| write_part(dir, self.optimizer));
        let agreed = agree(self.optimizer.communicator(), written);
        self.disagreed = agreed.is_err();
        agreed
    }
}

fn write_part(dir: &Path, optimizer: &MuonAdamW) -> Result<(), TrainError> {
    let worker = optimizer.communicator();
    let path = Checkpoints::part(dir, worker.rank(), worker.size());
    if !dir.exists() {
        return Err(TrainError::Request {
            problem: format!("worker {} does not see the folder `{}` that worker 0 made", worker.rank(), dir.display()),
            hint: Some("runs on several machines need a `run.dir` that all of them share".into()),
        });
    }
    storage::announce(Call::Write(&path)).map_err(TrainError::write(&path))?;
    optimizer.save(&path).map_err(|source| match source {
        // Its sentence is of a file that cannot be read.
        StateError::Unreadable(problem) => TrainError::write(&path)(std::io::Error::other(problem)),
        source => TrainError::OptimizerState { path: path.clone(), source },
    })?;
    // Rank 0 flushes the files that it sees before it renames the folder; on a shared file system those of other ranks need
    // not be among them.
    storage::sync_file(&path).map_err(TrainError::write(&path))
}

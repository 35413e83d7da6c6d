//! Saving a checkpoint with all ranks. Rank 0 writes the weights while each rank writes its part of the optimizer's state.
//! The folder is renamed to the checkpoint's name after every file is written.

use std::path::{Path, PathBuf};

use moonlight_convert::storage::{self, Call};
use moonlight_model::CausalLm;
use moonlight_optim::{MuonAdamW, StateError};

use super::exchange::{agree, broadcast_text};
use crate::checkpoint::{Checkpoints, StateWriter, TrainerState};
use crate::error::TrainError;

/// Writes the checkpoint of a step and returns its folder. All ranks make the same sequence of collectives, whichever of
/// them fails: a broadcast of the folder, an `agree` on the parts, and if these are written an `agree` on the whole.
pub(super) fn save(
    checkpoints: &Checkpoints,
    model: &CausalLm,
    optimizer: &MuonAdamW,
    state: &TrainerState,
) -> Result<PathBuf, TrainError> {
    let comm = optimizer.communicator();
    if comm.rank() > 0 {
        let Some(dir) = broadcast_text(comm, None)? else { return Err(TrainError::RemoteFailure) };
        let written = {
            let _busy = comm.busy();
            write_part(Path::new(&dir), optimizer)
        };
        agree(comm, written)?;
        agree(comm, Ok(()))?;
        return Ok(checkpoints.path(state.step));
    }
    let mut writer = RankZeroWriter { optimizer, announced: false, disagreed: false };
    let saved = {
        let _busy = comm.busy();
        checkpoints.save(model, &mut writer, state)
    };
    if !writer.announced {
        // The save failed before it had a folder, and the other ranks wait for its name.
        broadcast_text(comm, None)?;
        return saved;
    }
    if writer.disagreed { saved } else { agree(comm, saved) }
}

/// Rank 0's side: announces the new folder to the other ranks, and waits for their parts.
struct RankZeroWriter<'a> {
    optimizer: &'a MuonAdamW,
    /// Whether the folder was sent to the other ranks.
    announced: bool,
    /// Whether a rank failed to write its part. All ranks know this from the first `agree`, and skip the second.
    disagreed: bool,
}

impl StateWriter for RankZeroWriter<'_> {
    fn begin(&mut self, dir: &Path) -> Result<(), TrainError> {
        // Other ranks may have other working directories.
        let dir = std::path::absolute(dir).map_err(TrainError::read(dir))?;
        // From here on the other ranks have the folder's name, or a failed broadcast that ends them.
        self.announced = true;
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
    let comm = optimizer.communicator();
    let path = Checkpoints::part(dir, comm.rank(), comm.size());
    if !dir.exists() {
        return Err(TrainError::Request {
            problem: format!("rank {} cannot see the folder `{}` that rank 0 created", comm.rank(), dir.display()),
            hint: Some("use a `run.dir` that all machines share".into()),
        });
    }
    storage::announce(Call::Write(&path)).map_err(TrainError::write(&path))?;
    optimizer.save(&path).map_err(|source| match source {
        // The message of `Unreadable` is about reading.
        StateError::Unreadable(problem) => TrainError::write(&path)(std::io::Error::other(problem)),
        source => TrainError::OptimizerState { path: path.clone(), source },
    })?;
    // Each rank flushes its own file: rank 0 flushes those it sees before it renames the folder, and on a shared file system
    // it may not see another rank's file yet.
    storage::sync_file(&path).map_err(TrainError::write(&path))
}

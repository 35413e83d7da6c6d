//! The weights of a plan, read from the files in order and ahead of those who wait for them.
//!
//! Bytes are read into buffers that a core's cache holds, not looked at through a map: each page of a map has to be faulted
//! in, and costs more than it takes to copy it.

use std::fs::File;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};

use crate::check::Plan;
use crate::checkpoint::Checkpoint;
use crate::decode::{Part, Piece};
use crate::error::CheckpointError;

/// How far the system is asked to read ahead: enough for a disk to have work at any moment.
const AHEAD: u64 = 128 << 20;
/// How much it is asked for at a time.
const STEP: usize = 4 << 20;

/// The files of a checkpoint while they are read.
pub(crate) struct Stream<'a> {
    checkpoint: &'a Checkpoint,
    /// One for each shard, opened when it is first read; `None` where only its map can be had.
    files: Vec<OnceLock<Option<File>>>,
    position: Mutex<Position>,
    moved: Condvar,
}

/// Counted over all parts of the plan, in order.
#[derive(Default)]
struct Position {
    /// Bytes that have been read.
    read: u64,
    /// Nothing more will be.
    ended: bool,
}

impl<'a> Stream<'a> {
    /// Runs `work`, and meanwhile has the system read what `plan` asks for, in order, some way ahead of it.
    pub(crate) fn open<R>(checkpoint: &'a Checkpoint, plan: &Plan, work: impl FnOnce(&Self) -> R) -> R {
        let stream = Self {
            checkpoint,
            files: checkpoint.files().iter().map(|_| OnceLock::new()).collect(),
            position: Mutex::default(),
            moved: Condvar::new(),
        };
        /// Ends the thread also when `work` panics.
        struct End<'a, 'b>(&'a Stream<'b>);
        impl Drop for End<'_, '_> {
            fn drop(&mut self) {
                self.0.advance(|position| position.ended = true);
            }
        }
        std::thread::scope(|scope| {
            let pieces = plan.parameters.iter().flat_map(|planned| &planned.pieces);
            scope.spawn(|| stream.ask_for(pieces));
            let _end = End(&stream);
            work(&stream)
        })
    }

    /// Reads a part of a file.
    pub(crate) fn read(&self, part: &Part, target: &mut [u8]) -> Result<(), CheckpointError> {
        let shard = self.checkpoint.shard(part.shard);
        match self.files[part.shard].get_or_init(|| shard.reopen()) {
            #[cfg(unix)]
            Some(file) => {
                use std::os::unix::fs::FileExt;
                let read = file.read_exact_at(target, shard.position(part.range.start));
                read.map_err(|error| CheckpointError::read(shard.path())(error))?;
            }
            _ => {
                target.copy_from_slice(self.checkpoint.part(part));
                self.checkpoint.release(part);
            }
        }
        self.advance(|position| position.read += part.range.len() as u64);
        Ok(())
    }

    fn advance(&self, change: impl FnOnce(&mut Position)) {
        change(&mut self.position.lock().unwrap_or_else(PoisonError::into_inner));
        self.moved.notify_one();
    }

    fn ask_for<'p>(&self, pieces: impl Iterator<Item = &'p Piece>) {
        let mut asked = 0;
        for piece in pieces {
            let Part { shard, range } = &piece.part;
            // Scales are small, and looked at through the map.
            piece.parts().skip(1).for_each(|scale| self.checkpoint.prefetch(scale));
            for start in range.clone().step_by(STEP) {
                let position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
                let far = |position: &mut Position| !position.ended && asked > position.read + AHEAD;
                let position = self.moved.wait_while(position, far).unwrap_or_else(PoisonError::into_inner);
                if position.ended {
                    return;
                }
                let late = position.read > asked;
                drop(position);
                let end = range.end.min(start + STEP);
                if !late {
                    self.checkpoint.prefetch(&Part { shard: *shard, range: start..end });
                }
                asked += (end - start) as u64;
            }
        }
    }
}

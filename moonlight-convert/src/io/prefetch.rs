//! The weights of a plan, read from the files in order and ahead of those who wait for them.
//!
//! Bytes are read into buffers that a core's cache holds, not looked at through a map: each page of a map has to be faulted
//! in, and costs more than it takes to copy it.

use std::fs::File;
use std::sync::{Condvar, Mutex, PoisonError};

use crate::checkpoint::Checkpoint;
use crate::dtype::dequantize::SourceTensor;
use crate::error::CheckpointError;
use crate::format::shard::{FileRange, Shard};
use crate::mapping::load_plan::LoadPlan;

/// How far the system is asked to read ahead. It reads past the end of a source, into those of other parameters; when
/// their turn comes, the disk must have other work for as long as it takes to go through them.
const AHEAD: u64 = 512 << 20;
/// How much it is asked for at a time.
const STEP: usize = 4 << 20;

/// The files of a checkpoint while they are read.
pub(crate) struct PrefetchReader<'a> {
    checkpoint: &'a Checkpoint,
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

impl<'a> PrefetchReader<'a> {
    /// Runs `work`, and meanwhile has the system read what `plan` asks for, in order, some way ahead of it.
    pub(crate) fn open<R>(checkpoint: &'a Checkpoint, plan: &LoadPlan, work: impl FnOnce(&Self) -> R) -> R {
        let stream = Self { checkpoint, position: Mutex::default(), moved: Condvar::new() };
        /// Ends the thread also when `work` panics.
        struct End<'a, 'b>(&'a PrefetchReader<'b>);
        impl Drop for End<'_, '_> {
            fn drop(&mut self) {
                self.0.advance(|position| position.ended = true);
            }
        }
        std::thread::scope(|scope| {
            let sources = plan.parameters.iter().flat_map(|planned| &planned.sources);
            scope.spawn(|| stream.go_ahead(sources));
            let _end = End(&stream);
            work(&stream)
        })
    }

    /// Reads a part of a file.
    pub(crate) fn read(&self, part: &FileRange, target: &mut [u8]) -> Result<(), CheckpointError> {
        self.checkpoint.read_part(part, target)?;
        self.advance(|position| position.read += part.range.len() as u64);
        Ok(())
    }

    fn advance(&self, change: impl FnOnce(&mut Position)) {
        change(&mut self.position.lock().unwrap_or_else(PoisonError::into_inner));
        self.moved.notify_one();
    }

    /// Goes through the sources ahead of those who read them.
    fn go_ahead<'p>(&self, sources: impl Iterator<Item = &'p SourceTensor>) {
        let mut pull = SequentialReader { checkpoint: self.checkpoint, file: None };
        let mut asked = 0;
        for source in sources {
            let FileRange { shard, range } = &source.part;
            // Scales are small: advice is enough.
            source.parts().skip(1).for_each(|scale| self.checkpoint.prefetch(scale));
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
                    pull.part(&FileRange { shard: *shard, range: start..end });
                }
                asked += (end - start) as u64;
            }
        }
    }
}

/// Has the system read parts of files, without copying them.
struct SequentialReader<'a> {
    checkpoint: &'a Checkpoint,
    /// The file that was pulled from last, and where it is pulled to; `None` where that cannot be.
    file: Option<(usize, Option<(File, File)>)>,
}

impl SequentialReader<'_> {
    fn part(&mut self, part: &FileRange) {
        let shard = self.checkpoint.shard(part.shard);
        if self.file.as_ref().is_none_or(|(number, _)| *number != part.shard) {
            self.file = Some((part.shard, sequential(shard)));
        }
        if let Some((_, Some((file, nowhere)))) = &self.file
            && pull(file, nowhere, shard.position(part.range.start), part.range.len())
        {
            return;
        }
        self.checkpoint.prefetch(part);
    }
}

/// The file with a place of its own that the system reads on from, and where what was read goes.
#[cfg(target_os = "linux")]
fn sequential(shard: &Shard) -> Option<(File, File)> {
    let file = shard.reopen().ok()?;
    // The system then reads twice as far ahead. That it is refused costs only speed.
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential);
    Some((file, File::options().write(true).open("/dev/null").ok()?))
}

/// Sends a part of a file nowhere; whether that could be done. Unlike advice, this makes the system read as it does for a
/// program that reads on and on: in large sources into large pages, which takes half of the time.
#[cfg(target_os = "linux")]
fn pull(file: &File, nowhere: &File, start: u64, length: usize) -> bool {
    let (mut at, end) = (start, start + length as u64);
    while at < end {
        let left = (end - at) as usize;
        if !rustix::fs::sendfile(nowhere, file, Some(&mut at), left).is_ok_and(|sent| sent > 0) {
            return false;
        }
    }
    true
}

#[cfg(not(target_os = "linux"))]
fn sequential(_: &Shard) -> Option<(File, File)> {
    None
}

#[cfg(not(target_os = "linux"))]
fn pull(_: &File, _: &File, _: u64, _: usize) -> bool {
    false
}

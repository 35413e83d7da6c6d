//! Prefetching the weights of a plan, in the order of the files.
//!
//! Files are not memory-mapped but read into buffers that fit into a core's cache: faulting in the pages of a map takes
//! longer than copying them.

use std::fs::File;
use std::sync::{Condvar, Mutex, PoisonError};

use crate::checkpoint::Checkpoint;
use crate::dtype::dequantize::SourceTensor;
use crate::error::CheckpointError;
use crate::format::shard::{FileRange, Shard};
use crate::mapping::load_plan::LoadPlan;

/// How far ahead of the reads to prefetch, in bytes. The distance reaches past the end of one parameter into those that
/// follow, so that the disk keeps working while one is decoded.
const DISTANCE: u64 = 512 << 20;
/// Bytes prefetched per request.
const STEP: usize = 4 << 20;

/// Reads the parts of a plan, while another thread prefetches those that follow.
pub(crate) struct PrefetchReader<'a> {
    checkpoint: &'a Checkpoint,
    position: Mutex<Position>,
    progressed: Condvar,
}

/// Progress through all parts of the plan, in order.
#[derive(Default)]
struct Position {
    /// Bytes read so far.
    read: u64,
    /// Whether reading has ended.
    ended: bool,
}

impl<'a> PrefetchReader<'a> {
    /// Runs `work` while another thread prefetches the parts of `plan` in order.
    pub(crate) fn open<R>(checkpoint: &'a Checkpoint, plan: &LoadPlan, work: impl FnOnce(&Self) -> R) -> R {
        let reader = Self { checkpoint, position: Mutex::default(), progressed: Condvar::new() };
        /// Ends the thread even if `work` panics.
        struct End<'a, 'b>(&'a PrefetchReader<'b>);
        impl Drop for End<'_, '_> {
            fn drop(&mut self) {
                self.0.advance(|position| position.ended = true);
            }
        }
        std::thread::scope(|scope| {
            let sources = plan.parameters.iter().flat_map(|planned| &planned.sources);
            scope.spawn(|| reader.prefetch_parts(sources));
            let _end = End(&reader);
            work(&reader)
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
        self.progressed.notify_one();
    }

    /// Prefetches the sources in order, at most [`DISTANCE`] ahead of the reads.
    fn prefetch_parts<'p>(&self, sources: impl Iterator<Item = &'p SourceTensor>) {
        let mut prefetcher = SequentialPrefetcher { checkpoint: self.checkpoint, file: None };
        let mut requested = 0;
        for source in sources {
            let FileRange { shard, range } = &source.part;
            // Scales are small, so that advice suffices.
            source.parts().skip(1).for_each(|scale| self.checkpoint.prefetch(scale));
            for start in range.clone().step_by(STEP) {
                let position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
                let too_far = |position: &mut Position| !position.ended && requested > position.read + DISTANCE;
                let position = self.progressed.wait_while(position, too_far).unwrap_or_else(PoisonError::into_inner);
                if position.ended {
                    return;
                }
                // The reads are past this part: prefetching it now would only delay them.
                let overtaken = position.read > requested;
                drop(position);
                let end = range.end.min(start + STEP);
                if !overtaken {
                    prefetcher.prefetch(&FileRange { shard: *shard, range: start..end });
                }
                requested += (end - start) as u64;
            }
        }
    }
}

/// Makes the system read parts of files into its cache, without copying them.
struct SequentialPrefetcher<'a> {
    checkpoint: &'a Checkpoint,
    /// The current file and `/dev/null`; `None` if they cannot be opened.
    file: Option<(usize, Option<(File, File)>)>,
}

impl SequentialPrefetcher<'_> {
    fn prefetch(&mut self, part: &FileRange) {
        let shard = self.checkpoint.shard(part.shard);
        if self.file.as_ref().is_none_or(|(number, _)| *number != part.shard) {
            self.file = Some((part.shard, open_sequential(shard)));
        }
        if let Some((_, Some((file, dev_null)))) = &self.file
            && send_to_null(file, dev_null, shard.position(part.range.start), part.range.len())
        {
            return;
        }
        self.checkpoint.prefetch(part);
    }
}

/// The file and `/dev/null`. The file is opened again, because the readahead window belongs to the open file.
#[cfg(target_os = "linux")]
fn open_sequential(shard: &Shard) -> Option<(File, File)> {
    let file = shard.reopen().ok()?;
    // Doubles the readahead window. If it is refused, only speed is lost.
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential);
    Some((file, File::options().write(true).open("/dev/null").ok()?))
}

/// Sends a part of a file to `/dev/null`; returns whether that succeeded. Unlike `fadvise(WILLNEED)`, this triggers the
/// readahead of sequential reads, which uses large pages and takes half the time for large tensors.
#[cfg(target_os = "linux")]
fn send_to_null(file: &File, dev_null: &File, start: u64, length: usize) -> bool {
    let (mut at, end) = (start, start + length as u64);
    while at < end {
        let left = (end - at) as usize;
        if !rustix::fs::sendfile(dev_null, file, Some(&mut at), left).is_ok_and(|sent| sent > 0) {
            return false;
        }
    }
    true
}

#[cfg(not(target_os = "linux"))]
fn open_sequential(_: &Shard) -> Option<(File, File)> {
    None
}

#[cfg(not(target_os = "linux"))]
fn send_to_null(_: &File, _: &File, _: u64, _: usize) -> bool {
    false
}

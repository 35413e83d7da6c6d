//! Values from the files of one checkpoint to those of another, by all threads, in bounded memory.
//!
//! Each thread takes the next chunk of rows, decodes it and writes it, and gives the memory of what it read back. The
//! chunks are taken in order, so that no more than a few tensors are in memory at a time, whatever the checkpoint's size.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::checkpoint::Checkpoint;
use crate::dtype::conversion::{Outcome, WeightDtype, all_finite, with_weight};
use crate::dtype::dequantize::{Layout, SourceTensor};
use crate::dtype::transpose::WIDTH;
use crate::error::CheckpointError;
use crate::format::shard::FileRange;
use crate::io::writer::Output;
use crate::progress::Progress;

/// Bytes of all threads' chunks together.
const ALL_CHUNKS: usize = 96 << 20;
/// A chunk is no larger, where there are few threads.
const LARGEST_CHUNK: usize = 16 << 20;
/// A chunk is about so large: it is written while a core's cache still holds it.
const USUAL_CHUNK: usize = 1 << 20;
/// How many chunks ahead the system is asked to read.
const AHEAD: usize = 16;

/// A tensor, and where it goes.
pub(crate) struct CopyTask<'a> {
    pub(crate) source: &'a SourceTensor,
    /// Which tensor of the output.
    pub(crate) tensor: usize,
    /// Where in it, in bytes.
    pub(crate) at: u64,
    pub(crate) layout: Layout,
    pub(crate) dtype: WeightDtype,
}

/// Rows of a source.
pub(crate) struct RowChunk {
    /// Which of the sources.
    pub(crate) source: usize,
    pub(crate) rows: Range<usize>,
}

/// Divides sources, `(rows, bytes of a row)`, into chunks.
pub(crate) fn row_chunks(sources: impl Iterator<Item = (usize, usize)>) -> Vec<RowChunk> {
    let most = (ALL_CHUNKS / threads()).min(LARGEST_CHUNK);
    let mut chunks = Vec::new();
    for (source, (rows, row)) in sources.enumerate() {
        // A chunk's rows are columns of what is transposed: a multiple of a tile's, and no fewer where rows are long.
        let height = (USUAL_CHUNK.min(most) / row.max(1)).max(WIDTH.min(most / row.max(1))).max(1);
        let height = if height > WIDTH { height / WIDTH * WIDTH } else { height };
        chunks
            .extend((0..rows).step_by(height).map(|first| RowChunk { source, rows: first..rows.min(first + height) }));
    }
    chunks
}

pub(crate) fn threads() -> usize {
    rayon::current_num_threads()
}

/// Has all threads take chunks in order until there are none or one fails; the first failure is the result.
pub(crate) fn in_order(
    chunks: &[RowChunk],
    work: impl Fn(usize, &RowChunk, &mut Vec<u64>) -> Result<(), CheckpointError> + Sync,
) -> Result<(), CheckpointError> {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let failure = Mutex::new(None);
    let run = || {
        let mut buffer = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(chunk) = chunks.get(at) else { return };
            if let Err(error) = work(at, chunk, &mut buffer) {
                stop.store(true, Ordering::Relaxed);
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads().min(chunks.len()) {
            scope.spawn(run);
        }
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// A part of a buffer as values; the buffer grows to the largest that was asked for.
pub(crate) fn values<T: bytemuck::Pod>(buffer: &mut Vec<u64>, count: usize) -> &mut [T] {
    let words = (count * size_of::<T>()).div_ceil(size_of::<u64>());
    if buffer.len() < words {
        buffer.resize(words, 0);
    }
    &mut bytemuck::cast_slice_mut(&mut buffer[..words])[..count]
}

/// Gives memory back when the last chunk of a source is done, and asks for what comes next.
pub(crate) struct Prefetcher<'a> {
    checkpoint: &'a Checkpoint,
    sources: Vec<&'a SourceTensor>,
    remaining: Vec<AtomicUsize>,
}

impl<'a> Prefetcher<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, sources: Vec<&'a SourceTensor>, chunks: &[RowChunk]) -> Self {
        let remaining: Vec<AtomicUsize> = sources.iter().map(|_| AtomicUsize::new(0)).collect();
        for chunk in chunks {
            remaining[chunk.source].fetch_add(1, Ordering::Relaxed);
        }
        Self { checkpoint, sources, remaining }
    }

    pub(crate) fn begin(&self, chunks: &[RowChunk], at: usize) {
        let ahead = at + AHEAD * threads();
        let first = if at == 0 { 0 } else { ahead };
        for chunk in chunks.iter().take(ahead + 1).skip(first).filter(|chunk| chunk.rows.start == 0) {
            self.sources[chunk.source].parts().for_each(|part| self.checkpoint.prefetch(part));
        }
    }

    /// `verbatim` is the part that only this chunk reads, where there is one.
    pub(crate) fn end(&self, chunk: &RowChunk, verbatim: Option<&FileRange>) {
        let last = self.remaining[chunk.source].fetch_sub(1, Ordering::AcqRel) == 1;
        match verbatim {
            Some(part) => self.checkpoint.release(part),
            None if last => self.sources[chunk.source].parts().for_each(|part| self.checkpoint.release(part)),
            None => {}
        }
    }
}

/// Writes every task's values. `progress` counts the bytes of the target.
pub(crate) fn transfer(
    checkpoint: &Checkpoint,
    tasks: &[CopyTask<'_>],
    output: &Output,
    progress: &dyn Progress,
) -> Result<(), CheckpointError> {
    progress.begin(output.total());
    let chunks = row_chunks(tasks.iter().map(|task| {
        let (rows, columns) = task.source.dims(task.layout);
        (rows, columns * task.dtype.size())
    }));
    let reading = Prefetcher::new(checkpoint, tasks.iter().map(|task| task.source).collect(), &chunks);
    in_order(&chunks, |at, chunk, buffer| {
        reading.begin(&chunks, at);
        let CopyTask { source, tensor, at, layout, dtype } = &tasks[chunk.source];
        let columns = source.dims(*layout).1;
        let at = at + (chunk.rows.start * columns * dtype.size()) as u64;
        let verbatim = source.verbatim(*layout, *dtype, &chunk.rows);
        let count = chunk.rows.len() * columns;
        let outcome = with_weight!(*dtype, T => {
            let (bytes, outcome) = match &verbatim {
                Some(part) => {
                    let bytes = checkpoint.part(part);
                    (bytes, all_finite::<T>(bytes))
                }
                None => {
                    let target = values::<T>(buffer, count);
                    let outcome = checkpoint.decode(source, *layout, chunk.rows.start, target);
                    (bytemuck::cast_slice(target), outcome)
                }
            };
            if outcome == Outcome::Finite {
                output.write(*tensor, at, bytes)?;
            }
            outcome
        });
        reading.end(chunk, verbatim.as_ref());
        if outcome == Outcome::NotFinite {
            return Err(checkpoint.blame(source, *dtype));
        }
        match progress.advance((count * dtype.size()) as u64) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(CheckpointError::Interrupted),
        }
    })
}

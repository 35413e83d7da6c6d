//! Copying values from the files of one checkpoint to those of another, on all threads and in bounded memory.
//!
//! Each thread takes the next chunk of rows, reads it, decodes it and writes it. A chunk of a tensor that has to be
//! transposed needs all rows of the file. Such a tensor is read into memory once, by all threads that need it, and
//! freed after its last chunk. Chunks are taken in order, so that only a few tensors are in memory at a time, whatever
//! the size of the checkpoint.

use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::checkpoint::Checkpoint;
use crate::dtype::conversion::{Outcome, Weight, WeightDtype, all_finite, with_weight};
use crate::dtype::dequantize::{Layout, SourceTensor};
use crate::dtype::quant::Scales;
use crate::dtype::transpose::WIDTH;
use crate::error::CheckpointError;
use crate::io::file_error::FileError;
use crate::io::writer::Output;
use crate::progress::Progress;

/// The most bytes in the chunks of all threads together.
const ALL_CHUNKS: usize = 96 << 20;
/// The largest chunk in bytes, for machines with few threads.
const LARGEST_CHUNK: usize = 16 << 20;
/// The usual chunk in bytes: small enough to be still in a core's cache when it is written.
const USUAL_CHUNK: usize = 1 << 20;
/// How many chunks per thread the system is asked to prefetch.
const PREFETCH_CHUNKS: usize = 16;

/// A tensor to copy, and its place in the output.
pub(crate) struct CopyTask<'a> {
    pub(crate) source: &'a SourceTensor,
    /// Index of the tensor in the output.
    pub(crate) tensor: usize,
    /// Offset in that tensor, in bytes.
    pub(crate) at: u64,
    pub(crate) layout: Layout,
    pub(crate) dtype: WeightDtype,
}

/// A range of rows of a source.
pub(crate) struct RowChunk {
    /// Index of the source.
    pub(crate) source: usize,
    pub(crate) rows: Range<usize>,
}

/// Divides sources, given as `(rows, bytes per row)`, into chunks.
pub(crate) fn row_chunks(sources: impl Iterator<Item = (usize, usize)>) -> Vec<RowChunk> {
    let most = (ALL_CHUNKS / threads()).min(LARGEST_CHUNK);
    let mut chunks = Vec::new();
    for (source, (rows, row)) in sources.enumerate() {
        // In a source that has to be transposed, the rows of a chunk are columns of the file. A chunk has whole tiles
        // of columns, and at least one tile even if rows are long: otherwise several chunks would read each cache line.
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

/// Processes chunks in order on all threads until all are done or one fails; returns the first error. Each thread has
/// its own buffer.
pub(crate) fn in_order<B: Default>(
    chunks: &[RowChunk],
    work: impl Fn(usize, &RowChunk, &mut B) -> Result<(), CheckpointError> + Sync,
) -> Result<(), CheckpointError> {
    // Not rayon's iterators, which split a range in halves: chunks must be taken in the order of the files.
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let failure = Mutex::new(None);
    let run = || {
        let mut buffer = B::default();
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

/// The first `count` values of a buffer, which grows as needed. It consists of `u64`s, whose alignment suits every `T`.
pub(crate) fn values<T: bytemuck::Pod>(buffer: &mut Vec<u64>, count: usize) -> &mut [T] {
    let words = (count * size_of::<T>()).div_ceil(size_of::<u64>());
    if buffer.len() < words {
        buffer.resize(words, 0);
    }
    &mut bytemuck::cast_slice_mut(&mut buffer[..words])[..count]
}

/// The buffers of one thread: for bytes as stored, and for decoded values.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    stored: Vec<u64>,
    values: Vec<u64>,
}

/// Reads the chunks of sources, prefetches the sources that come next, and frees each one after its last chunk.
pub(crate) struct ChunkReader<'a> {
    checkpoint: &'a Checkpoint,
    /// Each source with the layout of the requested rows.
    sources: Vec<(&'a SourceTensor, Layout)>,
    /// The chunks of each source that are not done.
    remaining: Vec<AtomicUsize>,
    /// The sources that are in memory completely.
    buffered: Vec<Mutex<Option<Arc<BufferedTensor>>>>,
    /// Buffers of freed sources, for reuse.
    spare: Mutex<Vec<Vec<u8>>>,
}

impl<'a> ChunkReader<'a> {
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        sources: Vec<(&'a SourceTensor, Layout)>,
        chunks: &[RowChunk],
    ) -> Self {
        let remaining: Vec<AtomicUsize> = sources.iter().map(|_| AtomicUsize::new(0)).collect();
        for chunk in chunks {
            remaining[chunk.source].fetch_add(1, Ordering::Relaxed);
        }
        let buffered = sources.iter().map(|_| Mutex::new(None)).collect();
        Self { checkpoint, sources, remaining, buffered, spare: Mutex::default() }
    }

    /// Is called before chunk `at` is read, to prefetch sources of the chunks that follow it.
    pub(crate) fn begin(&self, chunks: &[RowChunk], at: usize) {
        let ahead = at + PREFETCH_CHUNKS * threads();
        // The first call fills the window; each later one adds a chunk to it.
        let first = if at == 0 { 0 } else { ahead };
        // A source is prefetched as a whole, with its first chunk.
        for chunk in chunks.iter().take(ahead + 1).skip(first).filter(|chunk| chunk.rows.start == 0) {
            self.sources[chunk.source].0.parts().for_each(|part| self.checkpoint.prefetch(part));
        }
    }

    /// The rows of a chunk in the requested layout, as bytes of `T`s, and whether decoding met non-finite values. `None`
    /// if the bytes were copied without decoding, which does not check them.
    pub(crate) fn rows<'b, T: Weight>(
        &self,
        chunk: &RowChunk,
        buffers: &'b mut Buffers,
    ) -> Result<(&'b [u8], Option<Outcome>), CheckpointError> {
        let &(source, layout) = &self.sources[chunk.source];
        let rows = &chunk.rows;
        let Buffers { stored, values: decoded } = buffers;
        let target = values::<T>(decoded, rows.len() * source.dims(layout).1);
        let dtype = WeightDtype::try_from(T::dtype()).expect("`Weight` is implemented for the dtypes of weights");
        if let Some(part) = source.verbatim(layout, dtype, rows) {
            let bytes = bytemuck::cast_slice_mut(target);
            self.checkpoint.read_part(&part, bytes)?;
            return Ok((bytes, None));
        }
        let outcome = if source.transposed_in(layout) {
            let buffered = self.buffered(chunk.source);
            let (pieces, scales) = buffered.read(self.checkpoint, source, &self.spare)?;
            source.decode_columns(rows.start, &pieces, buffered.shift, scales, target)
        } else {
            let part = source.stored_rows(rows);
            let bytes = values::<u8>(stored, part.range.len());
            self.checkpoint.read_part(&part, bytes)?;
            source.decode(rows.start, bytes, &self.checkpoint.scales(source, rows)?, target)
        };
        Ok((bytemuck::cast_slice(target), Some(outcome)))
    }

    fn buffered(&self, source: usize) -> Arc<BufferedTensor> {
        let mut slot = self.buffered[source].lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert_with(|| Arc::new(BufferedTensor::new(self.sources[source].0))).clone()
    }

    /// Is called when a chunk is done, to free its source after the last one.
    pub(crate) fn end(&self, chunk: &RowChunk) {
        if self.remaining[chunk.source].fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        // This was the last chunk of the source: no other thread holds it now, so that `into_inner` succeeds.
        let buffered = self.buffered[chunk.source].lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(buffered) = buffered.and_then(Arc::into_inner) {
            let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
            let pieces = buffered.pieces.into_iter().filter_map(|piece| piece.into_inner()?.ok());
            let room = MOST_SPARE.saturating_sub(spare.len());
            spare.extend(pieces.take(room));
        }
    }
}

/// Approximate size in bytes of the pieces of a [`BufferedTensor`].
const PIECE: usize = 1 << 20;
/// How many pieces are kept for reuse.
const MOST_SPARE: usize = ALL_CHUNKS / PIECE;

/// A tensor as stored, read into memory piece by piece.
struct BufferedTensor {
    /// A piece has 2 to this power rows, so that a shift finds the piece of a row.
    shift: u32,
    pieces: Vec<OnceLock<Result<Vec<u8>, ReadFailure>>>,
    /// The next piece that no thread has begun to read.
    next: AtomicUsize,
    scales: OnceLock<Result<Scales, ReadFailure>>,
}

/// A read error that can be returned to every waiting thread (`io::Error` cannot be cloned).
struct ReadFailure {
    path: std::path::PathBuf,
    kind: io::ErrorKind,
    problem: String,
}

impl ReadFailure {
    fn from_error(error: CheckpointError) -> Self {
        match error {
            CheckpointError::File(FileError { path, source, .. }) => {
                Self { path, kind: source.kind(), problem: source.to_string() }
            }
            error => Self { path: Default::default(), kind: io::ErrorKind::Other, problem: error.to_string() },
        }
    }

    fn to_error(&self) -> CheckpointError {
        CheckpointError::read(&self.path)(io::Error::new(self.kind, self.problem.clone()))
    }
}

impl BufferedTensor {
    fn new(source: &SourceTensor) -> Self {
        let (rows, _) = source.dims(source.stored());
        let row = (source.part.range.len() / rows.max(1)).max(1);
        let shift = (PIECE / row).max(1).ilog2();
        let pieces = (0..rows.div_ceil(1 << shift)).map(|_| OnceLock::new()).collect();
        Self { shift, pieces, next: AtomicUsize::new(0), scales: OnceLock::new() }
    }

    /// Reads the pieces that no other thread has begun, and returns all of them.
    fn read(
        &self,
        checkpoint: &Checkpoint,
        source: &SourceTensor,
        spare: &Mutex<Vec<Vec<u8>>>,
    ) -> Result<(Vec<&[u8]>, &Scales), CheckpointError> {
        let (rows, _) = source.dims(source.stored());
        let piece = |number: usize| {
            self.pieces[number].get_or_init(|| {
                let first = number << self.shift;
                let part = source.stored_rows(&(first..rows.min(first + (1 << self.shift))));
                let length = part.range.len();
                let mut bytes = match spare.lock().unwrap_or_else(PoisonError::into_inner).pop() {
                    Some(mut bytes) => {
                        bytes.resize(length, 0);
                        bytes
                    }
                    // `vec!` gets zeroed pages from the system without clearing them again.
                    None => vec![0; length],
                };
                checkpoint.read_part(&part, &mut bytes).map(|()| bytes).map_err(ReadFailure::from_error)
            })
        };
        // Each thread takes pieces that no other has begun. `get_or_init` below waits for those still in progress.
        while let Some(number) = Some(self.next.fetch_add(1, Ordering::Relaxed)).filter(|&at| at < self.pieces.len()) {
            piece(number);
        }
        let scales = self.scales.get_or_init(|| checkpoint.scales(source, &(0..rows)).map_err(ReadFailure::from_error));
        let pieces: Result<Vec<&[u8]>, &ReadFailure> =
            (0..self.pieces.len()).map(|number| piece(number).as_ref().map(Vec::as_slice)).collect();
        Ok((pieces.map_err(ReadFailure::to_error)?, scales.as_ref().map_err(ReadFailure::to_error)?))
    }
}

/// Copies every task's values. `progress` has begun, and counts the bytes written.
pub(crate) fn copy_tensors(
    checkpoint: &Checkpoint,
    tasks: &[CopyTask<'_>],
    output: &Output,
    progress: &dyn Progress,
) -> Result<(), CheckpointError> {
    let chunks = row_chunks(tasks.iter().map(|task| {
        let (rows, columns) = task.source.dims(task.layout);
        (rows, columns * task.dtype.size())
    }));
    let sources = tasks.iter().map(|task| (task.source, task.layout)).collect();
    let reading = ChunkReader::new(checkpoint, sources, &chunks);
    in_order(&chunks, |at, chunk, buffers: &mut Buffers| {
        reading.begin(&chunks, at);
        let CopyTask { source, tensor, at, layout, dtype } = &tasks[chunk.source];
        let columns = source.dims(*layout).1;
        let at = at + (chunk.rows.start * columns * dtype.size()) as u64;
        let count = chunk.rows.len() * columns;
        let outcome = with_weight!(*dtype, T => {
            let (bytes, outcome) = reading.rows::<T>(chunk, buffers)?;
            let outcome = outcome.unwrap_or_else(|| all_finite::<T>(bytes));
            if outcome == Outcome::Finite {
                output.write(*tensor, at, bytes)?;
            }
            outcome
        });
        reading.end(chunk);
        if outcome == Outcome::NonFinite {
            // Other chunks may have been written already; the caller removes the directory.
            return Err(checkpoint.value_error(source, *dtype));
        }
        match progress.advance((count * dtype.size()) as u64) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(CheckpointError::Interrupted),
        }
    })
}

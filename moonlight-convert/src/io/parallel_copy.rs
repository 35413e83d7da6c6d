//! Values from the files of one checkpoint to those of another, by all threads, in bounded memory.
//!
//! Each thread takes the next chunk of rows, reads it, decodes it and writes it. Of a tensor whose columns are wanted as
//! rows, every chunk needs all of the file's rows: it is read once, into memory, by all threads that need it, and forgotten
//! after its last chunk. The chunks are taken in order, so that no more than a few tensors are in memory at a time, whatever
//! the checkpoint's size.

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

/// Bytes of all threads' chunks together.
const ALL_CHUNKS: usize = 96 << 20;
/// A chunk is no larger, where there are few threads.
const LARGEST_CHUNK: usize = 16 << 20;
/// A chunk is about so large: it is written while a core's cache still holds it.
const USUAL_CHUNK: usize = 1 << 20;
/// How many chunks ahead the system is asked to read.
const PREFETCH_CHUNKS: usize = 16;

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

/// Has all threads take chunks in order until there are none or one fails; the first failure is the result. Each thread
/// has buffers of its own.
pub(crate) fn in_order<B: Default>(
    chunks: &[RowChunk],
    work: impl Fn(usize, &RowChunk, &mut B) -> Result<(), CheckpointError> + Sync,
) -> Result<(), CheckpointError> {
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

/// A part of a buffer as values; the buffer grows to the largest that was asked for.
pub(crate) fn values<T: bytemuck::Pod>(buffer: &mut Vec<u64>, count: usize) -> &mut [T] {
    let words = (count * size_of::<T>()).div_ceil(size_of::<u64>());
    if buffer.len() < words {
        buffer.resize(words, 0);
    }
    &mut bytemuck::cast_slice_mut(&mut buffer[..words])[..count]
}

/// What one thread reads into, and what it decodes that into.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    stored: Vec<u64>,
    values: Vec<u64>,
}

/// The sources of chunks: asks for what comes next, and forgets a source behind its last chunk.
pub(crate) struct ChunkReader<'a> {
    checkpoint: &'a Checkpoint,
    /// Each with the layout that its rows are wanted in.
    sources: Vec<(&'a SourceTensor, Layout)>,
    remaining: Vec<AtomicUsize>,
    /// Those that are in memory as a whole.
    whole: Vec<Mutex<Option<Arc<BufferedTensor>>>>,
    /// Memory of those that no longer are.
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
        let whole = sources.iter().map(|_| Mutex::new(None)).collect();
        Self { checkpoint, sources, remaining, whole, spare: Mutex::default() }
    }

    pub(crate) fn begin(&self, chunks: &[RowChunk], at: usize) {
        let ahead = at + PREFETCH_CHUNKS * threads();
        let first = if at == 0 { 0 } else { ahead };
        for chunk in chunks.iter().take(ahead + 1).skip(first).filter(|chunk| chunk.rows.start == 0) {
            self.sources[chunk.source].0.parts().for_each(|part| self.checkpoint.prefetch(part));
        }
    }

    /// The rows of a chunk in the layout of its source, as bytes of `T`s; and what decoding them met, where they had to be
    /// decoded.
    pub(crate) fn rows<'b, T: Weight>(
        &self,
        chunk: &RowChunk,
        buffers: &'b mut Buffers,
    ) -> Result<(&'b [u8], Option<Outcome>), CheckpointError> {
        let &(source, layout) = &self.sources[chunk.source];
        let rows = &chunk.rows;
        let Buffers { stored, values: decoded } = buffers;
        let target = values::<T>(decoded, rows.len() * source.dims(layout).1);
        let dtype = WeightDtype::try_from(T::dtype()).expect("a weight has a dtype of weights");
        if let Some(part) = source.verbatim(layout, dtype, rows) {
            let bytes = bytemuck::cast_slice_mut(target);
            self.checkpoint.read_part(&part, bytes)?;
            return Ok((bytes, None));
        }
        let outcome = if source.transposed_in(layout) {
            let whole = self.whole(chunk.source);
            let (pieces, scales) = whole.read(self.checkpoint, source, &self.spare)?;
            source.decode_columns(rows.start, &pieces, whole.shift, scales, target)
        } else {
            let part = source.stored_rows(rows);
            let bytes = values::<u8>(stored, part.range.len());
            self.checkpoint.read_part(&part, bytes)?;
            source.decode(rows.start, bytes, &self.checkpoint.scales(source, rows)?, target)
        };
        Ok((bytemuck::cast_slice(target), Some(outcome)))
    }

    fn whole(&self, source: usize) -> Arc<BufferedTensor> {
        let mut slot = self.whole[source].lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert_with(|| Arc::new(BufferedTensor::new(self.sources[source].0))).clone()
    }

    pub(crate) fn end(&self, chunk: &RowChunk) {
        if self.remaining[chunk.source].fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let whole = self.whole[chunk.source].lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(whole) = whole.and_then(Arc::into_inner) {
            let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
            let pieces = whole.pieces.into_iter().filter_map(|piece| piece.into_inner()?.ok());
            let room = MOST_SPARE.saturating_sub(spare.len());
            spare.extend(pieces.take(room));
        }
    }
}

/// A piece of a tensor that is in memory as a whole has about so many bytes.
const PIECE: usize = 1 << 20;
/// Pieces whose memory is kept for the next tensor.
const MOST_SPARE: usize = ALL_CHUNKS / PIECE;

/// A tensor as it is stored, read into memory piece by piece.
struct BufferedTensor {
    /// A piece has 2 to this power of rows.
    shift: u32,
    pieces: Vec<OnceLock<Result<Vec<u8>, ReadFailure>>>,
    /// The next piece that nobody reads yet.
    next: AtomicUsize,
    scales: OnceLock<Result<Scales, ReadFailure>>,
}

/// Why something could not be read, for each of those who wait for it.
struct ReadFailure {
    path: std::path::PathBuf,
    kind: io::ErrorKind,
    problem: String,
}

impl ReadFailure {
    fn of(error: CheckpointError) -> Self {
        match error {
            CheckpointError::File(FileError { path, source, .. }) => {
                Self { path, kind: source.kind(), problem: source.to_string() }
            }
            error => Self { path: Default::default(), kind: io::ErrorKind::Other, problem: error.to_string() },
        }
    }

    fn error(&self) -> CheckpointError {
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

    /// Reads pieces that nobody else does, and gives all of them.
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
                    // Pages that the system has cleared are not cleared once more.
                    None => vec![0; length],
                };
                checkpoint.read_part(&part, &mut bytes).map(|()| bytes).map_err(ReadFailure::of)
            })
        };
        while let Some(number) = Some(self.next.fetch_add(1, Ordering::Relaxed)).filter(|&at| at < self.pieces.len()) {
            piece(number);
        }
        let scales = self.scales.get_or_init(|| checkpoint.scales(source, &(0..rows)).map_err(ReadFailure::of));
        let pieces: Result<Vec<&[u8]>, &ReadFailure> =
            (0..self.pieces.len()).map(|number| piece(number).as_ref().map(Vec::as_slice)).collect();
        Ok((pieces.map_err(ReadFailure::error)?, scales.as_ref().map_err(ReadFailure::error)?))
    }
}

/// Writes every task's values. `progress` counts the bytes of the target.
pub(crate) fn copy_tensors(
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
            return Err(checkpoint.value_error(source, *dtype));
        }
        match progress.advance((count * dtype.size()) as u64) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(CheckpointError::Interrupted),
        }
    })
}

//! Values from the files of one checkpoint to those of another, by all threads, in bounded memory.
//!
//! Each thread takes the next panel of rows, decodes it and writes it, and gives the memory of what it read back. The
//! panels are taken in order, so that no more than a few tensors are in memory at a time, whatever the checkpoint's size.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::checkpoint::Checkpoint;
use crate::dtype::conversion::{Outcome, WeightDtype, all_finite, with_weight};
use crate::dtype::dequantize::{Layout, Piece};
use crate::dtype::transpose::WIDTH;
use crate::error::CheckpointError;
use crate::io::writer::Output;
use crate::progress::Progress;

/// Bytes of all threads' panels together.
const PANELS: usize = 96 << 20;
/// A panel is no larger, where there are few threads.
const LARGEST_PANEL: usize = 16 << 20;
/// A panel is about so large: it is written while a core's cache still holds it.
const USUAL_PANEL: usize = 1 << 20;
/// How many panels ahead the system is asked to read.
const AHEAD: usize = 16;

/// A tensor, and where it goes.
pub(crate) struct Task<'a> {
    pub(crate) piece: &'a Piece,
    /// Which tensor of the output.
    pub(crate) tensor: usize,
    /// Where in it, in bytes.
    pub(crate) at: u64,
    pub(crate) layout: Layout,
    pub(crate) dtype: WeightDtype,
}

/// Rows of a piece.
pub(crate) struct Panel {
    /// Which of the pieces.
    pub(crate) piece: usize,
    pub(crate) rows: Range<usize>,
}

/// Divides pieces, `(rows, bytes of a row)`, into panels.
pub(crate) fn panels(pieces: impl Iterator<Item = (usize, usize)>) -> Vec<Panel> {
    let most = (PANELS / threads()).min(LARGEST_PANEL);
    let mut panels = Vec::new();
    for (piece, (rows, row)) in pieces.enumerate() {
        // A panel's rows are columns of what is transposed: a multiple of a tile's, and no fewer where rows are long.
        let height = (USUAL_PANEL.min(most) / row.max(1)).max(WIDTH.min(most / row.max(1))).max(1);
        let height = if height > WIDTH { height / WIDTH * WIDTH } else { height };
        panels.extend((0..rows).step_by(height).map(|first| Panel { piece, rows: first..rows.min(first + height) }));
    }
    panels
}

pub(crate) fn threads() -> usize {
    rayon::current_num_threads()
}

/// Has all threads take panels in order until there are none or one fails; the first failure is the result.
pub(crate) fn in_order(
    panels: &[Panel],
    work: impl Fn(usize, &Panel, &mut Vec<u64>) -> Result<(), CheckpointError> + Sync,
) -> Result<(), CheckpointError> {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let failure = Mutex::new(None);
    let run = || {
        let mut buffer = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(panel) = panels.get(at) else { return };
            if let Err(error) = work(at, panel, &mut buffer) {
                stop.store(true, Ordering::Relaxed);
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads().min(panels.len()) {
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

/// Gives memory back when the last panel of a piece is done, and asks for what comes next.
pub(crate) struct Reading<'a> {
    checkpoint: &'a Checkpoint,
    pieces: Vec<&'a Piece>,
    remaining: Vec<AtomicUsize>,
}

impl<'a> Reading<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint, pieces: Vec<&'a Piece>, panels: &[Panel]) -> Self {
        let remaining: Vec<AtomicUsize> = pieces.iter().map(|_| AtomicUsize::new(0)).collect();
        for panel in panels {
            remaining[panel.piece].fetch_add(1, Ordering::Relaxed);
        }
        Self { checkpoint, pieces, remaining }
    }

    pub(crate) fn begin(&self, panels: &[Panel], at: usize) {
        let ahead = at + AHEAD * threads();
        let first = if at == 0 { 0 } else { ahead };
        for panel in panels.iter().take(ahead + 1).skip(first).filter(|panel| panel.rows.start == 0) {
            self.pieces[panel.piece].parts().for_each(|part| self.checkpoint.prefetch(part));
        }
    }

    /// `verbatim` is the part that only this panel reads, where there is one.
    pub(crate) fn end(&self, panel: &Panel, verbatim: Option<&crate::dtype::dequantize::Part>) {
        let last = self.remaining[panel.piece].fetch_sub(1, Ordering::AcqRel) == 1;
        match verbatim {
            Some(part) => self.checkpoint.release(part),
            None if last => self.pieces[panel.piece].parts().for_each(|part| self.checkpoint.release(part)),
            None => {}
        }
    }
}

/// Writes every task's values. `progress` counts the bytes of the target.
pub(crate) fn transfer(
    checkpoint: &Checkpoint,
    tasks: &[Task<'_>],
    output: &Output,
    progress: &dyn Progress,
) -> Result<(), CheckpointError> {
    progress.begin(output.total());
    let panels = panels(tasks.iter().map(|task| {
        let (rows, columns) = task.piece.dims(task.layout);
        (rows, columns * task.dtype.size())
    }));
    let reading = Reading::new(checkpoint, tasks.iter().map(|task| task.piece).collect(), &panels);
    in_order(&panels, |at, panel, buffer| {
        reading.begin(&panels, at);
        let Task { piece, tensor, at, layout, dtype } = &tasks[panel.piece];
        let columns = piece.dims(*layout).1;
        let at = at + (panel.rows.start * columns * dtype.size()) as u64;
        let verbatim = piece.verbatim(*layout, *dtype, &panel.rows);
        let count = panel.rows.len() * columns;
        let outcome = with_weight!(*dtype, T => {
            let (bytes, outcome) = match &verbatim {
                Some(part) => {
                    let bytes = checkpoint.part(part);
                    (bytes, all_finite::<T>(bytes))
                }
                None => {
                    let target = values::<T>(buffer, count);
                    let outcome = checkpoint.decode(piece, *layout, panel.rows.start, target);
                    (bytemuck::cast_slice(target), outcome)
                }
            };
            if outcome == Outcome::Finite {
                output.write(*tensor, at, bytes)?;
            }
            outcome
        });
        reading.end(panel, verbatim.as_ref());
        if outcome == Outcome::NotFinite {
            return Err(checkpoint.blame(piece, *dtype));
        }
        match progress.advance((count * dtype.size()) as u64) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(CheckpointError::Interrupted),
        }
    })
}

//! Products on processors with AVX512-BF16.
//!
//! The right operand is copied in panels of 32 columns, which stay in the L2 cache, and multiplied by strips of up to 14 rows of the
//! left operand, which stay in the L1 cache. Both have lanes of 32 bits: two bf16 that are neighbors along the inner index. A strip of
//! rows whose inner index is contiguous is read in place or copied row by row; the broadcast of a lane needs no other order.
//!
//! A sum is taken along the inner index from its start, in blocks that depend on its length alone. So an element of a product has the
//! same bits whichever rows and columns are computed with it.

use std::cell::RefCell;

use half::bf16;

use super::pack::{Source, pack_any, pack_lines};
use super::tile::{KERNELS, MAX_ROWS, Target, Tile, WIDTH};
use super::{Output, round_rows};
use crate::gemm::Operand;
use crate::transpose::{LANES, Line, transpose};

/// Values in a lane.
const PER_LANE: usize = 2;
/// The most lanes along the inner index of a block: with more, a panel and a strip would fill the L2 cache.
const MAX_STEPS: usize = 1024;
/// Lines of packed panels: 640 KiB of an L2 cache of 1 MiB or more.
const MAX_PACKED_LINES: usize = 10 * 1024;

/// Buffers of a thread, which products reuse.
#[derive(Default)]
struct Scratch {
    /// Panels of the right operand.
    right: Vec<Line>,
    /// A strip of the left operand.
    left: Vec<Line>,
    /// Sums in f32 of a result in bf16 with several blocks along the inner index.
    sums: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// At least `lines` lines. Those from earlier products keep their values.
fn lines(buffer: &mut Vec<Line>, lines: usize) -> *mut Line {
    if buffer.len() < lines {
        buffer.resize(lines, Line::ZERO);
    }
    buffer.as_mut_ptr()
}

/// [`multiply`](super::multiply) on a processor with AVX512-BF16.
///
/// # Safety
///
/// As there; and the processor must have AVX512BW and AVX512-BF16.
pub(super) unsafe fn multiply(
    [rows, depth, columns]: [usize; 3],
    out: Output,
    stride: usize,
    lhs: Operand<bf16>,
    rhs: Operand<bf16>,
) {
    let target = match out {
        Output::F32 { values, keep, factor } => Target::F32 { out: values, keep, factor },
        Output::Bf16 { values, factor } => Target::Bf16 { out: values, factor },
    };
    if rows == 0 || columns == 0 {
        return;
    }
    let lhs = Source {
        values: lhs.values,
        outer_stride: lhs.row_stride,
        inner_stride: lhs.column_stride,
        outer: rows,
        inner: depth,
    };
    let rhs = Source {
        values: rhs.values,
        outer_stride: rhs.column_stride,
        inner_stride: rhs.row_stride,
        outer: columns,
        inner: depth,
    };
    let steps = depth.div_ceil(PER_LANE);
    let blocks = steps.div_ceil(MAX_STEPS).max(1);
    let block_depth = steps.div_ceil(blocks) * PER_LANE;
    let panels = (MAX_PACKED_LINES / (2 * steps.div_ceil(blocks)).max(1)).max(1);
    SCRATCH.with_borrow_mut(|scratch| {
        for first in (0..columns).step_by(panels * WIDTH) {
            let count = (columns - first).min(panels * WIDTH);
            // SAFETY: the elements are those of the result, or of `sums`, which has this shape. The parts of the operands are within
            // them.
            unsafe {
                let target = target.offset(first);
                let rhs = Source { values: rhs.at(first, 0), outer: count, ..rhs };
                let (sums, sums_stride) = match target {
                    Target::Bf16 { factor, .. } if blocks > 1 => {
                        scratch.sums.resize(scratch.sums.len().max(rows * count), 0.0);
                        (Target::F32 { out: scratch.sums.as_mut_ptr(), keep: 0.0, factor }, count)
                    }
                    _ => (target, stride),
                };
                for block in 0..blocks {
                    let start = block * block_depth;
                    let inner = block_depth.min(depth - start);
                    let lhs = Source { values: lhs.values.add(start * lhs.inner_stride), inner, ..lhs };
                    let rhs = Source { values: rhs.values.add(start * rhs.inner_stride), inner, ..rhs };
                    let sums = match sums {
                        Target::F32 { out, factor, .. } if block > 0 => Target::F32 { out, keep: 1.0, factor },
                        _ => sums,
                    };
                    block_product(&mut scratch.right, &mut scratch.left, lhs, rhs, sums, sums_stride);
                }
                if let Target::Bf16 { out, .. } = target
                    && blocks > 1
                {
                    round_rows(&scratch.sums, out, [rows, count], stride);
                }
            }
        }
    });
}

/// A product whose right operand is packed at once.
///
/// # Safety
///
/// As for [`multiply`].
unsafe fn block_product(
    right: &mut Vec<Line>,
    left: &mut Vec<Line>,
    lhs: Source,
    rhs: Source,
    target: Target,
    stride: usize,
) {
    let steps = lhs.inner.div_ceil(PER_LANE);
    let panel_lines = 2 * steps;
    let right = lines(right, rhs.outer.div_ceil(WIDTH) * panel_lines);
    for (index, first) in (0..rhs.outer).step_by(WIDTH).enumerate() {
        let outer = WIDTH.min(rhs.outer - first);
        // SAFETY: `right` has the lines of each panel; the columns are those of the operand.
        unsafe { pack_panel(Source { values: rhs.at(first, 0), outer, ..rhs }, right.add(index * panel_lines)) };
    }
    // A copied row takes an odd number of lines, so that the rows of a strip are in different sets of the cache.
    let row_lines = steps.div_ceil(LANES) | 1;
    let left = lines(left, (MAX_ROWS * row_lines).max(steps));
    let strips = lhs.outer.div_ceil(MAX_ROWS);
    let mut first = 0;
    for strip in 0..strips {
        // Equal strips, rather than a last one of few rows, which would keep fewer multiplications under way.
        let rows = lhs.outer / strips + usize::from(strip < lhs.outer % strips);
        // SAFETY: the rows are those of the operand, and `left` has their lines. The panels were packed above. The tile's elements of
        // the target are those of the result.
        unsafe {
            let source = Source { values: lhs.at(first, 0), outer: rows, ..lhs };
            let (place, row_bytes, is_packed) = strip_of(source, left, row_lines);
            let target = target.offset(first * stride);
            for (index, column) in (0..rhs.outer).step_by(WIDTH).enumerate() {
                let columns = WIDTH.min(rhs.outer - column);
                let tile = Tile {
                    left: place,
                    row_bytes,
                    right: right.add(index * panel_lines).cast(),
                    steps,
                    target: target.offset(column),
                    stride,
                    columns,
                };
                KERNELS[rows - 1][usize::from(is_packed)][usize::from(columns > LANES)](&tile);
            }
        }
        first += rows;
    }
}

/// Packs up to 32 columns of the right operand, two lines for each inner lane. If there are 16 columns at most, the second line is not
/// written.
///
/// # Safety
///
/// The columns must be valid for reads, `out` have the lines, and the processor the instructions.
unsafe fn pack_panel(source: Source, out: *mut Line) {
    // SAFETY: as the caller ensures; halves are within the columns.
    unsafe {
        if source.outer_stride == 1 {
            return pack_lines(source, out, 2);
        }
        for (half, first) in (0..source.outer).step_by(LANES).enumerate() {
            let source = Source { values: source.at(first, 0), outer: LANES.min(source.outer - first), ..source };
            pack_half(source, out.add(half), 2);
        }
    }
}

/// Packs up to 16 outer indices whose inner indices are neighbors, or of any strides.
///
/// # Safety
///
/// As for [`pack_panel`].
unsafe fn pack_half(source: Source, out: *mut Line, step: usize) {
    if source.inner_stride != 1 {
        // SAFETY: as the caller ensures.
        return unsafe { pack_any(source, out, step) };
    }
    let lanes = source.inner / PER_LANE;
    // SAFETY: as the caller ensures; the lanes have values of the operand only. The rest is the last value of an odd number.
    unsafe {
        let bytes = source.outer_stride * size_of::<bf16>();
        transpose(source.values.cast(), bytes, source.outer, lanes, out, step);
        let rest = source.inner - lanes * PER_LANE;
        if rest > 0 {
            pack_any(
                Source { values: source.at(0, lanes * PER_LANE), inner: rest, ..source },
                out.add(lanes * step),
                step,
            );
        }
    }
}

/// A strip of the left operand: a pointer to its lanes, the bytes between rows, and whether it is packed.
///
/// # Safety
///
/// The rows must be valid for reads, `out` have `row_lines` lines for each row and one for each inner lane, and the processor the
/// instructions.
unsafe fn strip_of(source: Source, out: *mut Line, row_lines: usize) -> (*const u32, isize, bool) {
    let row_bytes = source.outer_stride * size_of::<bf16>();
    if source.inner_stride != 1 {
        // SAFETY: as the caller ensures.
        unsafe {
            if source.outer_stride == 1 {
                pack_lines(source, out, 1)
            } else {
                pack_half(source, out, 1)
            };
        }
        return (out.cast(), 0, true);
    }
    // Rows a multiple of 1 KiB apart compete for few sets of the L1 cache. A lane of an odd number's last value would reach beyond it.
    if source.inner.is_multiple_of(PER_LANE) && (!row_bytes.is_multiple_of(1024) || source.outer < 4) {
        return (source.values.cast(), row_bytes.cast_signed(), false);
    }
    for row in 0..source.outer {
        // SAFETY: as the caller ensures. Of an odd number of values, the last lane is set to zero before half of it is written.
        unsafe {
            let place = out.add(row * row_lines).cast::<bf16>();
            if !source.inner.is_multiple_of(PER_LANE) {
                place.cast::<u32>().add(source.inner / PER_LANE).write(0);
            }
            place.copy_from_nonoverlapping(source.at(row, 0), source.inner);
        }
    }
    (out.cast(), (row_lines * size_of::<Line>()).cast_signed(), false)
}

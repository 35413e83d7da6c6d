//! Matrix products on processors with AVX-512: of f32 by fused multiply-add, of bf16 by AVX512-BF16.
//!
//! The right operand is copied in panels of 32 columns, which stay in the L2 cache, and multiplied by strips of up to 14 rows of the
//! left operand, which stay in the L1 cache. Both have lanes of 32 bits, of one f32 or of two bf16 that are neighbors along the inner
//! index, so one driver and one way of packing is enough for both. A strip of rows whose inner index is contiguous is read in place or
//! copied row by row; the broadcast of a lane needs no other order.
//!
//! A sum is taken along the inner index from its start, in blocks that depend on its length alone. So an element of a product has the
//! same bits whichever rows and columns are computed with it.

mod pack;
mod tile;

use std::cell::RefCell;

use half::bf16;

use pack::{Line, Source, pack_any, pack_bf16_lines, pack_f32_lines, pack_transposed};
use tile::{BF16_KERNELS, F32_KERNELS, Kernels, LANES, MAX_ROWS, Target, Tile, WIDTH};

use crate::bf16_gemm::Output;
use crate::gemm::Operand;

/// The most lanes along the inner index of a block: with more, a panel and a strip would fill the L2 cache.
const MAX_STEPS: usize = 2048;
/// Lines of packed panels: 640 KiB of an L2 cache of 1 MiB or more.
const MAX_PACKED_LINES: usize = 10 * 1024;

/// A type of values with kernels.
trait Value: Copy + 'static {
    /// Values in a lane.
    const PER_LANE: usize;

    /// A lane of one or two values.
    fn lane(first: Self, second: Option<Self>) -> u32;

    /// The kernels, which the processor must have.
    fn kernels() -> &'static Kernels;

    /// [`pack_f32_lines`] or [`pack_bf16_lines`]: packs up to 32 columns (`step` 2) or up to 16 rows (`step` 1) whose outer indices are
    /// neighbors.
    ///
    /// # Safety
    ///
    /// As there.
    unsafe fn pack_lines(source: Source<Self>, out: *mut Line, step: usize);
}

impl Value for f32 {
    const PER_LANE: usize = 1;

    fn lane(first: f32, _second: Option<f32>) -> u32 {
        first.to_bits()
    }

    fn kernels() -> &'static Kernels {
        &F32_KERNELS
    }

    unsafe fn pack_lines(source: Source<f32>, out: *mut Line, step: usize) {
        // SAFETY: as the caller ensures; columns above 16 exist if there are more than 16, and then there are two lines.
        unsafe {
            pack_f32_lines(Source { outer: source.outer.min(LANES), ..source }, out, step);
            if source.outer > LANES {
                let rest = Source { values: source.at(LANES, 0), outer: source.outer - LANES, ..source };
                pack_f32_lines(rest, out.add(1), step);
            }
        }
    }
}

impl Value for bf16 {
    const PER_LANE: usize = 2;

    fn lane(first: bf16, second: Option<bf16>) -> u32 {
        u32::from(first.to_bits()) | u32::from(second.unwrap_or(bf16::ZERO).to_bits()) << 16
    }

    fn kernels() -> &'static Kernels {
        &BF16_KERNELS
    }

    unsafe fn pack_lines(source: Source<bf16>, out: *mut Line, step: usize) {
        let Source { values, outer_stride, inner_stride, outer, inner } = source;
        // SAFETY: as the caller ensures; a `bf16` is its bits.
        unsafe {
            pack_bf16_lines(Source { values: values.cast(), outer_stride, inner_stride, outer, inner }, out, step)
        };
    }
}

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

/// `out = lhs * rhs` in f32, `[rows, columns]`, with rows `stride` values apart and contiguous columns, on the calling thread. The
/// operands are `[rows, depth]` and `[depth, columns]`.
///
/// # Safety
///
/// The processor must have AVX-512 F, for bf16 also AVX512BW and AVX512-BF16. Every element of the operands within these shapes must be
/// valid for reads, and every element of the result for writes (and for reads, if it is kept). The result must not overlap an operand.
pub(crate) unsafe fn multiply_bf16(
    shape: [usize; 3],
    out: Output,
    stride: usize,
    lhs: Operand<bf16>,
    rhs: Operand<bf16>,
) {
    let target = match out {
        Output::F32 { values, keep, factor } => Target::F32 { out: values, keep, factor },
        Output::Bf16 { values, factor } => Target::Bf16 { out: values.cast(), factor },
    };
    // SAFETY: as the caller ensures.
    unsafe { multiply(shape, target, stride, lhs, rhs) };
}

/// [`gemm::multiply`](crate::gemm::multiply) on a processor with AVX-512 F.
///
/// # Safety
///
/// As there, and the processor must have AVX-512 F.
#[allow(dead_code, reason = "measured against `gemm`")]
pub(crate) unsafe fn multiply_f32(
    shape: [usize; 3],
    out: *mut f32,
    stride: usize,
    lhs: Operand<f32>,
    rhs: Operand<f32>,
    keep: f32,
    factor: f32,
) {
    // SAFETY: as the caller ensures.
    unsafe { multiply(shape, Target::F32 { out, keep, factor }, stride, lhs, rhs) };
}

/// `target = lhs * rhs`, on the calling thread, with the factors in [`Target`]. `lhs` is `[rows, depth]`, `rhs` `[depth, columns]`, and
/// the target `[rows, columns]` with rows `stride` values apart and contiguous columns.
///
/// # Safety
///
/// The processor must have AVX-512 F, for bf16 also AVX512BW and AVX512-BF16. Every element of the operands within these shapes must be
/// valid for reads, and every element of the target for writes (and for reads, if it is kept). The target must not overlap an operand.
unsafe fn multiply<V: Value>(
    [rows, depth, columns]: [usize; 3],
    target: Target,
    stride: usize,
    lhs: Operand<V>,
    rhs: Operand<V>,
) {
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
    let steps = depth.div_ceil(V::PER_LANE);
    let blocks = steps.div_ceil(MAX_STEPS).max(1);
    let block_depth = steps.div_ceil(blocks) * V::PER_LANE;
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
                    for (row, sums) in scratch.sums.chunks_exact(count).take(rows).enumerate() {
                        for (column, &sum) in sums.iter().enumerate() {
                            out.add(row * stride + column).write(bf16::from_f32(sum).to_bits());
                        }
                    }
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
unsafe fn block_product<V: Value>(
    right: &mut Vec<Line>,
    left: &mut Vec<Line>,
    lhs: Source<V>,
    rhs: Source<V>,
    target: Target,
    stride: usize,
) {
    let steps = lhs.inner.div_ceil(V::PER_LANE);
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
                V::kernels()[rows - 1][usize::from(is_packed)][usize::from(columns > LANES)](&tile);
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
unsafe fn pack_panel<V: Value>(source: Source<V>, out: *mut Line) {
    // SAFETY: as the caller ensures; halves are within the columns.
    unsafe {
        if source.outer_stride == 1 {
            return V::pack_lines(source, out, 2);
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
unsafe fn pack_half<V: Value>(source: Source<V>, out: *mut Line, step: usize) {
    let any = |source, out| {
        // SAFETY: as the caller ensures.
        unsafe {
            match V::PER_LANE {
                1 => pack_any::<V, 1>(source, out, step, V::lane),
                _ => pack_any::<V, 2>(source, out, step, V::lane),
            }
        }
    };
    if source.inner_stride != 1 {
        return any(source, out);
    }
    let lanes = source.inner / V::PER_LANE;
    // SAFETY: as the caller ensures; the lanes have values of the operand only. The rest is the last value of an odd number.
    unsafe {
        let bytes = source.outer_stride * size_of::<V>();
        pack_transposed(source.values.cast(), bytes, source.outer, lanes, out, step);
        let rest = source.inner - lanes * V::PER_LANE;
        if rest > 0 {
            any(Source { values: source.at(0, lanes * V::PER_LANE), inner: rest, ..source }, out.add(lanes * step));
        }
    }
}

/// A strip of the left operand: a pointer to its lanes, the bytes between rows, and whether it is packed.
///
/// # Safety
///
/// The rows must be valid for reads, `out` have `row_lines` lines for each row and one for each inner lane, and the processor the
/// instructions.
unsafe fn strip_of<V: Value>(source: Source<V>, out: *mut Line, row_lines: usize) -> (*const u32, isize, bool) {
    let row_bytes = source.outer_stride * size_of::<V>();
    if source.inner_stride != 1 {
        // SAFETY: as the caller ensures.
        unsafe {
            if source.outer_stride == 1 {
                V::pack_lines(source, out, 1)
            } else {
                pack_half(source, out, 1)
            };
        }
        return (out.cast(), 0, true);
    }
    // Rows a multiple of 1 KiB apart compete for few sets of the L1 cache. A lane of an odd number's last value would reach beyond it.
    if source.inner.is_multiple_of(V::PER_LANE) && (!row_bytes.is_multiple_of(1024) || source.outer < 4) {
        return (source.values.cast(), row_bytes.cast_signed(), false);
    }
    for row in 0..source.outer {
        // SAFETY: as the caller ensures. Of an odd number of values, the last lane is set to zero before half of it is written.
        unsafe {
            let place = out.add(row * row_lines).cast::<V>();
            if !source.inner.is_multiple_of(V::PER_LANE) {
                place.cast::<u32>().add(source.inner / V::PER_LANE).write(0);
            }
            place.copy_from_nonoverlapping(source.at(row, 0), source.inner);
        }
    }
    (out.cast(), (row_lines * size_of::<Line>()).cast_signed(), false)
}

//! The innermost loops: up to 14 rows by 32 columns of a product, in registers.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, __mmask16, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_load_si512,
    _mm512_mask_storeu_epi16, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_ps,
};

use half::bf16;

use crate::transpose::LANES;

/// Columns of a tile: two registers.
pub(super) const WIDTH: usize = 2 * LANES;
/// The most rows of a tile: 28 registers of sums, two of the right operand, and one of the left.
pub(super) const MAX_ROWS: usize = 14;

/// Where the sums of a tile go.
#[derive(Clone, Copy)]
pub(super) enum Target {
    /// `out = keep * out + factor * sum`. With a `keep` of 0, `out` is not read.
    F32 { out: *mut f32, keep: f32, factor: f32 },
    /// `out = factor * sum`, rounded to bf16.
    Bf16 { out: *mut bf16, factor: f32 },
}

impl Target {
    /// The target whose first element is `offset` elements further.
    ///
    /// # Safety
    ///
    /// The element must be in the same allocation.
    pub(super) unsafe fn offset(self, offset: usize) -> Self {
        // SAFETY: as the caller ensures.
        unsafe {
            match self {
                Self::F32 { out, keep, factor } => Self::F32 { out: out.add(offset), keep, factor },
                Self::Bf16 { out, factor } => Self::Bf16 { out: out.add(offset), factor },
            }
        }
    }
}

/// The operands of a tile. A *lane* is 32 bits: two bf16 that are neighbors along the inner index.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Lanes of the left operand. Packed, those of one pair of inner indices are [`LANES`] apart from those of the next, and rows are neighbors;
    /// otherwise the lanes of a row are neighbors.
    pub(super) left: *const u32,
    /// Bytes from one row of the left operand to the next, if it is not packed.
    pub(super) row_bytes: isize,
    /// A panel of the right operand, [`WIDTH`] lanes for each inner lane, aligned to 64 bytes.
    pub(super) right: *const u32,
    /// The number of inner lanes.
    pub(super) steps: usize,
    /// The first element of the result.
    pub(super) target: Target,
    /// The distance between rows of the result, in elements.
    pub(super) stride: usize,
    /// Columns to write.
    pub(super) columns: usize,
}

/// A kernel for a number of rows.
pub(super) type Kernel = unsafe fn(&Tile);

/// Computes a tile.
///
/// # Safety
///
/// The processor must have AVX512BW and AVX512-BF16. The operands must be valid for reads and the target for writes (and reads, if it
/// is kept) within the tile's shape.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn compute<const ROWS: usize, const PACKED: bool, const REGISTERS: usize>(tile: &Tile) {
    // SAFETY: the pointers are within the operands, as the caller ensures: after the last step they are at most one past their end, and
    // are not read there. Panels are aligned. All types are 512 bits, valid in any pattern.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); REGISTERS]; ROWS];
        let (mut left, mut right) = (tile.left.cast::<u8>(), tile.right);
        let row_bytes = tile.row_bytes;
        for _ in 0..tile.steps {
            let columns: [__m512bh; REGISTERS] =
                std::array::from_fn(|index| pairs(_mm512_load_si512(right.add(index * LANES).cast())));
            for (row, sums) in sums.iter_mut().enumerate() {
                let lane = if PACKED { left.add(row * 4) } else { left.offset(row as isize * row_bytes) };
                let value = pairs(_mm512_set1_epi32(lane.cast::<i32>().read_unaligned()));
                for (sum, columns) in sums.iter_mut().zip(columns) {
                    *sum = _mm512_dpbf16_ps(*sum, value, columns);
                }
            }
            right = right.add(WIDTH);
            left = left.add(if PACKED { 4 * LANES } else { 4 });
        }
        for (row, sums) in sums.iter().enumerate() {
            let high = if REGISTERS == 2 { sums[REGISTERS - 1] } else { _mm512_setzero_ps() };
            write(tile, row, sums[0], high);
        }
    }
}

/// The kernels: by rows - 1, then whether the left operand is packed, then whether there are more than 16 columns.
pub(super) static KERNELS: [[[Kernel; 2]; 2]; MAX_ROWS] = {
    macro_rules! row {
        ($rows:literal) => {
            [
                [compute::<$rows, false, 1>, compute::<$rows, false, 2>],
                [compute::<$rows, true, 1>, compute::<$rows, true, 2>],
            ]
        };
    }
    [
        row!(1),
        row!(2),
        row!(3),
        row!(4),
        row!(5),
        row!(6),
        row!(7),
        row!(8),
        row!(9),
        row!(10),
        row!(11),
        row!(12),
        row!(13),
        row!(14),
    ]
};

/// Lanes as pairs of bf16.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn pairs(lanes: __m512i) -> __m512bh {
    // SAFETY: both types are 512 bits, valid in any pattern.
    unsafe { std::mem::transmute(lanes) }
}

/// Writes the sums of one row.
///
/// # Safety
///
/// As for a tile.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
unsafe fn write(tile: &Tile, row: usize, low: __m512, high: __m512) {
    let mask = u32::MAX >> (WIDTH - tile.columns);
    match tile.target {
        Target::F32 { out, keep, factor } => {
            let factor = _mm512_set1_ps(factor);
            // SAFETY: the masks select columns of the tile, which the caller ensures to be valid.
            unsafe {
                let out = out.add(row * tile.stride);
                let halves =
                    [(low, mask as __mmask16, out), (high, (mask >> LANES) as __mmask16, out.wrapping_add(LANES))];
                for (sums, mask, out) in halves {
                    let mut value = _mm512_mul_ps(sums, factor);
                    if keep != 0.0 {
                        value = _mm512_fmadd_ps(_mm512_set1_ps(keep), _mm512_maskz_loadu_ps(mask, out), value);
                    }
                    _mm512_mask_storeu_ps(out, mask, value);
                }
            }
        }
        Target::Bf16 { out, factor } => {
            let factor = _mm512_set1_ps(factor);
            // SAFETY: the mask selects columns of the tile, which the caller ensures to be valid; both types are 512 bits, valid in any
            // pattern.
            unsafe {
                let values = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, factor), _mm512_mul_ps(low, factor));
                let values = std::mem::transmute::<__m512bh, __m512i>(values);
                _mm512_mask_storeu_epi16(out.add(row * tile.stride).cast(), mask, values);
            }
        }
    }
}

//! From blocks to values.
//!
//! A value is computed in f32, in the order of operations of ggml and of the Python package `gguf`, so that its bits are
//! theirs.

use half::{bf16, f16};

use super::block::BlockType;
use crate::dtype::conversion::{Weight, convert_bytes};

/// Values that are decoded at once. Every block has a number of complete groups.
const GROUP: usize = 32;
/// Values of a block of the types that end in `_K`.
const SUPER: usize = 256;

/// Decodes a part of a row, beginning with value `first`, into `target`; returns whether all values are finite. `row` has
/// the bytes of the complete row.
pub(crate) fn dequantize<T: Weight>(block_type: BlockType, row: &[u8], first: usize, target: &mut [T]) -> bool {
    match block_type {
        BlockType::F32 => plain::<f32, T>(row, first, target),
        BlockType::F16 => plain::<f16, T>(row, first, target),
        BlockType::Bf16 => plain::<bf16, T>(row, first, target),
        BlockType::Q4_0 => groups(block_type, row, first, target, |block, _| q4_0(block)),
        BlockType::Q4_1 => groups(block_type, row, first, target, |block, _| q4_1(block)),
        BlockType::Q5_0 => groups(block_type, row, first, target, |block, _| q5_0(block)),
        BlockType::Q5_1 => groups(block_type, row, first, target, |block, _| q5_1(block)),
        BlockType::Q8_0 => groups(block_type, row, first, target, |block, _| q8_0(block)),
        BlockType::Q4K => groups(block_type, row, first, target, q4_k),
        BlockType::Q5K => groups(block_type, row, first, target, q5_k),
        BlockType::Q6K => groups(block_type, row, first, target, q6_k),
    }
}

fn plain<S: Weight, T: Weight>(row: &[u8], first: usize, target: &mut [T]) -> bool {
    convert_bytes::<S, T>(&row[first * size_of::<S>()..][..target.len() * size_of::<S>()], target)
}

/// Fills `target` group by group. `decode` is called with a block and the number of a group in it.
#[inline(always)]
fn groups<T: Weight>(
    block_type: BlockType,
    row: &[u8],
    first: usize,
    target: &mut [T],
    decode: impl Fn(&[u8], usize) -> [f32; GROUP],
) -> bool {
    let (values, bytes) = (block_type.values(), block_type.bytes());
    let (mut at, mut rest) = (first, target);
    let mut marks = T::Mark::default();
    while !rest.is_empty() {
        let block = &row[at / values * bytes..][..bytes];
        let group = decode(block, at % values / GROUP);
        let group = &group[at % GROUP..];
        let (now, later) = rest.split_at_mut(group.len().min(rest.len()));
        for (target, value) in now.iter_mut().zip(group) {
            *target = T::narrow(*value);
            marks = marks | target.mark();
        }
        at += now.len();
        rest = later;
    }
    T::unmarked(marks)
}

/// The f16 number in two bytes.
fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// The low nibbles of 16 bytes, then the high ones.
fn nibbles(bytes: &[u8]) -> [u8; GROUP] {
    std::array::from_fn(|at| bytes[at % 16] >> (at / 16 * 4) & 0xf)
}

/// [`nibbles`] with a fifth bit from four other bytes.
fn five_bits(high: &[u8], low: &[u8]) -> [u8; GROUP] {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    let low = nibbles(low);
    std::array::from_fn(|at| low[at] | ((high >> at & 1) as u8) << 4)
}

fn q4_0(block: &[u8]) -> [f32; GROUP] {
    let scale = half(block);
    nibbles(&block[2..]).map(|value| scale * f32::from(value as i8 - 8))
}

fn q4_1(block: &[u8]) -> [f32; GROUP] {
    let (scale, minimum) = (half(block), half(&block[2..]));
    nibbles(&block[4..]).map(|value| scale * f32::from(value) + minimum)
}

fn q5_0(block: &[u8]) -> [f32; GROUP] {
    let scale = half(block);
    five_bits(&block[2..6], &block[6..]).map(|value| scale * f32::from(value as i8 - 16))
}

fn q5_1(block: &[u8]) -> [f32; GROUP] {
    let (scale, minimum) = (half(block), half(&block[2..]));
    five_bits(&block[4..8], &block[8..]).map(|value| scale * f32::from(value) + minimum)
}

fn q8_0(block: &[u8]) -> [f32; GROUP] {
    let scale = half(block);
    std::array::from_fn(|at| f32::from(block[2 + at] as i8) * scale)
}

/// The scale and the minimum of a group in a block of Q4_K or Q5_K. Both begin with two f16 numbers, and 12 bytes with
/// eight scales and eight minima of 6 bits:
///
/// | bytes | low 6 bits | high 2 bits |
/// |---|---|---|
/// | 0..4 | scales 0..4 | upper bits of scales 4..8 |
/// | 4..8 | minima 0..4 | upper bits of minima 4..8 |
///
/// | bytes | low nibble | high nibble |
/// |---|---|---|
/// | 8..12 | lower bits of scales 4..8 | lower bits of minima 4..8 |
fn scale_and_minimum(block: &[u8], group: usize) -> (f32, f32) {
    let packed = &block[4..16];
    let (scale, minimum) = match group.checked_sub(4) {
        None => (packed[group] & 0x3f, packed[4 + group] & 0x3f),
        Some(at) => (packed[8 + at] & 0xf | packed[at] >> 2 & 0x30, packed[8 + at] >> 4 | packed[4 + at] >> 2 & 0x30),
    };
    (half(block) * f32::from(scale), half(&block[2..]) * f32::from(minimum))
}

fn q4_k(block: &[u8], group: usize) -> [f32; GROUP] {
    let (scale, minimum) = scale_and_minimum(block, group);
    // Two groups in 32 bytes: the low nibbles of all, then the high ones.
    let (bytes, shift) = (&block[16 + group / 2 * GROUP..], group % 2 * 4);
    std::array::from_fn(|at| scale * f32::from(bytes[at] >> shift & 0xf) - minimum)
}

fn q5_k(block: &[u8], group: usize) -> [f32; GROUP] {
    let (scale, minimum) = scale_and_minimum(block, group);
    // The fifth bits of all eight groups in 32 bytes, then the nibbles as in Q4_K.
    let (high, bytes, shift) = (&block[16..48], &block[48 + group / 2 * GROUP..], group % 2 * 4);
    std::array::from_fn(|at| {
        let value = bytes[at] >> shift & 0xf | (high[at] >> group & 1) << 4;
        scale * f32::from(value) - minimum
    })
}

fn q6_k(block: &[u8], group: usize) -> [f32; GROUP] {
    // Two halves of four groups. In a half, 64 bytes have the low nibbles of two groups and the high ones, that is the
    // low 4 bits, of the other two; 32 bytes have the upper 2 bits of all four.
    let (half_of_block, quarter) = (group / 4, group % 4);
    let low = &block[64 * half_of_block + 32 * (quarter % 2)..];
    let high = &block[SUPER / 2 + 32 * half_of_block..];
    let scales = &block[SUPER / 2 + SUPER / 4..];
    let scale = half(&block[SUPER / 2 + SUPER / 4 + SUPER / 16..]);
    // A group has two scales.
    let scales = [0, 1].map(|at| scale * f32::from(scales[2 * group + at] as i8));
    std::array::from_fn(|at| {
        let value = low[at] >> (quarter / 2 * 4) & 0xf | (high[at] >> (2 * quarter) & 3) << 4;
        scales[at / 16] * f32::from(value as i8 - 32)
    })
}

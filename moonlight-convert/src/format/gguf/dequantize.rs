//! From blocks to values.
//!
//! A value is computed in f32, in the order of operations of ggml and of the Python package `gguf`, so that its bits are
//! theirs.

use half::{bf16, f16};

use super::block::BlockType;
use crate::dtype::conversion::{Weight, WeightDtype, convert_bytes};

/// Values that are decoded at once. Every block has a number of complete groups.
const GROUP: usize = 32;
/// Values of a block of the types that end in `_K`.
const SUPER: usize = 256;

/// The dtype of a type's values. The products of scales and integers need f32, but the models compute in bf16: like FP8
/// weights, they count as bf16.
pub(crate) fn dtype_of(block_type: BlockType) -> WeightDtype {
    match block_type {
        BlockType::F32 => WeightDtype::F32,
        BlockType::F16 => WeightDtype::F16,
        _ => WeightDtype::Bf16,
    }
}

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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::format::gguf::header::GgufHeader;

    /// The bytes of each row.
    fn rows(header: &GgufHeader, file: &[u8], name: &str) -> (BlockType, Vec<Vec<u8>>) {
        let info = header.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        let start = (header.data_start + info.offset) as usize;
        let bytes = &file[start..start + info.bytes().unwrap() as usize];
        let row = bytes.len() / info.shape[1] as usize;
        (info.block_type, bytes.chunks(row).map(<[u8]>::to_vec).collect())
    }

    /// `scripts/fixtures/make_gguf_fixtures.py` made the file with the Python package `gguf`.
    #[test]
    fn values_are_those_of_the_python_package_bit_for_bit() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/gguf/blocks.gguf");
        let file = std::fs::read(path).unwrap();
        let header = GgufHeader::parse(file.as_slice(), file.len() as u64).unwrap();
        let mut seen = Vec::new();
        for info in header.tensors.iter().filter(|tensor| !tensor.name.ends_with(".values")) {
            let (block_type, stored) = rows(&header, &file, &info.name);
            let (_, expected) = rows(&header, &file, &format!("{}.values", info.name));
            for (stored, expected) in stored.iter().zip(&expected) {
                let expected: Vec<u32> =
                    expected.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
                let mut values = vec![f32::NAN; expected.len()];
                assert!(dequantize(block_type, stored, 0, &mut values), "{block_type}: all values are finite");
                let values: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
                assert_eq!(values, expected, "{block_type}");
            }
            seen.push(block_type);
        }
        seen.push(BlockType::F32); // the type of the expected values
        assert!(BlockType::ALL.iter().all(|block_type| seen.contains(block_type)), "{seen:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Any bytes are blocks: nothing panics, parts are parts of the whole, and other dtypes are rounded from f32.
        #[test]
        fn a_part_of_a_row_has_the_values_of_the_row(
            kind in 0..BlockType::ALL.len(),
            bytes in vec(any::<u8>(), 4096),
            first in 0usize..512,
            length in 0usize..512,
        ) {
            let block_type = BlockType::ALL[kind];
            let row = &bytes[..512 / block_type.values() * block_type.bytes()];
            let length = length.min(512 - first);
            let mut whole = vec![0.0f32; 512];
            let finite = dequantize(block_type, row, 0, &mut whole);
            prop_assert_eq!(finite, whole.iter().all(|value| value.is_finite()));
            let mut part = vec![0.0f32; length];
            dequantize(block_type, row, first, &mut part);
            for (at, value) in part.iter().enumerate() {
                prop_assert_eq!(value.to_bits(), whole[first + at].to_bits());
            }
            let mut narrow = vec![bf16::ZERO; length];
            dequantize(block_type, row, first, &mut narrow);
            for (at, value) in narrow.iter().enumerate().filter(|(at, _)| whole[first + at].is_finite()) {
                prop_assert_eq!(value.to_bits(), bf16::from_f32(whole[first + at]).to_bits());
            }
        }

        /// A block whose quants are all one number is that number times the scale, plus the minimum.
        #[test]
        fn constant_blocks_have_constant_values(quant in 0u8..16, scale in -100i8..100, minimum in -100i8..100) {
            let [scale, minimum] = [scale, minimum].map(|value| f16::from_f32(f32::from(value) / 64.0));
            let nibbles = [quant << 4 | quant; 128];
            let joined = |parts: &[&[u8]]| parts.concat();
            let (d, m) = (scale.to_le_bytes(), minimum.to_le_bytes());
            let ones = [1u8; 12]; // scales and minima 0..4 are 1, those of 4..8 are 1 and 0
            let (q, s, m32) = (f32::from(quant), scale.to_f32(), minimum.to_f32());
            let cases = [
                (BlockType::Q4_0, joined(&[&d, &nibbles[..16]]), s * (q - 8.0)),
                (BlockType::Q4_1, joined(&[&d, &m, &nibbles[..16]]), s * q + m32),
                (BlockType::Q5_0, joined(&[&d, &[0xff; 4], &nibbles[..16]]), s * q),
                (BlockType::Q5_1, joined(&[&d, &m, &[0; 4], &nibbles[..16]]), s * q + m32),
                (BlockType::Q8_0, joined(&[&d, &[quant; 32]]), s * q),
                (BlockType::Q6K, joined(&[&nibbles, &[0xaa; 64], &[1; 16], &d]), s * q),
            ];
            for (block_type, bytes, expected) in cases {
                let mut values = vec![f32::NAN; block_type.values()];
                dequantize(block_type, &bytes, 0, &mut values);
                prop_assert!(values.iter().all(|value| *value == expected), "{block_type}: {values:?} {expected}");
            }
            let mut values = [f32::NAN; 256];
            dequantize(BlockType::Q4K, &joined(&[&d, &m, &ones, &nibbles]), 0, &mut values);
            prop_assert!(values[..128].iter().all(|value| *value == s * q - m32));
            prop_assert!(values[128..].iter().all(|value| *value == s * q));
            dequantize(BlockType::Q5K, &joined(&[&d, &m, &ones, &[0xff; 32], &nibbles]), 0, &mut values);
            prop_assert!(values[..128].iter().all(|value| *value == s * (q + 16.0) - m32));
        }
    }
}

//! Bytes of a file to values of a tensor and back: dtype and transposition in one pass, in parallel.

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

/// Rows and columns of a block of a transposition: two blocks fit the first cache.
const BLOCK: usize = 32;
/// Values of one task of a copy.
const VALUES: usize = 64 * 1024;

/// A floating-point number as it lies in a file.
pub(crate) trait Number: Copy + Send + Sync {
    const BYTES: usize;
    fn read(bytes: &[u8]) -> Self;
    fn write(self, bytes: &mut [u8]);
    fn to_f32(self) -> f32;
    fn from_f32(value: f32) -> Self;
}

impl Number for f32 {
    const BYTES: usize = 4;
    fn read(bytes: &[u8]) -> Self {
        Self::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
    fn write(self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.to_le_bytes());
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
}

macro_rules! half_number {
    ($type:ty) => {
        impl Number for $type {
            const BYTES: usize = 2;
            fn read(bytes: &[u8]) -> Self {
                Self::from_le_bytes([bytes[0], bytes[1]])
            }
            fn write(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }
            fn to_f32(self) -> f32 {
                <$type>::to_f32(self)
            }
            fn from_f32(value: f32) -> Self {
                <$type>::from_f32(value) // to the nearest, ties to even
            }
        }
    };
}

half_number!(bf16);
half_number!(f16);

/// Converts `source` into `target`, both little-endian, and says whether every value is finite.
///
/// With `transpose = Some((rows, columns))` the source is `[rows, columns]` and the target `[columns, rows]`. f32
/// between the two is exact for every pair but the rounding to a shorter dtype.
///
/// # Panics
///
/// When a dtype is not a floating-point dtype of 16 or 32 bits, or the lengths do not agree: callers have checked both.
pub(crate) fn convert(
    source: &[u8],
    from: Dtype,
    target: &mut [u8],
    to: Dtype,
    transpose: Option<(usize, usize)>,
) -> bool {
    match from {
        Dtype::F32 => convert_from::<f32>(source, target, to, transpose),
        Dtype::BF16 => convert_from::<bf16>(source, target, to, transpose),
        Dtype::F16 => convert_from::<f16>(source, target, to, transpose),
        other => unreachable!("{other:?} was refused before"),
    }
}

fn convert_from<S: Number>(source: &[u8], target: &mut [u8], to: Dtype, transpose: Option<(usize, usize)>) -> bool {
    match to {
        Dtype::F32 => convert_pair::<S, f32>(source, target, transpose),
        Dtype::BF16 => convert_pair::<S, bf16>(source, target, transpose),
        Dtype::F16 => convert_pair::<S, f16>(source, target, transpose),
        other => unreachable!("{other:?} was refused before"),
    }
}

fn convert_pair<S: Number, T: Number>(source: &[u8], target: &mut [u8], transpose: Option<(usize, usize)>) -> bool {
    assert_eq!(source.len() / S::BYTES, target.len() / T::BYTES, "as many values out as in");
    let one = |source: &[u8], target: &mut [u8]| {
        let value = S::read(source).to_f32();
        let converted = T::from_f32(value);
        converted.write(target);
        // The converted value is what will be computed with: f16 may overflow.
        converted.to_f32().is_finite()
    };
    let Some((rows, columns)) = transpose else {
        return target
            .par_chunks_mut(VALUES * T::BYTES)
            .zip(source.par_chunks(VALUES * S::BYTES))
            .map(|(target, source)| {
                let pairs = source.chunks_exact(S::BYTES).zip(target.chunks_exact_mut(T::BYTES));
                pairs.fold(true, |finite, (source, target)| one(source, target) & finite)
            })
            .reduce(|| true, |a, b| a & b);
    };
    assert_eq!(rows * columns * S::BYTES, source.len(), "the matrix has its values");
    target
        .par_chunks_mut(BLOCK * rows * T::BYTES)
        .enumerate()
        .map(|(block, target)| {
            let first = block * BLOCK;
            let width = target.len() / (rows * T::BYTES);
            let mut finite = true;
            for top in (0..rows).step_by(BLOCK) {
                for row in top..rows.min(top + BLOCK) {
                    let line = &source[(row * columns + first) * S::BYTES..][..width * S::BYTES];
                    for (column, value) in line.chunks_exact(S::BYTES).enumerate() {
                        let place = (column * rows + row) * T::BYTES;
                        finite &= one(value, &mut target[place..place + T::BYTES]);
                    }
                }
            }
            finite
        })
        .reduce(|| true, |a, b| a & b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn a_transposition_moves_every_value() {
        for (rows, columns) in [(1, 1), (3, 5), (33, 70), (64, 32), (100, 1)] {
            let values: Vec<f32> = (0..rows * columns).map(|value| value as f32).collect();
            let mut target = vec![0; values.len() * 4];
            assert!(convert(&bytes(&values), Dtype::F32, &mut target, Dtype::F32, Some((rows, columns))));
            let expected: Vec<f32> =
                (0..columns).flat_map(|column| (0..rows).map(move |row| (row * columns + column) as f32)).collect();
            assert_eq!(target, bytes(&expected));
        }
    }

    #[test]
    fn bf16_survives_f32_bit_by_bit() {
        let source: Vec<u8> =
            (0..=u16::MAX).filter(|&bits| bf16::from_bits(bits).is_finite()).flat_map(u16::to_le_bytes).collect();
        let mut wide = vec![0; source.len() * 2];
        assert!(convert(&source, Dtype::BF16, &mut wide, Dtype::F32, None));
        let mut back = vec![0; source.len()];
        assert!(convert(&wide, Dtype::F32, &mut back, Dtype::BF16, None));
        assert_eq!(back, source);
    }

    #[test]
    fn values_that_are_not_finite_are_seen() {
        let mut target = vec![0; 4];
        for value in [f32::NAN, f32::INFINITY] {
            assert!(!convert(&bytes(&[value]), Dtype::F32, &mut target, Dtype::F32, None));
        }
        // 1e6 is finite in f32 and not in f16.
        assert!(!convert(&bytes(&[1e6]), Dtype::F32, &mut target[..2], Dtype::F16, None));
    }
}

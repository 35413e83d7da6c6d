//! Weights on the host: the three floating-point formats, and conversion between them.
//!
//! Values are checked while they are converted: non-finite results are reported. Callers divide the work among threads
//! (`io/parallel_copy.rs`, `load.rs`).

use std::marker::PhantomData;

use burn::tensor::{DType, Element};
use half::{bf16, f16};

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little-endian, and so must the machine be");

/// A floating-point format of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WeightDtype {
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// IEEE single precision.
    F32,
}

impl WeightDtype {
    /// Size of a value in bytes.
    pub fn size(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    /// The name on the command line and in messages: `f16`, `bf16`, `f32`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }

    /// The name in `config.json`: `float16`, `bfloat16`, `float32`.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::F32 => "float32",
        }
    }

    /// The narrowest format that represents every value of both. For f16 and bf16 that is f32: f16 has more mantissa
    /// bits, bf16 a larger range.
    pub fn widest(self, other: Self) -> Self {
        if self == other { self } else { Self::F32 }
    }

    pub(crate) fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::F16 => Some(Self::F16),
            safetensors::Dtype::BF16 => Some(Self::Bf16),
            safetensors::Dtype::F32 => Some(Self::F32),
            _ => None,
        }
    }

    pub(crate) fn to_safetensors(self) -> safetensors::Dtype {
        match self {
            Self::F16 => safetensors::Dtype::F16,
            Self::Bf16 => safetensors::Dtype::BF16,
            Self::F32 => safetensors::Dtype::F32,
        }
    }
}

impl TryFrom<DType> for WeightDtype {
    type Error = DType;

    fn try_from(dtype: DType) -> Result<Self, DType> {
        match dtype {
            DType::F16 => Ok(Self::F16),
            DType::BF16 => Ok(Self::Bf16),
            DType::F32 => Ok(Self::F32),
            other => Err(other),
        }
    }
}

impl From<WeightDtype> for DType {
    fn from(dtype: WeightDtype) -> Self {
        match dtype {
            WeightDtype::F16 => Self::F16,
            WeightDtype::Bf16 => Self::BF16,
            WeightDtype::F32 => Self::F32,
        }
    }
}

impl std::fmt::Display for WeightDtype {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// A value in one of the three formats.
pub(crate) trait Weight: Element + bytemuck::Pod + Default + Send + Sync {
    /// An integer with as many bits as the value.
    type Mark: Copy + Default + std::ops::BitOr<Output = Self::Mark>;
    /// An integer whose highest bit is set if and only if the value is NaN or infinite: the magnitude plus one in the
    /// lowest exponent bit, which carries into the sign bit only if all exponent bits are set. Marks can be or-ed
    /// together, so that a loop over many values has no branch and is vectorized.
    fn mark(self) -> Self::Mark;
    /// Whether the highest bit is clear.
    fn unmarked(bits: Self::Mark) -> bool;
    /// Whether the value is finite.
    fn finite(self) -> bool {
        Self::unmarked(self.mark())
    }
    /// Converts to f32, exactly.
    fn widen(self) -> f32;
    /// Converts from f32, rounding to nearest, ties to even.
    fn narrow(value: f32) -> Self;
}

impl Weight for f32 {
    type Mark = u32;
    fn mark(self) -> u32 {
        (self.to_bits() & 0x7fff_ffff) + 0x0080_0000 // 8 exponent bits, 23 of mantissa
    }
    fn unmarked(bits: u32) -> bool {
        bits < 1 << 31
    }
    fn widen(self) -> f32 {
        self
    }
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Weight for bf16 {
    type Mark = u16;
    fn mark(self) -> u16 {
        (self.to_bits() & 0x7fff) + 0x0080 // 8 exponent bits, 7 of mantissa
    }
    fn unmarked(bits: u16) -> bool {
        bits < 1 << 15
    }
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Weight for f16 {
    type Mark = u16;
    fn mark(self) -> u16 {
        (self.to_bits() & 0x7fff) + 0x0400 // 5 exponent bits, 10 of mantissa
    }
    fn unmarked(bits: u16) -> bool {
        bits < 1 << 15
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// Runs `$body` with `$weight` as the type that belongs to `$dtype`.
macro_rules! with_weight {
    ($dtype:expr, $weight:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::conversion::WeightDtype::F32 => {
                type $weight = f32;
                $body
            }
            $crate::dtype::conversion::WeightDtype::Bf16 => {
                type $weight = half::bf16;
                $body
            }
            $crate::dtype::conversion::WeightDtype::F16 => {
                type $weight = half::f16;
                $body
            }
        }
    };
}
pub(crate) use with_weight;

/// Whether a conversion met non-finite values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All values are finite.
    Finite,
    /// At least one value is non-finite after the conversion.
    NonFinite,
}

impl Outcome {
    pub(crate) fn from_finite(finite: bool) -> Self {
        if finite { Self::Finite } else { Self::NonFinite }
    }
}

/// A matrix `[rows, columns]` that returns its values as `T`, whatever its stored form.
pub(crate) trait RowSource<T> {
    /// Fills `target` with values of row `row`, beginning at column `first`; returns whether all are finite.
    fn read_row(&self, row: usize, first: usize, target: &mut [T]) -> bool;
}

/// A row-major matrix of unquantized values, at any alignment.
pub(crate) struct PlainRows<'a, S> {
    bytes: &'a [u8],
    /// The matrix row with which `bytes` begins.
    first: usize,
    columns: usize,
    kind: PhantomData<S>,
}

impl<'a, S: Weight> PlainRows<'a, S> {
    pub(crate) fn new(bytes: &'a [u8], columns: usize) -> Self {
        Self::from_row(0, bytes, columns)
    }

    /// A part of a matrix that begins with row `first`.
    pub(crate) fn from_row(first: usize, bytes: &'a [u8], columns: usize) -> Self {
        Self { bytes, first, columns, kind: PhantomData }
    }
}

impl<S: Weight, T: Weight> RowSource<T> for PlainRows<'_, S> {
    fn read_row(&self, row: usize, first: usize, target: &mut [T]) -> bool {
        let size = size_of::<S>();
        let bytes = &self.bytes[((row - self.first) * self.columns + first) * size..][..target.len() * size];
        convert_bytes::<S, T>(bytes, target)
    }
}

/// A matrix in pieces, each of them some of its rows.
pub(crate) struct RowPieces<R> {
    /// A piece has 2 to this power rows; the last may have fewer.
    pub(crate) shift: u32,
    /// The pieces, each addressed by rows of the whole matrix.
    pub(crate) pieces: Vec<R>,
}

impl<T, R: RowSource<T>> RowSource<T> for RowPieces<R> {
    fn read_row(&self, row: usize, first: usize, target: &mut [T]) -> bool {
        self.pieces[row >> self.shift].read_row(row, first, target)
    }
}

/// Converts little-endian values of one dtype to another; returns whether all results are finite.
pub(crate) fn convert_bytes<S: Weight, T: Weight>(bytes: &[u8], target: &mut [T]) -> bool {
    let mut marks = T::Mark::default();
    for (target, bytes) in target.iter_mut().zip(bytes.chunks_exact(size_of::<S>())) {
        let value = bytemuck::pod_read_unaligned::<S>(bytes);
        // A plain copy for equal dtypes, without the detour through f32.
        *target = if S::dtype() == T::dtype() { bytemuck::cast(value) } else { T::narrow(value.widen()) };
        marks = marks | target.mark();
    }
    T::unmarked(marks)
}

/// Checks that all of the little-endian values are finite.
pub(crate) fn all_finite<T: Weight>(bytes: &[u8]) -> Outcome {
    let mut marks = T::Mark::default();
    for bytes in bytes.chunks_exact(size_of::<T>()) {
        marks = marks | bytemuck::pod_read_unaligned::<T>(bytes).mark();
    }
    Outcome::from_finite(T::unmarked(marks))
}

/// Fills `target` with rows of a matrix, beginning at row `first`.
pub(crate) fn copy<T>(source: &impl RowSource<T>, columns: usize, first: usize, target: &mut [T]) -> Outcome {
    let mut finite = true;
    for (row, target) in target.chunks_exact_mut(columns.max(1)).enumerate() {
        finite &= source.read_row(first + row, 0, target);
    }
    Outcome::from_finite(finite)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::transpose::transpose;

    fn plain<T: Weight>(values: &[T], columns: usize) -> PlainRows<'_, T> {
        PlainRows::new(bytemuck::cast_slice(values), columns)
    }

    fn convert<S: Weight, T: Weight>(source: &[S], target: &mut [T]) -> Outcome {
        copy(&plain(source, source.len()), source.len(), 0, target)
    }

    #[test]
    fn narrowing_rounds_to_nearest_even() {
        let cases = [
            (1.0f32, 0x3f80u16),
            (f32::from_bits(0x3f80_8000), 0x3f80), // a tie, down to even
            (f32::from_bits(0x3f81_8000), 0x3f82), // a tie, up to even
            (f32::from_bits(0x3f80_8001), 0x3f81),
            (f32::from_bits(0x3f80_7fff), 0x3f80),
            (-0.0, 0x8000),
        ];
        for (value, bits) in cases {
            let mut target = [bf16::ZERO];
            convert(&[value], &mut target);
            assert_eq!(target[0].to_bits(), bits, "{value}");
        }
    }

    #[test]
    fn every_finite_bf16_survives_f32_and_back() {
        let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).filter(|value| value.finite()).collect();
        let mut wide = vec![0.0f32; all.len()];
        assert_eq!(convert(&all, &mut wide), Outcome::Finite);
        let mut back = vec![bf16::ZERO; all.len()];
        assert_eq!(convert(&wide, &mut back), Outcome::Finite);
        assert!(all.iter().zip(&back).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn non_finite_values_are_detected_at_every_position() {
        for at in [0, 99, 6_399] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut source = vec![0.5f32; 6_400];
                source[at] = bad;
                let mut target = vec![bf16::ZERO; 6_400];
                assert_eq!(transpose(&plain(&source, 100), 64, 0, &mut target), Outcome::NonFinite);
                assert_eq!(convert(&source, &mut target), Outcome::NonFinite);
            }
        }
        // Finite in f32, infinite in f16.
        assert_eq!(convert(&[70_000.0f32], &mut [f16::ZERO]), Outcome::NonFinite);
    }

    #[test]
    fn unaligned_bytes_are_read() {
        let mut bytes = vec![0u8];
        bytes.extend_from_slice(&1.5f32.to_le_bytes());
        let mut target = [0.0f32];
        assert!(convert_bytes::<f32, f32>(&bytes[1..], &mut target));
        assert_eq!(target, [1.5]);
    }
}

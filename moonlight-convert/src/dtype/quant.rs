//! Quantized matrices: FP8 by block (DeepSeek-V3, Kimi-K2), by row or by tensor (compressed-tensors'
//! `float-quantized`), INT4 and INT8 by group (`pack-quantized`: Kimi-K2-Thinking, Kimi-K2.5).
//!
//! A value is a small number times a scale. The product is taken in f32 and rounded once to the requested dtype. This
//! is bit for bit what torch computes: `(fp8.float() * scale).to(bfloat16)`, and compressed-tensors' product in bf16.

use half::{bf16, f16};
use moonlight_model::ModelConfig;
use moonlight_simd::quant::Bits;
use serde_json::Value;

use crate::dtype::conversion::{RowSource, Weight, WeightDtype};

mod config_keys;

/// DeepSeek-V3's block, used if the config has none.
const DEFAULT_BLOCK: [usize; 2] = [128, 128];

/// The number of values of a packed matrix in a 32-bit word.
pub(crate) const fn values_per_word(bits: Bits) -> usize {
    match bits {
        Bits::Four => 8,
        Bits::Eight => 4,
    }
}

/// The bits of a value as a number.
pub(crate) const fn bit_count(bits: Bits) -> u8 {
    match bits {
        Bits::Four => 4,
        Bits::Eight => 8,
    }
}

/// The part of `quantization_config` that concerns weights.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct QuantScheme {
    /// The `quant_method`.
    pub(crate) method: Option<String>,
    /// Rows and columns that share an FP8 scale.
    block: Option<[usize; 2]>,
    /// The granularities of FP8 scales in the config; empty if it has none.
    strategies: Vec<ScaleStrategy>,
    /// Why packed integers of this checkpoint are not supported, as the rest of a sentence.
    pub(crate) packed_problem: Option<String>,
    /// The bits of packed integers in the config; empty if it has none.
    bits: Vec<Bits>,
    /// Why FP8 weights of this checkpoint are not supported, as the rest of a sentence.
    pub(crate) fp8_problem: Option<String>,
    /// The group sizes of packed integers in the config; empty if it has none.
    groups: Vec<usize>,
    /// Unsupported settings of the config, each as a sentence without a full stop.
    pub(crate) unsupported: Vec<String>,
}

impl QuantScheme {
    pub(crate) fn for_config(config: &ModelConfig) -> Self {
        let Some(quantization) = quantization(config) else { return Self::default() };
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        let groups = quantization.get("config_groups").and_then(Value::as_object);
        let weights: Vec<&Value> =
            groups.map(|groups| groups.values().filter_map(|group| group.get("weights")).collect()).unwrap_or_default();
        let block_size = quantization.get("weight_block_size").and_then(block);
        let mut strategies: Vec<ScaleStrategy> =
            weights.iter().filter_map(|weights| ScaleStrategy::from_weights(weights)).collect();
        strategies.extend(block_size.map(|_| ScaleStrategy::Block));
        Self {
            method: Some(method.to_owned()),
            block: block_size.or_else(|| weights.iter().find_map(|weights| block(weights.get("block_structure")?))),
            strategies,
            packed_problem: weights
                .iter()
                .find_map(|weights| unsupported_integers(weights))
                .or_else(|| none_of(&weights, "int", "packed integers")),
            bits: weights.iter().filter_map(|weights| declared_bits(weights)).collect(),
            fp8_problem: none_of(&weights, "float", "FP8"),
            groups: weights
                .iter()
                .filter(|weights| is_type(weights, "int"))
                .filter_map(|weights| group(weights))
                .collect(),
            unsupported: config_keys::unsupported(quantization),
        }
    }

    /// Checks a group size against the config. The error is the rest of a sentence about the matrix.
    pub(crate) fn check_group(&self, found: usize) -> Result<(), String> {
        match self.groups.first() {
            Some(declared) if !self.groups.contains(&found) => {
                Err(format!("has one scale per {found} values; `quantization_config` has the `group_size` {declared}"))
            }
            _ => Ok(()),
        }
    }

    /// The bits of a packed matrix with `columns` columns, stored in `words` words a row. If none has that many
    /// words, the one of the config is expected.
    ///
    /// # Errors
    ///
    /// The rest of a sentence about the matrix, if the config declares other bits.
    pub(crate) fn packed_bits(&self, columns: usize, words: Option<usize>) -> Result<Bits, String> {
        const BOTH: [Bits; 2] = [Bits::Four, Bits::Eight];
        let fits = |bits: &&Bits| words == Some(columns.div_ceil(values_per_word(**bits)));
        // The config's first: in a matrix of at most 4 columns, each number of bits has one word.
        match self.bits.iter().chain(&BOTH).find(fits) {
            Some(bits) if self.bits.is_empty() || self.bits.contains(bits) => Ok(*bits),
            Some(bits) => Err(format!(
                "has weights of {} bits; `quantization_config` has the `num_bits` {}",
                bit_count(*bits),
                bit_count(self.bits[0])
            )),
            None => Ok(self.bits.first().copied().unwrap_or(Bits::Four)),
        }
    }

    pub(crate) fn block(&self) -> [usize; 2] {
        self.block.unwrap_or(DEFAULT_BLOCK)
    }

    /// The rows and columns that share a scale of an FP8 matrix, and the shape of its scales, derived from the shape
    /// `found` in the file. If no granularity has that shape, the one of the config is expected.
    ///
    /// # Errors
    ///
    /// The rest of a sentence about the matrix, if the config declares another granularity.
    pub(crate) fn fp8_block(
        &self,
        matrix @ [rows, columns]: [usize; 2],
        found: Option<&[usize]>,
    ) -> Result<([usize; 2], Vec<usize>), String> {
        let block = self.block();
        let fits = |strategy: &ScaleStrategy| found.is_some_and(|found| strategy.fits(matrix, block, found));
        let declared = self.strategies.first().copied();
        let every = [ScaleStrategy::Tensor, ScaleStrategy::Row, ScaleStrategy::Block];
        // The config's granularities first: two can have the same shape, for example for a matrix of one block.
        let strategy = match self.strategies.iter().chain(&every).find(|strategy| fits(strategy)) {
            Some(strategy) if declared.is_none() || self.strategies.contains(strategy) => *strategy,
            Some(strategy) => {
                let declared = declared.map_or("", ScaleStrategy::name);
                return Err(format!(
                    "has {}; `quantization_config` has the `strategy` `{declared}`",
                    strategy.describe()
                ));
            }
            None => declared.unwrap_or(ScaleStrategy::Block),
        };
        let shape = found.filter(|_| fits(&strategy)).map(<[usize]>::to_vec);
        Ok(match strategy {
            ScaleStrategy::Tensor => (matrix, shape.unwrap_or_else(|| vec![1])),
            ScaleStrategy::Row => ([1, columns], shape.unwrap_or_else(|| vec![rows, 1])),
            ScaleStrategy::Group(group) => ([1, group], vec![rows, columns.div_ceil(group)]),
            ScaleStrategy::Block => (block, vec![rows.div_ceil(block[0]), columns.div_ceil(block[1])]),
        })
    }
}

/// The granularity of FP8 scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ScaleStrategy {
    Tensor,
    Row,
    /// A number of values in a row.
    Group(usize),
    Block,
}

impl ScaleStrategy {
    /// The granularity of an entry of `config_groups`, if its type is float.
    fn from_weights(weights: &Value) -> Option<Self> {
        if weights.get("type").is_some_and(|kind| kind != "float") {
            return None;
        }
        match weights.get("strategy")?.as_str()? {
            "tensor" => Some(Self::Tensor),
            "channel" => Some(Self::Row),
            "block" => Some(Self::Block),
            "group" => {
                let group = usize::try_from(weights.get("group_size")?.as_u64()?).ok()?;
                (group > 0).then_some(Self::Group(group))
            }
            _ => None,
        }
    }

    /// Whether `found` is the shape of such scales for a matrix.
    fn fits(self, [rows, columns]: [usize; 2], block: [usize; 2], found: &[usize]) -> bool {
        match self {
            Self::Tensor => found.len() <= 2 && found.iter().all(|&side| side == 1),
            Self::Row => found == [rows] || found == [rows, 1],
            Self::Group(group) => found == [rows, columns.div_ceil(group)],
            Self::Block => found == [rows.div_ceil(block[0]), columns.div_ceil(block[1])],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Tensor => "tensor",
            Self::Row => "channel",
            Self::Group(_) => "group",
            Self::Block => "block",
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Self::Tensor => "one scale for the tensor",
            Self::Row => "one scale per row",
            Self::Group(_) => "one scale per group of a row",
            Self::Block => "one scale per block",
        }
    }
}

/// The config's key for quantization: the current name, and compressed-tensors' first one.
pub(crate) const QUANTIZATION: [&str; 2] = ["quantization_config", "compression_config"];

fn quantization(config: &ModelConfig) -> Option<&Value> {
    QUANTIZATION.iter().find_map(|key| config.extra.get(*key).filter(|value| !value.is_null()))
}

/// Whether the config declares quantized weights.
pub(crate) fn is_quantized(config: &ModelConfig) -> bool {
    quantization(config).is_some()
}

/// Whether the weights of a group may have this type.
fn is_type(weights: &Value, kind: &str) -> bool {
    weights.get("type").is_none_or(|found| found.is_null() || found == kind)
}

/// The problem that the config has groups, but none of the type found in the file.
fn none_of(weights: &[&Value], kind: &str, what: &str) -> Option<String> {
    let none = !weights.is_empty() && !weights.iter().any(|weights| is_type(weights, kind));
    none.then(|| format!("is stored as {what}; `quantization_config` has no group of the `type` `{kind}`"))
}

/// The `group_size` of a group whose strategy is `group`.
fn group(weights: &Value) -> Option<usize> {
    if weights.get("strategy").is_some_and(|strategy| !strategy.is_null() && strategy != "group") {
        return None;
    }
    weights.get("group_size")?.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| *size > 0)
}

/// Parses `[128, 128]`, or compressed-tensors' first notation `"128x128"`; neither may be zero.
fn block(value: &Value) -> Option<[usize; 2]> {
    if let Some((rows, columns)) = value.as_str().and_then(|text| text.split_once('x')) {
        let sides = [rows, columns].map(|side| side.trim().parse::<usize>().ok().filter(|side| *side > 0));
        return sides[0].zip(sides[1]).map(|(rows, columns)| [rows, columns]);
    }
    let sides: Vec<usize> = value.as_array()?.iter().filter_map(|side| usize::try_from(side.as_u64()?).ok()).collect();
    <[usize; 2]>::try_from(sides).ok().filter(|sides| !sides.contains(&0))
}

/// The bits of a group, if its weights are packed integers.
fn declared_bits(weights: &Value) -> Option<Bits> {
    match weights.get("num_bits").and_then(Value::as_u64).filter(|_| is_type(weights, "int"))? {
        4 => Some(Bits::Four),
        // Without a type, a group of 8 bits may be one of FP8.
        8 if weights.get("type").is_some_and(|kind| kind == "int") => Some(Bits::Eight),
        _ => None,
    }
}

/// Why packed integers of a group are not supported, as the rest of a sentence.
fn unsupported_integers(weights: &Value) -> Option<String> {
    match weights.get("num_bits").and_then(Value::as_u64) {
        None | Some(4 | 8) => {}
        Some(bits) => return Some(format!("has weights of {bits} bits")),
    }
    if weights.get("symmetric") == Some(&Value::Bool(false)) {
        return Some("has weights with zero points".into());
    }
    None
}

/// The values of a second tensor for some rows of a matrix, in f32: the scales, or of `kv_b_proj` the rows of the keys.
#[derive(Debug, Default)]
pub(crate) struct Scales {
    /// The row of the second tensor with which `values` begins.
    pub(crate) first: usize,
    pub(crate) values: Vec<f32>,
}

/// Converts scales to f32.
pub(crate) fn scales(bytes: &[u8], dtype: WeightDtype) -> Vec<f32> {
    match dtype {
        WeightDtype::F32 => bytemuck::pod_collect_to_vec(bytes),
        WeightDtype::Bf16 => {
            bytes.chunks_exact(2).map(|pair| bf16::from_le_bytes([pair[0], pair[1]]).widen()).collect()
        }
        WeightDtype::F16 => bytes.chunks_exact(2).map(|pair| f16::from_le_bytes([pair[0], pair[1]]).widen()).collect(),
    }
}

/// The value of E4M3 bits (the finite variant: no infinities, and one NaN for each sign).
const fn e4m3(bits: u8) -> f32 {
    let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = ((bits >> 3) & 0xf, (bits & 7) as f32);
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0, // subnormal
        // 2^(exponent - 7), assembled from its bits, because `powi` is not const: 120 is f32's bias of 127 less 7.
        _ => (1.0 + mantissa / 8.0) * f32::from_bits((exponent as u32 + 120) << 23),
    };
    sign * magnitude
}

/// The values of all E4M3 bits.
const E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut bits = 0;
    while bits < 256 {
        table[bits] = e4m3(bits as u8);
        bits += 1;
    }
    table
};

/// A matrix of E4M3 values with one scale for each block; blocks at the edges may be partial.
pub(crate) struct Fp8<'a> {
    pub(crate) bytes: &'a [u8],
    /// The matrix row with which `bytes` begins.
    pub(crate) first: usize,
    pub(crate) columns: usize,
    pub(crate) block: [usize; 2],
    /// The scales `[ceil(rows / block), ceil(columns / block)]` for the rows in `bytes`.
    pub(crate) scales: &'a Scales,
}

impl<T: Weight> RowSource<T> for Fp8<'_> {
    fn read_row(&self, row: usize, first: usize, target: &mut [T]) -> bool {
        let [height, width] = self.block;
        let scales = &self.scales.values[(row / height - self.scales.first) * self.columns.div_ceil(width)..];
        let bytes = &self.bytes[(row - self.first) * self.columns + first..][..target.len()];
        let mut finite = true;
        for (at, (target, &bits)) in target.iter_mut().zip(bytes).enumerate() {
            *target = T::narrow(E4M3[usize::from(bits)] * scales[(first + at) / width]);
            finite &= target.finite();
        }
        finite
    }
}

/// A matrix of integers of 4 or 8 bits, eight or four to a 32-bit word, the lowest bits first, with one scale for each group
/// of a row. compressed-tensors stores them without a sign: with 4 bits 0 to 15 for -8 to 7, with 8 bits 0 to 255.
pub(crate) struct PackedIntegers<'a> {
    pub(crate) bits: Bits,
    pub(crate) bytes: &'a [u8],
    /// The matrix row with which `bytes` begins.
    pub(crate) first: usize,
    pub(crate) columns: usize,
    /// Values of a row that share a scale.
    pub(crate) group: usize,
    /// The scales `[rows, columns / group]` for the rows in `bytes`.
    pub(crate) scales: &'a Scales,
}

impl<T: Weight> RowSource<T> for PackedIntegers<'_> {
    fn read_row(&self, row: usize, first: usize, target: &mut [T]) -> bool {
        let scales = &self.scales.values[(row - self.scales.first) * (self.columns / self.group)..];
        let bytes = &self.bytes[(row - self.first) * self.columns.div_ceil(values_per_word(self.bits)) * 4..];
        let zero = i32::from(self.bits.zero());
        let mut finite = true;
        for (at, target) in (first..).zip(target) {
            // Words are little-endian. Two values of 4 bits are in a byte, the first in its low half.
            let value = match self.bits {
                Bits::Four => bytes[at / 2] >> (at % 2 * 4) & 0xf,
                Bits::Eight => bytes[at],
            };
            let value = i32::from(value) - zero;
            *target = T::narrow(value as f32 * scales[at / self.group]);
            finite &= target.finite();
        }
        finite
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The definition of the format (arXiv 2209.05433): bias 7, subnormals in steps of 2^-9, largest value 448.
    #[test]
    fn e4m3_is_as_defined() {
        for (bits, value) in [(0x00, 0.0), (0x01, 0.001_953_125), (0x08, 0.015_625), (0x38, 1.0), (0x7e, 448.0)] {
            assert_eq!(E4M3[bits], value, "{bits:#x}");
            assert_eq!(E4M3[bits | 0x80], -value, "{bits:#x}");
        }
        let positive: Vec<f32> = E4M3[..0x7f].to_vec();
        assert!(positive.windows(2).all(|pair| pair[0] < pair[1]), "values increase with their bits");
        assert!(E4M3[0x7f].is_nan() && E4M3[0xff].is_nan());
    }

    #[test]
    fn scales_belong_to_blocks_including_partial_ones() {
        // 3 x 5 in blocks of 2 x 2: 2 x 3 scales.
        let bytes = vec![0x38u8; 15];
        let scales = Scales { first: 0, values: vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0] };
        let matrix = Fp8 { bytes: &bytes, first: 0, columns: 5, block: [2, 2], scales: &scales };
        let mut line = [0.0f32; 5];
        assert!(matrix.read_row(1, 0, &mut line));
        assert_eq!(line, [1.0, 1.0, 2.0, 2.0, 3.0]);
        assert!(matrix.read_row(2, 1, &mut line[..3]));
        assert_eq!(line[..3], [4.0, 5.0, 5.0]);
        // The last row alone, and the scales of its blocks.
        let scales = Scales { first: 1, values: vec![4.0, 5.0, 6.0] };
        let last = Fp8 { bytes: &bytes[10..], first: 2, columns: 5, block: [2, 2], scales: &scales };
        assert!(last.read_row(2, 0, &mut line));
        assert_eq!(line, [4.0, 4.0, 5.0, 5.0, 6.0]);
        let mut target = [bf16::ZERO];
        let one = Scales { first: 0, values: vec![1.0] };
        let nan = Fp8 { bytes: &[0x7f], first: 0, columns: 1, block: [2, 2], scales: &one };
        assert!(!nan.read_row(0, 0, &mut target));
    }

    #[test]
    fn the_low_nibble_comes_first() {
        // Two rows of ten values: two words a row, the second with two values in it.
        let mut bytes = vec![0u8; 16];
        (bytes[0], bytes[4]) = (0xf7, 0x98);
        (bytes[8], bytes[12]) = (0x80, 0x0a);
        let scales = Scales { first: 0, values: vec![1.0, 2.0, 4.0, 8.0] };
        let matrix =
            PackedIntegers { bits: Bits::Four, bytes: &bytes, first: 0, columns: 10, group: 5, scales: &scales };
        let mut line = [0.0f32; 10];
        assert!(matrix.read_row(0, 0, &mut line));
        assert_eq!(line, [-1.0, 7.0, -8.0, -8.0, -8.0, -16.0, -16.0, -16.0, 0.0, 2.0]);
        assert!(matrix.read_row(1, 0, &mut line));
        assert_eq!(line[..2], [-32.0, 0.0]);
        assert_eq!(line[8..], [16.0, -64.0]);
        // The second row alone.
        let scales = Scales { first: 1, values: vec![4.0, 8.0] };
        let second =
            PackedIntegers { bits: Bits::Four, bytes: &bytes[8..], first: 1, columns: 10, group: 5, scales: &scales };
        assert!(second.read_row(1, 0, &mut line));
        assert_eq!((line[0], line[9]), (-32.0, -64.0));
    }

    #[test]
    fn a_value_of_8_bits_is_a_byte_without_sign() {
        let scales = Scales { first: 0, values: vec![0.5, -2.0] };
        let bytes = [0, 1, 128, 255, 129, 127, 0, 0];
        let matrix =
            PackedIntegers { bits: Bits::Eight, bytes: &bytes, first: 0, columns: 6, group: 3, scales: &scales };
        let mut line = [0.0f32; 6];
        assert!(matrix.read_row(0, 0, &mut line));
        assert_eq!(line, [-64.0, -63.5, 0.0, -254.0, -2.0, 2.0]);
    }

    #[test]
    fn the_scheme_is_read_from_the_config() {
        let mut config = ModelConfig::preset("moonlight-16b-a3b").unwrap();
        assert_eq!(QuantScheme::for_config(&config), QuantScheme::default());
        assert_eq!(QuantScheme::for_config(&config).block(), [128, 128]);
        let mut scheme = |value: Value| {
            config.extra.insert("quantization_config".into(), value);
            QuantScheme::for_config(&config)
        };
        let fp8 = scheme(json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 32]}));
        assert_eq!((fp8.method.as_deref(), fp8.block()), (Some("fp8"), [64, 32]));
        let packed = |weights: Value| json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}});
        assert_eq!(scheme(packed(json!({"num_bits": 4, "symmetric": true}))).packed_problem, None);
        assert!(scheme(packed(json!({"num_bits": 4, "symmetric": false}))).packed_problem.is_some());
        assert!(scheme(packed(json!({"num_bits": 3}))).packed_problem.is_some());
        for structure in [json!([128, 64]), json!("128x64")] {
            assert_eq!(scheme(packed(json!({"num_bits": 8, "block_structure": structure}))).block(), [128, 64]);
        }
        let int8 = scheme(packed(json!({"num_bits": 8, "type": "int"})));
        assert_eq!((int8.packed_problem.as_deref(), int8.packed_bits(64, Some(16))), (None, Ok(Bits::Eight)));
        assert!(
            int8.packed_bits(64, Some(8)).unwrap_err().contains("weights of 4 bits; `quantization_config` has the")
        );
        // A row of one word, and one that does not fit any bits.
        assert_eq!((int8.packed_bits(4, Some(1)), int8.packed_bits(64, Some(7))), (Ok(Bits::Eight), Ok(Bits::Eight)));
        assert_eq!(QuantScheme::default().packed_bits(64, Some(16)), Ok(Bits::Eight));
        let mixed = scheme(packed(json!({"num_bits": 8, "type": "float"})));
        assert!(mixed.packed_problem.unwrap().contains("no group of the `type` `int`"));
        assert_eq!(mixed.fp8_problem, None);
        let int4 = scheme(packed(json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64})));
        assert!(int4.fp8_problem.is_some() && int4.check_group(64).is_ok());
        assert!(int4.check_group(32).unwrap_err().contains("has the `group_size` 64"));
    }
}

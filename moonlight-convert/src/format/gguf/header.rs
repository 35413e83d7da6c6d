//! The beginning of a file: metadata and the list of tensors, parsed without trust, and written by the inverse.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;

use super::block::BlockType;
use super::value::{Input, Metadata, Value, write_string};
use crate::error::Bytes;
use crate::format::index::unprintable;
use crate::printable::{Printable, printable};

const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is written. Version 2 has the same bytes.
const VERSION: u32 = 3;
/// Size limit of a header in bytes, as of a safetensors header. The largest vocabularies need some 15 MB.
const LONGEST_HEADER: u64 = 100_000_000;
/// More keys than any file has; a lookup takes time in their number.
const MOST_KEYS: u64 = 1 << 12;
/// The longest name of a key or tensor in bytes, from the format's description of keys.
const LONGEST_NAME: usize = (1 << 16) - 1;
/// The most dimensions of a tensor, `GGML_MAX_DIMS`.
const HIGHEST_RANK: u32 = 4;
const ALIGNMENT_KEY: &str = "general.alignment";
/// Without the key.
const ALIGNMENT: u64 = 32;

/// Everything before the values of the tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufHeader {
    /// 2 or 3.
    pub version: u32,
    /// The metadata.
    pub metadata: Metadata,
    /// The tensors in the order of the file's list.
    pub tensors: Vec<TensorInfo>,
    /// Every offset is a multiple of it: `general.alignment`, or 32.
    pub alignment: u64,
    /// Position in the file of the first byte of the tensors' values.
    pub data_start: u64,
}

/// A tensor of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name, such as `blk.0.attn_norm.weight`.
    pub name: String,
    /// Innermost dimension first, the reverse of the usual order.
    pub shape: Vec<u64>,
    /// How the values are stored.
    pub block_type: BlockType,
    /// Distance in bytes from the header's [`data_start`](GgufHeader::data_start).
    pub offset: u64,
}

impl TensorInfo {
    /// Number of bytes of the values; `None` if it overflows, or if a row is not a number of complete blocks.
    pub fn bytes(&self) -> Option<u64> {
        let row = self.shape.first().copied().unwrap_or(1);
        let (values, bytes) = (self.block_type.values() as u64, self.block_type.bytes() as u64);
        if row % values != 0 {
            return None;
        }
        let elements = self.shape.iter().try_fold(1u64, |product, size| product.checked_mul(*size))?;
        (elements / values).checked_mul(bytes)
    }
}

impl GgufHeader {
    /// A header for tensors that follow each other in this order; their offsets are set.
    ///
    /// # Errors
    ///
    /// A sentence about a tensor whose size is invalid, or about the alignment.
    pub fn lay_out(metadata: Metadata, mut tensors: Vec<TensorInfo>) -> Result<Self, String> {
        let alignment = alignment(&metadata)?;
        let mut offset = 0u64;
        for tensor in &mut tensors {
            tensor.offset = offset;
            let next = checked_bytes(tensor)?;
            offset = offset
                .checked_add(next)
                .and_then(|end| end.checked_next_multiple_of(alignment))
                .ok_or_else(|| format!("`{}` ends beyond 2^64 bytes", printable(&tensor.name)))?;
        }
        let mut header = Self { version: VERSION, metadata, tensors, alignment, data_start: 0 };
        header.data_start = write_header(&header).len() as u64;
        Ok(header)
    }

    /// Parses the header of a file of `length` bytes, and checks that the file contains every tensor. The error is the
    /// rest of a sentence that begins with the file's name.
    ///
    /// # Errors
    ///
    /// See above: another version or byte order; a length, count or nesting that the file cannot have; names that
    /// repeat; block types that are not supported; tensors that overlap, leave gaps or end beyond the file.
    pub fn parse(reader: impl Read, length: u64) -> Result<Self, String> {
        let mut input = Input::new(reader, length.min(LONGEST_HEADER));
        let header = Self::read(&mut input).map_err(|problem| match length > LONGEST_HEADER {
            true => format!("{problem} (a header may have {LONGEST_HEADER} bytes)"),
            false => problem,
        })?;
        header.check_names()?;
        header.check_ranges(length)?;
        Ok(header)
    }

    /// The length of the shortest file with this header, for fuzzing; `None` if the header is invalid.
    #[doc(hidden)]
    pub fn claimed_length(header: &[u8]) -> Option<u64> {
        let header = Self::read(&mut Input::new(header, header.len() as u64)).ok()?;
        let ends = header.tensors.iter().map(|tensor| tensor.offset.checked_add(checked_bytes(tensor).ok()?));
        let end = ends.collect::<Option<Vec<u64>>>()?.into_iter().max().unwrap_or(0);
        header.data_start.checked_add(end)
    }

    fn read<R: Read>(input: &mut Input<R>) -> Result<Self, String> {
        let truncated = |problem: String| format!("is truncated or not a GGUF file: its header claims {problem}");
        let magic: [u8; 4] = input.array().map_err(truncated)?;
        if magic != MAGIC {
            return Err(format!("is not a GGUF file: it begins with `{}`", magic.escape_ascii()));
        }
        let version = input.u32().map_err(truncated)?;
        match version {
            2 | 3 => (),
            1 => return Err("has GGUF version 1, which is not supported; versions 2 and 3 are".into()),
            _ if matches!(version.swap_bytes(), 1..=0xffff) => {
                return Err("is a big-endian GGUF file, which is not supported; little-endian files are".into());
            }
            _ => return Err(format!("has GGUF version {version}, which is not supported; versions 2 and 3 are")),
        }
        let [tensor_count, key_count] = [input.u64().map_err(truncated)?, input.u64().map_err(truncated)?];
        if key_count > MOST_KEYS {
            return Err(format!("has {key_count} metadata keys, more than the limit of {MOST_KEYS}"));
        }
        // A key has at least a length, a type and one byte of value.
        let mut metadata = Vec::with_capacity(input.expect(key_count, 13).map_err(truncated)?);
        for _ in 0..key_count {
            let key = input.string().map_err(truncated)?;
            let value = Value::read(input)
                .map_err(|problem| format!("has invalid metadata: `{}` claims {problem}", Printable(&key)))?;
            metadata.push((key, value));
        }
        // A tensor has at least a name's length, its rank, one type and one offset.
        let mut tensors = Vec::with_capacity(input.expect(tensor_count, 24).map_err(truncated)?);
        let mut unsupported: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for _ in 0..tensor_count {
            let name = input.string().map_err(truncated)?;
            let (tensor, code) = Self::read_tensor(input, name)?;
            match BlockType::from_code(code) {
                Ok(block_type) => tensors.push(TensorInfo { block_type, ..tensor }),
                Err(kind) => unsupported.entry(kind).or_default().push(tensor.name),
            }
        }
        if !unsupported.is_empty() {
            return Err(describe_unsupported(&unsupported));
        }
        let metadata = Metadata::from_unique(metadata);
        let alignment = alignment(&metadata)?;
        let data_start = input.at().next_multiple_of(alignment);
        Ok(Self { version, metadata, tensors, alignment, data_start })
    }

    /// A tensor of the list without its type, and the number of its type.
    fn read_tensor<R: Read>(input: &mut Input<R>, name: String) -> Result<(TensorInfo, u32), String> {
        let invalid =
            |problem: String| format!("has an invalid header: tensor `{}` claims {problem}", Printable(&name));
        let rank = input.u32().map_err(invalid)?;
        if rank > HIGHEST_RANK {
            return Err(invalid(format!("{rank} dimensions, more than the limit of {HIGHEST_RANK}")));
        }
        let shape: Vec<u64> = (0..rank).map(|_| input.u64()).collect::<Result<_, _>>().map_err(invalid)?;
        let code = input.u32().map_err(invalid)?;
        let offset = input.u64().map_err(invalid)?;
        Ok((TensorInfo { name, shape, block_type: BlockType::F32, offset }, code))
    }

    fn check_names(&self) -> Result<(), String> {
        let mut keys = HashSet::new();
        let mut names = HashSet::new();
        let metadata = self.metadata.iter().map(|(key, _)| ("the metadata key", key, keys.insert(key)));
        let tensors = self.tensors.iter().map(|tensor| ("tensor", tensor.name.as_str(), names.insert(&tensor.name)));
        for (what, name, new) in metadata.chain(tensors) {
            if let Some(problem) = unprintable(name) {
                return Err(format!("has an invalid header: {problem}"));
            }
            if name.is_empty() || name.len() > LONGEST_NAME {
                return Err(format!("has an invalid header: {what} has a name of {} bytes", name.len()));
            }
            if !new {
                return Err(format!("has an invalid header: {what} `{name}` is listed twice"));
            }
        }
        Ok(())
    }

    /// Checks that the tensors follow each other with less than one alignment between two of them, and end with the
    /// file.
    fn check_ranges(&self, length: u64) -> Result<(), String> {
        let mut by_offset: Vec<&TensorInfo> = self.tensors.iter().collect();
        by_offset.sort_by_key(|tensor| tensor.offset);
        let mut end = 0u64; // of the tensor before, without its padding
        for (at, tensor) in by_offset.iter().enumerate() {
            let name = printable(&tensor.name);
            let bytes = checked_bytes(tensor).map_err(|problem| format!("has an invalid header: {problem}"))?;
            if tensor.offset % self.alignment != 0 {
                let (offset, alignment) = (tensor.offset, self.alignment);
                return Err(format!(
                    "has an invalid header: the offset {offset} of `{name}` is not a multiple of the alignment {alignment}"
                ));
            }
            if tensor.offset < end {
                let before = printable(&by_offset[at - 1].name);
                return Err(format!("has an invalid header: the values of `{before}` and `{name}` overlap"));
            }
            if tensor.offset - end >= self.alignment {
                let gap = tensor.offset - end;
                return Err(format!("has an invalid header: {gap} bytes before `{name}` belong to no tensor"));
            }
            end = tensor
                .offset
                .checked_add(bytes)
                .filter(|end| end.checked_add(self.data_start).is_some_and(|end| end <= i64::MAX as u64))
                .ok_or_else(|| format!("has an invalid header: `{name}` ends beyond 2^63 bytes"))?;
        }
        // A file without tensors may end before the padding of its header.
        let end = if self.tensors.is_empty() { self.data_start.min(length) } else { self.data_start + end };
        if length < end {
            return Err(format!("is truncated: its header claims {end} bytes ({}), and it has {length}", Bytes(end)));
        }
        if length - end >= self.alignment {
            return Err(format!("contains {} bytes that its header does not account for", length - end));
        }
        Ok(())
    }
}

/// `unsupported`: the names of tensors by the name of their type.
fn describe_unsupported(unsupported: &BTreeMap<String, Vec<String>>) -> String {
    let describe = |(kind, names): (&String, &Vec<String>)| match names.len() {
        1 => format!("`{}` as {kind}", printable(&names[0])),
        count => format!("`{}` and {} more as {kind}", printable(&names[0]), count - 1),
    };
    // A hostile file can name any number of types.
    let list: Vec<String> = unsupported.iter().take(8).map(describe).collect();
    let supported = BlockType::ALL.map(|block_type| block_type.to_string()).join(", ");
    format!("contains {}, which is not supported; supported types are {supported}", list.join(", "))
}

fn checked_bytes(tensor: &TensorInfo) -> Result<u64, String> {
    let name = printable(&tensor.name);
    if tensor.shape.contains(&0) {
        return Err(format!("`{name}` has no values"));
    }
    let values = tensor.block_type.values() as u64;
    if let Some(row) = tensor.shape.first().filter(|row| *row % values != 0) {
        let block_type = tensor.block_type;
        return Err(format!("`{name}` has rows of {row} values, and {block_type} needs a multiple of {values}"));
    }
    if !tensor.block_type.is_quantized() || !tensor.shape.is_empty() {
        return tensor.bytes().ok_or_else(|| format!("the size of `{name}` overflows"));
    }
    Err(format!("`{name}` has no dimensions, and {} needs rows", tensor.block_type))
}

fn alignment(metadata: &Metadata) -> Result<u64, String> {
    let alignment = match metadata.get(ALIGNMENT_KEY) {
        None => return Ok(ALIGNMENT),
        Some(Value::U32(alignment)) => u64::from(*alignment),
        Some(other) => {
            return Err(format!("has invalid metadata: `{ALIGNMENT_KEY}` is of type {}, not u32", other.kind()));
        }
    };
    match alignment.is_power_of_two() {
        true => Ok(alignment),
        false => Err(format!("has invalid metadata: `{ALIGNMENT_KEY}` is {alignment}, which is not a power of two")),
    }
}

/// The bytes of a file up to the values of its tensors, including the padding: the inverse of [`GgufHeader::parse`].
pub fn write_header(header: &GgufHeader) -> Vec<u8> {
    let mut output = Vec::new();
    output.extend(MAGIC);
    output.extend(header.version.to_le_bytes());
    output.extend((header.tensors.len() as u64).to_le_bytes());
    output.extend((header.metadata.len() as u64).to_le_bytes());
    for (key, value) in header.metadata.iter() {
        write_string(key, &mut output);
        value.write(&mut output);
    }
    for tensor in &header.tensors {
        write_string(&tensor.name, &mut output);
        output.extend((tensor.shape.len() as u32).to_le_bytes());
        output.extend(tensor.shape.iter().flat_map(|size| size.to_le_bytes()));
        output.extend(tensor.block_type.code().to_le_bytes());
        output.extend(tensor.offset.to_le_bytes());
    }
    output.resize((output.len() as u64).next_multiple_of(header.alignment) as usize, 0);
    output
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    use super::super::value::Array;
    use super::*;

    fn info(name: &str, shape: &[u64], block_type: BlockType) -> TensorInfo {
        TensorInfo { name: name.into(), shape: shape.to_vec(), block_type, offset: 0 }
    }

    /// The bytes of a file with zeros as values.
    fn file(metadata: &[(&str, Value)], tensors: Vec<TensorInfo>) -> Vec<u8> {
        let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        let header = GgufHeader::lay_out(metadata, tensors).unwrap();
        let mut bytes = write_header(&header);
        let end = header.tensors.last().map_or(0, |last| last.offset + last.bytes().unwrap());
        bytes.resize(bytes.len() + end as usize, 0);
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<GgufHeader, String> {
        GgufHeader::parse(bytes, bytes.len() as u64)
    }

    fn two_tensors() -> Vec<u8> {
        let tensors = vec![info("a", &[4, 3], BlockType::F32), info("b", &[64], BlockType::Q8_0)];
        file(&[("general.architecture", "llama".into())], tensors)
    }

    /// The bytes with those at the first occurrence of `from` replaced.
    fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
        let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
        [&bytes[..at], to, &bytes[at + from.len()..]].concat()
    }

    #[test]
    fn a_file_is_laid_out_with_padding() {
        let bytes = two_tensors();
        let header = parse(&bytes).unwrap();
        assert_eq!((header.version, header.alignment, header.data_start % 32), (3, 32, 0));
        // 48 bytes of the first tensor, and 16 of padding.
        assert_eq!(header.tensors.iter().map(|tensor| tensor.offset).collect::<Vec<_>>(), [0, 64]);
        assert_eq!(header.tensors[1].bytes(), Some(68));
        // Version 2 has the same bytes; the padding after the last tensor may be absent or present.
        let second = replaced(&bytes, &[b'F', 3, 0, 0, 0], &[b'F', 2, 0, 0, 0]);
        assert_eq!(parse(&second).unwrap().version, 2);
        assert!(parse(&[bytes.as_slice(), &[0; 28]].concat()).is_ok());
    }

    #[test]
    fn what_is_wrong_with_a_file_is_named() {
        let bytes = two_tensors();
        let wrong = |from: &[u8], to: &[u8]| parse(&replaced(&bytes, from, to)).unwrap_err();
        let name = |name: &[u8]| [&(name.len() as u64).to_le_bytes(), name].concat();
        let shape = |sizes: &[u64]| -> Vec<u8> {
            let rank = (sizes.len() as u32).to_le_bytes();
            rank.into_iter().chain(sizes.iter().flat_map(|size| size.to_le_bytes())).collect()
        };
        let offset = |kind: u32, offset: u64| [&kind.to_le_bytes()[..], &offset.to_le_bytes()].concat();
        let key = |metadata: &[(&str, Value)]| parse(&file_with(metadata)).unwrap_err();
        let text = [
            parse(b"").unwrap_err(),
            parse(b"GGUF\x03").unwrap_err(),
            parse(b"PK\x03\x04 and more bytes").unwrap_err(),
            wrong(&[b'F', 3, 0, 0, 0], &[b'F', 1, 0, 0, 0]),
            wrong(&[b'F', 3, 0, 0, 0], &[b'F', 4, 0, 0, 0]),
            wrong(&[b'F', 3, 0, 0, 0], &[b'F', 0, 0, 0, 3]),
            wrong(&[b'F', 3, 0, 0, 0, 2], &[b'F', 3, 0, 0, 0, 3]),
            wrong(&[b'F', 3, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0], &[b'F', 3, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0x80]),
            wrong(&name(b"b"), &name(b"a")),
            wrong(&name(b"b"), &name(b"\x1b")),
            wrong(&name(b"b"), &name(b"")),
            wrong(&name(b"b"), &name(b"\xff")),
            wrong(&name(b"llama"), &[&u64::MAX.to_le_bytes()[..], b"llama"].concat()),
            wrong(&shape(&[64]), &shape(&[65])),
            wrong(&shape(&[64]), &shape(&[0])),
            wrong(&shape(&[64]), &shape(&[1; 5])),
            wrong(&shape(&[64]), &shape(&[1 << 32, 1 << 32])),
            wrong(&shape(&[64]), &shape(&[1 << 32, 1 << 31])),
            wrong(&shape(&[64]), &shape(&[96])),
            wrong(&shape(&[64]), &shape(&[32])),
            wrong(&shape(&[64]), &shape(&[])),
            wrong(&offset(8, 64), &offset(8, 0)),
            wrong(&offset(8, 64), &offset(8, 32)),
            wrong(&offset(8, 64), &offset(8, 65)),
            wrong(&offset(8, 64), &offset(8, 128)),
            wrong(&offset(8, 64), &offset(8, u64::MAX - 31)),
            wrong(&offset(8, 64), &offset(16, 64)),
            wrong(&offset(8, 64), &offset(77, 64)),
            key(&[("general.alignment", 48u32.into())]),
            key(&[("general.alignment", 0u32.into())]),
            key(&[("general.alignment", "32".into())]),
            parse(&bytes[..bytes.len() - 1]).unwrap_err(),
            parse(&[bytes.as_slice(), &[0; 60]].concat()).unwrap_err(),
            parse(&nested(5)).unwrap_err(),
        ];
        assert!(parse(&nested(4)).is_ok());
        insta::assert_snapshot!(text.join("\n"));
    }

    /// A file without tensors; its alignment may be invalid.
    fn file_with(metadata: &[(&str, Value)]) -> Vec<u8> {
        let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        write_header(&GgufHeader { version: 3, metadata, tensors: vec![], alignment: 32, data_start: 0 })
    }

    fn nested(depth: usize) -> Vec<u8> {
        let array = (1..depth).fold(Array::U8(vec![7]), |array, _| Array::Array(vec![array]));
        file_with(&[("key", Value::Array(array))])
    }

    #[test]
    fn a_file_of_vocabulary_without_tensors_is_read() {
        let bytes = file_with(&[("tokenizer.ggml.model", "gpt2".into())]);
        assert_eq!(parse(&bytes).unwrap().metadata.str("tokenizer.ggml.model"), Ok(Some("gpt2")));
        // ggml writes no padding if no tensor follows.
        let header = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
        assert!(parse(&bytes[..header]).is_ok());
    }

    fn numbers() -> impl Strategy<Value = Array> {
        prop_oneof![
            vec(any::<u8>(), 0..4).prop_map(Array::U8),
            vec(any::<i8>(), 0..4).prop_map(Array::I8),
            vec(any::<u16>(), 0..4).prop_map(Array::U16),
            vec(any::<i16>(), 0..4).prop_map(Array::I16),
            vec(any::<u32>(), 0..4).prop_map(Array::U32),
            vec(any::<i32>(), 0..4).prop_map(Array::I32),
            vec(-1e9f32..1e9, 0..4).prop_map(Array::F32),
            vec(any::<bool>(), 0..4).prop_map(Array::Bool),
            vec(".*", 0..4).prop_map(Array::String),
            vec(any::<u64>(), 0..4).prop_map(Array::U64),
            vec(any::<i64>(), 0..4).prop_map(Array::I64),
            vec(-1e9f64..1e9, 0..4).prop_map(Array::F64),
        ]
    }

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<u8>().prop_map(Value::U8),
            any::<i8>().prop_map(Value::I8),
            any::<u16>().prop_map(Value::U16),
            any::<i16>().prop_map(Value::I16),
            any::<u32>().prop_map(Value::U32),
            any::<i32>().prop_map(Value::I32),
            (-1e9f32..1e9).prop_map(Value::F32),
            any::<bool>().prop_map(Value::Bool),
            ".*".prop_map(Value::String),
            any::<u64>().prop_map(Value::U64),
            any::<i64>().prop_map(Value::I64),
            (-1e9f64..1e9).prop_map(Value::F64),
            numbers().prop_map(Value::Array),
            vec(numbers(), 0..3).prop_map(|arrays| Value::Array(Array::Array(arrays))),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn parsing_is_the_inverse_of_writing(
            metadata in btree_map("[a-z_.]{1,20}", value(), 0..6),
            tensors in btree_map("[a-z0-9_.]{1,20}", (0..BlockType::ALL.len(), vec(1u64..4, 1..4)), 0..6),
            alignment in proptest::option::of(0u32..8),
        ) {
            let mut metadata: Metadata = metadata.into_iter().collect();
            if let Some(alignment) = alignment {
                metadata.insert(ALIGNMENT_KEY, 1u32 << alignment);
            }
            let tensors = tensors.into_iter().map(|(name, (kind, mut shape))| {
                let block_type = BlockType::ALL[kind];
                shape[0] *= block_type.values() as u64;
                TensorInfo { name, shape, block_type, offset: 0 }
            });
            let header = GgufHeader::lay_out(metadata, tensors.collect()).unwrap();
            let mut bytes = write_header(&header);
            let end = header.tensors.last().map_or(0, |last| last.offset + last.bytes().unwrap());
            prop_assert_eq!(bytes.len() as u64, header.data_start);
            bytes.resize(bytes.len() + end as usize, 0);
            prop_assert_eq!(parse(&bytes).unwrap(), header);
        }
    }
}

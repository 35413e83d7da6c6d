//! Burn's own weight file, `model.bpk`: reading and writing its header.
//!
//! The format and its constants are those of the `burn-pack` crate: a header, descriptors in CBOR, and the tensors,
//! each aligned to 256 bytes. burn-pack's writer takes one complete tensor after the other. This module only computes
//! the layout, so that many threads can write parts of tensors. burn-pack's reader validates a file before its
//! descriptors are used.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use burn::tensor::DType;
use burn_pack::{HEADER_SIZE, Header, MAX_FILE_SIZE, MAX_METADATA_SIZE, TENSOR_ALIGNMENT, aligned_data_section_start};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::format::index::unprintable;
use crate::format::tensor_entry::TensorEntry;
use crate::printable::Printable;

/// The file's name in a checkpoint.
pub(crate) const BURNPACK: &str = "model.bpk";

/// Nesting limit for descriptors; burn-pack's reader has a limit of 128.
const DEEPEST: usize = 16;

/// The descriptors, as burn-pack writes them.
#[derive(Debug, Serialize, Deserialize)]
struct Descriptors {
    tensors: BTreeMap<String, Descriptor>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Descriptor {
    dtype: DType,
    shape: Vec<u64>,
    /// Relative to the start of the data section.
    data_offsets: (u64, u64),
    #[serde(default, skip_serializing_if = "Option::is_none")]
    param_id: Option<u64>,
}

/// A tensor to be written.
pub(crate) struct PlannedTensor {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: u64,
}

/// The layout of a file to be written.
#[derive(Debug)]
pub(crate) struct FileLayout {
    /// All bytes before the tensors.
    pub(crate) header: Vec<u8>,
    /// The offset of each tensor in the file.
    pub(crate) starts: Vec<u64>,
    /// Size of the file in bytes.
    pub(crate) length: u64,
}

/// Computes the layout. The error is the rest of a sentence that begins with the file's name.
pub(crate) fn lay_out_tensors(entries: &[PlannedTensor]) -> Result<FileLayout, String> {
    let mut tensors = BTreeMap::new();
    let mut starts = Vec::with_capacity(entries.len());
    let mut end = 0u64;
    for entry in entries {
        let start = end.next_multiple_of(TENSOR_ALIGNMENT);
        end = start + entry.bytes;
        starts.push(start);
        let shape = entry.shape.iter().map(|&size| size as u64).collect();
        let descriptor = Descriptor { dtype: entry.dtype, shape, data_offsets: (start, end), param_id: None };
        tensors.insert(entry.name.clone(), descriptor);
    }
    let metadata = [("format", "burnpack"), ("producer", "moonlight-convert")];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let mut cbor = Vec::new();
    ciborium::into_writer(&Descriptors { tensors, metadata }, &mut cbor)
        .map_err(|error| format!("cannot be described: {error}"))?;
    let size = u32::try_from(cbor.len()).ok().filter(|&size| size <= MAX_METADATA_SIZE);
    let size = size.ok_or("has more tensors than a burnpack file can describe")?;
    let data = aligned_data_section_start(cbor.len());
    let length = data as u64 + end;
    if length > MAX_FILE_SIZE {
        return Err(format!("would have {length} bytes, more than the {MAX_FILE_SIZE} that burn-pack reads"));
    }
    let mut header = Header::new(size).into_bytes().to_vec();
    header.extend_from_slice(&cbor);
    header.resize(data, 0);
    // Descriptors count from the start of the data section, the caller from that of the file.
    for start in &mut starts {
        *start += data as u64;
    }
    Ok(FileLayout { header, starts, length })
}

/// The tensors of a file, with ranges relative to its start. The error is the rest of a sentence that begins with the
/// file's name.
pub(crate) fn read(path: &Path) -> Result<Vec<TensorEntry>, String> {
    // burn-pack checks the header, the number of tensors, and that every range is in the file and has the length that
    // its dtype and shape require. It does not check that ranges are disjoint; that is done below.
    burn_pack::Reader::from_file_exact(path)
        .map_err(|error| format!("is not a burnpack file: {}", Printable(error)))?;
    let cannot = |error: std::io::Error| format!("cannot be read: {error}");
    let mut file = File::open(path).map_err(cannot)?;
    let mut header = [0u8; HEADER_SIZE];
    file.read_exact(&mut header).map_err(cannot)?;
    let header =
        Header::from_bytes(&header).map_err(|error| format!("is not a burnpack file: {}", Printable(error)))?;
    let size = header.metadata_size as usize;
    let reader = std::io::BufReader::new(file.take(size as u64));
    let descriptors: Descriptors = ciborium::de::from_reader_with_recursion_limit(reader, DEEPEST)
        .map_err(|error| format!("has an invalid header: {}", Printable(error)))?;
    let data = aligned_data_section_start(size);
    let mut tensors: Vec<TensorEntry> = descriptors
        .tensors
        .into_iter()
        .map(|(name, descriptor)| {
            if let Some(problem) = unprintable(&name) {
                return Err(format!("has an invalid header: {problem}"));
            }
            let (start, end) = descriptor.data_offsets;
            let offset = |at: u64| usize::try_from(at).ok().and_then(|at| at.checked_add(data));
            let range = offset(start).zip(offset(end)).map(|(start, end)| start..end);
            let shape = descriptor.shape.iter().map(|&size| usize::try_from(size).ok()).collect();
            let dtype =
                dtype(descriptor.dtype).ok_or_else(|| format!("contains `{name}` as {:?}", descriptor.dtype))?;
            let (range, shape) = range.zip(shape).ok_or_else(|| format!("has an invalid offset for `{name}`"))?;
            Ok(TensorEntry { name, dtype: dtype.into(), shape, range })
        })
        .collect::<Result<_, String>>()?;
    tensors.sort_by_key(|tensor| tensor.range.start);
    match tensors.windows(2).find(|pair| pair[1].range.start < pair[0].range.end) {
        None => Ok(tensors),
        Some(pair) => Err(format!("has overlapping ranges for `{}` and `{}`", pair[0].name, pair[1].name)),
    }
}

/// Burn's dtype in the terms of safetensors; `None` for dtypes that no weight has.
fn dtype(dtype: DType) -> Option<Dtype> {
    match dtype {
        DType::F64 => Some(Dtype::F64),
        DType::F32 => Some(Dtype::F32),
        DType::F16 => Some(Dtype::F16),
        DType::BF16 => Some(Dtype::BF16),
        DType::I64 => Some(Dtype::I64),
        DType::I32 => Some(Dtype::I32),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use burn_pack::{Bytes, Tensor, Writer};

    use super::*;

    /// The header equals that of burn-pack's own writer, byte for byte.
    #[test]
    fn the_header_equals_that_of_burn_pack() {
        let shapes: [(&str, DType, Vec<usize>); 3] = [
            ("layers.0.norm", DType::F32, vec![3]),
            ("embed", DType::BF16, vec![5, 7]),
            ("layers.0.experts", DType::BF16, vec![2, 3, 50]),
        ];
        let bytes = |dtype: DType, shape: &[usize]| dtype.size() * shape.iter().product::<usize>();
        let entries: Vec<PlannedTensor> = shapes
            .iter()
            .map(|(name, dtype, shape)| PlannedTensor {
                name: (*name).into(),
                dtype: *dtype,
                shape: shape.clone(),
                bytes: bytes(*dtype, shape) as u64,
            })
            .collect();
        let ours = lay_out_tensors(&entries).unwrap();
        let tensors = shapes.iter().zip(1u8..).map(|((name, dtype, shape), fill)| {
            let data = Bytes::from_bytes_vec(vec![fill; bytes(*dtype, shape)]);
            Tensor::new((*name).into(), *dtype, shape.clone(), None, data)
        });
        let theirs = Writer::new(tensors.collect())
            .with_metadata("format", "burnpack")
            .with_metadata("producer", "moonlight-convert")
            .into_bytes()
            .unwrap();
        assert_eq!(ours.length, theirs.len() as u64);
        assert_eq!(ours.header, theirs[..ours.header.len()]);
        for (fill, &start) in (1u8..).zip(&ours.starts) {
            assert_eq!(theirs[start as usize], fill);
            assert_ne!(theirs[start as usize - 1], fill);
        }

        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &theirs[..]).unwrap();
        let read = read(file.path()).unwrap();
        for ((name, _, shape), start) in shapes.iter().zip(ours.starts) {
            let tensor = read.iter().find(|tensor| tensor.name == *name).unwrap();
            assert_eq!((&tensor.shape, tensor.range.start as u64), (shape, start));
        }
    }

    #[test]
    fn inconsistent_files_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let problem = |bytes: &[u8]| {
            std::fs::write(file.path(), bytes).unwrap();
            read(file.path()).unwrap_err()
        };
        assert!(problem(b"").contains("is not a burnpack file"));
        assert!(problem(&[0; 300]).contains("is not a burnpack file"));
        let entry = PlannedTensor { name: "a".into(), dtype: DType::F32, shape: vec![4], bytes: 16 };
        let whole = lay_out_tensors(&[entry]).unwrap();
        assert!(problem(&whole.header).contains("truncated"), "the tensor is missing");
        let mut huge = whole.header.clone();
        huge[6..10].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(problem(&huge).contains("exceeds maximum"));
        let descriptor = |start: u64, end: u64, dtype: DType| Descriptor {
            dtype,
            shape: vec![(end - start) / dtype.size() as u64],
            data_offsets: (start, end),
            param_id: None,
        };
        let with = |tensors: [(&str, Descriptor); 2]| {
            let tensors = tensors.map(|(name, descriptor)| (name.to_owned(), descriptor)).into();
            let mut cbor = Vec::new();
            ciborium::into_writer(&Descriptors { tensors, metadata: BTreeMap::new() }, &mut cbor).unwrap();
            let mut bytes = Header::new(cbor.len() as u32).into_bytes().to_vec();
            bytes.extend_from_slice(&cbor);
            bytes.resize(aligned_data_section_start(cbor.len()) + 512, 0);
            bytes
        };
        let apart = with([("a", descriptor(0, 256, DType::F32)), ("b", descriptor(256, 512, DType::F32))]);
        std::fs::write(file.path(), apart).unwrap();
        assert_eq!(read(file.path()).unwrap().len(), 2);
        let overlap = with([("a", descriptor(0, 256, DType::F32)), ("b", descriptor(128, 512, DType::F32))]);
        assert!(problem(&overlap).contains("has overlapping ranges for `a` and `b`"));
        let bytes = with([("a", descriptor(0, 256, DType::F32)), ("b", descriptor(256, 512, DType::U8))]);
        assert!(problem(&bytes).contains("contains `b` as U8"));
    }
}

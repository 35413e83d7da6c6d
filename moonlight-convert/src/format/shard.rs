//! One weight file, safetensors or burnpack: its header, validated before any use, and its bytes.

use std::collections::HashSet;
use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::tensor::{self, TensorInfo};
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::error::Bytes;
use crate::format::burnpack;
use crate::format::gguf::{self, GgufHeader};
use crate::format::index::unprintable;
use crate::format::tensor_entry::TensorEntry;
use crate::io::confined_dir::open_plain;
use crate::io::read_at::read_exact_at;
use crate::printable::Printable;

/// A file begins with the length of its header, in this many bytes.
const LENGTH: usize = 8;
/// Size limit of a header in bytes, the same as in the safetensors library.
const LONGEST_HEADER: u64 = 100_000_000;
/// The most dimensions of a tensor; PyTorch's own limit.
const HIGHEST_RANK: usize = 64;
/// The key of free-form metadata. Only the note of this project's adapters is read.
const NOTES: &str = "__metadata__";

/// An opened weight file.
#[derive(Debug)]
pub(crate) struct Shard {
    path: PathBuf,
    /// Device and inode, to detect that the path names another file now.
    #[cfg(unix)]
    identity: (u64, u64),
    /// The file, if it is kept open.
    file: Option<File>,
    /// Offset of the data section in the file.
    data: usize,
    pub(crate) tensors: Vec<TensorEntry>,
    /// The note that this project writes into adapters, in JSON.
    pub(crate) note: Option<String>,
}

/// A range of bytes in the data section of one of a checkpoint's shards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileRange {
    /// Index of the checkpoint's file.
    pub(crate) shard: usize,
    pub(crate) range: Range<usize>,
}

impl Shard {
    /// Opens and validates a safetensors file. The error is the rest of a sentence that begins with the file's name.
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        let (file, metadata) = open_plain(path).map_err(|error| format!("cannot be opened: {error}"))?;
        let length = metadata.len();
        if length < LENGTH as u64 {
            return Err(format!("is truncated: {length} bytes are too few for a safetensors file"));
        }
        let cannot = |error: io::Error| format!("cannot be read: {error}");
        let mut claimed = [0; LENGTH];
        read_exact_at(&file, &mut claimed, 0).map_err(cannot)?;
        let claimed = header_length(u64::from_le_bytes(claimed), length)?;
        // `header_length` limits this allocation to the length of the file and to 100 MB.
        let mut header = vec![0; claimed];
        read_exact_at(&file, &mut header, LENGTH as u64).map_err(cannot)?;
        let data = LENGTH + claimed;
        let (tensors, note) = read_header(&header, length - data as u64)?;
        Ok(Self { note, ..Self::new(path, &metadata, file, data, tensors) })
    }

    /// Opens and validates a burnpack file. The error is the rest of a sentence that begins with the file's name.
    pub(crate) fn open_burnpack(path: &Path) -> Result<Self, String> {
        let tensors = burnpack::read(path)?;
        let (file, metadata) = open_plain(path).map_err(|error| format!("cannot be opened: {error}"))?;
        // burn-pack opened the path itself, which may name a shorter file by now.
        if tensors.iter().any(|tensor| tensor.range.end as u64 > metadata.len()) {
            return Err("was truncated while it was opened".into());
        }
        Ok(Self::new(path, &metadata, file, 0, tensors))
    }

    /// Opens and validates a GGUF file. The error is the rest of a sentence that begins with the file's name.
    pub(crate) fn open_gguf(path: &Path) -> Result<(Self, GgufHeader), String> {
        let (file, metadata) = open_plain(path).map_err(|error| format!("cannot be opened: {error}"))?;
        let header = gguf::read::parse_file(&file, metadata.len())?;
        let too_large = |_| "is too large for this machine".to_owned();
        let data = usize::try_from(header.data_start).map_err(too_large)?;
        usize::try_from(metadata.len()).map_err(too_large)?;
        let tensors = header.tensors.iter().map(|tensor| {
            // The header has been checked: every tensor is inside the file, whose length fits.
            let (start, bytes) = (tensor.offset as usize, tensor.bytes().unwrap_or(0) as usize);
            TensorEntry {
                name: tensor.name.clone(),
                dtype: tensor.block_type.into(),
                shape: tensor.shape.iter().rev().map(|size| *size as usize).collect(),
                range: start..start + bytes,
            }
        });
        Ok((Self::new(path, &metadata, file, data, tensors.collect()), header))
    }

    #[cfg_attr(not(unix), expect(unused_variables, reason = "files are identified only on Unix"))]
    fn new(path: &Path, metadata: &Metadata, file: File, data: usize, tensors: Vec<TensorEntry>) -> Self {
        Self {
            path: path.to_path_buf(),
            #[cfg(unix)]
            identity: identity(metadata),
            file: Some(file),
            data,
            tensors,
            note: None,
        }
    }

    /// Closes the file; each read opens it again.
    pub(crate) fn close(&mut self) {
        self.file = None;
    }

    /// The path at which the file was found.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the file again.
    ///
    /// # Errors
    ///
    /// An I/O error, also if another file is at the path now.
    pub(crate) fn reopen(&self) -> io::Result<File> {
        let (file, metadata) = open_plain(&self.path)?;
        #[cfg(unix)]
        if identity(&metadata) != self.identity {
            return Err(io::Error::other("it has been replaced by another file"));
        }
        #[cfg(not(unix))]
        drop(metadata);
        Ok(file)
    }

    /// The offset in the file of an offset in the data section.
    pub(crate) fn position(&self, at: usize) -> u64 {
        (self.data + at) as u64
    }

    /// Fills `target` from the data section, beginning at offset `start`.
    pub(crate) fn read(&self, start: usize, target: &mut [u8]) -> io::Result<()> {
        self.with_file(|file| read_exact_at(file, target, self.position(start)))
    }

    /// Asks the operating system to prefetch a part of the data section into its cache.
    pub(crate) fn prefetch(&self, range: &Range<usize>) {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        // Only a hint: if it is refused, reading is slower.
        let _ = self.with_file(|file| {
            let length = std::num::NonZeroU64::new(range.len() as u64);
            let advice = rustix::fs::Advice::WillNeed;
            if length.is_some() {
                rustix::fs::fadvise(file, self.position(range.start), length, advice)?;
            }
            Ok(())
        });
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        let _ = range;
    }

    fn with_file<R>(&self, work: impl FnOnce(&File) -> io::Result<R>) -> io::Result<R> {
        match &self.file {
            Some(file) => work(file),
            None => work(&self.reopen()?),
        }
    }
}

/// Device and inode of a file.
#[cfg(unix)]
fn identity(metadata: &Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

/// Checks the header's claimed length against the length of the file.
fn header_length(claimed: u64, length: u64) -> Result<usize, String> {
    if claimed > length - LENGTH as u64 {
        return Err(format!(
            "is truncated or not a safetensors file: it claims a header of {claimed} bytes and has {length} bytes in all"
        ));
    }
    if claimed > LONGEST_HEADER {
        return Err(format!("claims a header of {claimed} bytes, more than the limit of {LONGEST_HEADER}"));
    }
    Ok(claimed as usize)
}

/// The tensors of a header, sorted by offset, and the adapter note. `held` is the number of bytes after the header.
pub(crate) fn read_header(header: &[u8], held: u64) -> Result<(Vec<TensorEntry>, Option<String>), String> {
    let broken = |error: &dyn fmt::Display| format!("has an invalid header: {}", Printable(error));
    let Header { tensors: mut infos, note } = serde_json::from_slice(header).map_err(|error| broken(&error))?;
    // The library expects the entries in the order of their offsets.
    infos.sort_by_key(|(_, info)| info.data_offsets);
    // This checks that the ranges leave no gap and do not overlap, and that each has the length that its shape and
    // dtype require.
    let metadata = tensor::Metadata::new(None, infos).map_err(|error| broken(&error))?;
    let claimed = metadata.data_len() as u64;
    if claimed > held {
        return Err(format!(
            "is truncated: its header claims {claimed} bytes of tensors ({}), and {held} bytes follow it",
            Bytes(claimed)
        ));
    }
    if claimed < held {
        return Err(format!("contains {} bytes that its header does not account for", held - claimed));
    }
    let tensors = metadata
        .offset_keys()
        .into_iter()
        .filter_map(|name| {
            let info = metadata.info(&name)?;
            let (start, end) = info.data_offsets;
            Some(TensorEntry { dtype: info.dtype.into(), shape: info.shape.clone(), range: start..end, name })
        })
        .collect();
    Ok((tensors, note))
}

/// The tensors of a header, in its order. It is parsed here because the safetensors library silently takes the last of
/// two tensors with one name.
struct Header {
    tensors: Vec<(String, TensorInfo)>,
    note: Option<String>,
}

/// The metadata of a file; unknown entries are ignored.
#[derive(Deserialize)]
struct Notes {
    #[serde(default)]
    moonlight_adapters: Option<String>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut tensors, mut names, mut note) = (Vec::new(), HashSet::new(), None);
                while let Some(name) = map.next_key::<String>()? {
                    if name == NOTES {
                        let notes: Option<Notes> = map.next_value()?;
                        note = notes.and_then(|notes| notes.moonlight_adapters).or(note);
                        continue;
                    }
                    let info: TensorInfo = map.next_value()?;
                    if let Some(problem) = unprintable(&name) {
                        return Err(A::Error::custom(problem));
                    }
                    if info.shape.len() > HIGHEST_RANK {
                        let rank = info.shape.len();
                        return Err(A::Error::custom(format!("`{name}` has {rank} dimensions")));
                    }
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format!("`{name}` is listed twice")));
                    }
                    tensors.push((name, info));
                }
                Ok(Header { tensors, note })
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;

    fn problem(header: &str, data: u64) -> String {
        read_header(header.as_bytes(), data).unwrap_err()
    }

    #[test]
    fn a_valid_header_is_read() {
        let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},
            "a":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}"#;
        let (tensors, note) = read_header(header.as_bytes(), 8).unwrap();
        assert_eq!(note, None);
        assert_eq!((tensors[0].name.as_str(), &tensors[0].shape, &tensors[0].range), ("a", &vec![1, 2], &(0..4)));
        assert_eq!((tensors[1].name.as_str(), tensors[1].dtype), ("b", Dtype::F32.into()));
    }

    #[test]
    fn the_adapter_note_is_kept_and_other_metadata_is_ignored() {
        let note = |notes: &str| read_header(format!(r#"{{"__metadata__":{notes}}}"#).as_bytes(), 0).unwrap().1;
        assert_eq!(note(r#"{"format":"pt","moonlight_adapters":"[]","more":[1,{"a":2}]}"#).as_deref(), Some("[]"));
        assert_eq!(note(r#"{"format":3}"#), None);
        assert_eq!(note("null"), None);
    }

    #[test]
    fn inconsistent_headers_are_refused() {
        let long = header_length(u64::MAX, 10).unwrap_err();
        assert!(long.contains("claims a header of 18446744073709551615 bytes and has 10"), "{long}");
        assert!(header_length(100_000_001, 1 << 40).unwrap_err().contains("more than the limit of"));
        assert_eq!(header_length(2, 10), Ok(2));

        let a = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        // More than the file contains, less than it contains.
        let two = a("BF16", "[2]", "[0,4]");
        assert!(
            problem(&two, 3)
                .contains("is truncated: its header claims 4 bytes of tensors (4 B), and 3 bytes follow it")
        );
        assert!(problem(&two, 9).contains("contains 5 bytes that its header does not account for"));
        // Offsets that do not match the shape, run backwards, leave a gap, overlap, overflow.
        assert!(problem(&a("BF16", "[2]", "[0,6]"), 6).contains("has an invalid header: invalid shape"));
        assert!(problem(&a("BF16", "[2]", "[4,0]"), 4).contains("invalid offset for tensor `a`"));
        assert!(problem(&a("BF16", "[2]", "[2,6]"), 6).contains("invalid offset for tensor `a`"));
        let overlap = r#"{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},
            "b":{"dtype":"BF16","shape":[2],"data_offsets":[2,6]}}"#;
        assert!(problem(overlap, 6).contains("invalid offset for tensor `b`"));
        assert!(problem(&a("BF16", "[9223372036854775807,4]", "[0,4]"), 4).contains("overflow"));
        // Duplicate names, with and without overlapping ranges.
        let same = r#"{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},
            "a":{"dtype":"BF16","shape":[2],"data_offsets":[OFFSETS]}}"#;
        for (offsets, data) in [("0,4", 4), ("4,8", 8)] {
            assert!(problem(&same.replace("OFFSETS", offsets), data).contains("`a` is listed twice"));
        }
        // Too many dimensions, invalid names, invalid metadata.
        let rank = format!("[{}]", vec!["1"; 65].join(","));
        assert!(problem(&a("U8", &rank, "[0,1]"), 1).contains("`a` has 65 dimensions"));
        assert!(problem(&a("U8", "[1]", "[0,1]").replace("\"a\"", "\"a\\n\""), 1).contains("control character U+000A"));
        assert!(problem(&format!(r#"{{"__metadata__":{}}}"#, "[".repeat(300)), 0).contains("has an invalid header"));
        assert!(problem(&a("BF16", "[1e400]", "[0,4]"), 4).contains("out of range"));
        // Invalid JSON, unknown dtypes, invalid UTF-8.
        assert!(read_header(b"{\"\xFF\"", 0).unwrap_err().contains("has an invalid header"));
        assert!(problem("{", 0).contains("has an invalid header"));
        assert!(problem(&a("B17", "[2]", "[0,4]"), 4).contains("unknown variant `B17`"));
    }
}

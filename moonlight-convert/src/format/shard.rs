//! One file of weights, safetensors or burnpack: mapped into memory, its header checked before anything in it is believed.

use std::collections::HashSet;
use std::fmt;
use std::fs::{File, Metadata};
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
use safetensors::tensor::{self, TensorInfo};
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::error::{Bytes, OneLine};
use crate::format::burnpack;
use crate::format::index::unprintable;
use crate::format::tensor_entry::TensorEntry;

/// Bytes of the length that a file begins with.
const LENGTH: usize = 8;
/// The longest header that the safetensors library reads, too.
const LONGEST_HEADER: u64 = 100_000_000;
/// More dimensions than any tensor has; PyTorch's own limit.
const HIGHEST_RANK: usize = 64;
/// Where writers leave notes, of which none are needed.
const NOTES: &str = "__metadata__";

/// What Linux maps at most around a page that is asked for (`fault_around_bytes`).
#[cfg(unix)]
const MAPPED_AROUND: usize = 64 << 10;

/// A file of weights, mapped into memory.
#[derive(Debug)]
pub(crate) struct Shard {
    map: Mmap,
    #[cfg(unix)]
    path: std::path::PathBuf,
    /// Which file it is, whatever stands at the path later.
    #[cfg(unix)]
    identity: (u64, u64),
    /// Where the tensors' bytes begin.
    data: usize,
    pub(crate) tensors: Vec<TensorEntry>,
}

/// A range of bytes in the data section of one of a checkpoint's shards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileRange {
    /// Which of the checkpoint's files.
    pub(crate) shard: usize,
    pub(crate) range: Range<usize>,
}

impl Shard {
    /// Opens and checks a file. The error is the rest of a sentence that begins with the file's name.
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        let file = File::open(path).map_err(|error| format!("cannot be opened: {error}"))?;
        let metadata = file.metadata().map_err(|error| format!("cannot be read: {error}"))?;
        let length = metadata.len();
        if length < LENGTH as u64 {
            return Err(format!("is truncated: {length} bytes are too few for a safetensors file"));
        }
        // SAFETY: the map is read-only and private to this process. As with every mapped file, another process that
        // shortens or rewrites it meanwhile breaks the promise; checkpoints are replaced by renaming, never in place.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| format!("cannot be mapped into memory: {error}"))?;
        let (data, tensors) = read_header(&map)?;
        Ok(Self::new(path, &metadata, map, data, tensors))
    }

    /// Opens and checks a burnpack file. The error is the rest of a sentence that begins with the file's name.
    pub(crate) fn open_burnpack(path: &Path) -> Result<Self, String> {
        let tensors = burnpack::read(path)?;
        let file = File::open(path).map_err(|error| format!("cannot be opened: {error}"))?;
        let metadata = file.metadata().map_err(|error| format!("cannot be read: {error}"))?;
        // SAFETY: as above.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| format!("cannot be mapped into memory: {error}"))?;
        if tensors.iter().any(|tensor| tensor.range.end > map.len()) {
            return Err("became shorter while it was opened".into());
        }
        Ok(Self::new(path, &metadata, map, 0, tensors))
    }

    #[cfg_attr(not(unix), expect(unused_variables, reason = "files are opened again on Unix alone"))]
    fn new(path: &Path, metadata: &Metadata, map: Mmap, data: usize, tensors: Vec<TensorEntry>) -> Self {
        Self {
            map,
            #[cfg(unix)]
            path: path.to_path_buf(),
            #[cfg(unix)]
            identity: identity(metadata),
            data,
            tensors,
        }
    }

    /// Where the file was found.
    #[cfg(unix)]
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file, to be read at [`position`](Shard::position). `None` where another stands in its place by now, and where
    /// reading would move the place that is read at.
    pub(crate) fn reopen(&self) -> Option<File> {
        #[cfg(unix)]
        {
            let file = File::open(&self.path).ok()?;
            (identity(&file.metadata().ok()?) == self.identity).then_some(file)
        }
        #[cfg(not(unix))]
        None
    }

    /// Where in the file a place of the data section is.
    pub(crate) fn position(&self, at: usize) -> u64 {
        (self.data + at) as u64
    }

    /// Gives the memory of a part of the data section back; it is read again from the disk, or from the system's cache,
    /// when it is asked for again.
    pub(crate) fn release(&self, range: &Range<usize>) {
        #[cfg(unix)]
        {
            // What the system mapped around the part goes with it: left alone, it would add up from part to part.
            let start = (self.data + range.start).saturating_sub(MAPPED_AROUND);
            let end = (self.data + range.end).saturating_add(MAPPED_AROUND).min(self.map.len());
            // SAFETY: the map is of a file and read-only, so that dropped pages come back with the same contents.
            // That it is refused costs only memory.
            let _ = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end.saturating_sub(start))
            };
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// The bytes of a part of the data section.
    pub(crate) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.map[self.data + range.start..self.data + range.end]
    }

    /// Asks the operating system to have a part of the data section in memory soon.
    pub(crate) fn prefetch(&self, range: &Range<usize>) {
        #[cfg(unix)]
        // Advice: that it is refused costs only speed.
        let _ = self.map.advise_range(memmap2::Advice::WillNeed, self.data + range.start, range.len());
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Device and number.
#[cfg(unix)]
fn identity(metadata: &Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

/// The start of the data section, and the tensors in the order of their offsets.
fn read_header(file: &[u8]) -> Result<(usize, Vec<TensorEntry>), String> {
    let claimed = u64::from_le_bytes(file[..LENGTH].try_into().expect("eight bytes were sliced"));
    let held = (file.len() - LENGTH) as u64;
    if claimed > held {
        return Err(format!(
            "is truncated or no safetensors file: it claims a header of {claimed} bytes and holds {} in all",
            file.len()
        ));
    }
    if claimed > LONGEST_HEADER {
        return Err(format!("claims a header of {claimed} bytes; {LONGEST_HEADER} are the most that is read"));
    }
    let data = LENGTH + claimed as usize;
    let broken = |error: &dyn fmt::Display| format!("has a broken header: {}", OneLine(error));
    let Header(mut infos) = serde_json::from_slice(&file[LENGTH..data]).map_err(|error| broken(&error))?;
    infos.sort_by_key(|(_, info)| info.data_offsets);
    // This checks that the offsets follow one another without gap or overlap, and that each tensor is as long as its
    // shape and dtype say.
    let metadata = tensor::Metadata::new(None, infos).map_err(|error| broken(&error))?;
    let (claimed, held) = (metadata.data_len(), file.len() - data);
    if claimed > held {
        return Err(format!(
            "is truncated: its header claims {} of tensors, {claimed} bytes, and {held} bytes are there",
            Bytes(claimed as u64)
        ));
    }
    if claimed < held {
        return Err(format!("holds {} bytes that its header does not account for", held - claimed));
    }
    let tensors = metadata
        .offset_keys()
        .into_iter()
        .filter_map(|name| {
            let info = metadata.info(&name)?;
            let (start, end) = info.data_offsets;
            Some(TensorEntry { dtype: info.dtype, shape: info.shape.clone(), range: start..end, name })
        })
        .collect();
    Ok((data, tensors))
}

/// The tensors of a header as they stand there. The safetensors library's own reader takes the last of two tensors of
/// one name.
struct Header(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut tensors, mut names) = (Vec::new(), HashSet::new());
                while let Some(name) = map.next_key::<String>()? {
                    if name == NOTES {
                        map.next_value::<IgnoredAny>()?;
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
                        return Err(A::Error::custom(format!("`{name}` is there twice")));
                    }
                    tensors.push((name, info));
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn problem(header: &str, data: usize) -> String {
        read_header(&file(header, data)).unwrap_err()
    }

    #[test]
    fn a_sound_header_is_read() {
        let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},
            "a":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}"#;
        let (data, tensors) = read_header(&file(header, 8)).unwrap();
        assert_eq!(data, 8 + header.len());
        assert_eq!((tensors[0].name.as_str(), &tensors[0].shape, &tensors[0].range), ("a", &vec![1, 2], &(0..4)));
        assert_eq!((tensors[1].name.as_str(), tensors[1].dtype), ("b", Dtype::F32));
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let mut long = file("{}", 0);
        long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(read_header(&long).unwrap_err().contains("claims a header of 18446744073709551615 bytes and holds 10"));

        let a = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        // More than the file holds, less than it holds.
        let two = a("BF16", "[2]", "[0,4]");
        assert!(
            problem(&two, 3).contains("is truncated: its header claims 4 B of tensors, 4 bytes, and 3 bytes are there")
        );
        assert!(problem(&two, 9).contains("holds 5 bytes that its header does not account for"));
        // Offsets that do not fit the shape, run backwards, leave a gap, overlap, overflow.
        assert!(problem(&a("BF16", "[2]", "[0,6]"), 6).contains("has a broken header: invalid shape"));
        assert!(problem(&a("BF16", "[2]", "[4,0]"), 4).contains("invalid offset for tensor `a`"));
        assert!(problem(&a("BF16", "[2]", "[2,6]"), 6).contains("invalid offset for tensor `a`"));
        let overlap = r#"{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},
            "b":{"dtype":"BF16","shape":[2],"data_offsets":[2,6]}}"#;
        assert!(problem(overlap, 6).contains("invalid offset for tensor `b`"));
        assert!(problem(&a("BF16", "[9223372036854775807,4]", "[0,4]"), 4).contains("overflow"));
        // One name twice, whether or not both could be there.
        let same = r#"{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},
            "a":{"dtype":"BF16","shape":[2],"data_offsets":[OFFSETS]}}"#;
        for (offsets, data) in [("0,4", 4), ("4,8", 8)] {
            assert!(problem(&same.replace("OFFSETS", offsets), data).contains("`a` is there twice"));
        }
        // Absurd ranks, names that are no names, notes that are no notes.
        let rank = format!("[{}]", vec!["1"; 65].join(","));
        assert!(problem(&a("U8", &rank, "[0,1]"), 1).contains("`a` has 65 dimensions"));
        assert!(problem(&a("U8", "[1]", "[0,1]").replace("\"a\"", "\"a\\n\""), 1).contains("control character U+000A"));
        assert!(problem(&format!(r#"{{"__metadata__":{}}}"#, "[".repeat(300)), 0).contains("has a broken header"));
        assert!(problem(&a("BF16", "[1e400]", "[0,4]"), 4).contains("out of range"));
        // No JSON, no known dtype, no UTF-8.
        assert!(read_header(b"\x04\0\0\0\0\0\0\0{\"\xFF\"").unwrap_err().contains("has a broken header"));
        assert!(problem("{", 0).contains("has a broken header"));
        assert!(problem(&a("B17", "[2]", "[0,4]"), 4).contains("unknown variant `B17`"));
    }
}

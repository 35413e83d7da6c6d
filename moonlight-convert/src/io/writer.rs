//! Writing weight files in any order, from many threads, in bounded memory.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::DType;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

use crate::dtype::conversion::WeightDtype;
use crate::error::CheckpointError;
use crate::format::burnpack::{self, BURNPACK, PlannedTensor};
use crate::format::index::{INDEX, Index, SINGLE};
use crate::io::file_error::is_full;
use crate::io::storage::{self, Call};
use crate::mapping::names;

/// Headers are padded to this multiple, so that the data after them is aligned for every dtype.
const ALIGNMENT: usize = 8;

/// The dtype of a tensor to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OutDtype {
    Weight(WeightDtype),
    /// The words of packed integers.
    I32,
    /// The shape of a packed matrix.
    I64,
}

impl OutDtype {
    /// Size of a value in bytes.
    pub(crate) fn size(self) -> usize {
        match self {
            Self::Weight(dtype) => dtype.size(),
            Self::I32 => 4,
            Self::I64 => 8,
        }
    }

    pub(crate) fn to_safetensors(self) -> safetensors::Dtype {
        match self {
            Self::Weight(dtype) => dtype.to_safetensors(),
            Self::I32 => safetensors::Dtype::I32,
            Self::I64 => safetensors::Dtype::I64,
        }
    }
}

impl From<WeightDtype> for OutDtype {
    fn from(dtype: WeightDtype) -> Self {
        Self::Weight(dtype)
    }
}

impl From<OutDtype> for DType {
    fn from(dtype: OutDtype) -> Self {
        match dtype {
            OutDtype::Weight(dtype) => Self::from(dtype),
            OutDtype::I32 => Self::I32,
            OutDtype::I64 => Self::I64,
        }
    }
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OutTensor {
    pub(crate) name: String,
    pub(crate) dtype: OutDtype,
    pub(crate) shape: Vec<usize>,
}

impl OutTensor {
    pub(crate) fn bytes(&self) -> u64 {
        self.shape.iter().map(|&dim| dim as u64).product::<u64>() * self.dtype.size() as u64
    }
}

/// How tensors are distributed over safetensors files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sharding {
    /// Files with at most this many bytes of data; a larger tensor gets a file of its own.
    Size(u64),
    /// One file per layer. Tensors before the first layer are in its file, those after the last layer in that layer's
    /// file.
    Layer,
}

/// A file being written.
#[derive(Debug)]
struct OutFile {
    name: String,
    /// Everything before the data; written when the file is first opened.
    header: Vec<u8>,
    /// Size of the whole file.
    length: u64,
    open: Mutex<Option<Arc<File>>>,
    /// Bytes of tensors not written yet.
    remaining: AtomicU64,
}

/// The files to write, with their layout known before the first byte.
#[derive(Debug)]
pub(crate) struct Output {
    dir: PathBuf,
    /// The directory that messages name: the one that `dir` is renamed to.
    shown: PathBuf,
    files: Vec<OutFile>,
    /// For each tensor its file, and its start and end in it.
    places: Vec<(usize, u64, u64)>,
    index: Option<Index>,
    total: u64,
}

impl Output {
    /// One safetensors file, or several with an index.
    pub(crate) fn safetensors(
        dir: &Path,
        shown: &Path,
        tensors: &[OutTensor],
        sharding: Sharding,
    ) -> Result<Self, CheckpointError> {
        let groups = divide(tensors, sharding);
        let mut output = Self::empty(dir, shown, tensors);
        let mut index = Index { metadata: serde_json::Map::new(), weight_map: BTreeMap::new() };
        let count = groups.len();
        for (number, group) in groups.into_iter().enumerate() {
            let file = match count {
                1 => SINGLE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            output.lay_out(number, file, group, tensors, &mut index)?;
        }
        index.metadata.insert("total_size".into(), json!(output.total));
        output.index = (count > 1).then_some(index);
        Ok(output)
    }

    /// One burnpack file.
    pub(crate) fn burnpack(dir: &Path, shown: &Path, tensors: &[OutTensor]) -> Result<Self, CheckpointError> {
        let mut output = Self::empty(dir, shown, tensors);
        let entry = |tensor: &OutTensor| PlannedTensor {
            name: tensor.name.clone(),
            dtype: DType::from(tensor.dtype),
            shape: tensor.shape.clone(),
            bytes: tensor.bytes(),
        };
        let entries: Vec<PlannedTensor> = tensors.iter().map(entry).collect();
        let layout = burnpack::lay_out_tensors(&entries).map_err(|problem| invalid(shown, BURNPACK, problem))?;
        for ((place, start), tensor) in output.places.iter_mut().zip(&layout.starts).zip(tensors) {
            *place = (0, *start, start + tensor.bytes());
        }
        let total = output.total;
        output.add(BURNPACK.to_owned(), layout.header, layout.length, total);
        Ok(output)
    }

    fn empty(dir: &Path, shown: &Path, tensors: &[OutTensor]) -> Self {
        Self {
            dir: dir.to_path_buf(),
            shown: shown.to_path_buf(),
            files: Vec::new(),
            places: vec![(0, 0, 0); tensors.len()],
            index: None,
            total: tensors.iter().map(OutTensor::bytes).sum(),
        }
    }

    fn add(&mut self, name: String, header: Vec<u8>, length: u64, remaining: u64) {
        let remaining = AtomicU64::new(remaining);
        self.files.push(OutFile { name, header, length, open: Mutex::new(None), remaining });
    }

    /// Size of all tensors in bytes.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Lays out one safetensors file, in the order of the safetensors library: by decreasing size of the dtype, so that
    /// every tensor is aligned, then by name.
    fn lay_out(
        &mut self,
        number: usize,
        file: String,
        mut group: Vec<usize>,
        tensors: &[OutTensor],
        index: &mut Index,
    ) -> Result<(), CheckpointError> {
        group.sort_by(|&a, &b| {
            let (a, b) = (&tensors[a], &tensors[b]);
            (b.dtype.size(), &a.name).cmp(&(a.dtype.size(), &b.name))
        });
        let mut infos = Vec::with_capacity(group.len());
        let mut offset = 0;
        for &tensor in &group {
            let OutTensor { name, dtype, shape } = &tensors[tensor];
            let end = offset + tensors[tensor].bytes();
            let data_offsets = (offset as usize, end as usize);
            infos
                .push((name.clone(), TensorInfo { dtype: dtype.to_safetensors(), shape: shape.clone(), data_offsets }));
            self.places[tensor] = (number, offset, end);
            index.weight_map.insert(name.clone(), file.clone());
            offset = end;
        }
        let invalid = |problem: String| invalid(&self.shown, &file, problem);
        // The metadata that transformers writes.
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let metadata = Metadata::new(Some(format), infos).map_err(|error| invalid(error.to_string()))?;
        let mut json = serde_json::to_vec(&metadata).map_err(|error| invalid(error.to_string()))?;
        json.resize(json.len().next_multiple_of(ALIGNMENT), b' ');
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.extend_from_slice(&json);
        for &tensor in &group {
            self.places[tensor].1 += header.len() as u64;
            self.places[tensor].2 += header.len() as u64;
        }
        let length = header.len() as u64 + offset;
        self.add(file, header, length, offset);
        Ok(())
    }

    /// Writes a part of a tensor, beginning at its byte `at`. Every byte is written once.
    pub(crate) fn write(&self, tensor: usize, at: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let (number, start, end) = self.places[tensor];
        assert!(start + at + bytes.len() as u64 <= end, "a tensor has the size in the header");
        let file = &self.files[number];
        let failure = |error| write_failure(&self.shown, &file.name, self.total, error);
        let open = self.open(file).map_err(failure)?;
        write_all_at(&open, bytes, start + at).map_err(failure)?;
        let written = bytes.len() as u64;
        // The ordering makes the writes of the other threads happen before the flush.
        if file.remaining.fetch_sub(written, Ordering::AcqRel) == written {
            // The file is complete. It is flushed now, while other files are still being written, and closed, which
            // limits the number of open files.
            *file.open.lock().unwrap_or_else(PoisonError::into_inner) = None;
            let sync = storage::announce(Call::SyncFile(&self.dir.join(&file.name))).and_then(|()| open.sync_all());
            sync.map_err(failure)?;
        }
        Ok(())
    }

    fn open(&self, file: &OutFile) -> io::Result<Arc<File>> {
        let mut open = file.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = &*open {
            return Ok(open.clone());
        }
        let path = self.dir.join(&file.name);
        storage::announce(Call::Write(&path))?;
        let created = File::options().create(true).truncate(false).write(true).open(&path)?;
        // Parts are written in any order, so that the file has its full length from the start.
        created.set_len(file.length)?;
        write_all_at(&created, &file.header, 0)?;
        Ok(open.insert(Arc::new(created)).clone())
    }

    /// Writes the index, if there are several files.
    pub(crate) fn finish(self) -> Result<(), CheckpointError> {
        for file in self.files.iter().filter(|file| file.header.len() as u64 == file.length) {
            // Without values there was no write that created the file.
            self.open(file).map_err(|error| write_failure(&self.shown, &file.name, self.total, error))?;
        }
        match &self.index {
            Some(index) => write_file(&self.dir, INDEX, index.to_json().as_bytes(), &self.shown, self.total),
            None => Ok(()),
        }
    }
}

/// Assigns tensors to files; returns the indices of each file's tensors.
fn divide(tensors: &[OutTensor], sharding: Sharding) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = vec![Vec::new()];
    let mut filled = 0;
    let mut layer = None;
    for (index, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.bytes();
        let group = groups.last_mut().expect("there is always one group");
        // Tensors without a layer do not begin a file.
        let own = names::layer_of_tensor(&tensor.name);
        let full = match sharding {
            Sharding::Size(most) => !group.is_empty() && filled + bytes > most,
            Sharding::Layer => layer.is_some() && own.is_some() && own != layer,
        };
        layer = own.or(layer);
        if full {
            groups.push(vec![index]);
            filled = bytes;
        } else {
            group.push(index);
            filled += bytes;
        }
    }
    groups
}

#[cfg(unix)]
pub(crate) fn write_all_at(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, at)
}

#[cfg(windows)]
pub(crate) fn write_all_at(file: &File, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_write(file, bytes, at)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => {
                bytes = &bytes[written..];
                at += written as u64;
            }
        }
    }
    Ok(())
}

fn invalid(shown: &Path, file: &str, problem: String) -> CheckpointError {
    CheckpointError::write(&shown.join(file))(io::Error::new(io::ErrorKind::InvalidInput, problem))
}

/// Writes one small file of the checkpoint.
pub(crate) fn write_file(
    dir: &Path,
    name: &str,
    bytes: &[u8],
    shown: &Path,
    needed: u64,
) -> Result<(), CheckpointError> {
    storage::write(&dir.join(name), bytes).map_err(|error| write_failure(shown, name, needed, error))
}

/// The error for a failed write to `name`, a file of the directory that messages call `shown`. `needed` is the number of
/// bytes that the whole checkpoint needs.
pub(crate) fn write_failure(shown: &Path, name: &str, needed: u64, error: io::Error) -> CheckpointError {
    if is_full(&error) {
        CheckpointError::Full { dir: shown.to_path_buf(), needed }
    } else {
        CheckpointError::write(&shown.join(name))(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_per_layer() {
        let names = [
            "model.embed_tokens.weight",
            "model.layers.0.a",
            "model.layers.0.b",
            "model.layers.1.a",
            "model.norm.weight",
        ];
        let tensors =
            names.map(|name| OutTensor { name: name.into(), dtype: WeightDtype::Bf16.into(), shape: vec![4] });
        assert_eq!(divide(&tensors, Sharding::Layer), [vec![0, 1, 2], vec![3, 4]]);
        assert_eq!(divide(&tensors, Sharding::Size(16)), [vec![0, 1], vec![2, 3], vec![4]]);
        assert_eq!(divide(&tensors, Sharding::Size(1)).len(), 5);
    }
}

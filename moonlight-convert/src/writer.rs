//! Writing safetensors shards piece by piece, in bounded memory.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

use crate::elements::WeightDtype;
use crate::error::{CheckpointError, is_full};
use crate::index::{INDEX, Index, SINGLE};

/// Headers are padded so that the data behind them is aligned for every dtype.
const ALIGNMENT: usize = 8;

/// A tensor that is going to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OutTensor {
    pub(crate) name: String,
    pub(crate) dtype: WeightDtype,
    pub(crate) shape: Vec<usize>,
}

impl OutTensor {
    pub(crate) fn bytes(&self) -> u64 {
        self.shape.iter().map(|&dim| dim as u64).product::<u64>() * self.dtype.size() as u64
    }
}

/// Which tensors go where.
#[derive(Debug)]
struct Shard {
    file: String,
    header: Vec<u8>,
    /// Length of the whole file.
    length: u64,
}

/// Writes tensors into shards, in the order in which the tensors were announced.
#[derive(Debug)]
pub(crate) struct ShardWriter {
    dir: PathBuf,
    /// The directory's name in messages.
    shown: PathBuf,
    shards: Vec<Shard>,
    /// For each tensor its shard, and where in that file it begins and ends.
    places: Vec<(usize, u64, u64)>,
    open: Option<(usize, File)>,
    index: Index,
    total: u64,
}

impl ShardWriter {
    /// Lays the tensors out in files of at most `max_shard_size` bytes of data; a tensor larger than that gets a file of
    /// its own.
    pub(crate) fn new(
        dir: &Path,
        shown: &Path,
        tensors: &[OutTensor],
        max_shard_size: u64,
    ) -> Result<Self, CheckpointError> {
        let mut groups: Vec<Vec<usize>> = vec![Vec::new()];
        let mut filled = 0;
        for (index, tensor) in tensors.iter().enumerate() {
            let bytes = tensor.bytes();
            let group = groups.last_mut().expect("there is always one group");
            if !group.is_empty() && filled + bytes > max_shard_size {
                groups.push(vec![index]);
                filled = bytes;
            } else {
                group.push(index);
                filled += bytes;
            }
        }
        let mut writer = Self {
            dir: dir.to_path_buf(),
            shown: shown.to_path_buf(),
            shards: Vec::with_capacity(groups.len()),
            places: vec![(0, 0, 0); tensors.len()],
            open: None,
            index: Index { metadata: serde_json::Map::new(), weight_map: BTreeMap::new() },
            total: tensors.iter().map(OutTensor::bytes).sum(),
        };
        let count = groups.len();
        for (number, group) in groups.into_iter().enumerate() {
            let file = match count {
                1 => SINGLE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            writer.lay_out(number, file, group, tensors)?;
        }
        writer.index.metadata.insert("total_size".into(), json!(writer.total));
        Ok(writer)
    }

    /// Bytes of all tensors.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// The order inside a file is that of the safetensors library: the widest dtype first, so that each is aligned, then
    /// by name.
    fn lay_out(
        &mut self,
        number: usize,
        file: String,
        mut group: Vec<usize>,
        tensors: &[OutTensor],
    ) -> Result<(), CheckpointError> {
        group.sort_by(|&a, &b| {
            let (a, b) = (&tensors[a], &tensors[b]);
            (b.dtype.size(), &a.name).cmp(&(a.dtype.size(), &b.name))
        });
        let mut infos = Vec::with_capacity(group.len());
        let mut offset = 0;
        for &index in &group {
            let tensor = &tensors[index];
            let end = offset + tensor.bytes();
            infos.push((
                tensor.name.clone(),
                TensorInfo {
                    dtype: tensor.dtype.to_safetensors(),
                    shape: tensor.shape.clone(),
                    data_offsets: (offset as usize, end as usize),
                },
            ));
            self.places[index] = (number, offset, end);
            self.index.weight_map.insert(tensor.name.clone(), file.clone());
            offset = end;
        }
        let invalid = |problem: String| CheckpointError::Write {
            path: self.shown.join(&file),
            source: io::Error::new(io::ErrorKind::InvalidInput, problem),
        };
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let metadata = Metadata::new(Some(format), infos).map_err(|error| invalid(error.to_string()))?;
        let mut json = serde_json::to_vec(&metadata).map_err(|error| invalid(error.to_string()))?;
        json.resize(json.len().next_multiple_of(ALIGNMENT), b' ');
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.extend_from_slice(&json);
        for &index in &group {
            self.places[index].1 += header.len() as u64;
            self.places[index].2 += header.len() as u64;
        }
        self.shards.push(Shard { file, length: header.len() as u64 + offset, header });
        Ok(())
    }

    /// Writes a part of a tensor, `at` bytes behind its beginning.
    pub(crate) fn write(&mut self, tensor: usize, at: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let (shard, start, end) = self.places[tensor];
        assert!(start + at + bytes.len() as u64 <= end, "no tensor is longer than announced");
        self.turn_to(shard)?;
        let (_, file) = self.open.as_mut().expect("the shard was just opened");
        let written = file.seek(SeekFrom::Start(start + at)).and_then(|_| file.write_all(bytes));
        written.map_err(|error| self.failure(shard, error))
    }

    /// Writes the index, where there is more than one shard.
    pub(crate) fn finish(self) -> Result<(), CheckpointError> {
        if self.shards.len() > 1 {
            write_file(&self.dir, INDEX, self.index.to_json().as_bytes(), &self.shown, self.total)?;
        }
        Ok(())
    }

    fn turn_to(&mut self, shard: usize) -> Result<(), CheckpointError> {
        if self.open.as_ref().is_some_and(|(open, _)| *open == shard) {
            return Ok(());
        }
        self.open = None;
        let Shard { file, header, length } = &self.shards[shard];
        let path = self.dir.join(file);
        let opened = File::options().create(true).truncate(false).write(true).open(&path).and_then(|mut opened| {
            opened.set_len(*length)?;
            opened.write_all(header)?;
            Ok(opened)
        });
        let opened = opened.map_err(|error| self.failure(shard, error))?;
        self.open = Some((shard, opened));
        Ok(())
    }

    fn failure(&self, shard: usize, error: io::Error) -> CheckpointError {
        write_failure(&self.shown, &self.shards[shard].file, self.total, error)
    }
}

/// Writes one small file of the checkpoint.
pub(crate) fn write_file(
    dir: &Path,
    name: &str,
    bytes: &[u8],
    shown: &Path,
    needed: u64,
) -> Result<(), CheckpointError> {
    std::fs::write(dir.join(name), bytes).map_err(|error| write_failure(shown, name, needed, error))
}

/// A failure to write `name`, which people know as a file of `shown`.
pub(crate) fn write_failure(shown: &Path, name: &str, needed: u64, error: io::Error) -> CheckpointError {
    if is_full(&error) {
        CheckpointError::Full { dir: shown.to_path_buf(), needed }
    } else {
        CheckpointError::Write { path: shown.join(name), source: error }
    }
}

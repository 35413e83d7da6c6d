//! A Hugging Face directory, opened: its configuration, its files mapped into memory, its tensors by name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use memmap2::Mmap;
use moonlight_model::ModelConfig;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::error::CheckpointError;

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// An opened checkpoint. Headers are read and checked; no tensor is copied.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, StoredTensor>,
}

/// One file of weights.
#[derive(Debug)]
pub struct Shard {
    /// The file.
    pub path: PathBuf,
    map: Mmap,
}

/// One tensor of a checkpoint, under the name that the file gives it.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// The dtype in the file.
    pub dtype: Dtype,
    /// The shape in the file.
    pub shape: Vec<usize>,
    shard: usize,
    range: Range<usize>,
}

impl Shard {
    /// Size of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    fn open(path: PathBuf) -> Result<Self, CheckpointError> {
        let file = File::open(&path).map_err(CheckpointError::read(&path))?;
        let length = file.metadata().map_err(CheckpointError::read(&path))?.len();
        if length < 8 {
            return Err(CheckpointError::Header { path, problem: format!("it has {length} bytes") });
        }
        // SAFETY: the map is only read; a file that another process cuts short while it is mapped is beyond what we
        // can guard against, as for every reader of memory-mapped weights.
        let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::read(&path))?;
        Ok(Self { path, map })
    }
}

impl Checkpoint {
    /// Opens a directory with `config.json` and either `model.safetensors` or shards under an index.
    ///
    /// # Errors
    ///
    /// [`CheckpointError`]: a file is absent or broken, a header does not agree with its file, or the index leads out of
    /// the directory. Whether the tensors are the model's is checked by [`load`](crate::load()).
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let config = read_config(dir)?;
        let index = dir.join(INDEX);
        let single = dir.join(SINGLE);
        let placed = if index.exists() {
            read_index(dir, &index)?
        } else if single.exists() {
            BTreeMap::from([(SINGLE.to_owned(), BTreeSet::new())])
        } else {
            let missing = "`model.safetensors` and no `model.safetensors.index.json`";
            return Err(CheckpointError::NotACheckpoint { dir: dir.to_owned(), missing });
        };
        let mut shards = Vec::with_capacity(placed.len());
        let mut tensors = BTreeMap::new();
        for (file, promised) in &placed {
            let shard = Shard::open(dir.join(file))?;
            let stored = read_header(&shard, shards.len())?;
            if let Some(absent) = promised.iter().find(|name| !stored.contains_key(*name)) {
                let problem = format!("it places `{absent}` in `{file}`, which does not hold it");
                return Err(CheckpointError::Index { path: index, problem });
            }
            tensors.extend(stored);
            shards.push(shard);
        }
        Ok(Self { dir: dir.to_owned(), config, shards, tensors })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model that `config.json` describes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The files of weights.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// All tensors in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// A tensor by the name that the file gives it.
    pub fn tensor(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }

    /// The bytes of a tensor of this checkpoint, little-endian.
    pub fn data(&self, tensor: &StoredTensor) -> &[u8] {
        &self.shards[tensor.shard].map[tensor.range.clone()]
    }

    /// The file that a tensor of this checkpoint is in.
    pub fn file(&self, tensor: &StoredTensor) -> &Path {
        &self.shards[tensor.shard].path
    }
}

fn read_config(dir: &Path) -> Result<ModelConfig, CheckpointError> {
    let path = dir.join(CONFIG);
    if !dir.is_dir() {
        let error = fs::read_dir(dir).err().unwrap_or_else(|| std::io::ErrorKind::NotADirectory.into());
        return Err(CheckpointError::read(dir)(error));
    }
    if !path.exists() {
        return Err(CheckpointError::NotACheckpoint { dir: dir.to_owned(), missing: "`config.json`" });
    }
    let text = fs::read_to_string(&path).map_err(CheckpointError::read(&path))?;
    ModelConfig::from_json(&text).map_err(|source| CheckpointError::Config { path, source })
}

/// The files that the index names, with the tensors that it places in each.
fn read_index(dir: &Path, path: &Path) -> Result<BTreeMap<String, BTreeSet<String>>, CheckpointError> {
    let broken = |problem: String| CheckpointError::Index { path: path.to_owned(), problem };
    let text = fs::read_to_string(path).map_err(CheckpointError::read(path))?;
    let value: Value = serde_json::from_str(&text).map_err(|error| broken(error.to_string()))?;
    let map = value.get("weight_map").and_then(Value::as_object).ok_or_else(|| broken("no `weight_map`".into()))?;
    let mut files: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (tensor, file) in map {
        let file = file.as_str().ok_or_else(|| broken(format!("the file of `{tensor}` is {file}")))?;
        let inside = !file.is_empty() && Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
        if !inside {
            let (path, tensor, entry) = (path.to_owned(), tensor.clone(), file.to_owned());
            return Err(CheckpointError::OutsideDirectory { path, tensor, entry });
        }
        files.entry(file.to_owned()).or_default().insert(tensor.clone());
    }
    if files.is_empty() {
        return Err(broken("its `weight_map` is empty".into()));
    }
    let shards: Vec<String> = files.keys().filter(|file| !dir.join(file).exists()).cloned().collect();
    if !shards.is_empty() {
        return Err(CheckpointError::MissingShards { dir: dir.to_owned(), shards, total: files.len() });
    }
    Ok(files)
}

/// The tensors of a file. The header is checked against the file's length before anything is believed of it.
fn read_header(shard: &Shard, index: usize) -> Result<BTreeMap<String, StoredTensor>, CheckpointError> {
    let (header, metadata) = SafeTensors::read_metadata(&shard.map)
        .map_err(|error| CheckpointError::Header { path: shard.path.clone(), problem: error.to_string() })?;
    let start = 8 + header;
    Ok(metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let range = start + info.data_offsets.0..start + info.data_offsets.1;
            (name, StoredTensor { dtype: info.dtype, shape: info.shape.clone(), shard: index, range })
        })
        .collect())
}

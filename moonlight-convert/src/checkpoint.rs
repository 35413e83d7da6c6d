//! Opening a checkpoint directory: its config, and the headers of its weight files.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use moonlight_model::{ConfigError, ModelConfig};
use rayon::prelude::*;

use crate::dtype::conversion::{Weight, WeightDtype, with_weight};
use crate::dtype::quant::scales;
use crate::error::CheckpointError;
use crate::format::burnpack::BURNPACK;
use crate::format::gguf::read::OpenedGguf;
use crate::format::gguf::{self, Metadata};
use crate::format::index::{Index, SINGLE};
use crate::format::shard::{FileRange, Shard};
use crate::format::tensor_entry::StoredDtype;
use crate::hub;
use crate::io::atomic_dir;
use crate::io::confined_dir::ConfinedDir;
use crate::io::file_error::FileError;
use crate::io::read_at::most_kept_open;
use crate::mapping::names;
use crate::report::validation::Problem;

/// The file name of the model's config.
pub(crate) const CONFIG: &str = "config.json";
/// Size limit of `config.json` in bytes; published ones have a few kB.
const LONGEST_CONFIG: u64 = 1_000_000;

/// An opened checkpoint directory: its config, and the headers of its files. Weights are read by
/// [`load`](Checkpoint::load) and the like.
///
/// The files stay open (as many as the process's limit allows), so that a checkpoint can be read to the end even if the
/// directory is replaced or removed meanwhile, as a training run does with its oldest checkpoint. Reading a file that
/// has been truncated since is an error.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    files: Vec<WeightFile>,
    tensors: Vec<StoredTensor>,
    /// Problems of the files themselves, found while opening.
    pub(crate) file_problems: Vec<Problem>,
    /// Whether the weights are `model.bpk`, whose tensors have the module's paths as names.
    burnpack: bool,
    /// The metadata, if the weights are a GGUF file.
    gguf: Option<Metadata>,
    /// The directory whose only weights are the GGUF file, if the checkpoint was opened by it.
    pub(crate) gguf_folder: Option<PathBuf>,
    /// Tensors of a GGUF file, by their index, whose values the dtype of the matrices represents exactly.
    narrowed: HashMap<usize, WeightDtype>,
    /// The keys of tensors in files that cannot be read, according to the index; `None` if that may be any tensor.
    pub(crate) unreadable_keys: Option<HashSet<String>>,
    tied_head: TiedHead,
    /// Tensors that only the index lists and that the model does not need. transformers opens such checkpoints.
    pub(crate) listed_only: Vec<String>,
}

/// What the files contain for the output head, where `config.json` says `tie_word_embeddings`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TiedHead {
    /// The head is not tied, or the files contain the embedding alone, as they should.
    #[default]
    Absent,
    /// A head equal to the embedding.
    Repeated,
    /// A head that differs from the embedding. It is used, and the model is treated as untied.
    Separate,
    /// A head without an embedding; it serves as both.
    HeadOnly,
}

impl TiedHead {
    /// A sentence for the user; `None` where nothing is unusual.
    pub fn describe(self) -> Option<&'static str> {
        match self {
            Self::Absent | Self::Repeated => None,
            Self::Separate => Some(
                "`config.json` ties the head to the embedding, but the files contain a different head: the head is used, \
                 as in transformers 5",
            ),
            Self::HeadOnly => {
                Some("the files contain no embedding: the head is used for it, as `config.json` ties the two")
            }
        }
    }
}

/// A file of weights.
#[derive(Debug)]
pub struct WeightFile {
    /// Its name in the directory.
    pub name: String,
    /// How many tensors it contains; `None` if the file is missing or damaged.
    pub tensors: Option<usize>,
    /// Bytes of its tensors, without the header.
    pub bytes: u64,
    shard: Option<Shard>,
}

/// A tensor as a checkpoint stores it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its name in the file; in a burnpack file, the parameter's path.
    pub name: String,
    /// Its dtype in the terms of safetensors (`BF16`, `F32`, `F8_E4M3`, …) or of llama.cpp (`Q4_K`, …).
    pub dtype: StoredDtype,
    /// Its shape: `[out, in]` for a projection (`[in, out]` in a burnpack file).
    pub shape: Vec<usize>,
    /// The name of its file.
    pub file: String,
    pub(crate) shard: usize,
    pub(crate) range: Range<usize>,
}

impl StoredTensor {
    /// Size of its data in bytes.
    pub fn bytes(&self) -> u64 {
        self.range.len() as u64
    }
}

impl Checkpoint {
    /// Opens a directory: `config.json`, and the weights through `model.safetensors.index.json` or, if it exists
    /// (transformers prefers it, too), the single file `model.safetensors`; without either, Burn's `model.bpk`. The top
    /// folder of a repository in the Hub's cache stands for its newest snapshot, and so does `org/name` where no such
    /// directory exists ([`hub::resolve`]).
    ///
    /// A GGUF file is opened by its path, or by that of a directory whose only weights it is; of a file that was split, by the
    /// path of the first part. Its config is that of its metadata.
    ///
    /// No weight is read, with one exception: if `tie_word_embeddings` is true and the files contain both a head and an
    /// embedding, the two are compared. If they differ, the head is used, as in transformers 5, and
    /// [`config`](Checkpoint::config) is that of an untied model.
    ///
    /// Missing and damaged files are not errors yet: [`problems`](Checkpoint::problems) lists them along with
    /// everything that does not match the model, and [`load`](fn@crate::load) returns one error for all of it.
    ///
    /// # Errors
    ///
    /// [`CheckpointError`], if the directory does not exist, `config.json` cannot be read, there are no weights, or the
    /// index is invalid or names a file outside the directory.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        // A save that was killed between two renames leaves the directory under a hidden name.
        let dir = &atomic_dir::complete_path(&hub::resolve(dir)?);
        if gguf::is_gguf(dir) {
            return Self::open_gguf(dir.to_path_buf());
        }
        if !dir.is_dir() {
            return Err(CheckpointError::not_a_directory(dir));
        }
        let snapshot = if dir.join(CONFIG).exists() { None } else { hub::snapshot_of_main(dir)? };
        let dir = snapshot.unwrap_or_else(|| dir.to_path_buf());
        let confined = ConfinedDir::new(&dir).map_err(CheckpointError::read(&dir))?;
        if let Some(file) = gguf::gguf_file(&dir)
            && let Some(name) = file.file_name().and_then(OsStr::to_str)
            && confined.file(name)?.is_some()
        {
            return Ok(Self { gguf_folder: Some(dir), ..Self::open_gguf(file)? });
        }
        if !dir.join(CONFIG).exists() {
            let others = other_weights(&dir);
            if others.first().is_some_and(|name| name.ends_with(".gguf")) {
                return Err(CheckpointError::NoWeights { others, dir });
            }
        }
        let config = read_config(&confined, &dir)?;
        let mut checkpoint = Self::new(dir, config);
        // transformers, too, prefers the single file to an index.
        if confined.file(SINGLE)?.is_some() {
            checkpoint.open_files(&confined, vec![SINGLE.to_owned()]);
            if !checkpoint.file_problems.is_empty() {
                // Without an index, the damaged file may contain any tensor.
                checkpoint.unreadable_keys = None;
            }
        } else if let Some(index) = Index::read(&confined, &checkpoint.dir)? {
            checkpoint.open_indexed(&confined, index);
        } else if confined.file(BURNPACK)?.is_some() {
            checkpoint.burnpack = true;
            checkpoint.open_files(&confined, vec![BURNPACK.to_owned()]);
            if !checkpoint.file_problems.is_empty() {
                checkpoint.unreadable_keys = None;
            }
        } else {
            return Err(CheckpointError::NoWeights { others: other_weights(&checkpoint.dir), dir: checkpoint.dir });
        }
        checkpoint.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        if checkpoint.config.tie_word_embeddings && !checkpoint.burnpack {
            checkpoint.tied_head = checkpoint.find_tied_head()?;
            checkpoint.config.tie_word_embeddings = checkpoint.tied_head != TiedHead::Separate;
        }
        Ok(checkpoint)
    }

    /// Opens a GGUF file, with the other parts if it was split.
    fn open_gguf(path: PathBuf) -> Result<Self, CheckpointError> {
        let OpenedGguf { metadata, config, parts } = gguf::read::open(&path)?;
        let mut checkpoint = Self::new(path, config);
        checkpoint.gguf = Some(metadata);
        for (number, (name, part)) in parts.into_iter().enumerate() {
            let shard = part.map_err(|problem| match problem {
                None => Problem::MissingFile { file: name.clone(), tensors: 0 },
                Some(problem) => Problem::BrokenFile { file: name.clone(), problem },
            });
            checkpoint.add_file(number, name, shard);
        }
        if !checkpoint.file_problems.is_empty() {
            checkpoint.unreadable_keys = None;
        }
        checkpoint.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        checkpoint.narrowed = checkpoint.find_narrowed();
        Ok(checkpoint)
    }

    fn new(dir: PathBuf, config: ModelConfig) -> Self {
        Self {
            dir,
            config,
            files: Vec::new(),
            tensors: Vec::new(),
            file_problems: Vec::new(),
            burnpack: false,
            gguf: None,
            gguf_folder: None,
            narrowed: HashMap::new(),
            unreadable_keys: Some(HashSet::new()),
            tied_head: TiedHead::Absent,
            listed_only: Vec::new(),
        }
    }

    /// llama.cpp wants norms, biases and routers in f32, whatever they were before. If all matrices are bf16 or quantized (or
    /// all f16), those f32 tensors that bf16 represents exactly count as bf16, so that a model does not change its dtype on
    /// the way through a GGUF file. Correction biases stay in f32 in memory, too.
    fn find_narrowed(&self) -> HashMap<usize, WeightDtype> {
        let is_matrix = |tensor: &&StoredTensor| tensor.shape.len() > 1 && !tensor.name.ends_with(gguf::names::ROUTER);
        let dtype_of = |tensor: &StoredTensor| tensor.dtype.block_type().map(gguf::dequantize::dtype_of);
        let mut dtypes = self.tensors.iter().filter(is_matrix).map(dtype_of);
        let Some(Some(dtype @ (WeightDtype::Bf16 | WeightDtype::F16))) = dtypes.next() else { return HashMap::new() };
        if dtypes.any(|other| other != Some(dtype)) {
            return HashMap::new();
        }
        // A tensor that cannot be read is reported when it is loaded.
        let is_exact = |tensor: &StoredTensor| self.is_exact(tensor, dtype).unwrap_or(false);
        let wide = |(_, tensor): &(usize, &StoredTensor)| {
            tensor.dtype == safetensors::Dtype::F32 && !tensor.name.ends_with(gguf::names::CORRECTION)
        };
        let tensors = self.tensors.par_iter().enumerate();
        tensors.filter(wide).filter(|(_, tensor)| is_exact(tensor)).map(|(index, _)| (index, dtype)).collect()
    }

    /// Whether `dtype` represents the values of an f32 tensor exactly.
    fn is_exact(&self, tensor: &StoredTensor, dtype: WeightDtype) -> Result<bool, CheckpointError> {
        /// Bytes read at a time.
        const CHUNK: usize = 1 << 20;
        /// More bytes than any norm or router has. The file may be sparse, with a length that it does not occupy.
        const MOST: usize = 1 << 28;
        let range = tensor.range.clone();
        if range.len() > MOST {
            return Ok(false);
        }
        let mut bytes = vec![0; CHUNK.min(range.len())];
        for start in range.clone().step_by(CHUNK) {
            let part = start..range.end.min(start + CHUNK);
            let bytes = &mut bytes[..part.len()];
            self.read_part(&FileRange { shard: tensor.shard, range: part }, bytes)?;
            if !with_weight!(dtype, T => is_exact::<T>(bytes)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The dtype that a tensor counts as, if it is not the stored one.
    pub(crate) fn narrowed(&self, stored_index: usize) -> Option<WeightDtype> {
        self.narrowed.get(&stored_index).copied()
    }

    /// What the files contain for the output head, where `config.json` says `tie_word_embeddings`.
    pub fn tied_head(&self) -> TiedHead {
        self.tied_head
    }

    fn find_tied_head(&self) -> Result<TiedHead, CheckpointError> {
        let find = |key: &str| self.tensors.iter().find(|tensor| names::key(&tensor.name) == key);
        let absent = |key: &str| self.unreadable_keys.as_ref().is_some_and(|unread| !unread.contains(key));
        let packed = names::packed_names(names::HEAD).values;
        Ok(match (find(names::EMBEDDING), find(names::HEAD)) {
            // A quantized head cannot equal the embedding, which is not quantized.
            _ if find(&packed).is_some() => TiedHead::Separate,
            (Some(embedding), Some(head)) => {
                if self.equal_values(embedding, head)? {
                    TiedHead::Repeated
                } else {
                    TiedHead::Separate
                }
            }
            (None, Some(_)) if absent(names::EMBEDDING) => TiedHead::HeadOnly,
            _ => TiedHead::Absent,
        })
    }

    /// Whether two unquantized tensors have equal values, also across dtypes.
    fn equal_values(&self, a: &StoredTensor, b: &StoredTensor) -> Result<bool, CheckpointError> {
        /// Values read at a time.
        const CHUNK: usize = 1 << 19;
        let dtypes = [a, b].map(|tensor| tensor.dtype.weight_dtype());
        let ([Some(first), Some(second)], true) = (dtypes, a.shape == b.shape) else { return Ok(false) };
        let count: usize = a.shape.iter().product();
        let read = |tensor: &StoredTensor, dtype: WeightDtype, values: Range<usize>| {
            let start = tensor.range.start;
            let range = start + values.start * dtype.size()..start + values.end * dtype.size();
            let mut bytes = vec![0; range.len()];
            self.read_part(&FileRange { shard: tensor.shard, range }, &mut bytes)?;
            Ok::<_, CheckpointError>(bytes)
        };
        for start in (0..count).step_by(CHUNK) {
            let values = start..count.min(start + CHUNK);
            let [left, right] = [read(a, first, values.clone())?, read(b, second, values)?];
            // Exact for equal dtypes; across dtypes both are widened to f32, which is exact, too.
            let equal = if first == second { left == right } else { scales(&left, first) == scales(&right, second) };
            if !equal {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The directory; for the top folder of a repository in the Hub's cache, that of its snapshot. For a GGUF file, the file.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The path of a weight file.
    pub fn file_path(&self, name: &str) -> PathBuf {
        // The parts of a GGUF file are next to the first.
        if self.is_gguf() { self.dir.with_file_name(name) } else { self.dir.join(name) }
    }

    /// The model's config, as read from `config.json`, or from the metadata of a GGUF file.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The weight files, sorted by name.
    pub fn files(&self) -> &[WeightFile] {
        &self.files
    }

    /// The tensors of all readable files, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor))
    }

    /// Reads the bytes of a tensor, little-endian.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::File`] if the file cannot be read or has been truncated, or the tensor does not fit into
    /// memory.
    pub fn data(&self, tensor: &StoredTensor) -> Result<Vec<u8>, CheckpointError> {
        let mut bytes = Vec::new();
        let length = tensor.range.len();
        // The length comes from the file: with `vec!`, one that is too large would abort the program.
        let reserved = bytes.try_reserve_exact(length).map_err(|_| io::ErrorKind::OutOfMemory.into());
        reserved.map_err(CheckpointError::read(self.shard(tensor.shard).path()))?;
        bytes.resize(length, 0);
        self.read_part(&FileRange { shard: tensor.shard, range: tensor.range.clone() }, &mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn tensor_list(&self) -> &[StoredTensor] {
        &self.tensors
    }

    /// Reads a part of a file's data section into `target`, which has its length.
    pub(crate) fn read_part(&self, part: &FileRange, target: &mut [u8]) -> Result<(), CheckpointError> {
        debug_assert_eq!(part.range.len(), target.len());
        let shard = self.shard(part.shard);
        shard.read(part.range.start, target).map_err(CheckpointError::read(shard.path()))
    }

    /// Asks the operating system to prefetch a part of a file into its cache.
    pub(crate) fn prefetch(&self, part: &FileRange) {
        self.shard(part.shard).prefetch(&part.range);
    }

    /// Whether the weights are in Burn's format, `model.bpk`.
    pub fn is_burnpack(&self) -> bool {
        self.burnpack
    }

    /// Whether the weights are a GGUF file.
    pub fn is_gguf(&self) -> bool {
        self.gguf.is_some()
    }

    /// The metadata of a GGUF file.
    pub fn gguf_metadata(&self) -> Option<&Metadata> {
        self.gguf.as_ref()
    }

    pub(crate) fn shard(&self, shard: usize) -> &Shard {
        self.files[shard].shard.as_ref().expect("a tensor in the list comes from a file that was opened")
    }

    fn open_indexed(&mut self, confined: &ConfinedDir, index: Index) {
        let mut wanted: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (tensor, file) in index.weight_map {
            wanted.entry(file).or_default().push(tensor);
        }
        self.open_files(confined, wanted.keys().cloned().collect());

        let present: HashSet<(&str, usize)> =
            self.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.shard)).collect();
        let mut unread = HashSet::new();
        let mut not_in_file = Vec::new();
        let mut indexed: HashSet<String> = HashSet::new();
        for (shard, (file, tensors)) in wanted.iter().enumerate() {
            let readable = self.files[shard].tensors.is_some();
            for tensor in tensors {
                indexed.insert(tensor.clone());
                if readable && present.contains(&(tensor.as_str(), shard)) {
                    continue;
                }
                if !readable {
                    unread.insert(names::key(tensor).to_owned());
                } else if names::skip_reason(tensor, &self.config).is_some() {
                    // transformers opens such checkpoints, for example an index that still lists `inv_freq`.
                    self.listed_only.push(tensor.clone());
                } else {
                    unread.insert(names::key(tensor).to_owned());
                    not_in_file.push(Problem::NotInFile { tensor: tensor.clone(), file: file.clone() });
                }
            }
        }
        // Only the index has the number of tensors in a missing file.
        for problem in &mut self.file_problems {
            if let Problem::MissingFile { file, tensors } = problem {
                *tensors = wanted.get(file).map_or(0, Vec::len);
            }
        }
        // If two files contain a tensor, the index decides, as in transformers. The names of each file are sorted,
        // because those of the index are.
        self.tensors.retain(|tensor| {
            !indexed.contains(&tensor.name)
                || wanted.get(&tensor.file).is_some_and(|names| names.binary_search(&tensor.name).is_ok())
        });
        self.file_problems.extend(not_in_file);
        self.unreadable_keys = Some(unread);
    }

    fn open_files(&mut self, confined: &ConfinedDir, names: Vec<String>) {
        let open = if self.burnpack { Shard::open_burnpack } else { Shard::open };
        // Headers are read in parallel; the results keep the order of `names`, and so the indices of the files.
        let kept_open = most_kept_open();
        let opened: Vec<_> = names
            .into_par_iter()
            .enumerate()
            .map(|(number, name)| {
                let open = |path: PathBuf| {
                    let mut shard = open(&path);
                    if let Ok(shard) = &mut shard
                        && number >= kept_open
                    {
                        shard.close();
                    }
                    shard
                };
                let shard = match confined.file(&name) {
                    Ok(path) => path.map(open),
                    Err(CheckpointError::Link { .. }) => {
                        Some(Err("is a symbolic link that leads out of the directory".into()))
                    }
                    Err(CheckpointError::File(FileError { source, .. })) => {
                        Some(Err(format!("cannot be read: {source}")))
                    }
                    Err(error) => Some(Err(format!("cannot be read: {error}"))),
                };
                (name, shard)
            })
            .collect();
        for (number, (name, shard)) in opened.into_iter().enumerate() {
            let shard = match shard {
                None => Err(Problem::MissingFile { file: name.clone(), tensors: 0 }),
                Some(Err(problem)) => Err(Problem::BrokenFile { file: name.clone(), problem }),
                Some(Ok(shard)) => Ok(shard),
            };
            self.add_file(number, name, shard);
        }
    }

    fn add_file(&mut self, number: usize, name: String, shard: Result<Shard, Problem>) {
        let shard = match shard {
            Err(problem) => {
                self.file_problems.push(problem);
                None
            }
            Ok(mut shard) => {
                // The entries move to the checkpoint: the header of a large model is not kept twice.
                self.tensors.extend(shard.tensors.drain(..).map(|tensor| StoredTensor {
                    name: tensor.name,
                    dtype: tensor.dtype,
                    shape: tensor.shape,
                    file: name.clone(),
                    shard: number,
                    range: tensor.range,
                }));
                Some(shard)
            }
        };
        let own = self.tensors.iter().rev().take_while(|tensor| tensor.shard == number);
        let (count, bytes) = own.fold((0, 0), |(count, bytes), tensor| (count + 1, bytes + tensor.bytes()));
        self.files.push(WeightFile { name, tensors: shard.is_some().then_some(count), bytes, shard });
    }
}

/// Whether values in f32 survive a conversion to `T` and back.
fn is_exact<T: Weight>(bytes: &[u8]) -> bool {
    let (values, _) = bytes.as_chunks::<4>();
    values.iter().map(|bytes| f32::from_le_bytes(*bytes)).all(|value| {
        // NaN is found when the tensor is loaded.
        T::narrow(value).widen().to_bits() == value.to_bits()
    })
}

fn read_config(confined: &ConfinedDir, dir: &Path) -> Result<ModelConfig, CheckpointError> {
    let path = dir.join(CONFIG);
    let Some(bytes) = confined.read(CONFIG, LONGEST_CONFIG)? else {
        return Err(CheckpointError::NoConfig { dir: dir.to_path_buf() });
    };
    let config = match String::from_utf8(bytes) {
        Ok(text) => ModelConfig::from_json(&text),
        Err(_) => Err(ConfigError::Json("it is not UTF-8 text".into())),
    };
    config.map_err(|source| CheckpointError::Config { path, source })
}

/// Names of weight files in formats that are not read, or of shards without an index; safetensors first.
fn other_weights(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| [".safetensors", ".bin", ".pt", ".pth", ".gguf"].iter().any(|end| name.ends_with(end)))
        .collect();
    names.sort_by_key(|name| (!name.ends_with(".safetensors"), name.clone()));
    names
}

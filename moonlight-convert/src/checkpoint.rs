//! A Hugging Face directory, opened.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use moonlight_model::{ConfigError, ModelConfig};
use rayon::prelude::*;

use crate::dtype::conversion::WeightDtype;
use crate::dtype::quant::scales;
use crate::error::CheckpointError;
use crate::format::burnpack::BURNPACK;
use crate::format::index::{Index, SINGLE};
use crate::format::shard::{FileRange, Shard};
use crate::hub;
use crate::io::atomic_dir;
use crate::io::confined_dir::ConfinedDir;
use crate::io::file_error::FileError;
use crate::io::read_at::most_kept_open;
use crate::mapping::names;
use crate::report::validation::Problem;

/// The model's configuration.
pub(crate) const CONFIG: &str = "config.json";
/// The longest configuration that is read; the published ones have a few kB.
const LONGEST_CONFIG: u64 = 1_000_000;

/// A Hugging Face directory: its configuration, and the tensors of its files, which are not read yet.
///
/// Its files stay open (as many as the process may have), so that they can be read to the end also when the directory is
/// replaced or removed meanwhile. One that becomes shorter is an error when it is read.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    files: Vec<WeightFile>,
    tensors: Vec<StoredTensor>,
    /// What is wrong with the files themselves.
    pub(crate) broken: Vec<Problem>,
    /// Whether the weights are Burn's own file, with tensors named by the module.
    burnpack: bool,
    /// The keys of tensors that should lie in files that cannot be read; `None` where that may be any.
    pub(crate) unread: Option<HashSet<String>>,
    tied_head: TiedHead,
    /// Tensors that the index lists, that its file does not hold and that the model does not need.
    pub(crate) listed_only: Vec<String>,
}

/// What the files hold for a head that `config.json` ties to the embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TiedHead {
    /// It is not tied, or the embedding alone is there, as it should be.
    #[default]
    Absent,
    /// A head that repeats the embedding.
    Repeated,
    /// A head that differs from the embedding. It is used, and the model is one without a tied head.
    Separate,
    /// A head alone, which is the embedding too.
    HeadOnly,
}

impl TiedHead {
    /// What to say of it.
    pub fn describe(self) -> Option<&'static str> {
        match self {
            Self::Absent | Self::Repeated => None,
            Self::Separate => Some(
                "`tie_word_embeddings` is true in config.json, and the files hold a head that differs from the embedding: the \
                 head is used, as transformers 5 does",
            ),
            Self::HeadOnly => Some("the files hold no embedding: the head stands for it, to which config.json ties it"),
        }
    }
}

/// A file of weights.
#[derive(Debug)]
pub struct WeightFile {
    /// Its name in the directory.
    pub name: String,
    /// Its tensors; `None` where the file is absent or broken.
    pub tensors: Option<usize>,
    /// Bytes of its tensors.
    pub bytes: u64,
    shard: Option<Shard>,
}

/// A tensor of a checkpoint, by its name in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its name; in a burnpack file, the parameter's path.
    pub name: String,
    /// Its dtype as safetensors spells it: `BF16`, `F32`, ….
    pub dtype: safetensors::Dtype,
    /// Its shape, `[out, in]` for a projection (`[in, out]` in a burnpack file).
    pub shape: Vec<usize>,
    /// The file that holds it.
    pub file: String,
    pub(crate) shard: usize,
    pub(crate) range: Range<usize>,
}

impl StoredTensor {
    /// Length of its data.
    pub fn bytes(&self) -> u64 {
        self.range.len() as u64
    }
}

impl Checkpoint {
    /// Opens a directory: `config.json`, and the weights through `model.safetensors.index.json` or, where it stands there
    /// (as transformers decides), the single file `model.safetensors`; where neither is there, Burn's `model.bpk`. The top
    /// folder of a model in the Hub's cache stands for its newest snapshot, and so does `org/name` where there is no such
    /// directory ([`hub::resolve`]).
    ///
    /// No weight is read, but for one case: where `tie_word_embeddings` is true and the files hold a head beside the embedding,
    /// the two are compared. If they differ, the head is used as transformers 5 uses it, and
    /// [`config`](Checkpoint::config) says that it is not tied. Files that are absent or broken are no error yet: [`problems`](Checkpoint::problems) lists
    /// them beside what does not fit the model, and [`load`](crate::load) refuses all of it in one error.
    ///
    /// # Errors
    ///
    /// [`CheckpointError`], where there is no such directory, no configuration that can be read, no weights, or an index
    /// that cannot be read or names a file elsewhere.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let dir = &atomic_dir::complete_path(&hub::resolve(dir)?);
        if !dir.is_dir() {
            return Err(CheckpointError::not_a_directory(dir));
        }
        let snapshot = if dir.join(CONFIG).exists() { None } else { hub::snapshot_of_main(dir)? };
        let dir = snapshot.unwrap_or_else(|| dir.to_path_buf());
        let confined = ConfinedDir::new(&dir).map_err(CheckpointError::read(&dir))?;
        let config = read_config(&confined, &dir)?;
        let mut checkpoint = Self {
            dir,
            config,
            files: Vec::new(),
            tensors: Vec::new(),
            broken: Vec::new(),
            burnpack: false,
            unread: Some(HashSet::new()),
            tied_head: TiedHead::Absent,
            listed_only: Vec::new(),
        };
        if confined.file(SINGLE)?.is_some() {
            checkpoint.open_files(&confined, vec![SINGLE.to_owned()]);
            if !checkpoint.broken.is_empty() {
                checkpoint.unread = None;
            }
        } else if let Some(index) = Index::read(&confined, &checkpoint.dir)? {
            checkpoint.open_indexed(&confined, index);
        } else if confined.file(BURNPACK)?.is_some() {
            checkpoint.burnpack = true;
            checkpoint.open_files(&confined, vec![BURNPACK.to_owned()]);
            if !checkpoint.broken.is_empty() {
                checkpoint.unread = None;
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

    /// What the files hold for a head that `config.json` ties to the embedding.
    pub fn tied_head(&self) -> TiedHead {
        self.tied_head
    }

    fn find_tied_head(&self) -> Result<TiedHead, CheckpointError> {
        let find = |key: &str| self.tensors.iter().find(|tensor| names::key(&tensor.name) == key);
        let absent = |key: &str| self.unread.as_ref().is_some_and(|unread| !unread.contains(key));
        let packed = names::int4_names(names::HEAD).values;
        Ok(match (find(names::EMBEDDING), find(names::HEAD)) {
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

    /// Whether two tensors of plain values hold the same numbers, in whatever dtypes.
    fn equal_values(&self, a: &StoredTensor, b: &StoredTensor) -> Result<bool, CheckpointError> {
        /// Values that are read at a time.
        const CHUNK: usize = 1 << 19;
        let dtypes = [a, b].map(|tensor| WeightDtype::from_safetensors(tensor.dtype));
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
            let equal = if first == second { left == right } else { scales(&left, first) == scales(&right, second) };
            if !equal {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The directory; for the top folder of a model in the Hub's cache, that of the snapshot.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What `config.json` says.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The files of weights, in the order of their names.
    pub fn files(&self) -> &[WeightFile] {
        &self.files
    }

    /// All tensors of all files that can be read, in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor))
    }

    /// The bytes of a tensor of this checkpoint, little-endian, read from its file.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::File`] where the file cannot be read or has become shorter, or memory does not hold the tensor.
    pub fn data(&self, tensor: &StoredTensor) -> Result<Vec<u8>, CheckpointError> {
        let mut bytes = Vec::new();
        let length = tensor.range.len();
        let reserved = bytes.try_reserve_exact(length).map_err(|_| io::ErrorKind::OutOfMemory.into());
        reserved.map_err(CheckpointError::read(self.shard(tensor.shard).path()))?;
        bytes.resize(length, 0);
        self.read_part(&FileRange { shard: tensor.shard, range: tensor.range.clone() }, &mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn tensor_list(&self) -> &[StoredTensor] {
        &self.tensors
    }

    /// Reads a part of a file's data section; `target` is as long.
    pub(crate) fn read_part(&self, part: &FileRange, target: &mut [u8]) -> Result<(), CheckpointError> {
        debug_assert_eq!(part.range.len(), target.len());
        let shard = self.shard(part.shard);
        shard.read(part.range.start, target).map_err(CheckpointError::read(shard.path()))
    }

    /// Asks the operating system to have a part of a file in its cache soon.
    pub(crate) fn prefetch(&self, part: &FileRange) {
        self.shard(part.shard).prefetch(&part.range);
    }

    /// Whether the weights are a burnpack file.
    pub fn is_burnpack(&self) -> bool {
        self.burnpack
    }

    pub(crate) fn shard(&self, shard: usize) -> &Shard {
        self.files[shard].shard.as_ref().expect("only tensors of files that were read are asked for")
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
        let mut misplaced = Vec::new();
        let mut placed: HashSet<String> = HashSet::new();
        for (shard, (file, tensors)) in wanted.iter().enumerate() {
            let readable = self.files[shard].tensors.is_some();
            for tensor in tensors {
                placed.insert(tensor.clone());
                if readable && present.contains(&(tensor.as_str(), shard)) {
                    continue;
                }
                if !readable {
                    unread.insert(names::key(tensor).to_owned());
                } else if names::skip_reason(tensor, &self.config).is_some() {
                    // transformers opens such checkpoints, too.
                    self.listed_only.push(tensor.clone());
                } else {
                    unread.insert(names::key(tensor).to_owned());
                    misplaced.push(Problem::NotInFile { tensor: tensor.clone(), file: file.clone() });
                }
            }
        }
        for problem in &mut self.broken {
            if let Problem::MissingFile { file, tensors } = problem {
                *tensors = wanted.get(file).map_or(0, Vec::len);
            }
        }
        // A tensor that lies in two files is the one that the index names.
        self.tensors.retain(|tensor| {
            !placed.contains(&tensor.name)
                || wanted.get(&tensor.file).is_some_and(|names| names.binary_search(&tensor.name).is_ok())
        });
        self.broken.extend(misplaced);
        self.unread = Some(unread);
    }

    fn open_files(&mut self, confined: &ConfinedDir, names: Vec<String>) {
        let open = if self.burnpack { Shard::open_burnpack } else { Shard::open };
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
                None => {
                    self.broken.push(Problem::MissingFile { file: name.clone(), tensors: 0 });
                    None
                }
                Some(Err(problem)) => {
                    self.broken.push(Problem::BrokenFile { file: name.clone(), problem });
                    None
                }
                Some(Ok(mut shard)) => {
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

/// Files of weights that are not opened by themselves.
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

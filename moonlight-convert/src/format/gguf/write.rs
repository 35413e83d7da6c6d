//! Writing a checkpoint as one GGUF file: tensor by tensor, in bounded memory, under a temporary name.

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use moonlight_model::config::ParameterKind;

use super::block::BlockType;
use super::header::{GgufHeader, TensorInfo, write_header};
use super::metadata::{self, General};
use super::mixture;
use super::names::{self, GgufTensor, HeadRows, RowOrder, Values};
use super::quantize::quantize;
use super::tokenizer::{TokenizerMetadata, tokenizer_metadata};
use super::value::Metadata;
use crate::checkpoint::Checkpoint;
use crate::dtype::conversion::{Outcome, Weight, WeightDtype, all_finite};
use crate::dtype::dequantize::{Layout, SourceTensor};
use crate::error::CheckpointError;
use crate::io::confined_dir::ConfinedDir;
use crate::io::disk_space;
use crate::io::parallel_copy::{Buffers, ChunkReader, RowChunk, in_order, values};
use crate::io::storage::{self, Call};
use crate::io::temporary::new_file;
use crate::io::writer::{write_all_at, write_failure};
use crate::mapping::load_plan::{LoadPlan, PlannedParameter, Scope};
use crate::progress::Progress;

/// About the size of the values of a chunk in f32, in bytes.
const CHUNK: usize = 1 << 20;

/// Options for writing a GGUF file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GgufOptions {
    /// The type of most matrices; [F32](BlockType::F32), [F16](BlockType::F16), [BF16](BlockType::Bf16), [Q8_0](BlockType::Q8_0),
    /// [Q4_0](BlockType::Q4_0) or [Q4_K](BlockType::Q4K). `None` keeps the dtype of the weights, the widest if they differ; quantized
    /// weights become bf16.
    pub block_type: Option<BlockType>,
    /// Whether an existing GGUF file is replaced; otherwise it is an error.
    pub overwrite: bool,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufReport {
    /// The type of most matrices.
    pub block_type: BlockType,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// Number of tensors of each type.
    pub types: Vec<(BlockType, usize)>,
    /// What other programs compute differently, and what is not in the file, as sentences.
    pub notes: Vec<String>,
}

/// The kind of the tokenizer; `none` for a model without one.
const TOKENIZER_MODEL: &str = "tokenizer.ggml.model";
/// Keys about the file itself, which are not copied from one GGUF file to another.
const OWN_GENERAL_KEYS: [&str; 6] = [
    "general.alignment",
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.size_label",
    "general.type",
];
/// The types of files that can be written.
const FILE_TYPES: [BlockType; 6] =
    [BlockType::F32, BlockType::F16, BlockType::Bf16, BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4K];

impl Checkpoint {
    /// Writes this checkpoint as one GGUF file, with its tokenizer, chat template and config, for llama.cpp and the programs based on
    /// it. Tensors get the types that `llama-quantize` would give them; quantized sources are dequantized on the way.
    ///
    /// The file appears complete or not at all: it is written under a temporary name in the same directory, flushed and renamed.
    ///
    /// Memory: about 100 MB, and the largest tensor if the file has to be transposed (burnpack).
    ///
    /// # Errors
    ///
    /// [`CheckpointError`]: those of [`load`](fn@crate::load); [`NotInGguf`](CheckpointError::NotInGguf) if the architectures of
    /// llama.cpp cannot express the model; a value that is NaN or infinite or out of the type's range; a target that exists;
    /// [`NoRoom`](CheckpointError::NoRoom) before anything is written; [`Interrupted`](CheckpointError::Interrupted) if `progress`
    /// stops the work.
    pub fn write_gguf(
        &self,
        path: &Path,
        options: &GgufOptions,
        progress: &dyn Progress,
    ) -> Result<GgufReport, CheckpointError> {
        let plan = self.checked_plan(Scope::All)?;
        check_target(path, options.overwrite)?;
        let not_in_gguf = |problem| CheckpointError::NotInGguf { dir: self.dir().to_path_buf(), problem };
        let file_type = match options.block_type {
            Some(wanted) if FILE_TYPES.contains(&wanted) => wanted,
            Some(other) => return Err(not_in_gguf(format!("files of type {other} are not written"))),
            None if self.has_blocks() => BlockType::Bf16,
            None => match matrix_dtype(&plan) {
                WeightDtype::F32 => BlockType::F32,
                WeightDtype::F16 => BlockType::F16,
                WeightDtype::Bf16 => BlockType::Bf16,
            },
        };
        let config = self.config();
        let tensors = names::tensors(config).map_err(not_in_gguf)?;
        let tied = !tensors.iter().any(|tensor| tensor.name == "output.weight");
        let types: Vec<BlockType> =
            tensors.iter().map(|tensor| mixture::block_type(file_type, config, tensor, tied)).collect();
        let mut metadata = Metadata::default();
        let mut notes = metadata::notes(config);
        notes.extend(self.other_metadata(&mut metadata)?);
        metadata::add(&mut metadata, config, &general(self)?, file_type).map_err(not_in_gguf)?;
        let metadata = in_usual_order(metadata);
        let infos = tensors.iter().zip(&types).map(|(tensor, &block_type)| TensorInfo {
            name: tensor.name.clone(),
            shape: tensor.shape.iter().map(|&size| size as u64).collect(),
            block_type,
            offset: 0,
        });
        let header = GgufHeader::lay_out(metadata, infos.collect()).map_err(not_in_gguf)?;
        let output = GgufFile::create(path, &header)?;
        progress.begin(output.length);
        self.copy(&plan, &tensors, &types, &output, progress)?;
        let bytes = output.length;
        output.finish(path, options.overwrite)?;
        notes.extend(self.skipped_notes());
        let mut counts: Vec<(BlockType, usize)> = Vec::new();
        for block_type in types {
            match counts.iter_mut().find(|(other, _)| *other == block_type) {
                Some((_, count)) => *count += 1,
                None => counts.push((block_type, 1)),
            }
        }
        Ok(GgufReport { block_type: file_type, bytes, types: counts, notes })
    }

    /// Whether weights are stored in quantized blocks, as in a GGUF file.
    fn has_blocks(&self) -> bool {
        self.tensor_list().iter().filter_map(|tensor| tensor.dtype.block_type()).any(BlockType::is_quantized)
    }

    /// Adds the keys of the tokenizer and the chat template, from another GGUF file all keys that do not describe the weights;
    /// returns notes.
    fn other_metadata(&self, metadata: &mut Metadata) -> Result<Vec<String>, CheckpointError> {
        if let Some(source) = self.gguf_metadata() {
            let kept = source.iter().filter(|(key, _)| {
                key.starts_with("tokenizer.") || key.starts_with("general.") && !OWN_GENERAL_KEYS.contains(key)
            });
            metadata.extend(kept.map(|(key, value)| (key.to_owned(), value.clone())));
            return Ok(Vec::new());
        }
        let TokenizerMetadata { entries, notes } = tokenizer_metadata(self.dir(), self.config())?;
        metadata.extend(entries);
        if metadata.get(TOKENIZER_MODEL).is_none() {
            metadata.insert(TOKENIZER_MODEL, "none");
        }
        Ok(notes)
    }

    /// Copies the values of all tensors on all threads.
    fn copy(
        &self,
        plan: &LoadPlan,
        tensors: &[GgufTensor],
        types: &[BlockType],
        output: &GgufFile,
        progress: &dyn Progress,
    ) -> Result<(), CheckpointError> {
        let mut work = Work::default();
        for (tensor, gguf) in tensors.iter().enumerate() {
            match &gguf.values {
                Values::RopeFactors(factors) => output.write(tensor, 0, bytemuck::cast_slice(factors))?,
                Values::Parameter { index, order } => {
                    let planned = &plan.parameters[*index];
                    for (part, source) in planned.sources.iter().enumerate() {
                        work.add(tensor, gguf, part, planned.sources.len(), source, *order, planned.parameter.kind);
                    }
                }
            }
        }
        let Work { sources, chunks, targets } = work;
        let reading = ChunkReader::new(self, sources.clone(), &chunks);
        in_order(&chunks, |at, chunk, buffers: &mut (Buffers, Vec<u64>, Vec<u64>)| {
            reading.begin(&chunks, at);
            let (stored, ordered, blocks) = buffers;
            let target = &targets[at];
            let source = sources[chunk.source].0;
            let block_type = types[target.tensor];
            let rows = Rows { chunk, target, width: tensors[target.tensor].shape[0], reading: &reading };
            let bytes = match block_type {
                BlockType::F32 => rows.plain::<f32>(stored, ordered)?,
                BlockType::F16 => rows.plain::<half::f16>(stored, ordered)?,
                BlockType::Bf16 => rows.plain::<half::bf16>(stored, ordered)?,
                _ => match rows.plain::<f32>(stored, ordered)? {
                    Some(values) => rows.quantized(block_type, values, blocks),
                    None => None,
                },
            };
            let Some(bytes) = bytes else { return Err(self.gguf_value_error(source, block_type)) };
            output.write(target.tensor, rows.offset(block_type), bytes)?;
            let count = bytes.len() as u64;
            reading.end(chunk);
            match progress.advance(count) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(CheckpointError::Interrupted),
            }
        })
    }

    /// The error for values that a type cannot represent.
    fn gguf_value_error(&self, source: &SourceTensor, block_type: BlockType) -> CheckpointError {
        let dtype = match block_type {
            BlockType::F16 => WeightDtype::F16,
            BlockType::Bf16 => WeightDtype::Bf16,
            _ => WeightDtype::F32,
        };
        match self.value_error(source, dtype) {
            CheckpointError::Overflow { tensor, file, .. } if block_type.is_quantized() => {
                CheckpointError::BlockOverflow { tensor, file, block_type }
            }
            error => error,
        }
    }
}

/// The widest dtype of the matrices. All other tensors are f32 in a file of any type.
fn matrix_dtype(plan: &LoadPlan) -> WeightDtype {
    let is_matrix = |kind| {
        matches!(kind, ParameterKind::Embedding | ParameterKind::Head | ParameterKind::Matrix | ParameterKind::Experts)
    };
    let matrices = plan.parameters.iter().filter(|planned| is_matrix(planned.parameter.kind));
    matrices.map(PlannedParameter::stored).reduce(WeightDtype::widest).unwrap_or(WeightDtype::F32)
}

/// The keys in the order of other programs: the file, the model, the tokenizer. Those about the file are sorted by name, so that a
/// copy of a file has the same bytes.
fn in_usual_order(metadata: Metadata) -> Metadata {
    let rank = |key: &str| match key {
        "general.architecture" => (0, String::new()),
        _ if key.starts_with("general.") => (1, key.to_owned()),
        _ if key.starts_with("tokenizer.") => (3, String::new()),
        _ => (2, String::new()),
    };
    let mut entries: Vec<_> = metadata.iter().map(|(key, value)| (key.to_owned(), value.clone())).collect();
    entries.sort_by_cached_key(|(key, _)| rank(key));
    entries.into_iter().collect()
}

/// The chunks of all tensors.
#[derive(Default)]
struct Work<'a> {
    sources: Vec<(&'a SourceTensor, Layout)>,
    chunks: Vec<RowChunk>,
    /// For each chunk, where it goes.
    targets: Vec<Target>,
}

/// Where a chunk of a source goes.
struct Target {
    /// Index of the GGUF tensor.
    tensor: usize,
    /// Its first row there.
    row: usize,
    order: RowOrder,
}

impl<'a> Work<'a> {
    /// Adds the chunks of a source, the part with number `part` of `parts` of a GGUF tensor.
    #[expect(clippy::too_many_arguments, reason = "one call")]
    fn add(
        &mut self,
        tensor: usize,
        gguf: &GgufTensor,
        part: usize,
        parts: usize,
        source: &'a SourceTensor,
        order: RowOrder,
        kind: ParameterKind,
    ) {
        let number = self.sources.len();
        self.sources.push((source, Layout::HuggingFace));
        // A vector is a single column for a source, and a single row in GGUF.
        let is_vector = gguf.shape.len() == 1;
        debug_assert!(
            !is_vector || matches!(kind, ParameterKind::Norm | ParameterKind::Bias | ParameterKind::CorrectionBias)
        );
        let (rows, columns) = source.dims(Layout::HuggingFace);
        let first = part * gguf.shape.iter().product::<usize>() / parts / columns.max(1);
        let usual = (CHUNK / (columns * size_of::<f32>()).max(1)).max(1);
        let mut push = |rows: Range<usize>, row: usize| {
            self.chunks.push(RowChunk { source: number, rows });
            self.targets.push(Target { tensor, row, order });
        };
        match order {
            RowOrder::Same if is_vector => push(0..rows, 0),
            RowOrder::Same => {
                (0..rows).step_by(usual).for_each(|start| push(start..rows.min(start + usual), first + start));
            }
            // Complete heads, within which rows change places.
            RowOrder::Rotated(rotated) => {
                let height = if is_vector { rows } else { (usual / rotated.head()).max(1) * rotated.head() };
                (0..rows).step_by(height).for_each(|start| push(start..rows.min(start + height), first + start));
            }
            RowOrder::KeyUp(HeadRows { heads, key, value, rank }) => {
                (0..heads).for_each(|head| push(head * (key + value)..head * (key + value) + key, head * rank));
            }
            RowOrder::ValueUp(HeadRows { heads, key, value, .. }) => {
                let head_rows = |head: usize| head * (key + value) + key..(head + 1) * (key + value);
                (0..heads).for_each(|head| push(head_rows(head), head * value));
            }
        }
    }
}

/// The rows of a chunk, on their way.
struct Rows<'a, 'b> {
    chunk: &'a RowChunk,
    target: &'a Target,
    /// Values in a row of the GGUF tensor.
    width: usize,
    reading: &'a ChunkReader<'b>,
}

impl Rows<'_, '_> {
    /// Offset in the tensor in bytes.
    fn offset(&self, block_type: BlockType) -> u64 {
        (self.target.row * (self.width / block_type.values()) * block_type.bytes()) as u64
    }

    /// The values in the order of the GGUF tensor, as bytes of `T`s; `None` if some are non-finite.
    fn plain<'c, T: Weight>(
        &self,
        stored: &'c mut Buffers,
        ordered: &'c mut Vec<u64>,
    ) -> Result<Option<&'c [u8]>, CheckpointError> {
        let (bytes, outcome) = self.reading.rows::<T>(self.chunk, stored)?;
        if outcome.unwrap_or_else(|| all_finite::<T>(bytes)) == Outcome::NonFinite {
            return Ok(None);
        }
        let read: &[T] = bytemuck::cast_slice(bytes);
        let rows = self.chunk.rows.len();
        let width = read.len() / rows.max(1);
        Ok(Some(match self.target.order {
            RowOrder::Same | RowOrder::ValueUp(_) => bytes,
            RowOrder::Rotated(order) => {
                let target = values::<T>(ordered, read.len());
                for (row, target) in target.chunks_exact_mut(width).enumerate() {
                    target.copy_from_slice(&read[order.hugging_face_row(row) * width..][..width]);
                }
                bytemuck::cast_slice(target)
            }
            RowOrder::KeyUp(_) => {
                let target = values::<T>(ordered, read.len());
                for (column, target) in target.chunks_exact_mut(rows).enumerate() {
                    for (row, target) in target.iter_mut().enumerate() {
                        *target = read[row * width + column];
                    }
                }
                bytemuck::cast_slice(target)
            }
        }))
    }

    /// The blocks of f32 values; `None` if some are outside the range.
    fn quantized<'c>(&self, block_type: BlockType, bytes: &[u8], blocks: &'c mut Vec<u64>) -> Option<&'c [u8]> {
        let read: &[f32] = bytemuck::cast_slice(bytes);
        let target = values::<u8>(blocks, read.len() / block_type.values() * block_type.bytes());
        quantize(block_type, read, target).then_some(&*target)
    }
}

/// A GGUF file being written under a temporary name.
struct GgufFile {
    temporary: tempfile::NamedTempFile,
    target: PathBuf,
    /// For each tensor its start in the file, and its end.
    places: Vec<Range<u64>>,
    length: u64,
    written: AtomicU64,
    expected: u64,
}

impl GgufFile {
    /// Writes the header of a file of its final size.
    fn create(target: &Path, header: &GgufHeader) -> Result<Self, CheckpointError> {
        let bytes = write_header(header);
        let place = |info: &TensorInfo| {
            let start = header.data_start + info.offset;
            start..start + info.bytes().expect("`lay_out` checked the sizes")
        };
        let places: Vec<Range<u64>> = header.tensors.iter().map(place).collect();
        let end = places.last().map_or(header.data_start, |place| place.end);
        // llama.cpp wants the padding after the last tensor, too.
        let length = end.next_multiple_of(header.alignment);
        let expected = places.iter().map(|place| place.end - place.start).sum();
        let dir = directory(target);
        if let Some(free) = disk_space::free(&dir)
            && free < length
        {
            return Err(CheckpointError::NoRoom { dir: target.to_path_buf(), needed: length, free });
        }
        let failure = |error| failure(target, length, error);
        let temporary = new_file(&dir, ".", ".gguf.partial").map_err(failure)?;
        storage::announce(Call::Write(temporary.path())).map_err(failure)?;
        temporary.as_file().set_len(length).map_err(failure)?;
        write_all_at(temporary.as_file(), &bytes, 0).map_err(failure)?;
        let written = AtomicU64::new(0);
        Ok(Self { temporary, target: target.to_path_buf(), places, length, written, expected })
    }

    fn write(&self, tensor: usize, at: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let place = &self.places[tensor];
        assert!(place.start + at + bytes.len() as u64 <= place.end, "a tensor has the size in the header");
        write_all_at(self.temporary.as_file(), bytes, place.start + at)
            .map_err(|error| failure(&self.target, self.length, error))?;
        self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Flushes the file and gives it its name.
    fn finish(self, path: &Path, overwrite: bool) -> Result<(), CheckpointError> {
        assert_eq!(self.written.into_inner(), self.expected, "every byte of every tensor is written once");
        let failure = |error| failure(path, self.length, error);
        storage::announce(Call::SyncFile(self.temporary.path())).map_err(failure)?;
        self.temporary.as_file().sync_all().map_err(failure)?;
        storage::announce(Call::Rename(self.temporary.path(), path)).map_err(failure)?;
        // Another process may have created the target meanwhile.
        let renamed = if overwrite { self.temporary.persist(path) } else { self.temporary.persist_noclobber(path) };
        renamed.map_err(|error| match error.error.kind() {
            io::ErrorKind::AlreadyExists => CheckpointError::Exists { dir: path.to_path_buf() },
            _ => failure(error.error),
        })?;
        storage::sync_dir(&directory(path)).map_err(failure)
    }
}

/// The directory of a file.
fn directory(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// The error for a failed write, in terms of the final name.
fn failure(target: &Path, needed: u64, error: io::Error) -> CheckpointError {
    match write_failure(&directory(target), "", needed, error) {
        CheckpointError::Full { needed, .. } => CheckpointError::Full { dir: target.to_path_buf(), needed },
        CheckpointError::File(error) => CheckpointError::write(target)(error.source),
        other => other,
    }
}

/// Refuses a target that must not be replaced.
fn check_target(path: &Path, overwrite: bool) -> Result<(), CheckpointError> {
    let target = |problem: &str| CheckpointError::Target { path: path.to_path_buf(), problem: problem.to_owned() };
    let Ok(found) = fs::symlink_metadata(path) else { return Ok(()) };
    // A link to a file is replaced by the rename, not its target.
    let found = if found.is_symlink() { fs::metadata(path).unwrap_or(found) } else { found };
    if found.is_dir() {
        return Err(target("is a directory, and a GGUF is a file"));
    }
    if !overwrite {
        return Err(CheckpointError::Exists { dir: path.to_path_buf() });
    }
    let mut magic = [0; 4];
    let is_gguf = found.is_file() && File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok();
    if !is_gguf || magic != *b"GGUF" {
        return Err(target("is not a GGUF file, and is not replaced"));
    }
    Ok(())
}

/// The longest README that is searched for a license, in bytes.
const LONGEST_README: u64 = 1_000_000;

/// What a checkpoint says about itself: its name is that of the repository or directory, and the license that of the front matter of
/// its README. Those of a GGUF file have been copied.
fn general(checkpoint: &Checkpoint) -> Result<General, CheckpointError> {
    if checkpoint.is_gguf() {
        return Ok(General::default());
    }
    let dir = checkpoint.dir();
    let confined = ConfinedDir::new(dir).map_err(CheckpointError::read(dir))?;
    // A README that cannot be read is no reason not to write the file.
    let readme = confined.read("README.md", LONGEST_README).ok().flatten().unwrap_or_default();
    Ok(General { name: name_of(dir), license: license(&String::from_utf8_lossy(&readme)) })
}

/// The name of a model's directory; in the Hub's cache, `models--ORG--NAME/snapshots/COMMIT`, that of the repository.
fn name_of(dir: &Path) -> Option<String> {
    let dir = dir.canonicalize().ok()?;
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let repository = dir.parent().filter(|parent| parent.ends_with("snapshots")).and_then(Path::parent).and_then(name);
    let repository = repository.as_deref().and_then(|name| name.strip_prefix("models--")?.rsplit("--").next());
    repository.map(str::to_owned).or_else(|| name(&dir))
}

/// The `license` in the front matter of a README, as on the Hub.
fn license(readme: &str) -> Option<String> {
    let mut lines = readme.lines();
    if lines.next()?.trim_end() != "---" {
        return None;
    }
    let value = lines.take_while(|line| line.trim_end() != "---").find_map(|line| line.strip_prefix("license:"))?;
    let value = value.trim().trim_matches(['"', '\'']);
    let is_identifier = |c: char| c.is_ascii_alphanumeric() || "-.+_".contains(c);
    (!value.is_empty() && value.len() < 100 && value.chars().all(is_identifier)).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_license_is_that_of_the_front_matter() {
        assert_eq!(license("---\nlicense: mit\ntags: [a]\n---\n# Model"), Some("mit".into()));
        assert_eq!(license("---\nlibrary_name: x\nlicense: \"apache-2.0\"\n---"), Some("apache-2.0".into()));
        for other in ["", "# Model\nlicense: mit", "---\ntags: a\n---\nlicense: mit", "---\nlicense: [a, b]\n---"] {
            assert_eq!(license(other), None, "{other}");
        }
    }

    #[test]
    fn a_snapshot_has_the_name_of_its_repository() {
        let home = tempfile::tempdir().unwrap();
        let snapshot = home.path().join("models--moonshotai--Moonlight-16B-A3B/snapshots/0123");
        fs::create_dir_all(&snapshot).unwrap();
        assert_eq!(name_of(&snapshot).as_deref(), Some("Moonlight-16B-A3B"));
        fs::create_dir(home.path().join("fine-tuned")).unwrap();
        assert_eq!(name_of(&home.path().join("fine-tuned")).as_deref(), Some("fine-tuned"));
    }
}

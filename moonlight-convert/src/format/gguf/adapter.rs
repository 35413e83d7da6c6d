//! LoRA adapters in GGUF files, as llama.cpp's `convert_lora_to_gguf.py` writes them, from and to peft's layout.
//!
//! | GGUF | peft |
//! |---|---|
//! | `general.type` `adapter`, `adapter.type` `lora` | `peft_type` `LORA` |
//! | `adapter.lora.alpha`, of the whole file | `lora_alpha`, `alpha_pattern`, `use_rslora` |
//! | `NAME.lora_a`, `{in, rank}`, for experts `{in, rank, experts}` | `lora_A` |
//! | `NAME.lora_b`, `{rank, out}`, for experts `{rank, out, experts}` | `lora_B`, with the rows in the order of the GGUF tensor `NAME` |
//!
//! llama.cpp scales every adapter by `alpha / rank`. An adapter with another scale, because it has another alpha or is rsLoRA,
//! gets the ratio as a factor on its `lora_b`.
//!
//! In the architecture `deepseek2` llama.cpp (0.5.0 and 0.6.0) multiplies with the projections to queries, keys and values
//! without looking for adapters, so that a file with them would be opened and those adapters ignored. They are refused.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use moonlight_model::ModelConfig;
use moonlight_model::lora::{Adapter, LowRankSettings};

use super::block::BlockType;
use super::dequantize::dequantize;
use super::header::{GgufHeader, TensorInfo, write_header};
use super::names::{self, Architecture, GgufTensor, RowOrder, Values};
use super::value::{Metadata, Value};
use crate::adapter::{AdapterError, low_rank_only, write_adapters};
use crate::error::CheckpointError;
use crate::io::confined_dir::open_plain;
use crate::io::temporary::new_file;
use crate::printable::printable;

const TYPE: &str = "general.type";
const ADAPTER: &str = "adapter";
const ARCHITECTURE: &str = "general.architecture";
const ADAPTER_TYPE: &str = "adapter.type";
const LORA: &str = "lora";
const ALPHA: &str = "adapter.lora.alpha";
/// Tokens that switch an adapter on (activated LoRA).
const INVOCATION: &str = "adapter.alora.invocation_tokens";
const SUFFIXES: [&str; 2] = [".lora_a", ".lora_b"];
/// The largest rank.
const HIGHEST_RANK: u64 = 1 << 16;
const MERGE_FIRST: &str = "merge the adapter into its model first, and convert the merged model";

/// Whether a header is that of an adapter.
pub fn is_gguf_adapter(header: &GgufHeader) -> bool {
    header.metadata.get(TYPE).and_then(Value::as_str) == Some(ADAPTER)
}

/// Where the adapter of a module is in a GGUF file.
struct Place {
    /// The name of the model's tensor.
    name: String,
    order: RowOrder,
}

/// The places of the adapters of a model, by the path of the module; `None` for those that llama.cpp ignores.
fn places(config: &ModelConfig) -> Result<BTreeMap<String, Option<Place>>, String> {
    let parameters = config.parameter_shapes();
    let mut places = BTreeMap::new();
    let is_deepseek = Architecture::of(config.model_type) == Architecture::Deepseek2;
    for GgufTensor { name, values, .. } in names::tensors(config)? {
        let Values::Parameter { index, order } = values else { continue };
        let parameter = &parameters[index];
        let path = parameter.path.strip_suffix(".weight").unwrap_or(&parameter.path);
        let is_ignored =
            is_deepseek && path.contains(".self_attn.") && !path.ends_with(".o_proj") && parameter.role.is_some();
        let place = (!is_ignored).then_some(Place { name, order });
        places.insert(path.to_owned(), place);
    }
    Ok(places)
}

/// Writes an adapter in peft's layout as one GGUF file, for a model with this config. The matrices are f32.
///
/// The file appears complete or not at all. An existing file is replaced only with `overwrite`.
///
/// # Errors
///
/// Those of [`load_adapter`](crate::adapter::load_adapter); [`AdapterError::Weights`] for an adapter that llama.cpp cannot
/// apply: fully trained weights, DoRA, adapters of embedding and head, and in the architecture `deepseek2` those of the
/// projections to queries, keys and values.
pub fn write_gguf_adapter(config: &ModelConfig, dir: &Path, path: &Path, overwrite: bool) -> Result<(), AdapterError> {
    let adapters = low_rank_only(config, dir, "which a GGUF adapter cannot express")?;
    let refused =
        |problem: String| AdapterError::Weights { path: dir.to_path_buf(), problem, hint: Some(MERGE_FIRST.into()) };
    let mut places = places(config).map_err(refused)?;
    if !overwrite && fs::symlink_metadata(path).is_ok() {
        return Err(CheckpointError::Exists { dir: path.to_path_buf() }.into());
    }
    let alpha = common_alpha(&adapters);
    let mut tensors = Vec::with_capacity(2 * adapters.len());
    let mut matrices = Vec::with_capacity(2 * adapters.len());
    for adapter in &adapters {
        let place = match places.remove(&adapter.path) {
            Some(Some(place)) => place,
            Some(None) => {
                return Err(refused(format!(
                    "adapts `{}`, and llama.cpp ignores adapters of that projection in the architecture `deepseek2`",
                    adapter.path
                )));
            }
            None => return Err(refused(format!("adapts `{}`, which has no name in GGUF", adapter.path))),
        };
        let [a, b] = gguf_matrices(adapter, &place.order, alpha);
        for (matrix, suffix) in [a, b].into_iter().zip(SUFFIXES) {
            tensors.push(TensorInfo {
                name: format!("{}{suffix}", place.name),
                shape: matrix.shape.iter().map(|&size| size as u64).collect(),
                block_type: BlockType::F32,
                offset: 0,
            });
            matrices.push(matrix.values);
        }
    }
    let mut metadata = Metadata::default();
    metadata.insert(ARCHITECTURE, Architecture::of(config.model_type).as_str());
    metadata.insert(TYPE, ADAPTER);
    metadata.insert(ADAPTER_TYPE, LORA);
    metadata.insert(ALPHA, alpha as f32);
    let header = GgufHeader::lay_out(metadata, tensors).map_err(refused)?;
    write_file(path, &header, &matrices).map_err(|error| CheckpointError::write(path)(error).into())
}

fn write_file(path: &Path, header: &GgufHeader, matrices: &[Vec<f32>]) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut partial = new_file(dir, ".adapter.", ".gguf")?;
    let mut output = BufWriter::new(partial.as_file_mut());
    output.write_all(&write_header(header))?;
    let mut at = 0;
    for (tensor, values) in header.tensors.iter().zip(matrices) {
        // Offsets are multiples of the alignment.
        io::copy(&mut io::repeat(0).take(tensor.offset - at), &mut output)?;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        output.write_all(bytes)?;
        at = tensor.offset + bytes.len() as u64;
    }
    // Readers expect the padding of the last tensor, too.
    io::copy(&mut io::repeat(0).take(at.next_multiple_of(header.alignment) - at), &mut output)?;
    output.flush()?;
    drop(output);
    partial.as_file().sync_all()?;
    partial.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// A matrix, or a stack of matrices, in the order of the file.
struct GgufMatrix {
    /// The innermost dimension first.
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// The dimensions of a matrix or a stack: how many, rows, columns.
fn dims(data: &TensorData) -> [usize; 3] {
    let shape = data.shape();
    match **shape {
        [rows, columns] => [1, rows, columns],
        [count, rows, columns] => [count, rows, columns],
        _ => [0; 3],
    }
}

/// The alpha for which most adapters need no factor: the most frequent `scale * rank`.
fn common_alpha(adapters: &[Adapter]) -> f64 {
    let mut counts: Vec<(f64, usize)> = Vec::new();
    for adapter in adapters {
        let alpha = gguf_alpha(adapter);
        match counts.iter_mut().find(|(other, _)| *other == alpha) {
            Some((_, count)) => *count += 1,
            None => counts.push((alpha, 1)),
        }
    }
    // llama.cpp takes an alpha of 0 for a scale of 1.
    let used = counts.into_iter().filter(|(alpha, _)| *alpha != 0.0);
    used.max_by_key(|(_, count)| *count).map_or(1.0, |(alpha, _)| alpha)
}

/// The alpha that gives an adapter its scale as `alpha / rank`.
fn gguf_alpha(adapter: &Adapter) -> f64 {
    let [_, _, rank] = dims(&adapter.a);
    match adapter.settings.rslora {
        true => adapter.settings.scale(rank) * rank as f64,
        false => adapter.settings.alpha,
    }
}

/// `lora_a` and `lora_b` of an adapter.
fn gguf_matrices(adapter: &Adapter, order: &RowOrder, alpha: f64) -> [GgufMatrix; 2] {
    let (a, b) = (transposed(&adapter.a), transposed(&adapter.b));
    let [count, input, rank] = dims(&adapter.a);
    let [_, _, output] = dims(&adapter.b);
    let own = gguf_alpha(adapter);
    let factor = (own / alpha) as f32;
    let mut b = ordered(b, rank, |row| gguf_to_hugging_face(order, row % output) + row / output * output);
    // A factor of exactly 1 leaves the values as they are.
    if own != alpha {
        b.iter_mut().for_each(|value| *value *= factor);
    }
    let shape = |inner: usize, outer: usize| {
        let is_stack = adapter.a.shape().len() == 3;
        [inner, outer].into_iter().chain(is_stack.then_some(count)).collect()
    };
    [GgufMatrix { shape: shape(input, rank), values: a }, GgufMatrix { shape: shape(rank, output), values: b }]
}

/// The Hugging Face row that is row `row` of the GGUF tensor.
fn gguf_to_hugging_face(order: &RowOrder, row: usize) -> usize {
    match order {
        RowOrder::Rotated(rotated) => rotated.hugging_face_row(row),
        _ => row,
    }
}

/// The transposes of the matrices of a stack.
fn transposed(data: &TensorData) -> Vec<f32> {
    let [count, rows, columns] = dims(data);
    let values: Vec<f32> = data.iter::<f32>().collect();
    let mut result = Vec::with_capacity(values.len());
    for matrix in values.chunks_exact((rows * columns).max(1)).take(count) {
        for column in 0..columns {
            result.extend((0..rows).map(|row| matrix[row * columns + column]));
        }
    }
    result
}

/// Rows of `width` values in another order.
fn ordered(values: Vec<f32>, width: usize, source: impl Fn(usize) -> usize) -> Vec<f32> {
    let rows = values.len() / width.max(1);
    (0..rows).flat_map(|row| values[source(row) * width..][..width].iter().copied()).collect()
}

/// Reads the adapter in a GGUF file, for a model with this config.
///
/// # Errors
///
/// [`AdapterError::Weights`] for a file that is no adapter of this model or not of the kind `lora`.
pub fn read_gguf_adapter(config: &ModelConfig, path: &Path) -> Result<Vec<Adapter>, AdapterError> {
    let error = |problem: String| AdapterError::Weights { path: path.to_path_buf(), problem, hint: None };
    let (mut file, metadata) = open_plain(path).map_err(CheckpointError::read(path))?;
    let header = GgufHeader::parse(io::BufReader::new(&file), metadata.len()).map_err(error)?;
    let alpha = check(config, &header).map_err(error)?;
    let mut places: BTreeMap<String, (String, RowOrder)> = BTreeMap::new();
    for GgufTensor { name, values, .. } in names::tensors(config).map_err(error)? {
        let Values::Parameter { index, order } = values else { continue };
        places.insert(name, (index.to_string(), order));
    }
    let parameters = config.parameter_shapes();
    let mut pairs: BTreeMap<&str, [Option<&TensorInfo>; 2]> = BTreeMap::new();
    for tensor in &header.tensors {
        let found = (0..2).find_map(|at| Some((tensor.name.strip_suffix(SUFFIXES[at])?, at)));
        let (name, at) = found.ok_or_else(|| AdapterError::Weights {
            path: path.to_path_buf(),
            problem: format!(
                "contains `{}`, which is neither `lora_a` nor `lora_b` of a matrix",
                printable(&tensor.name)
            ),
            hint: Some("apply the file with llama.cpp: only LoRA of projections is read".into()),
        })?;
        pairs.entry(name).or_default()[at] = Some(tensor);
    }
    let mut adapters = Vec::with_capacity(pairs.len());
    for (name, pair) in pairs {
        let [Some(a), Some(b)] = pair else {
            return Err(error(format!("contains only one of the two matrices of `{}`", printable(name))));
        };
        let (index, order) = places
            .get(name)
            .ok_or_else(|| error(format!("adapts `{}`, which the model does not have", printable(name))))?;
        let parameter = &parameters[index.parse::<usize>().expect("an index was stored")];
        let path_of_module = parameter.path.strip_suffix(".weight").unwrap_or(&parameter.path);
        if parameter.role.is_none() || matches!(order, RowOrder::KeyUp(_) | RowOrder::ValueUp(_)) {
            return Err(error(format!(
                "adapts `{}`, which cannot be expressed as LoRA of a projection",
                printable(name)
            )));
        }
        let (experts, input, output) = match *parameter.shape.as_slice() {
            [input, output] => (None, input, output),
            [experts, input, output] => (Some(experts), input, output),
            _ => return Err(error(format!("adapts `{}`, which is not a matrix", printable(name)))),
        };
        let rank = a.shape.get(1).copied().filter(|rank| (1..=HIGHEST_RANK).contains(rank));
        let rank = rank.ok_or_else(|| error(format!("contains `{}` without a rank", printable(&a.name))))?;
        for (tensor, inner, outer) in [(a, input as u64, rank), (b, rank, output as u64)] {
            let expected: Vec<u64> = [inner, outer].into_iter().chain(experts.map(|experts| experts as u64)).collect();
            if tensor.shape != expected {
                return Err(error(format!(
                    "contains `{}` of shape {:?}; the model has {expected:?}",
                    printable(&tensor.name),
                    tensor.shape
                )));
            }
        }
        let rank = rank as usize;
        let a = read_values(&mut file, &header, a).map_err(|problem| read_problem(path, problem))?;
        let b = read_values(&mut file, &header, b).map_err(|problem| read_problem(path, problem))?;
        let b = ordered(b, rank, |row| hugging_face_to_gguf(order, row % output) + row / output * output);
        let count = experts.unwrap_or(1);
        let data = |values: Vec<f32>, rows: usize, columns: usize| {
            let values = TensorData::new(values, [count, rows, columns]);
            let values = transposed(&values);
            match experts {
                Some(experts) => TensorData::new(values, [experts, columns, rows]),
                None => TensorData::new(values, [columns, rows]),
            }
        };
        adapters.push(Adapter {
            path: path_of_module.to_owned(),
            a: data(a, rank, input),
            b: data(b, output, rank),
            // llama.cpp takes an alpha of 0 for a scale of 1.
            settings: LowRankSettings {
                alpha: if alpha == 0.0 { rank as f64 } else { alpha },
                rslora: false,
                dropout: 0.0,
            },
        });
    }
    match adapters.is_empty() {
        true => Err(error("contains no tensors".into())),
        false => Ok(adapters),
    }
}

/// A part of a file that cannot be read, or values that cannot be used.
enum ReadProblem {
    File(io::Error),
    NonFinite(String),
}

fn read_problem(path: &Path, problem: ReadProblem) -> AdapterError {
    match problem {
        ReadProblem::File(error) => CheckpointError::read(path)(error).into(),
        ReadProblem::NonFinite(tensor) => CheckpointError::NonFinite { tensor, file: Some(path.to_path_buf()) }.into(),
    }
}

/// The row of the GGUF tensor that is this row of the Hugging Face tensor.
fn hugging_face_to_gguf(order: &RowOrder, row: usize) -> usize {
    match order {
        RowOrder::Rotated(rotated) => rotated.gguf_row(row),
        _ => row,
    }
}

/// Checks the metadata and returns alpha. The error is the rest of a sentence that begins with the file's name.
fn check(config: &ModelConfig, header: &GgufHeader) -> Result<f64, String> {
    let text = |key: &str| header.metadata.get(key).and_then(Value::as_str).unwrap_or_default();
    if text(TYPE) != ADAPTER {
        return Err("is a model and not an adapter".into());
    }
    if text(ADAPTER_TYPE) != LORA {
        return Err(format!("is an adapter of the kind `{}`; only `lora` is supported", printable(text(ADAPTER_TYPE))));
    }
    let architecture = Architecture::of(config.model_type).as_str();
    if text(ARCHITECTURE) != architecture {
        let other = printable(text(ARCHITECTURE)).into_owned();
        return Err(format!("is an adapter of the architecture `{other}`, and the model is `{architecture}`"));
    }
    if header.metadata.get(INVOCATION).is_some() {
        return Err("takes effect after certain tokens (activated LoRA), which is not supported".into());
    }
    let alpha = match header.metadata.get(ALPHA) {
        None => 0.0,
        Some(value) => value.as_f64().ok_or_else(|| format!("has a `{ALPHA}` that is not a number"))?,
    };
    match alpha.is_finite() {
        true => Ok(alpha),
        false => Err(format!("has a non-finite `{ALPHA}`")),
    }
}

/// The values of a tensor, row by row. The header was checked against the length of the file.
fn read_values(file: &mut fs::File, header: &GgufHeader, tensor: &TensorInfo) -> Result<Vec<f32>, ReadProblem> {
    let bytes = tensor.bytes().unwrap_or_default() as usize;
    let mut stored = Vec::with_capacity(bytes);
    file.seek(SeekFrom::Start(header.data_start + tensor.offset)).map_err(ReadProblem::File)?;
    file.take(bytes as u64).read_to_end(&mut stored).map_err(ReadProblem::File)?;
    if stored.len() != bytes {
        return Err(ReadProblem::File(io::ErrorKind::UnexpectedEof.into()));
    }
    let count = tensor.shape.iter().product::<u64>() as usize;
    let mut values = vec![0.0f32; count];
    match dequantize(tensor.block_type, &stored, 0, &mut values) {
        true => Ok(values),
        false => Err(ReadProblem::NonFinite(tensor.name.clone())),
    }
}

/// Writes the adapter in a GGUF file in peft's layout into a directory, which is created, for the model `base` with this
/// config.
///
/// # Errors
///
/// Those of [`read_gguf_adapter`], and a directory that cannot be written.
pub fn write_peft_adapter(config: &ModelConfig, path: &Path, base: &Path, dir: &Path) -> Result<(), AdapterError> {
    let adapters = read_gguf_adapter(config, path)?;
    fs::create_dir_all(dir).map_err(CheckpointError::write(dir))?;
    let base = absolute(base);
    write_adapters(&adapters, config, dir, &base)
}

/// A path that does not depend on the working directory, if it exists.
fn absolute(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf())
}

#[cfg(test)]
mod tests;

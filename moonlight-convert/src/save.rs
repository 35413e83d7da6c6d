//! A model as a Hugging Face directory.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor, TensorData};
use moonlight_model::config::ParameterShape;
use moonlight_model::{CausalLm, ModelConfig};
use safetensors::{Dtype, SafeTensorError, View};
use serde_json::{Map, Value, json};

use crate::checkpoint::{CONFIG, INDEX, SINGLE};
use crate::error::CheckpointError;
use crate::load::file_dtype;
use crate::names::{self, Place};
use crate::replace::replace_directory;
use crate::values::convert;

/// Files beside the weights that belong to a checkpoint and travel with it.
const COMPANIONS: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tiktoken.model",
    "tokenization_moonshot.py",
    "tokenization_kimi.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
];
const GENERATION_CONFIG: &str = "generation_config.json";

/// How a checkpoint is written.
#[derive(Debug, Clone)]
pub struct SaveOptions {
    /// The dtype of the weights in the files; `None` keeps that of each tensor. The correction bias is always f32.
    pub dtype: Option<DType>,
    /// A file of weights holds at most this many bytes, unless one tensor alone is larger.
    pub max_shard_size: u64,
    /// A directory whose tokenizer and generation files are carried along.
    pub companions_from: Option<PathBuf>,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self { dtype: None, max_shard_size: 5_000_000_000, companions_from: None }
    }
}

/// Writes a model to `dir` as transformers, vLLM and SGLang read it, all or nothing: a crash, an error or a full disk
/// leaves what stood there before.
///
/// # Errors
///
/// [`CheckpointError::Write`], or [`CheckpointError::NotFinite`] for weights that are NaN or infinite in the dtype
/// asked for.
pub fn save(model: &CausalLm, dir: &Path, options: &SaveOptions) -> Result<(), CheckpointError> {
    replace_directory(dir, |new| write_into(model, new, options))
}

/// Writes the files of a checkpoint into an existing directory, for callers that have their own way of putting a
/// finished directory in place.
///
/// # Errors
///
/// As [`save`].
pub fn write_into(model: &CausalLm, dir: &Path, options: &SaveOptions) -> Result<(), CheckpointError> {
    let parameters = Parameters::of(model);
    let tensors = tensors(model.config(), &parameters, options.dtype);
    let mut config = model.config().clone();
    config.dtype = Some(dtype_name(tensors[0].dtype).to_owned());
    write_text(&dir.join(CONFIG), &config.to_json())?;
    for companion in COMPANIONS {
        if let Some(source) = options.companions_from.as_ref().map(|from| from.join(companion))
            && source.exists()
        {
            fs::copy(&source, dir.join(companion)).map_err(CheckpointError::write(dir.join(companion)))?;
        }
    }
    if !dir.join(GENERATION_CONFIG).exists() {
        write_text(&dir.join(GENERATION_CONFIG), &generation_config(&config))?;
    }
    write_weights(tensors, dir, options.max_shard_size)
}

fn write_weights(tensors: Vec<FileTensor<'_>>, dir: &Path, max_shard_size: u64) -> Result<(), CheckpointError> {
    let total: u64 = tensors.iter().map(|tensor| tensor.data_len() as u64).sum();
    let mut shards: Vec<(u64, Vec<FileTensor<'_>>)> = Vec::new();
    for tensor in tensors {
        let bytes = tensor.data_len() as u64;
        match shards.last_mut() {
            Some((size, shard)) if *size + bytes <= max_shard_size => {
                *size += bytes;
                shard.push(tensor);
            }
            _ => shards.push((bytes, vec![tensor])),
        }
    }
    let count = shards.len();
    let mut weight_map = Map::new();
    for (index, (_, shard)) in shards.into_iter().enumerate() {
        let file =
            if count == 1 { SINGLE.to_owned() } else { format!("model-{:05}-of-{count:05}.safetensors", index + 1) };
        for tensor in &shard {
            weight_map.insert(tensor.name.clone(), json!(file));
        }
        write_shard(&shard, &dir.join(file))?;
    }
    if count > 1 {
        weight_map.sort_keys();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_text(&dir.join(INDEX), &pretty(&index))?;
    }
    Ok(())
}

/// Writes a file of weights, one tensor at a time.
fn write_shard(shard: &[FileTensor<'_>], path: &Path) -> Result<(), CheckpointError> {
    // transformers wants to know which framework's layout this is.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let views = shard.iter().map(|tensor| (tensor.name.as_str(), tensor));
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(|error| match error {
        SafeTensorError::IoError(source) => CheckpointError::write(path)(source),
        other => CheckpointError::write(path)(std::io::Error::other(other.to_string())),
    })?;
    let broken = shard.iter().find(|tensor| *tensor.broken.lock().unwrap_or_else(|lock| lock.into_inner()));
    match broken {
        Some(tensor) => Err(CheckpointError::NotFinite { tensor: tensor.name.clone(), path: path.to_owned() }),
        None => Ok(()),
    }
}

fn generation_config(config: &ModelConfig) -> String {
    let mut map = Map::new();
    if let Some(bos) = config.bos_token_id {
        map.insert("bos_token_id".into(), json!(bos));
    }
    if !config.eos_token_id.is_empty() {
        map.insert("eos_token_id".into(), json!(config.eos_token_id));
    }
    map.insert("max_length".into(), json!(config.max_position_embeddings));
    pretty(&Value::Object(map))
}

fn pretty(value: &Value) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("a map of plain values is always JSON");
    text.push('\n');
    text
}

fn write_text(path: &Path, text: &str) -> Result<(), CheckpointError> {
    fs::write(path, text).map_err(CheckpointError::write(path))
}

fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
}

/// A matrix of a parameter, or the whole of it, on its way to the host.
type Fetch<'a> = Box<dyn Fn(Option<usize>) -> TensorData + 'a>;

/// A model's parameters by path; each is fetched when it is written.
#[derive(Default)]
struct Parameters<'a> {
    path: Vec<String>,
    found: HashMap<String, (DType, Fetch<'a>)>,
}

impl Parameters<'_> {
    fn of(model: &CausalLm) -> Self {
        let mut parameters = Self::default();
        model.visit(&mut parameters);
        parameters
    }
}

impl ModuleVisitor for Parameters<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val().detach();
        let dtype = tensor.dtype();
        let fetch = move |part: Option<usize>| match part {
            Some(index) => tensor.clone().slice_dim(0, index..index + 1).into_data(),
            None => tensor.clone().into_data(),
        };
        self.found.insert(self.path.join("."), (dtype, Box::new(fetch)));
    }
}

/// A tensor of a file, made when it is written.
struct FileTensor<'a> {
    name: String,
    shape: Vec<usize>,
    dtype: Dtype,
    /// The parameter's rows and columns, where the file wants columns and rows.
    transpose: Option<(usize, usize)>,
    fetch: &'a Fetch<'a>,
    /// The expert, of a stacked parameter.
    part: Option<usize>,
    /// Whether a value turned out not to be finite.
    broken: Mutex<bool>,
}

impl View for &FileTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let data = (self.fetch)(self.part);
        let mut bytes = vec![0; FileTensor::data_len(self)];
        if !convert(data.as_bytes(), file_dtype(data.dtype()), &mut bytes, self.dtype, self.transpose) {
            *self.broken.lock().unwrap_or_else(|lock| lock.into_inner()) = true;
        }
        bytes.into()
    }

    fn data_len(&self) -> usize {
        FileTensor::data_len(self)
    }
}

impl FileTensor<'_> {
    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Every tensor of the files, in the order of the model.
fn tensors<'a>(config: &ModelConfig, parameters: &'a Parameters<'a>, dtype: Option<DType>) -> Vec<FileTensor<'a>> {
    config.parameter_shapes().iter().flat_map(|parameter| file_tensors(parameter, parameters, dtype)).collect()
}

fn file_tensors<'a>(
    parameter: &ParameterShape,
    parameters: &'a Parameters<'a>,
    dtype: Option<DType>,
) -> Vec<FileTensor<'a>> {
    let (held, fetch) = &parameters.found[&parameter.path];
    let keeps_f32 = parameter.kind == moonlight_model::config::ParameterKind::CorrectionBias;
    let dtype = file_dtype(if keeps_f32 { DType::F32 } else { dtype.unwrap_or(*held) });
    let tensor = |name: String, shape: &[usize], transposed: bool, part: Option<usize>| {
        let transpose = transposed.then(|| (shape[0], shape[1]));
        let shape = if transposed { vec![shape[1], shape[0]] } else { shape.to_vec() };
        FileTensor { name, shape, dtype, transpose, fetch, part, broken: Mutex::new(false) }
    };
    match names::place(parameter) {
        Place::Same(name) => vec![tensor(name, &parameter.shape, false, None)],
        Place::Transposed(name) => vec![tensor(name, &parameter.shape, true, None)],
        Place::Experts(experts) => experts
            .into_iter()
            .enumerate()
            .map(|(expert, name)| tensor(name, &parameter.shape[1..], true, Some(expert)))
            .collect(),
    }
}

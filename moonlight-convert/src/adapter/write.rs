//! Writing an adapter in peft's layout.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::Path;

use burn::tensor::TensorData;
use moonlight_model::config::ParameterKind;
use moonlight_model::lora::{Adapter, LowRankSettings};
use moonlight_model::{CausalLm, ModelConfig};
use serde_json::{Map, Value, json};

use super::config::{ADAPTER_CONFIG, NewConfig};
use super::error::AdapterError;
use super::names;
use super::{ADAPTER_WEIGHTS, NOTES, Note};
use crate::error::CheckpointError;
use crate::format::sidecars;
use crate::io::temporary::{create_anew, write_anew};

/// A module of the file. Its matrices are computed when they are written: those of all experts take as much memory as the adapters.
struct Module<'a> {
    /// `layers.3.self_attn.q_proj`, `layers.3.mlp.experts.base_layer`.
    name: String,
    /// Its name in the config, `layers.3.mlp.experts.gate_up_proj` for a parameter.
    target: String,
    /// Whether the config lists it as a parameter and not as a module.
    parameter: bool,
    rank: usize,
    alpha: f64,
    source: Source<'a>,
}

/// What the matrices of a module are made of.
enum Source<'a> {
    Plain(&'a Adapter),
    /// The blocks of the output rows of a stacked parameter, some without an adapter.
    Stack(Vec<Option<&'a Adapter>>),
}

/// The matrices of a module: `[rank, in]` and `[out, rank]`; for experts, with the ranks of all experts.
#[derive(Clone, Copy)]
enum Side {
    A,
    B,
}

/// A row-major matrix.
struct Matrix {
    columns: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn zeros([rows, columns]: [usize; 2]) -> Self {
        Self { columns, values: vec![0.0; rows * columns] }
    }

    fn set(&mut self, row: usize, column: usize, value: f32) {
        self.values[row * self.columns + column] = value;
    }
}

/// The last two dimensions of an adapter's matrix.
fn dims(data: &TensorData) -> [usize; 2] {
    let shape = data.shape();
    [shape[shape.len() - 2], shape[shape.len() - 1]]
}

fn scale(adapter: &Adapter) -> f64 {
    adapter.settings.scale(dims(&adapter.a)[1])
}

/// Writes the adapters of a model into an existing directory in peft's layout: `adapter_config.json`,
/// `adapter_model.safetensors` in f32, and from `sidecars_from` the tokenizer, the chat template and the generation
/// config. `base` is the base model named in the config.
///
/// # Errors
///
/// [`AdapterError`] for a file that cannot be written.
///
/// # Panics
///
/// If the model has no adapter.
pub fn write_adapter(
    model: &CausalLm,
    dir: &Path,
    base: &Path,
    sidecars_from: Option<&Path>,
) -> Result<(), AdapterError> {
    let adapters = model.adapters();
    assert!(!adapters.is_empty(), "the model has an adapter");
    if let Some(from) = sidecars_from {
        sidecars::copy(from, dir)?;
    }
    write_adapters(&adapters, model.config(), dir, base)
}

/// Writes adapters of a model with this config, at least one, as [`write_adapter`] does, without sidecars.
pub(crate) fn write_adapters(
    adapters: &[Adapter],
    model: &ModelConfig,
    dir: &Path,
    base: &Path,
) -> Result<(), AdapterError> {
    let modules = modules(adapters, model.moe.is_some());
    let config = config(&modules, adapters, model, base);
    let path = dir.join(ADAPTER_WEIGHTS);
    create_anew(&path)
        .and_then(|file| write_safetensors(&modules, adapters, file))
        .map_err(CheckpointError::write(&path))?;
    let path = dir.join(ADAPTER_CONFIG);
    write_anew(&path, config.to_json().as_bytes()).map_err(CheckpointError::write(&path))?;
    Ok(())
}

/// The modules of the file. Gate and up of a stack become one module with the sum of their ranks: `A` has the rows of
/// both; `B` has the columns of each in that one's half of the rows, and zeros elsewhere.
fn modules(adapters: &[Adapter], experts_are_stacked: bool) -> Vec<Module<'_>> {
    // `gate_proj` and `up_proj` are trained separately: a stack may have an adapter of only one of them.
    let by_path: BTreeMap<&str, &Adapter> = adapters.iter().map(|adapter| (adapter.path.as_str(), adapter)).collect();
    let mut modules = Vec::new();
    for adapter in adapters {
        let Some((front, projection)) = adapter.path.rsplit_once('.') else { continue };
        if !front.ends_with(".experts") {
            modules.push(plain(adapter, experts_are_stacked && front.contains(".mlp")));
            continue;
        }
        let down = format!("{front}.down_proj");
        if projection == "down_proj" {
            modules.push(fused(front, front, "down_proj", vec![Some(adapter)]));
            continue;
        }
        let halves = ["gate_proj", "up_proj"].map(|half| by_path.get(format!("{front}.{half}").as_str()).copied());
        if projection == "up_proj" && halves[0].is_some() {
            continue; // written with the gate
        }
        let inner = format!("{front}.base_layer");
        let name = if by_path.contains_key(down.as_str()) { inner.as_str() } else { front };
        modules.push(fused(front, name, names::GATE_UP, halves.to_vec()));
    }
    modules
}

fn plain(adapter: &Adapter, parameter: bool) -> Module<'_> {
    let target = if parameter { names::as_parameter(&adapter.path) } else { adapter.path.clone() };
    let (rank, alpha) = (dims(&adapter.a)[1], adapter.settings.alpha);
    Module { name: adapter.path.clone(), target, parameter, rank, alpha, source: Source::Plain(adapter) }
}

/// Fuses parts of a stacked parameter.
fn fused<'a>(stack_path: &str, name: &str, parameter: &str, parts: Vec<Option<&'a Adapter>>) -> Module<'a> {
    let first = first_of(&parts);
    let rank: usize = parts.iter().flatten().map(|adapter| dims(&adapter.a)[1]).sum();
    Module {
        name: name.to_owned(),
        target: format!("{stack_path}.{parameter}"),
        parameter: true,
        rank,
        alpha: alpha_for(first.settings, scale(first), rank),
        source: Source::Stack(parts),
    }
}

fn first_of<'a>(parts: &[Option<&'a Adapter>]) -> &'a Adapter {
    parts.iter().flatten().next().expect("a module is written for an adapter")
}

impl Module<'_> {
    fn shape(&self, side: Side) -> [usize; 2] {
        match (&self.source, side) {
            (Source::Plain(adapter), Side::A) => [self.rank, dims(&adapter.a)[0]],
            (Source::Plain(adapter), Side::B) => [dims(&adapter.b)[1], self.rank],
            (Source::Stack(parts), side) => {
                let first = first_of(parts);
                let experts = first.a.shape()[0];
                match side {
                    Side::A => [experts * self.rank, dims(&first.a)[0]],
                    Side::B => [parts.len() * dims(&first.b)[1], self.rank * experts],
                }
            }
        }
    }

    fn values(&self, side: Side) -> Vec<f32> {
        let mut matrix = Matrix::zeros(self.shape(side));
        match &self.source {
            Source::Plain(adapter) => {
                let data = match side {
                    Side::A => &adapter.a,
                    Side::B => &adapter.b,
                };
                // The file has the transpose.
                let [_, columns] = dims(data);
                data.iter::<f32>().enumerate().for_each(|(at, value)| matrix.set(at % columns, at / columns, value));
            }
            Source::Stack(parts) => fill_stack(&mut matrix, side, parts, self.rank),
        }
        matrix.values
    }
}

/// Fills peft's layout of stacks: in `A` the ranks of one expert are adjacent, `[experts * rank, in]`; in `B` the experts of one rank,
/// `[out, rank * experts]`.
fn fill_stack(matrix: &mut Matrix, side: Side, parts: &[Option<&Adapter>], rank: usize) {
    let first = first_of(parts);
    let (experts, input, height) = (first.a.shape()[0], dims(&first.a)[0], dims(&first.b)[1]);
    let mut first_rank = 0; // of the part
    for (half, adapter) in parts.iter().enumerate() {
        let Some(adapter) = adapter else { continue };
        let own = dims(&adapter.a)[1];
        match side {
            Side::A => {
                let values = adapter.a.iter::<f32>().enumerate(); // [experts, in, own]
                values.for_each(|(at, value)| {
                    let (expert, i, k) = (at / (input * own), at / own % input, at % own);
                    matrix.set(expert * rank + first_rank + k, i, value);
                });
            }
            Side::B => {
                // A module has only one scale, so that `B` takes up a difference. Adapters of one run have the same scale, so
                // that the ratio is usually 1.
                let ratio = (scale(adapter) / scale(first)) as f32;
                let values = adapter.b.iter::<f32>().enumerate(); // [experts, own, out]
                values.for_each(|(at, value)| {
                    let (expert, k, o) = (at / (own * height), at / height % own, at % height);
                    matrix.set(half * height + o, (first_rank + k) * experts + expert, value * ratio);
                });
            }
        }
        first_rank += own;
    }
}

/// The `alpha` that gives `scale` for `rank`.
fn alpha_for(settings: LowRankSettings, scale: f64, rank: usize) -> f64 {
    let rank = rank as f64;
    scale * if settings.rslora { rank.sqrt() } else { rank }
}

fn config(modules: &[Module<'_>], adapters: &[Adapter], model: &ModelConfig, base: &Path) -> NewConfig {
    let LowRankSettings { rslora, dropout, .. } = adapters[0].settings;
    let mut config = NewConfig { base: base.display().to_string(), rslora, dropout, ..NewConfig::default() };
    // The most frequent pair of rank and alpha becomes the default; the others become patterns.
    let mut pairs: Vec<(usize, f64, usize)> = Vec::new();
    for module in modules {
        match pairs.iter_mut().find(|(rank, alpha, _)| (*rank, *alpha) == (module.rank, module.alpha)) {
            Some((_, _, count)) => *count += 1,
            None => pairs.push((module.rank, module.alpha, 1)),
        }
    }
    if let Some(&(rank, alpha, _)) = pairs.iter().max_by_key(|(_, _, count)| *count) {
        (config.rank, config.alpha) = (rank, alpha);
    }
    // A name without its layer targets the projection in every layer. It is used only if every layer has the adapter.
    let mut wanted: BTreeMap<(bool, String), Vec<&Module<'_>>> = BTreeMap::new();
    for module in modules {
        let short = module.target.splitn(3, '.').nth(2).unwrap_or(&module.target);
        let short = short.strip_prefix("self_attn.").unwrap_or(short);
        wanted.entry((module.parameter, short.to_owned())).or_default().push(module);
    }
    let everywhere: BTreeMap<String, usize> = candidates(model).into_iter().fold(BTreeMap::new(), |mut count, path| {
        *count.entry(path).or_default() += 1;
        count
    });
    for ((parameter, short), modules) in wanted {
        let list = if parameter { &mut config.parameters } else { &mut config.modules };
        let plain = short.strip_suffix(".weight").unwrap_or(&short);
        let all = everywhere.get(plain).is_some_and(|&count| count == modules.len());
        let alike = modules.iter().all(|module| (module.rank, module.alpha) == (modules[0].rank, modules[0].alpha));
        let full: Vec<String> = modules.iter().map(|module| names::transformers_name(&module.target)).collect();
        list.extend(if all { vec![short.clone()] } else { full.clone() });
        let names = if all && alike { vec![short] } else { full };
        for (name, module) in names.into_iter().zip(modules) {
            if module.rank != config.rank {
                config.ranks.push((name.clone(), module.rank));
            }
            if module.alpha != config.alpha {
                config.alphas.push((name, module.alpha));
            }
        }
    }
    config
}

/// The projections of all layers by their names without the layer, and the experts by their parameters in transformers.
fn candidates(model: &ModelConfig) -> Vec<String> {
    let mut seen = BTreeSet::new();
    for parameter in model.parameter_shapes() {
        let path = match parameter.kind {
            ParameterKind::Matrix | ParameterKind::Router => {
                names::peft_module(parameter.path.strip_suffix(".weight").unwrap_or(&parameter.path))
            }
            ParameterKind::Experts => parameter
                .path
                .replace("experts.gate_proj", "experts.gate_up_proj")
                .replace("experts.up_proj", "experts.gate_up_proj"),
            _ => continue,
        };
        seen.insert(path);
    }
    let short = |path: &String| {
        let short = path.splitn(3, '.').nth(2).unwrap_or(path);
        short.strip_prefix("self_attn.").unwrap_or(short).to_owned()
    };
    seen.iter().map(short).collect()
}

/// Writes a header with this project's note, then the matrices sorted by name. Written here because the safetensors library writes
/// metadata in an order that differs from run to run.
fn write_safetensors(modules: &[Module<'_>], adapters: &[Adapter], file: impl Write) -> io::Result<()> {
    let mut tensors: Vec<(String, &Module<'_>, Side)> = Vec::new();
    for module in modules {
        let [a, b] = names::tensor_names(&module.name);
        tensors.extend([(a, module, Side::A), (b, module, Side::B)]);
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let note: Vec<Note> = adapters.iter().map(Note::for_adapter).collect();
    let mut header = Map::new();
    let note = serde_json::to_string(&note).expect("a list of plain values is JSON");
    header.insert("__metadata__".into(), json!({ "format": "pt", NOTES: note }));
    let mut offset = 0;
    for (name, module, side) in &tensors {
        let shape = module.shape(*side);
        let end = offset + 4 * shape[0] * shape[1];
        let info: Value = json!({ "dtype": "F32", "shape": shape, "data_offsets": [offset, end] });
        header.insert(name.clone(), info);
        offset = end;
    }
    let mut json = serde_json::to_vec(&Value::Object(header)).expect("a map of plain values is JSON");
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut file = io::BufWriter::new(file);
    file.write_all(&(json.len() as u64).to_le_bytes())?;
    file.write_all(&json)?;
    for (_, module, side) in tensors {
        file.write_all(bytemuck::cast_slice(&module.values(side)))?;
    }
    file.flush()
}

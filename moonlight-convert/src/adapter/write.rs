//! Writing an adapter in peft's layout.

use std::collections::{BTreeMap, BTreeSet};
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
use crate::io::temporary::write_anew;

/// A module of the file.
struct Module {
    /// `layers.3.self_attn.q_proj`, `layers.3.mlp.experts.base_layer`.
    name: String,
    /// Its name in the config, `layers.3.mlp.experts.gate_up_proj` for a parameter.
    target: String,
    /// Whether the config lists it as a parameter and not as a module.
    parameter: bool,
    rank: usize,
    alpha: f64,
    /// `[rank, in]` and `[out, rank]`; for experts, with the ranks of all experts.
    a: Matrix,
    b: Matrix,
}

/// A row-major matrix.
struct Matrix {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn zeros(rows: usize, columns: usize) -> Self {
        Self { rows, columns, values: vec![0.0; rows * columns] }
    }

    fn set(&mut self, row: usize, column: usize, value: f32) {
        self.values[row * self.columns + column] = value;
    }
}

/// The values of an adapter's matrix, and its last two dimensions.
fn stack(data: &TensorData) -> (Vec<f32>, usize, usize) {
    let shape = data.shape();
    (data.iter::<f32>().collect(), shape[shape.len() - 2], shape[shape.len() - 1])
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
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        write_anew(&path, bytes).map_err(CheckpointError::write(&path))
    };
    write(ADAPTER_WEIGHTS, &safetensors(&modules, adapters))?;
    write(ADAPTER_CONFIG, config.to_json().as_bytes())?;
    Ok(())
}

/// The modules of the file. Gate and up of a stack become one module with the sum of their ranks: `A` has the rows of
/// both; `B` has the columns of each in that one's half of the rows, and zeros elsewhere.
fn modules(adapters: &[Adapter], experts_are_stacked: bool) -> Vec<Module> {
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
            modules.push(fused(front, front, "down_proj", &[Some(adapter)]));
            continue;
        }
        let halves = ["gate_proj", "up_proj"].map(|half| by_path.get(format!("{front}.{half}").as_str()).copied());
        if projection == "up_proj" && halves[0].is_some() {
            continue; // written with the gate
        }
        let inner = format!("{front}.base_layer");
        let name = if by_path.contains_key(down.as_str()) { inner.as_str() } else { front };
        modules.push(fused(front, name, names::GATE_UP, &halves));
    }
    modules
}

fn plain(adapter: &Adapter, parameter: bool) -> Module {
    let (a, input, rank) = stack(&adapter.a);
    let (b, _, output) = stack(&adapter.b);
    let (mut file_a, mut file_b) = (Matrix::zeros(rank, input), Matrix::zeros(output, rank));
    for k in 0..rank {
        (0..input).for_each(|i| file_a.set(k, i, a[i * rank + k])); // [in, rank] to [rank, in]
        (0..output).for_each(|o| file_b.set(o, k, b[k * output + o])); // [rank, out] to [out, rank]
    }
    let target = if parameter { names::as_parameter(&adapter.path) } else { adapter.path.clone() };
    let alpha = adapter.settings.alpha;
    Module { name: adapter.path.clone(), target, parameter, rank, alpha, a: file_a, b: file_b }
}

/// Fuses parts of a stacked parameter: `parts` are the blocks of its output rows, some without an adapter.
fn fused(stack_path: &str, name: &str, parameter: &str, parts: &[Option<&Adapter>]) -> Module {
    let present: Vec<&Adapter> = parts.iter().copied().flatten().collect();
    let first = present.first().expect("a module is written for an adapter");
    let experts = first.a.shape()[0];
    let (_, input, _) = stack(&first.a);
    let (_, _, height) = stack(&first.b);
    let rank: usize = present.iter().map(|adapter| stack(&adapter.a).2).sum();
    let scale = |adapter: &Adapter| adapter.settings.scale(stack(&adapter.a).2);
    // peft's layout of stacks: in `A` the ranks of one expert are adjacent, `[experts * rank, in]`; in `B` the experts
    // of one rank, `[out, rank * experts]`.
    let (mut file_a, mut file_b) =
        (Matrix::zeros(experts * rank, input), Matrix::zeros(parts.len() * height, rank * experts));
    let mut first_rank = 0; // of the part
    for (half, adapter) in parts.iter().enumerate() {
        let Some(adapter) = adapter else { continue };
        let ((a, _, own), (b, _, _)) = (stack(&adapter.a), stack(&adapter.b));
        // A module has only one scale, so that `B` takes up a difference. Adapters of one run have the same scale, so
        // that the ratio is usually 1.
        let ratio = (scale(adapter) / scale(first)) as f32;
        for expert in 0..experts {
            for k in 0..own {
                for i in 0..input {
                    file_a.set(expert * rank + first_rank + k, i, a[(expert * input + i) * own + k]);
                }
                for o in 0..height {
                    let value = b[(expert * own + k) * height + o] * ratio;
                    file_b.set(half * height + o, (first_rank + k) * experts + expert, value);
                }
            }
        }
        first_rank += own;
    }
    Module {
        name: name.to_owned(),
        target: format!("{stack_path}.{parameter}"),
        parameter: true,
        rank,
        alpha: alpha_for(first.settings, scale(first), rank),
        a: file_a,
        b: file_b,
    }
}

/// The `alpha` that gives `scale` for `rank`.
fn alpha_for(settings: LowRankSettings, scale: f64, rank: usize) -> f64 {
    let rank = rank as f64;
    scale * if settings.rslora { rank.sqrt() } else { rank }
}

fn config(modules: &[Module], adapters: &[Adapter], model: &ModelConfig, base: &Path) -> NewConfig {
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
    let mut wanted: BTreeMap<(bool, String), Vec<&Module>> = BTreeMap::new();
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

/// The file: a header with this project's note, then the matrices sorted by name. Written here because the safetensors
/// library writes metadata in an order that differs from run to run.
fn safetensors(modules: &[Module], adapters: &[Adapter]) -> Vec<u8> {
    let mut tensors: Vec<(String, &Matrix)> = Vec::new();
    for module in modules {
        let [a, b] = names::tensor_names(&module.name);
        tensors.extend([(a, &module.a), (b, &module.b)]);
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let note: Vec<Note> = adapters.iter().map(Note::for_adapter).collect();
    let mut header = Map::new();
    let note = serde_json::to_string(&note).expect("a list of plain values is JSON");
    header.insert("__metadata__".into(), json!({ "format": "pt", NOTES: note }));
    let mut offset = 0;
    for (name, matrix) in &tensors {
        let end = offset + 4 * matrix.values.len();
        let info: Value =
            json!({ "dtype": "F32", "shape": [matrix.rows, matrix.columns], "data_offsets": [offset, end] });
        header.insert(name.clone(), info);
        offset = end;
    }
    let mut json = serde_json::to_vec(&Value::Object(header)).expect("a map of plain values is JSON");
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(&json);
    bytes.reserve(offset);
    for (_, matrix) in tensors {
        bytes.extend_from_slice(bytemuck::cast_slice(&matrix.values));
    }
    bytes
}

//! An adapter from files.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use memmap2::Mmap;
use moonlight_model::config::{ParameterKind, ParameterShape};
use moonlight_model::lora::{Adapter, LowRankSettings};
use moonlight_model::{CausalLm, ModelConfig};
use safetensors::{Dtype, SafeTensors};

use super::config::AdapterConfig;
use super::error::AdapterError;
use super::names::{self, Part};
use super::{ADAPTER_WEIGHTS, NOTES, Note};
use crate::error::CheckpointError;
use crate::io::confined_dir::ConfinedDir;

/// A matrix of the file, row by row, in f32.
#[derive(Debug, Clone)]
struct Matrix {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
}

/// The two matrices of a module: `[rank, in]`, `[out, rank]`.
#[derive(Debug, Default)]
struct Pair {
    a: Option<Matrix>,
    b: Option<Matrix>,
}

/// Loads the adapter of a directory into a model: ours, or one that peft wrote, for any of the model's projections.
///
/// # Errors
///
/// [`AdapterError`]: files that are absent or broken, ranks that are not those of the configuration, tensors and shapes
/// that do not belong to the model.
pub fn load_adapter(model: CausalLm, dir: &Path) -> Result<CausalLm, AdapterError> {
    let adapters = read_adapter(model.config(), dir)?;
    model.with_adapters(adapters).map_err(|source| AdapterError::Misfit { dir: dir.to_path_buf(), source })
}

/// The file's tensors, and how they become the model's.
struct Reading {
    path: PathBuf,
    config: AdapterConfig,
    shapes: BTreeMap<String, ParameterShape>,
    notes: Vec<Note>,
    adapters: Vec<Adapter>,
}

/// The adapters of a directory for a model of this configuration, as [`load_adapter`] hands them to the model.
///
/// # Errors
///
/// Those of [`load_adapter`].
pub fn read_adapter(model: &ModelConfig, dir: &Path) -> Result<Vec<Adapter>, AdapterError> {
    let config = AdapterConfig::read(dir)?;
    let confined = ConfinedDir::new(dir).map_err(CheckpointError::read(dir))?;
    let Some(path) = confined.file(ADAPTER_WEIGHTS)? else {
        return Err(AdapterError::NoWeights { dir: dir.to_path_buf() });
    };
    let wrong = |problem: String| AdapterError::Weights { path: path.clone(), problem };
    let file = File::open(&path).map_err(CheckpointError::read(&path))?;
    // SAFETY: the map is read-only and private; as with every mapped file, another process that shortens it meanwhile
    // breaks the promise. Adapters are replaced by renaming, never in place.
    let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::read(&path))?;
    let broken = |error: safetensors::SafeTensorError| wrong(format!("is truncated or no safetensors file: {error}"));
    let tensors = SafeTensors::deserialize(&map).map_err(broken)?;
    let (_, metadata) = SafeTensors::read_metadata(&map).map_err(broken)?;
    let notes = metadata.metadata().as_ref().and_then(|metadata| metadata.get(NOTES));
    let notes = notes.and_then(|notes| serde_json::from_str(notes).ok()).unwrap_or_default();

    let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
    for (name, view) in tensors.iter() {
        let Some((module, part)) = names::parse(name) else {
            return Err(wrong(format!("holds `{name}`, which is no part of a LoRA adapter")));
        };
        let &[rows, columns] = view.shape() else {
            return Err(wrong(format!("holds `{name}` of shape {:?}; it must be a matrix", view.shape())));
        };
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            other => return Err(wrong(format!("holds `{name}` as {other:?}; f32, bf16 and f16 are read"))),
        };
        let data = TensorData::from_bytes_vec(view.data().to_vec(), [rows, columns], dtype);
        let values: Vec<f32> = data.iter::<f32>().collect();
        if values.iter().any(|value| !value.is_finite()) {
            return Err(wrong(format!("holds infinite or NaN values in `{name}`")));
        }
        let pair = pairs.entry(module.to_owned()).or_default();
        let matrix = Some(Matrix { rows, columns, values });
        match part {
            Part::A => pair.a = matrix,
            Part::B => pair.b = matrix,
        }
    }
    let shapes = model.parameter_shapes().into_iter();
    let shapes = shapes
        .filter(|shape| matches!(shape.kind, ParameterKind::Matrix | ParameterKind::Experts))
        .map(|shape| (shape.path.strip_suffix(".weight").unwrap_or(&shape.path).to_owned(), shape))
        .collect();
    let mut reading = Reading { path: path.clone(), config, shapes, notes, adapters: Vec::new() };
    let mut singles: BTreeMap<(String, String), BTreeMap<usize, (Matrix, Matrix)>> = BTreeMap::new();
    let modules: Vec<String> = pairs.keys().cloned().collect();
    for (module, Pair { a, b }) in pairs {
        let (Some(a), Some(b)) = (a, b) else {
            return Err(wrong(format!("holds only one of the two matrices of `{module}`")));
        };
        if let Some((stack, expert, projection)) = names::single_expert(&module) {
            let stack = (stack.to_owned(), projection.to_owned());
            singles.entry(stack).or_default().insert(expert, (a, b));
        } else if let Some((stack, inner)) = names::whole_stack(&module) {
            let has_inner = inner || modules.contains(&format!("{stack}.base_layer"));
            reading.stack(stack, &module, (inner, has_inner), &a, &b)?;
        } else {
            reading.plain(&module, &a, &b)?;
        }
    }
    for ((stack, projection), experts) in singles {
        reading.singles(&stack, &projection, &experts)?;
    }
    Ok(reading.adapters)
}

impl Reading {
    fn wrong(&self, problem: String) -> AdapterError {
        AdapterError::Weights { path: self.path.clone(), problem }
    }

    fn unknown(&self, module: &str) -> AdapterError {
        self.wrong(format!("holds an adapter of `{module}`, which is no projection of the model"))
    }

    /// The rank that a module's matrices have, checked against each other and the configuration.
    fn rank(&self, module: &str, names: &[String], a: usize, b: usize) -> Result<LowRankSettings, AdapterError> {
        let (expected, settings) = self.config.of(names);
        for found in [a, b] {
            if found != expected {
                let (path, module) = (self.path.clone(), module.to_owned());
                return Err(AdapterError::Rank { path, module, found, expected });
            }
        }
        Ok(settings)
    }

    fn noted(&self, path: &str) -> Option<&Note> {
        self.notes.iter().find(|note| note.path == path)
    }

    fn push(&mut self, path: String, a: (Vec<f32>, Vec<usize>), b: (Vec<f32>, Vec<usize>), settings: LowRankSettings) {
        let settings = self.noted(&path).map_or(settings, Note::settings);
        self.adapters.push(Adapter { path, a: TensorData::new(a.0, a.1), b: TensorData::new(b.0, b.1), settings });
    }

    fn plain(&mut self, module: &str, a: &Matrix, b: &Matrix) -> Result<(), AdapterError> {
        if !self.shapes.get(module).is_some_and(|shape| shape.kind == ParameterKind::Matrix) {
            return Err(self.unknown(module));
        }
        let settings = self.rank(module, &names::names_of(module), a.rows, b.columns)?;
        let (input, rank, output) = (a.columns, a.rows, b.rows);
        let mut ours = (vec![0.0; input * rank], vec![0.0; rank * output]);
        for k in 0..rank {
            (0..input).for_each(|i| ours.0[i * rank + k] = a.values[k * input + i]);
            (0..output).for_each(|o| ours.1[k * output + o] = b.values[o * rank + k]);
        }
        self.push(module.to_owned(), (ours.0, vec![input, rank]), (ours.1, vec![rank, output]), settings);
        Ok(())
    }

    /// A stack as transformers 5 keeps it. `(inner, has_inner)`: whether this is the inner of two, and whether there are
    /// two.
    fn stack(
        &mut self,
        stack: &str,
        module: &str,
        (inner, has_inner): (bool, bool),
        a: &Matrix,
        b: &Matrix,
    ) -> Result<(), AdapterError> {
        let shape = |projection: &str| self.shapes.get(&format!("{stack}.{projection}")).map(|s| s.shape.clone());
        let (Some(gate), Some(down)) = (shape("gate_proj"), shape("down_proj")) else {
            return Err(self.unknown(module));
        };
        let (&[experts, hidden, width], &[_, _, _]) = (gate.as_slice(), down.as_slice()) else {
            return Err(self.unknown(module));
        };
        // One alone is told by its shape, or where that fits both, by the configuration.
        let alone_is_gate_up = || {
            let fits = |input, output| (a.columns, b.rows) == (input, output);
            fits(hidden, 2 * width) && (!fits(width, hidden) || self.targets_gate_up())
        };
        let is_gate_up = inner || (!has_inner && alone_is_gate_up());
        let (parts, input, height): (&[&str], _, _) =
            if is_gate_up { (&["gate_proj", "up_proj"], hidden, width) } else { (&["down_proj"], width, hidden) };
        if a.columns != input
            || b.rows != parts.len() * height
            || !a.rows.is_multiple_of(experts)
            || !b.columns.is_multiple_of(experts)
        {
            return Err(self.wrong(format!(
                "holds an adapter of `{module}` with A [{}, {}] and B [{}, {}], which do not fit {experts} experts of \
                 {input} inputs and {} outputs",
                a.rows,
                a.columns,
                b.rows,
                b.columns,
                parts.len() * height
            )));
        }
        let rank = a.rows / experts;
        let parameter = if is_gate_up { names::GATE_UP } else { "down_proj" };
        let name = names::full(&format!("{stack}.{parameter}"));
        let settings = self.rank(module, &[name], rank, b.columns / experts)?;
        // In our own files each part has ranks of its own; in peft's, all parts share all of them.
        let noted: Vec<_> = parts.iter().map(|part| self.noted(&format!("{stack}.{part}")).cloned()).collect();
        let ours = noted.iter().flatten().map(|note| note.rank).sum::<usize>() == rank;
        let mut first = 0;
        for (half, (part, note)) in parts.iter().zip(noted).enumerate() {
            let (from, own) = match (ours, note) {
                (true, Some(note)) => (first, note.rank),
                (true, None) => continue,
                (false, _) => (0, rank),
            };
            first += own;
            let mut values = (vec![0.0; experts * input * own], vec![0.0; experts * own * height]);
            for expert in 0..experts {
                for k in 0..own {
                    for i in 0..input {
                        values.0[(expert * input + i) * own + k] = a.values[(expert * rank + from + k) * input + i];
                    }
                    for o in 0..height {
                        values.1[(expert * own + k) * height + o] =
                            b.values[(half * height + o) * b.columns + (from + k) * experts + expert];
                    }
                }
            }
            let shapes = (vec![experts, input, own], vec![experts, own, height]);
            // The scale is that of all the ranks.
            let alpha = match settings.rslora {
                true => settings.scale(rank) * (own as f64).sqrt(),
                false => settings.scale(rank) * own as f64,
            };
            let settings = LowRankSettings { alpha, ..settings };
            self.push(format!("{stack}.{part}"), (values.0, shapes.0), (values.1, shapes.1), settings);
        }
        Ok(())
    }

    fn targets_gate_up(&self) -> bool {
        let mut targets = self.config.target_parameters.iter().flatten();
        targets.any(|target| target.rsplit('.').next() == Some(names::GATE_UP))
    }

    /// Experts one by one; one without an adapter has zeros.
    fn singles(
        &mut self,
        stack: &str,
        projection: &str,
        found: &BTreeMap<usize, (Matrix, Matrix)>,
    ) -> Result<(), AdapterError> {
        let path = format!("{stack}.{projection}");
        let shape = self.shapes.get(&path).map(|shape| shape.shape.clone());
        let Some(&[experts, input, output]) = shape.as_deref() else { return Err(self.unknown(&path)) };
        let (_, settings) = self.config.of(&names::names_of(&path));
        let Some(rank) = found.values().next().map(|(a, _)| a.rows) else { return Ok(()) };
        let mut values = (vec![0.0; experts * input * rank], vec![0.0; experts * rank * output]);
        for (&expert, (a, b)) in found {
            let module = format!("{stack}.{expert}.{projection}");
            if expert >= experts {
                return Err(self.unknown(&module));
            }
            self.rank(&module, &names::names_of(&module), a.rows, b.columns)?;
            if (a.rows, a.columns, b.rows) != (rank, input, output) {
                return Err(self.wrong(format!(
                    "holds an adapter of `{module}` with A [{}, {}] and B [{}, {}]; the expert takes {input} inputs to \
                     {output} outputs, and the others have rank {rank}",
                    a.rows, a.columns, b.rows, b.columns
                )));
            }
            for k in 0..rank {
                (0..input).for_each(|i| values.0[(expert * input + i) * rank + k] = a.values[k * input + i]);
                (0..output).for_each(|o| values.1[(expert * rank + k) * output + o] = b.values[o * rank + k]);
            }
        }
        let shapes = (vec![experts, input, rank], vec![experts, rank, output]);
        self.push(path, (values.0, shapes.0), (values.1, shapes.1), settings);
        Ok(())
    }
}

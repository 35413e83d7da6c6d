//! An adapter from files. Its header is read as that of weights is, and every shape is held against the model and the
//! configuration before memory is asked for.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use half::{bf16, f16};
use moonlight_model::config::{ParameterKind, ParameterShape};
use moonlight_model::lora::{Adapter, LoraError, LowRankSettings};
use moonlight_model::{CausalLm, ModelConfig};

use super::config::{AdapterConfig, check_scale};
use super::error::AdapterError;
use super::names::{self, Part};
use super::{ADAPTER_WEIGHTS, Note};
use crate::dtype::conversion::{WeightDtype, convert_bytes};
use crate::error::CheckpointError;
use crate::format::shard::Shard;
use crate::io::confined_dir::ConfinedDir;

/// Bytes that are read at a time.
const CHUNK: usize = 1 << 20;
/// The longest note of ours that is read: 200 bytes for each of more projections than any model has.
const LONGEST_NOTE: usize = 20_000_000;
/// An adapter may have so many values whatever its model, and more only where the model has more itself.
const ALWAYS_ALLOWED: u64 = 1 << 26;

/// A matrix of the file, which has not been read.
#[derive(Debug, Clone)]
struct Stored {
    rows: usize,
    columns: usize,
    dtype: WeightDtype,
    /// Where in the file's data section.
    range: Range<usize>,
}

/// The two matrices of a module: `[rank, in]`, `[out, rank]`.
#[derive(Debug, Default)]
struct Pair {
    a: Option<Stored>,
    b: Option<Stored>,
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
    dir: PathBuf,
    shard: Shard,
    config: AdapterConfig,
    /// Whether the configuration names `gate_up_proj` among its parameters.
    targets_gate_up: bool,
    shapes: BTreeMap<String, ParameterShape>,
    notes: HashMap<String, Note>,
    adapters: Vec<Adapter>,
    /// The most values of the whole adapter.
    most: u64,
    /// Those of them that may still be asked for.
    allowed: u64,
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
    let mut shard = Shard::open(&path).map_err(wrong)?;
    let notes = shard.note.take().map_or(Ok(HashMap::new()), |note| read_notes(&note)).map_err(wrong)?;
    let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
    for tensor in std::mem::take(&mut shard.tensors) {
        let name = &tensor.name;
        let Some((module, part)) = names::parse(name) else {
            return Err(wrong(format!("holds `{name}`, which is no part of a LoRA adapter")));
        };
        let &[rows, columns] = tensor.shape.as_slice() else {
            return Err(wrong(format!("holds `{name}` of shape {:?}; it must be a matrix", tensor.shape)));
        };
        let Some(dtype) = WeightDtype::from_safetensors(tensor.dtype) else {
            return Err(wrong(format!("holds `{name}` as {}; f32, bf16 and f16 are read", tensor.dtype)));
        };
        let pair = pairs.entry(module.to_owned()).or_default();
        let matrix = match part {
            Part::A => &mut pair.a,
            Part::B => &mut pair.b,
        };
        if matrix.replace(Stored { rows, columns, dtype, range: tensor.range }).is_some() {
            return Err(wrong(format!("holds `{name}` twice, under two names")));
        }
    }
    let shapes = model.parameter_shapes().into_iter();
    let shapes = shapes
        .filter(|shape| matches!(shape.kind, ParameterKind::Matrix | ParameterKind::Experts))
        .map(|shape| (shape.path.strip_suffix(".weight").unwrap_or(&shape.path).to_owned(), shape))
        .collect();
    let mut targets = config.target_parameters.iter().flatten();
    let targets_gate_up = targets.any(|target| target.rsplit('.').next() == Some(names::GATE_UP));
    let most = model.parameter_count().total.max(ALWAYS_ALLOWED);
    let mut reading = Reading {
        path: path.clone(),
        dir: dir.to_path_buf(),
        shard,
        config,
        targets_gate_up,
        shapes,
        notes,
        adapters: Vec::new(),
        most,
        allowed: most,
    };
    let mut singles: BTreeMap<(String, String), BTreeMap<usize, (Stored, Stored)>> = BTreeMap::new();
    let has_base_layer: HashSet<String> =
        pairs.keys().filter_map(|module| Some(module.strip_suffix(".base_layer")?.to_owned())).collect();
    for (module, Pair { a, b }) in pairs {
        let (Some(a), Some(b)) = (a, b) else {
            return Err(wrong(format!("holds only one of the two matrices of `{module}`")));
        };
        if let Some((stack, expert, projection)) = names::single_expert(&module) {
            let stack = (stack.to_owned(), projection.to_owned());
            if singles.entry(stack).or_default().insert(expert, (a, b)).is_some() {
                return Err(wrong(format!("holds two adapters of `{module}`")));
            }
        } else if let Some((stack, inner)) = names::whole_stack(&module) {
            let has_inner = inner || has_base_layer.contains(stack);
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

/// Our note of a file, by the adapters' paths. The error is the rest of a sentence that begins with the file's name.
fn read_notes(note: &str) -> Result<HashMap<String, Note>, String> {
    if note.len() > LONGEST_NOTE {
        return Err(format!("has a note of {} bytes on its adapters; none has more than {LONGEST_NOTE}", note.len()));
    }
    let list: Vec<Note> =
        serde_json::from_str(note).map_err(|error| format!("has a note on its adapters that is broken: {error}"))?;
    for note in &list {
        if note.rank == 0 || !note.alpha.is_finite() || !(0.0..1.0).contains(&note.dropout) {
            return Err(format!("has a note on `{}` with numbers that no adapter has", note.path));
        }
        check_scale(note.settings(), note.rank)?;
    }
    Ok(list.into_iter().map(|note| (note.path.clone(), note)).collect())
}

impl Reading {
    fn wrong(&self, problem: String) -> AdapterError {
        AdapterError::Weights { path: self.path.clone(), problem }
    }

    fn unknown(&self, module: &str) -> AdapterError {
        self.wrong(format!("holds an adapter of `{module}`, which is no projection of the model"))
    }

    fn settings(&self, names: &[String]) -> Result<(usize, LowRankSettings), AdapterError> {
        let path = || self.dir.join(super::config::ADAPTER_CONFIG);
        self.config.of(names).map_err(|problem| AdapterError::Config { path: path(), problem })
    }

    /// The rank that a module's matrices have, checked against each other and the configuration.
    fn rank(&self, module: &str, names: &[String], a: usize, b: usize) -> Result<LowRankSettings, AdapterError> {
        let (expected, settings) = self.settings(names)?;
        for found in [a, b] {
            if found != expected {
                let (path, module) = (self.path.clone(), module.to_owned());
                return Err(AdapterError::Rank { path, module, found, expected });
            }
        }
        Ok(settings)
    }

    /// Zeros for an adapter's two matrices, each a stack of `experts`.
    fn zeros(
        &mut self,
        module: &str,
        experts: usize,
        [input, rank, output]: [usize; 3],
    ) -> Result<(Vec<f32>, Vec<f32>), AdapterError> {
        let count = |width: usize| (experts as u64).saturating_mul(width as u64).saturating_mul(rank as u64);
        let wanted = count(input).saturating_add(count(output));
        let Some(left) = self.allowed.checked_sub(wanted) else {
            return Err(self.larger_than_its_model(module, wanted));
        };
        self.allowed = left;
        Ok((vec![0.0; experts * input * rank], vec![0.0; experts * rank * output]))
    }

    fn larger_than_its_model(&self, module: &str, values: u64) -> AdapterError {
        self.wrong(format!("holds more values than its model has: with the {values} of `{module}`, over {}", self.most))
    }

    /// The values of a matrix, row by row.
    fn values(&self, module: &str, matrix: &Stored) -> Result<Vec<f32>, AdapterError> {
        let size = matrix.dtype.size();
        let count = (matrix.rows as u64).saturating_mul(matrix.columns as u64);
        if count > self.most {
            return Err(self.larger_than_its_model(module, count));
        }
        let mut values = vec![0.0f32; matrix.rows * matrix.columns];
        let mut bytes = vec![0; CHUNK.min(values.len() * size)];
        let mut finite = true;
        for (at, values) in values.chunks_mut(CHUNK / size).enumerate() {
            let bytes = &mut bytes[..values.len() * size];
            let read = self.shard.read(matrix.range.start + at * CHUNK, bytes);
            read.map_err(CheckpointError::read(&self.path))?;
            finite &= match matrix.dtype {
                WeightDtype::F32 => convert_bytes::<f32, f32>(bytes, values),
                WeightDtype::Bf16 => convert_bytes::<bf16, f32>(bytes, values),
                WeightDtype::F16 => convert_bytes::<f16, f32>(bytes, values),
            };
        }
        if finite { Ok(values) } else { Err(self.wrong(format!("holds infinite or NaN values for `{module}`"))) }
    }

    fn noted(&self, path: &str) -> Option<&Note> {
        self.notes.get(path)
    }

    fn push(&mut self, path: String, a: (Vec<f32>, Vec<usize>), b: (Vec<f32>, Vec<usize>), settings: LowRankSettings) {
        let settings = self.noted(&path).map_or(settings, Note::settings);
        self.adapters.push(Adapter { path, a: TensorData::new(a.0, a.1), b: TensorData::new(b.0, b.1), settings });
    }

    fn plain(&mut self, module: &str, a: &Stored, b: &Stored) -> Result<(), AdapterError> {
        let shape = self.shapes.get(module).filter(|shape| shape.kind == ParameterKind::Matrix);
        let Some(weight) = shape.map(|shape| shape.shape.clone()) else { return Err(self.unknown(module)) };
        let settings = self.rank(module, &names::names_of(module), a.rows, b.columns)?;
        let (input, rank, output) = (a.columns, a.rows, b.rows);
        if weight != [input, output] {
            let (path, a, b) = (module.to_owned(), vec![input, rank], vec![rank, output]);
            let source = LoraError::Shape { path, a, b, weight };
            return Err(AdapterError::Misfit { dir: self.dir.clone(), source });
        }
        let mut ours = self.zeros(module, 1, [input, rank, output])?;
        let (a, b) = (self.values(module, a)?, self.values(module, b)?);
        for k in 0..rank {
            (0..input).for_each(|i| ours.0[i * rank + k] = a[k * input + i]);
            (0..output).for_each(|o| ours.1[k * output + o] = b[o * rank + k]);
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
        a: &Stored,
        b: &Stored,
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
            fits(hidden, 2 * width) && (!fits(width, hidden) || self.targets_gate_up)
        };
        let is_gate_up = inner || (!has_inner && alone_is_gate_up());
        let (parts, input, height): (&[&str], _, _) =
            if is_gate_up { (&["gate_proj", "up_proj"], hidden, width) } else { (&["down_proj"], width, hidden) };
        if experts == 0
            || a.columns != input
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
        let ours = noted.iter().flatten().fold(0, |all: usize, note| all.saturating_add(note.rank)) == rank;
        let (columns, a, b) = (b.columns, self.values(module, a)?, self.values(module, b)?);
        let mut first = 0;
        for (half, (part, note)) in parts.iter().zip(noted).enumerate() {
            let (from, own) = match (ours, note) {
                (true, Some(note)) => (first, note.rank),
                (true, None) => continue,
                (false, _) => (0, rank),
            };
            first += own;
            let mut values = self.zeros(module, experts, [input, own, height])?;
            for expert in 0..experts {
                for k in 0..own {
                    for i in 0..input {
                        values.0[(expert * input + i) * own + k] = a[(expert * rank + from + k) * input + i];
                    }
                    for o in 0..height {
                        values.1[(expert * own + k) * height + o] =
                            b[(half * height + o) * columns + (from + k) * experts + expert];
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

    /// Experts one by one; one without an adapter has zeros.
    fn singles(
        &mut self,
        stack: &str,
        projection: &str,
        found: &BTreeMap<usize, (Stored, Stored)>,
    ) -> Result<(), AdapterError> {
        let path = format!("{stack}.{projection}");
        let shape = self.shapes.get(&path).map(|shape| shape.shape.clone());
        let Some(&[experts, input, output]) = shape.as_deref() else { return Err(self.unknown(&path)) };
        let (_, settings) = self.settings(&names::names_of(&path))?;
        let Some(rank) = found.values().next().map(|(a, _)| a.rows) else { return Ok(()) };
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
        }
        let mut values = self.zeros(&path, experts, [input, rank, output])?;
        for (&expert, (a, b)) in found {
            let (a, b) = (self.values(&path, a)?, self.values(&path, b)?);
            for k in 0..rank {
                (0..input).for_each(|i| values.0[(expert * input + i) * rank + k] = a[k * input + i]);
                (0..output).for_each(|o| values.1[(expert * rank + k) * output + o] = b[o * rank + k]);
            }
        }
        let shapes = (vec![experts, input, rank], vec![experts, rank, output]);
        self.push(path, (values.0, shapes.0), (values.1, shapes.1), settings);
        Ok(())
    }
}

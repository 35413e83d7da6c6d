//! Reading an adapter. Its header is validated like that of any weight file, and every shape is checked against the
//! model and the config before memory is allocated.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use half::{bf16, f16};
use moonlight_model::config::{ParameterKind, ParameterShape};
use moonlight_model::lora::{Adapter, LoraError, LowRankSettings};
use moonlight_model::{CausalLm, ModelConfig};

use super::config::{
    ADAPTER_CONFIG, AdapterConfig, BaseInit, MERGE_IN_PEFT, TrainedBiases, TrainedTokens, check_scale,
};
use super::error::AdapterError;
use super::names::{self, TensorRole};
use super::targets::Names;
use super::weight_change::{self, WeightChange, WeightChanges};
use super::{ADAPTER_WEIGHTS, Note};
use crate::checkpoint::TiedHead;
use crate::dtype::conversion::{WeightDtype, convert_bytes};
use crate::error::CheckpointError;
use crate::format::shard::Shard;
use crate::format::tensor_entry::TensorEntry;
use crate::io::confined_dir::ConfinedDir;
use crate::mapping::names as mapping;
use crate::mapping::names::hugging_face_tensors;

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;
/// Size limit of this project's note, in bytes: 200 for each of 100,000 projections, more than any model has.
const MAX_NOTE_BYTES: usize = 20_000_000;
/// The number of values that an adapter may always have; more only if the model has more.
const MIN_ALLOWED_VALUES: u64 = 1 << 26;

/// A tensor of the file, not read yet; a vector is a matrix with one row.
#[derive(Debug, Clone)]
struct StoredMatrix {
    rows: usize,
    columns: usize,
    dtype: WeightDtype,
    /// Byte range in the file's data section.
    range: Range<usize>,
}

/// The two matrices of a module: `A`, `[rank, in]`, and `B`, `[out, rank]`.
#[derive(Debug, Default)]
struct MatrixPair {
    a: Option<StoredMatrix>,
    b: Option<StoredMatrix>,
}

/// The tensors of the file, by module.
#[derive(Debug, Default)]
struct AdapterTensors {
    pairs: BTreeMap<String, MatrixPair>,
    embeddings: BTreeMap<String, MatrixPair>,
    magnitudes: BTreeMap<String, StoredMatrix>,
    tokens: BTreeMap<String, StoredMatrix>,
    /// Fully trained weights by the name of the checkpoint's tensor, with the name in the file.
    full_weights: BTreeMap<String, (String, StoredMatrix)>,
}

/// A loaded adapter: its pairs of matrices, and its changes of the weights.
#[derive(Debug)]
struct AdapterContents {
    adapters: Vec<Adapter>,
    changes: WeightChanges,
}

/// Loads an adapter, written by this project or by peft, into a model. It may adapt any of the model's projections, its
/// embedding and its head. Everything except LoRA of a projection (DoRA, a trained embedding, the residual of PiSSA) is
/// applied to the weights themselves, once.
///
/// # Errors
///
/// [`AdapterError`]: missing or damaged files, ranks that differ from the config, an unsupported config, tensors or
/// shapes that do not match the model, changes of quantized weights.
pub fn load_adapter(model: CausalLm, dir: &Path) -> Result<CausalLm, AdapterError> {
    load_adapter_with_head(model, TiedHead::Absent, dir)
}

/// [`load_adapter`] for a model whose files contain `head` ([`Checkpoint::tied_head`](crate::Checkpoint::tied_head)).
/// With [`TiedHead::Separate`], `config.json` ties a head that differs from the embedding. peft follows `config.json`,
/// so that trained tokens apply to both matrices.
///
/// # Errors
///
/// Those of [`load_adapter`].
pub fn load_adapter_with_head(model: CausalLm, head: TiedHead, dir: &Path) -> Result<CausalLm, AdapterError> {
    let AdapterContents { adapters, changes } = contents(model.config(), head, dir)?;
    let model = weight_change::apply(model, changes)
        .map_err(|path| AdapterError::Quantized { dir: dir.to_path_buf(), path })?;
    model.with_adapters(adapters).map_err(|source| AdapterError::Mismatch { dir: dir.to_path_buf(), source })
}

/// Reads an adapter for a model with this config, to train it further.
///
/// # Errors
///
/// Those of [`load_adapter`], and [`AdapterError::NotTrainable`] for an adapter that changes the weights of the base.
pub fn read_adapter(model: &ModelConfig, dir: &Path) -> Result<Vec<Adapter>, AdapterError> {
    let AdapterContents { adapters, changes } = contents(model, TiedHead::Absent, dir)?;
    let what = |(path, changes): (&String, &Vec<WeightChange>)| match changes.last() {
        Some(WeightChange::SubtractPrincipal(_)) => "is PiSSA, which changes the base's weights".to_owned(),
        Some(WeightChange::SubtractFirstColumns { .. }) => "is OLoRA, which changes the base's weights".to_owned(),
        Some(WeightChange::Dora { .. }) => "is DoRA".to_owned(),
        Some(WeightChange::Add { .. }) => format!("has an adapter of `{path}`"),
        _ => format!("replaces `{path}`"),
    };
    match changes.iter().next() {
        None => Ok(adapters),
        Some(first) => Err(AdapterError::NotTrainable { dir: dir.to_path_buf(), what: what(first) }),
    }
}

/// State of reading one adapter.
struct AdapterReader {
    path: PathBuf,
    dir: PathBuf,
    shard: Shard,
    config: AdapterConfig,
    /// Whether the config lists `gate_up_proj` in `target_parameters`.
    targets_gate_up: bool,
    tied: bool,
    /// Whether `config.json` ties a head that differs from the embedding in the files.
    tied_in_config: bool,
    shapes: BTreeMap<String, ParameterShape>,
    notes: HashMap<String, Note>,
    adapters: Vec<Adapter>,
    changes: WeightChanges,
    /// The most values that the adapter may have in all.
    most: u64,
    /// How many values may still be allocated.
    allowed: u64,
}

/// The matrices of an adapter that changes no weight of its base by itself. `why` is the end of the message for one that does.
pub(crate) fn low_rank_only(model: &ModelConfig, dir: &Path, why: &str) -> Result<Vec<Adapter>, AdapterError> {
    let AdapterContents { adapters, changes } = contents(model, TiedHead::Absent, dir)?;
    match changes.into_iter().next() {
        None => Ok(adapters),
        Some((path, _)) => Err(AdapterError::Weights {
            path: dir.join(ADAPTER_WEIGHTS),
            problem: format!("changes `{path}` by more than LoRA of a projection, {why}"),
            hint: Some("merge the adapter into its model first, and convert the merged model".into()),
        }),
    }
}

fn contents(model: &ModelConfig, head: TiedHead, dir: &Path) -> Result<AdapterContents, AdapterError> {
    let mut config = AdapterConfig::read(dir)?;
    if config.targets.modules.is_none() && config.targets.parameters.is_empty() {
        config.targets.modules = Some(default_targets(model).ok_or_else(|| AdapterError::Config {
            path: dir.join(ADAPTER_CONFIG),
            problem: "does not list any modules".into(),
            hint: Some("set `target_modules`, as peft writes it".into()),
        })?);
    }
    let confined = ConfinedDir::new(dir).map_err(CheckpointError::read(dir))?;
    let Some(path) = confined.file(ADAPTER_WEIGHTS)? else {
        return Err(AdapterError::NoWeights { dir: dir.to_path_buf() });
    };
    let error = |problem: String| AdapterError::Weights { path: path.clone(), problem, hint: None };
    let mut shard = Shard::open(&path).map_err(error)?;
    let notes = shard.note.take().map_or(Ok(HashMap::new()), |note| read_notes(&note)).map_err(error)?;
    let tensors = std::mem::take(&mut shard.tensors);
    if tensors.is_empty() {
        let hint = "save the adapter again: its model had none, or a sharded training run did not gather it";
        let problem = "contains no tensors".into();
        return Err(AdapterError::Weights { path, problem, hint: Some(hint.into()) });
    }
    if let Some(TensorEntry { name, shape, .. }) =
        tensors.iter().find(|tensor| tensor.shape.len() > 2 && names::parse(&tensor.name).1 == TensorRole::FullWeight)
    {
        let stack = name.contains(".experts.");
        let what = if stack {
            "fully trained experts are not supported"
        } else {
            "the model has no weight with three or more dimensions"
        };
        let problem = format!("contains `{name}` of shape {shape:?}: {what}");
        let hint = stack.then(|| format!("{MERGE_IN_PEFT}, or train adapters of the experts (`target_parameters`)"));
        return Err(AdapterError::Weights { path, problem, hint });
    }
    let found = by_role(tensors).map_err(error)?;
    let shapes = model.parameter_shapes().into_iter();
    let shapes =
        shapes.map(|shape| (shape.path.strip_suffix(".weight").unwrap_or(&shape.path).to_owned(), shape)).collect();
    let mut targets = config.targets.parameters.iter();
    let targets_gate_up = targets.any(|target| target.rsplit('.').next() == Some(names::GATE_UP));
    let most = model.parameter_count().total.max(MIN_ALLOWED_VALUES);
    let reader = AdapterReader {
        path: path.clone(),
        dir: dir.to_path_buf(),
        shard,
        config,
        targets_gate_up,
        tied: model.tie_word_embeddings,
        tied_in_config: head == TiedHead::Separate,
        shapes,
        notes,
        adapters: Vec::new(),
        changes: WeightChanges::new(),
        most,
        allowed: most,
    };
    reader.read(found)
}

/// peft's default targets (`TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`).
fn default_targets(model: &ModelConfig) -> Option<Names> {
    let known = matches!(model.model_type.as_str(), "llama" | "qwen2");
    known.then(|| Names::List(["q_proj", "v_proj"].map(str::to_owned).into()))
}

/// Sorts the tensors by their role. The error is the rest of a sentence that begins with the file's name.
fn by_role(tensors: Vec<TensorEntry>) -> Result<AdapterTensors, String> {
    let mut found = AdapterTensors::default();
    for tensor in tensors {
        let name = &tensor.name;
        let (module, role) = names::parse(name);
        let (rows, columns) = match (role, tensor.shape.as_slice()) {
            (TensorRole::Magnitude | TensorRole::FullWeight, &[columns]) => (1, columns),
            // peft before 0.9 stored a magnitude as a column.
            (TensorRole::Magnitude, &[columns, 1]) => (1, columns),
            (TensorRole::Magnitude, shape) => {
                return Err(format!("contains `{name}` of shape {shape:?}; it must be a vector"));
            }
            (_, &[rows, columns]) => (rows, columns),
            (_, shape) => return Err(format!("contains `{name}` of shape {shape:?}; it must be a matrix")),
        };
        let Some(dtype) = tensor.dtype.weight_dtype() else {
            return Err(format!("contains `{name}` as {}; supported are f32, bf16 and f16", tensor.dtype));
        };
        let stored = StoredMatrix { rows, columns, dtype, range: tensor.range };
        let AdapterTensors { pairs, embeddings, magnitudes, tokens, full_weights } = &mut found;
        let twice = match role {
            TensorRole::A => pairs.entry(module).or_default().a.replace(stored).is_some(),
            TensorRole::B => pairs.entry(module).or_default().b.replace(stored).is_some(),
            TensorRole::EmbeddingA => embeddings.entry(module).or_default().a.replace(stored).is_some(),
            TensorRole::EmbeddingB => embeddings.entry(module).or_default().b.replace(stored).is_some(),
            TensorRole::Magnitude => magnitudes.insert(module, stored).is_some(),
            TensorRole::TrainedTokens => tokens.insert(module, stored).is_some(),
            TensorRole::FullWeight => full_weights.insert(module, (name.clone(), stored)).is_some(),
        };
        if twice {
            return Err(format!("contains `{name}` twice, under two names"));
        }
    }
    Ok(found)
}

/// The transpose of a matrix.
fn transposed_values(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|at| values[(at % rows) * columns + at / rows]).collect()
}

/// Parses this project's note, by the paths of the adapters. The error is the rest of a sentence that begins with the
/// file's name.
fn read_notes(note: &str) -> Result<HashMap<String, Note>, String> {
    if note.len() > MAX_NOTE_BYTES {
        return Err(format!("has a note of {} bytes on its adapters; the limit is {MAX_NOTE_BYTES}", note.len()));
    }
    let list: Vec<Note> =
        serde_json::from_str(note).map_err(|error| format!("has an invalid note on its adapters: {error}"))?;
    for note in &list {
        if note.rank == 0 || !note.alpha.is_finite() || !(0.0..1.0).contains(&note.dropout) {
            return Err(format!("has a note on `{}` with an invalid rank, alpha or dropout", note.path));
        }
        check_scale(note.settings(), note.rank)?;
    }
    Ok(list.into_iter().map(|note| (note.path.clone(), note)).collect())
}

impl AdapterReader {
    fn read(mut self, found: AdapterTensors) -> Result<AdapterContents, AdapterError> {
        let AdapterTensors { pairs, embeddings, mut magnitudes, tokens, full_weights } = found;
        let mut present: HashSet<String> = pairs.keys().cloned().collect();
        // Replaced weights come first, because later changes may build on them.
        let by_key: HashMap<String, ParameterShape> = if full_weights.is_empty() {
            HashMap::new()
        } else {
            let shapes = self.shapes.values().filter(|shape| shape.kind != ParameterKind::Experts);
            let named = shapes.filter_map(|shape| Some((hugging_face_tensors(shape).into_iter().next()?, shape)));
            named.map(|(tensor, shape)| (mapping::key(&tensor.name).to_owned(), shape.clone())).collect()
        };
        for (key, (name, stored)) in &full_weights {
            // The file's copy of a tied head is a copy of the embedding.
            if self.tied && key == mapping::HEAD && !self.config.targets.saves(names::HEAD) {
                match full_weights.get(mapping::EMBEDDING) {
                    Some((other, embedding)) => self.check_equal(name, stored, other, embedding)?,
                    None => self.replace_weight(by_key.get(mapping::EMBEDDING), mapping::EMBEDDING, name, stored)?,
                }
                continue;
            }
            self.replace_weight(by_key.get(key), key, name, stored)?;
        }
        let mut separate_experts: BTreeMap<(String, String), BTreeMap<usize, (StoredMatrix, StoredMatrix)>> =
            BTreeMap::new();
        let has_base_layer: HashSet<String> =
            pairs.keys().filter_map(|module| Some(module.strip_suffix(".base_layer")?.to_owned())).collect();
        for (module, pair) in pairs {
            let (a, b) = self.complete_pair(&module, pair)?;
            if let Some((stack, expert, projection)) = names::parse_expert(&module) {
                self.check_targeted(&module, &[format!("{stack}.{projection}")], &[self.stacked(stack, projection)])?;
                let stack = (stack.to_owned(), projection.to_owned());
                if separate_experts.entry(stack).or_default().insert(expert, (a, b)).is_some() {
                    return Err(self.error(format!("contains two adapters of `{module}`")));
                }
            } else if let Some((stack, inner)) = names::parse_stack(&module) {
                let has_inner = inner || has_base_layer.contains(stack);
                self.stack(stack, &module, (inner, has_inner), &a, &b)?;
            } else {
                self.projection(&module, &a, &b, magnitudes.remove(&module))?;
            }
        }
        for ((stack, projection), experts) in separate_experts {
            self.separate_experts(&stack, &projection, &experts)?;
        }
        for (module, pair) in embeddings {
            let (a, b) = self.complete_pair(&module, pair)?;
            self.embedding(&module, &a, &b)?;
            present.insert(module);
        }
        // `projection` has removed the magnitudes that it used.
        if let Some(module) = magnitudes.keys().next() {
            return Err(self.error_with_hint(
                format!("contains a DoRA magnitude of `{module}`, which has no adapter of a plain projection"),
                MERGE_IN_PEFT,
            ));
        }
        self.tokens(&tokens)?;
        self.check_complete(&present, &full_weights)?;
        Ok(AdapterContents { adapters: self.adapters, changes: self.changes })
    }

    fn complete_pair(
        &self,
        module: &str,
        MatrixPair { a, b }: MatrixPair,
    ) -> Result<(StoredMatrix, StoredMatrix), AdapterError> {
        match (a, b) {
            (Some(a), Some(b)) => Ok((a, b)),
            _ => Err(self.error(format!("contains only one of the two matrices of `{module}`"))),
        }
    }

    fn error(&self, problem: String) -> AdapterError {
        AdapterError::Weights { path: self.path.clone(), problem, hint: None }
    }

    fn error_with_hint(&self, problem: String, hint: &str) -> AdapterError {
        AdapterError::Weights { path: self.path.clone(), problem, hint: Some(hint.to_owned()) }
    }

    /// The parameter of transformers 5 that contains a projection of a stack.
    fn stacked(&self, stack: &str, projection: &str) -> String {
        let parameter = if projection == "down_proj" { "down_proj" } else { names::GATE_UP };
        names::transformers_name(&format!("{stack}.{parameter}"))
    }

    /// Refuses an adapter that the config does not target under any of its possible names, as a module or as a
    /// parameter. peft ignores such tensors silently.
    fn check_targeted(&self, module: &str, modules: &[String], parameters: &[String]) -> Result<(), AdapterError> {
        let targets = &self.config.targets;
        let own = [names::transformers_name(module)];
        let named = own.iter().cloned().chain(modules.iter().map(|module| names::transformers_name(module)));
        if named.into_iter().any(|name| targets.has_module(&name))
            || parameters.iter().any(|parameter| targets.has_parameter(parameter))
        {
            return Ok(());
        }
        Err(self.error_with_hint(
            format!("contains an adapter of `{module}`, which `adapter_config.json` does not target"),
            "add the module to `target_modules`, or remove the tensors from the file; peft ignores them",
        ))
    }

    /// Refuses two differing copies of a tied embedding.
    fn check_equal(
        &self,
        name: &str,
        stored: &StoredMatrix,
        other: &str,
        embedding: &StoredMatrix,
    ) -> Result<(), AdapterError> {
        let shapes = [stored, embedding].map(|stored| [stored.rows, stored.columns]);
        if shapes[0] == shapes[1] && self.values(name, stored)? == self.values(other, embedding)? {
            return Ok(());
        }
        Err(self.error_with_hint(
            format!(
                "contains `{other}` and a different `{name}`, but the model's head is its embedding (`tie_word_embeddings`)"
            ),
            "remove the copy that was not trained from the file, or untie the model first",
        ))
    }

    /// Reads a tensor that replaces one of the model.
    fn replace_weight(
        &mut self,
        parameter: Option<&ParameterShape>,
        key: &str,
        name: &str,
        stored: &StoredMatrix,
    ) -> Result<(), AdapterError> {
        let Some(parameter) = parameter else {
            if mapping::HEAD == key && self.tied {
                return Err(self.tied(name));
            }
            return Err(self.error(format!(
                "contains `{name}`, which is neither part of a LoRA adapter nor a weight of the model"
            )));
        };
        let module = key.rsplit_once('.').map_or(key, |(module, _)| module);
        let full = if parameter.kind == ParameterKind::Head { module.to_owned() } else { format!("model.{module}") };
        let targets = &self.config.targets;
        let bias = parameter.kind == ParameterKind::Bias || parameter.kind == ParameterKind::CorrectionBias;
        // peft saves embedding and head along with their adapters, and if tokens were added.
        let is_listed = targets.saves(&full)
            || matches!(parameter.kind, ParameterKind::Embedding | ParameterKind::Head)
            || (bias && self.trains_bias(&full));
        if !is_listed {
            return Err(self.error_with_hint(
                format!("contains `{name}`, which `adapter_config.json` does not list"),
                "remove the tensor from the file, or list what was trained: modules in `modules_to_save`, biases by `bias`",
            ));
        }
        // In peft, a module in `modules_to_save` has its own weight and is no longer tied. A copy that peft saves along
        // with an adapter (`save_embedding_layers`) is loaded into the one tied weight.
        if self.tied && parameter.kind == ParameterKind::Embedding && targets.saves(&full) {
            return Err(self.tied(name));
        }
        let mut shape = parameter.shape.clone();
        let transposed = mapping::transposed(parameter.kind);
        if transposed {
            shape.reverse();
        }
        let found =
            if shape.len() == 1 && stored.rows == 1 { vec![stored.columns] } else { vec![stored.rows, stored.columns] };
        if found != shape {
            let hint = match parameter.kind {
                ParameterKind::Embedding | ParameterKind::Head => {
                    "merge it with peft, on a base resized in the same way: tokens were added or removed"
                }
                _ => "check that the adapter belongs to this model",
            };
            return Err(
                self.error_with_hint(format!("contains `{name}` of shape {found:?}; the model's is {shape:?}"), hint)
            );
        }
        self.reserve(name, parameter.count())?;
        let mut values = self.values(name, stored)?;
        if transposed {
            values = transposed_values(&values, stored.rows, stored.columns);
        }
        self.change(&parameter.path, WeightChange::Replace(TensorData::new(values, parameter.shape.clone())));
        Ok(())
    }

    /// Whether the bias of a module was trained, by its name in transformers.
    fn trains_bias(&self, module: &str) -> bool {
        match self.config.biases {
            TrainedBiases::None => false,
            TrainedBiases::All => true,
            TrainedBiases::Adapted => self.config.targets.has_module(module),
        }
    }

    fn tied(&self, name: &str) -> AdapterError {
        self.error_with_hint(
            format!("contains `{name}`, and the model's head is its embedding (`tie_word_embeddings`)"),
            "untie the model first, or train single tokens (`trainable_token_indices`); in peft, an adapter of one of the \
             two unties them",
        )
    }

    fn change(&mut self, path: &str, change: WeightChange) {
        self.changes.entry(path.to_owned()).or_default().push(change);
    }

    /// Subtracts from the base's weight what peft subtracts for PiSSA and OLoRA.
    fn subtract_initial(&mut self, path: &str, rank: usize, scale: f64) {
        match self.config.initial {
            BaseInit::Unchanged => {}
            BaseInit::Pissa => self.change(path, WeightChange::SubtractPrincipal(rank)),
            BaseInit::Olora => self.change(path, WeightChange::SubtractFirstColumns { rank, scale }),
        }
    }

    /// Reads an adapter of the embedding: `A` is `[rank, vocab]`, `B` is `[hidden, rank]`.
    fn embedding(&mut self, module: &str, a: &StoredMatrix, b: &StoredMatrix) -> Result<(), AdapterError> {
        let shape = self.shapes.get(module).filter(|shape| shape.kind == ParameterKind::Embedding);
        let Some(shape) = shape.cloned() else { return Err(self.unknown(module)) };
        self.check_targeted(module, &[], &[])?;
        if self.tied {
            return Err(self.tied(module));
        }
        if self.config.dora || self.config.initial != BaseInit::Unchanged {
            return Err(self
                .error_with_hint("contains an adapter of the embedding that is not plain LoRA".into(), MERGE_IN_PEFT));
        }
        let settings = self.rank(module, &names::names_of(module), a.rows, b.columns)?;
        if shape.shape != [a.columns, b.rows] {
            return Err(self.misfit(module, [a.columns, a.rows, b.rows], &shape.shape));
        }
        let (a, b, scale) = self.load_pair(module, a, b, settings)?;
        self.change(&shape.path, WeightChange::Add { a, b, scale });
        Ok(())
    }

    /// Reads `A` and `B`, transposed to `[in, rank]` and `[rank, out]`, and their scale.
    fn load_pair(
        &mut self,
        module: &str,
        a: &StoredMatrix,
        b: &StoredMatrix,
        settings: LowRankSettings,
    ) -> Result<(TensorData, TensorData, f64), AdapterError> {
        let (input, rank, output) = (a.columns, a.rows, b.rows);
        let (mut our_a, mut our_b) = self.zeros(module, 1, [input, rank, output])?;
        let (a, b) = (self.values(module, a)?, self.values(module, b)?);
        for k in 0..rank {
            (0..input).for_each(|i| our_a[i * rank + k] = a[k * input + i]); // [rank, in] to [in, rank]
            (0..output).for_each(|o| our_b[k * output + o] = b[o * rank + k]); // [out, rank] to [rank, out]
        }
        let (a, b) = (TensorData::new(our_a, [input, rank]), TensorData::new(our_b, [rank, output]));
        Ok((a, b, settings.scale(rank)))
    }

    fn misfit(&self, module: &str, [input, rank, output]: [usize; 3], weight: &[usize]) -> AdapterError {
        let (path, a, b) = (module.to_owned(), vec![input, rank], vec![rank, output]);
        let source = LoraError::Shape { path, a, b, weight: weight.to_vec() };
        AdapterError::Mismatch { dir: self.dir.clone(), source }
    }

    /// Reads single trained rows of the embedding and columns of the head.
    fn tokens(&mut self, found: &BTreeMap<String, StoredMatrix>) -> Result<(), AdapterError> {
        let by_module = match &self.config.tokens {
            TrainedTokens::None => Vec::new(),
            TrainedTokens::Embedding(tokens) => vec![(names::EMBEDDING.to_owned(), tokens.clone())],
            TrainedTokens::ByModule(list) => list.clone(),
        };
        let short = |module: &str| module.rsplit('.').next().unwrap_or_default().to_owned();
        let listed: BTreeMap<String, Vec<usize>> =
            by_module.into_iter().map(|(module, tokens)| (short(&module), tokens)).collect();
        for (module, stored) in found {
            let Some(tokens) = listed.get(module) else {
                return Err(self.error_with_hint(
                    format!("contains trained tokens of `{module}`, which `adapter_config.json` does not list"),
                    "list the tokens in `trainable_token_indices`",
                ));
            };
            let head = module == names::HEAD;
            if head && self.tied {
                return Err(self.tied(module));
            }
            let shape = self.shapes.get(module).cloned();
            let shape = shape.filter(|shape| matches!(shape.kind, ParameterKind::Embedding | ParameterKind::Head));
            let Some(shape) = shape else { return Err(self.unknown(module)) };
            let (vocab, hidden) =
                if head { (shape.shape[1], shape.shape[0]) } else { (shape.shape[0], shape.shape[1]) };
            if let Some(token) = tokens.iter().find(|token| **token >= vocab) {
                return Err(
                    self.error(format!("contains the token {token} of `{module}`; the model has {vocab} tokens"))
                );
            }
            if (stored.rows, stored.columns) != (tokens.len(), hidden) {
                return Err(self.error(format!(
                    "contains trained tokens of `{module}` as [{}, {}]; {} of {hidden} are listed",
                    stored.rows,
                    stored.columns,
                    tokens.len()
                )));
            }
            self.reserve(module, (stored.rows as u64).saturating_mul(stored.columns as u64))?;
            let values = TensorData::new(self.values(module, stored)?, [stored.rows, stored.columns]);
            if !head && self.tied_in_config && !listed.contains_key(names::HEAD) {
                let shape = self.shapes.get(names::HEAD).cloned();
                let Some(shape) = shape else { return Err(self.unknown(names::HEAD)) };
                self.change(&shape.path, WeightChange::Columns(tokens.clone(), values.clone()));
            }
            let tokens = tokens.clone();
            self.change(
                &shape.path,
                if head { WeightChange::Columns(tokens, values) } else { WeightChange::Rows(tokens, values) },
            );
        }
        match listed.keys().find(|module| !found.contains_key(*module)) {
            Some(module) => Err(self.missing(&format!("the trained tokens of `{module}`"), 0)),
            None => Ok(()),
        }
    }

    fn missing(&self, what: &str, more: usize) -> AdapterError {
        let more = if more > 0 { format!(" (and {more} more)") } else { String::new() };
        self.error_with_hint(
            format!("lacks {what}{more}, which `adapter_config.json` lists"),
            "check that the file is complete and belongs to this adapter",
        )
    }

    /// The parameter of a stack of experts that the config targets and the file lacks. With one tensor per expert, one
    /// expert is enough.
    fn missing_of_stack(&self, stack: &str, present: &HashSet<String>) -> Option<String> {
        let names = [names::GATE_UP, "down_proj"].map(|parameter| format!("{stack}.{parameter}"));
        let targeted = names.each_ref().map(|name| self.config.targets.has_parameter(&names::transformers_name(name)));
        let has_expert = |projections: &[&str]| {
            present
                .iter()
                .filter_map(|module| names::parse_expert(module))
                .any(|(of, _, projection)| of == stack && projections.contains(&projection))
        };
        let separate_experts = [has_expert(&["gate_proj", "up_proj"]), has_expert(&["down_proj"])];
        // Of two adapters, the inner one is called `base_layer`. A single one is whichever is targeted.
        let stacked = [format!("{stack}.base_layer"), stack.to_owned()].map(|module| present.contains(&module));
        let found = match (targeted, stacked) {
            (_, [true, true]) => [true; 2],
            ([true, true], [inner, outer]) => [inner, outer],
            (_, [inner, outer]) => [inner || outer; 2],
        };
        let missing = (0..2).find(|&at| targeted[at] && !found[at] && !separate_experts[at])?;
        names.into_iter().nth(missing)
    }

    /// Refuses a file that lacks an adapter or weight that the config lists. peft would leave it untrained.
    fn check_complete(
        &self,
        present: &HashSet<String>,
        full_weights: &BTreeMap<String, (String, StoredMatrix)>,
    ) -> Result<(), AdapterError> {
        let targets = &self.config.targets;
        let moe = self.shapes.values().any(|shape| shape.kind == ParameterKind::Experts);
        // In a model with experts, peft applies the names of MLP projections to the experts alone with transformers 5,
        // but also to dense layers and shared experts with transformers 4. So none of the latter is missing.
        let is_ambiguous = |module: &str| moe && module.contains(".mlp") && !module.ends_with(".router");
        let has = |module: &String, shape: &ParameterShape| match shape.kind {
            ParameterKind::Matrix | ParameterKind::Router => {
                let full = names::transformers_name(module);
                let all_linear = matches!(targets.modules, Some(Names::AllLinear));
                let by_module = targets.has_module(&full) && !is_ambiguous(module);
                (by_module && !(all_linear && shape.kind == ParameterKind::Router))
                    || targets.has_parameter(&format!("{full}.weight"))
            }
            ParameterKind::Head | ParameterKind::Embedding => {
                matches!(targets.modules, Some(Names::List(_) | Names::Expression(_)))
                    && targets.has_module(&names::transformers_name(module))
            }
            _ => false,
        };
        let mut missing = self.shapes.iter().filter(|(module, shape)| has(module, shape) && !present.contains(*module));
        if let Some((module, _)) = missing.next() {
            return Err(self.missing(&format!("the adapter of `{module}`"), missing.count()));
        }
        for stack in self.shapes.keys().filter_map(|module| module.strip_suffix(".gate_proj")) {
            if let Some(missing) = stack.ends_with(".experts").then(|| self.missing_of_stack(stack, present)).flatten()
            {
                return Err(self.missing(&format!("the adapter of `{missing}`"), 0));
            }
        }
        let saved = self.shapes.values().filter(|shape| shape.kind != ParameterKind::Experts).filter_map(|shape| {
            let name = hugging_face_tensors(shape).into_iter().next()?.name;
            let module = name.rsplit_once('.').map_or(name.as_str(), |(module, _)| module);
            let asked = targets.saves(module) || shape.kind == ParameterKind::Bias && self.trains_bias(module);
            (asked && !full_weights.contains_key(mapping::key(&name))).then_some(name)
        });
        match saved.into_iter().next() {
            Some(name) => Err(self.missing(&format!("`{name}`"), 0)),
            None => Ok(()),
        }
    }

    fn unknown(&self, module: &str) -> AdapterError {
        self.error(format!("contains an adapter of `{module}`, which is not a projection of the model"))
    }

    fn settings(&self, names: &[String]) -> Result<(usize, LowRankSettings), AdapterError> {
        let path = || self.dir.join(ADAPTER_CONFIG);
        self.config.settings_of(names).map_err(|problem| AdapterError::Config { path: path(), problem, hint: None })
    }

    /// Checks the ranks of a module's two matrices against the config.
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

    /// Allocates an adapter's two matrices, each a stack of `experts`, filled with zeros.
    fn zeros(
        &mut self,
        module: &str,
        experts: usize,
        [input, rank, output]: [usize; 3],
    ) -> Result<(Vec<f32>, Vec<f32>), AdapterError> {
        let count = |width: usize| (experts as u64).saturating_mul(width as u64).saturating_mul(rank as u64);
        self.reserve(module, count(input).saturating_add(count(output)))?;
        Ok((vec![0.0; experts * input * rank], vec![0.0; experts * rank * output]))
    }

    /// Counts values against the limit, before they are allocated.
    fn reserve(&mut self, module: &str, wanted: u64) -> Result<(), AdapterError> {
        let Some(left) = self.allowed.checked_sub(wanted) else {
            return Err(self.larger_than_its_model(module, wanted));
        };
        self.allowed = left;
        Ok(())
    }

    fn larger_than_its_model(&self, module: &str, values: u64) -> AdapterError {
        self.error(format!("contains too many values: with the {values} of `{module}`, more than {}", self.most))
    }

    /// Reads the values of a matrix, row-major.
    fn values(&self, module: &str, matrix: &StoredMatrix) -> Result<Vec<f32>, AdapterError> {
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
        if finite { Ok(values) } else { Err(self.error(format!("contains NaN or infinity in `{module}`"))) }
    }

    fn note_of(&self, path: &str) -> Option<&Note> {
        self.notes.get(path)
    }

    fn push(&mut self, path: String, a: (Vec<f32>, Vec<usize>), b: (Vec<f32>, Vec<usize>), settings: LowRankSettings) {
        let settings = self.note_of(&path).map_or(settings, Note::settings);
        self.adapters.push(Adapter { path, a: TensorData::new(a.0, a.1), b: TensorData::new(b.0, b.1), settings });
    }

    fn projection(
        &mut self,
        module: &str,
        a: &StoredMatrix,
        b: &StoredMatrix,
        magnitude: Option<StoredMatrix>,
    ) -> Result<(), AdapterError> {
        use ParameterKind::{Head, Matrix, Router};
        let shape = self.shapes.get(module).filter(|shape| matches!(shape.kind, Matrix | Router | Head)).cloned();
        let Some(shape) = shape else {
            return Err(if module == names::HEAD && self.tied { self.tied(module) } else { self.unknown(module) });
        };
        let known = names::names_of(module);
        self.check_targeted(module, &[], &known[1..])?;
        let settings = self.rank(module, &known, a.rows, b.columns)?;
        let (input, rank, output) = (a.columns, a.rows, b.rows);
        if shape.shape != [input, output] {
            return Err(self.misfit(module, [input, rank, output], &shape.shape));
        }
        // peft wraps the router as a parameter, for which it has neither DoRA nor PiSSA.
        if shape.kind == Router && (self.config.dora || self.config.initial != BaseInit::Unchanged) {
            return Err(self.unsupported_kind(module));
        }
        self.subtract_initial(&shape.path, rank, settings.scale(rank));
        let (a, b, scale) = self.load_pair(module, a, b, settings)?;
        match (self.config.dora, magnitude) {
            (false, None) if shape.kind == Head => self.change(&shape.path, WeightChange::Add { a, b, scale }),
            (false, None) => {
                let settings = self.note_of(module).map_or(settings, Note::settings);
                self.adapters.push(Adapter { path: module.to_owned(), a, b, settings });
            }
            (true, Some(magnitude)) => {
                if magnitude.columns != output {
                    return Err(self.error(format!(
                        "contains {} magnitudes of `{module}`, which has {output} outputs",
                        magnitude.columns
                    )));
                }
                let magnitude = TensorData::new(self.values(module, &magnitude)?, [output]);
                self.change(&shape.path, WeightChange::Dora { a, b, scale, magnitude });
            }
            (true, None) => return Err(self.missing(&format!("the DoRA magnitudes of `{module}`"), 0)),
            (false, Some(_)) => {
                return Err(self.error(format!(
                    "contains DoRA magnitudes of `{module}`, but `adapter_config.json` does not set `use_dora`"
                )));
            }
        }
        Ok(())
    }

    fn unsupported_kind(&self, module: &str) -> AdapterError {
        let problem =
            format!("contains an adapter of `{module}`, for which peft supports neither DoRA nor PiSSA nor OLoRA");
        self.error_with_hint(problem, MERGE_IN_PEFT)
    }

    /// Reads a stack in the layout of transformers 5: `A` `[experts * rank, in]`, `B` `[out, rank * experts]`. `inner` is
    /// whether this is the inner of two adapters, and `has_inner` whether the stack has two.
    fn stack(
        &mut self,
        stack: &str,
        module: &str,
        (inner, has_inner): (bool, bool),
        a: &StoredMatrix,
        b: &StoredMatrix,
    ) -> Result<(), AdapterError> {
        let shape = |projection: &str| self.shapes.get(&format!("{stack}.{projection}")).map(|s| s.shape.clone());
        if self.config.dora || self.config.initial != BaseInit::Unchanged {
            return Err(self.unsupported_kind(module));
        }
        let (Some(gate), Some(down)) = (shape("gate_proj"), shape("down_proj")) else {
            return Err(self.unknown(module));
        };
        let (&[experts, hidden, width], &[_, _, _]) = (gate.as_slice(), down.as_slice()) else {
            return Err(self.unknown(module));
        };
        // A single adapter is recognized by its shape, or by the config if both shapes match.
        let single_is_gate_up = || {
            let fits = |input, output| (a.columns, b.rows) == (input, output);
            fits(hidden, 2 * width) && (!fits(width, hidden) || self.targets_gate_up)
        };
        let is_gate_up = inner || (!has_inner && single_is_gate_up());
        let (parts, input, height): (&[&str], _, _) =
            if is_gate_up { (&["gate_proj", "up_proj"], hidden, width) } else { (&["down_proj"], width, hidden) };
        if experts == 0
            || a.columns != input
            || b.rows != parts.len() * height
            || !a.rows.is_multiple_of(experts)
            || !b.columns.is_multiple_of(experts)
        {
            return Err(self.error(format!(
                "contains an adapter of `{module}` with A [{}, {}] and B [{}, {}], which do not match {experts} \
                 experts with {input} inputs and {} outputs",
                a.rows,
                a.columns,
                b.rows,
                b.columns,
                parts.len() * height
            )));
        }
        let rank = a.rows / experts;
        let parameter = if is_gate_up { names::GATE_UP } else { "down_proj" };
        let name = names::transformers_name(&format!("{stack}.{parameter}"));
        let modules: Vec<String> = parts.iter().map(|part| format!("{stack}.{part}")).collect();
        self.check_targeted(module, &modules, std::slice::from_ref(&name))?;
        let settings = self.rank(module, &[name], rank, b.columns / experts)?;
        // In files of this project each part has its own block of ranks; in peft's, both parts share all ranks.
        let notes: Vec<_> = parts.iter().map(|part| self.note_of(&format!("{stack}.{part}")).cloned()).collect();
        // The notes apply only if their ranks add up to that of the matrices: another program may have changed the
        // matrices since.
        let has_own_ranks = notes.iter().flatten().fold(0, |all: usize, note| all.saturating_add(note.rank)) == rank;
        let (columns, a, b) = (b.columns, self.values(module, a)?, self.values(module, b)?);
        let mut first = 0;
        for (half, (part, note)) in parts.iter().zip(notes).enumerate() {
            let (from, own) = match (has_own_ranks, note) {
                (true, Some(note)) => (first, note.rank),
                (true, None) => continue,
                (false, _) => (0, rank),
            };
            first += own;
            let mut values = self.zeros(module, experts, [input, own, height])?; // [experts, in, rank], [experts, rank, out]
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
            // The file's scale is that for all ranks together. This alpha gives the part the same scale.
            let alpha = match settings.rslora {
                true => settings.scale(rank) * (own as f64).sqrt(),
                false => settings.scale(rank) * own as f64,
            };
            let settings = LowRankSettings { alpha, ..settings };
            self.push(format!("{stack}.{part}"), (values.0, shapes.0), (values.1, shapes.1), settings);
        }
        Ok(())
    }

    /// Reads a stack with one tensor per expert; an expert without an adapter gets zeros.
    fn separate_experts(
        &mut self,
        stack: &str,
        projection: &str,
        found: &BTreeMap<usize, (StoredMatrix, StoredMatrix)>,
    ) -> Result<(), AdapterError> {
        let path = format!("{stack}.{projection}");
        let shape = self.shapes.get(&path).map(|shape| shape.shape.clone());
        let Some(&[experts, input, output]) = shape.as_deref() else { return Err(self.unknown(&path)) };
        if self.config.dora || self.config.initial != BaseInit::Unchanged {
            return Err(self.unsupported_kind(&path));
        }
        let (_, settings) = self.settings(&names::names_of(&path))?;
        let Some(rank) = found.values().next().map(|(a, _)| a.rows) else { return Ok(()) };
        for (&expert, (a, b)) in found {
            let module = format!("{stack}.{expert}.{projection}");
            if expert >= experts {
                return Err(self.unknown(&module));
            }
            self.rank(&module, &names::names_of(&module), a.rows, b.columns)?;
            if (a.rows, a.columns, b.rows) != (rank, input, output) {
                return Err(self.error(format!(
                    "contains an adapter of `{module}` with A [{}, {}] and B [{}, {}]; the expert has {input} \
                     inputs and {output} outputs, and the others have rank {rank}",
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

//! The load plan: every tensor of a checkpoint is matched with a parameter of its model before a byte of a weight is
//! read.

mod gguf;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use moonlight_model::ModelConfig;
use moonlight_model::config::{ParameterKind, ParameterShape};
use moonlight_simd::quant::Bits;
use safetensors::Dtype;

use crate::checkpoint::{Checkpoint, StoredTensor, TiedHead};
use crate::dtype::conversion::WeightDtype;
use crate::dtype::dequantize::{Encoding, Layout, SourceTensor};
use crate::dtype::quant::{QuantScheme, values_per_word};
use crate::error::CheckpointError;
use crate::format::gguf::names::ROPE_FACTORS;
use crate::format::shard::FileRange;
use crate::format::tensor_entry::StoredDtype;
use crate::mapping::names::{self, HfTensor, SkipReason, Stacked};
use crate::report::validation::{Problem, ProblemList};

/// More experts than any model of the family has in a layer.
const MOST_EXPERTS: usize = 1 << 16;
/// More routed experts, over all layers, than any model of the family has (Kimi-K2: 23,040), not counting those that are
/// stored one by one.
const MOST_STACKED: usize = 1 << 15;
/// The same limit if a file cannot be read and may contain any tensor.
const MOST_UNREAD: usize = 1 << 17;
/// Group size of the packed weights of Kimi-K2-Thinking and Kimi-K2.5: values of a row that share a scale.
const USUAL_GROUP: usize = 32;
/// Wider than any matrix of the family; a product of three such numbers fits into 64 bits.
const WIDEST: usize = 1 << 21;

/// Where the values of each parameter are stored.
#[derive(Debug)]
pub(crate) struct LoadPlan {
    pub(crate) parameters: Vec<PlannedParameter>,
    pub(crate) skipped: BTreeMap<SkipReason, Vec<String>>,
}

/// Where the values of one parameter are stored.
#[derive(Debug)]
pub(crate) struct PlannedParameter {
    pub(crate) parameter: ParameterShape,
    /// One source, or one for each expert.
    pub(crate) sources: Vec<SourceTensor>,
}

impl PlannedParameter {
    /// The narrowest dtype that represents all values exactly.
    pub(crate) fn stored(&self) -> WeightDtype {
        self.sources.iter().map(|source| source.dtype).reduce(WeightDtype::widest).unwrap_or(WeightDtype::F32)
    }
}

/// Which parameters are planned, and what may be missing.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Scope<'a> {
    /// All parameters; nothing may be missing.
    All,
    /// The parameters that the files contain completely: files and tensors may be missing, but nothing may be wrong.
    Present,
    /// The parameters at or below a path of the module. Files that contain none of them may be missing or damaged.
    Below(&'a str),
}

impl Checkpoint {
    /// Every reason why this checkpoint cannot be loaded; empty if it can.
    pub fn problems(&self) -> Vec<Problem> {
        match self.plan(Scope::All) {
            Ok(_) => Vec::new(),
            Err(problems) => problems.list,
        }
    }

    /// The names of tensors that loading ignores, by reason. Missing files and tensors do not matter; with any other of
    /// the [`problems`](Checkpoint::problems) the map is empty.
    pub fn skipped(&self) -> BTreeMap<SkipReason, Vec<String>> {
        let plan = self.plan(Scope::All).or_else(|_| self.plan(Scope::Present));
        plan.map(|plan| plan.skipped).unwrap_or_default()
    }

    /// [`skipped`](Checkpoint::skipped) as sentences, one for each reason: what a model loses when it is loaded and
    /// saved again.
    pub fn skipped_notes(&self) -> Vec<String> {
        let note = |(reason, tensors): (SkipReason, Vec<String>)| {
            let tensor = if tensors.len() == 1 { "tensor" } else { "tensors" };
            format!("ignored {} {tensor}: {}", tensors.len(), reason.describe())
        };
        self.skipped().into_iter().map(note).chain(self.listed_only_note()).chain(self.gguf_notes()).collect()
    }

    /// A note on tensors that only the index lists and that the model does not need.
    pub(crate) fn listed_only_note(&self) -> Option<String> {
        let (first, more) = (self.listed_only.first()?, self.listed_only.len() - 1);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        Some(format!("the index lists `{first}`{more}, which no file contains and the model does not need"))
    }

    /// The number of matrices in each quantized form, such as `FP8, one scale per row`.
    pub(crate) fn quantized_forms(&self) -> BTreeMap<String, usize> {
        let mut forms = BTreeMap::new();
        let Ok(plan) = self.plan(Scope::Present) else { return forms };
        for source in plan.parameters.iter().flat_map(|planned| &planned.sources) {
            if let Some(form) = source.quantized_form() {
                *forms.entry(form).or_default() += 1;
            }
        }
        forms
    }

    /// The config's `quant_method`, if the weights are quantized.
    pub(crate) fn quantization(&self) -> Option<String> {
        QuantScheme::for_config(self.config()).method
    }

    pub(crate) fn checked_plan(&self, scope: Scope<'_>) -> Result<LoadPlan, CheckpointError> {
        self.plan(scope).map_err(|problems| CheckpointError::Mismatch { dir: self.dir().to_path_buf(), problems })
    }

    pub(crate) fn plan(&self, scope: Scope<'_>) -> Result<LoadPlan, ProblemList> {
        let scheme = QuantScheme::for_config(self.config());
        let quantized = scheme.method.clone();
        let unsupported = scheme.unsupported.clone().into_iter().map(|problem| Problem::QuantizationConfig { problem });
        if let Some(problem) =
            implausible(self.config(), self.tensor_list().len(), self.unreadable_keys.as_ref().map(|set| set.len()))
        {
            let mut list = self.file_problems.clone();
            list.push(Problem::Implausible { problem });
            return Err(ProblemList { list, quantized, gguf: self.is_gguf() });
        }
        let wanted: Vec<ParameterShape> = self
            .config()
            .parameter_shapes()
            .into_iter()
            .filter(|parameter| match scope {
                Scope::All | Scope::Present => true,
                Scope::Below(prefix) => {
                    let rest = parameter.path.strip_prefix(prefix);
                    prefix.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
                }
            })
            .collect();
        let mut matcher = TensorMatcher::new(self, scheme);
        let mut parameters: Vec<PlannedParameter> =
            wanted.into_iter().map(|parameter| matcher.plan(parameter)).collect();
        // For a part of the model, most tensors are unused, and none of them is unexpected.
        let skipped = if matches!(scope, Scope::Below(_)) { BTreeMap::new() } else { matcher.sort_unused() };
        let TensorMatcher { problems: found, wants_unreadable, .. } = matcher;
        let mut list = match scope {
            // Damaged files do not matter if they cannot contain a tensor of the part.
            Scope::Below(_) if !wants_unreadable => Vec::new(),
            _ => self.file_problems.clone(),
        };
        list.extend(unsupported);
        list.extend(found);
        if matches!(scope, Scope::Present) {
            list.retain(|problem| !problem.is_missing());
            // A stack with missing experts is dropped as a whole: Burn has one parameter for it.
            parameters.retain(|planned| planned.sources.len() == source_count(&planned.parameter));
        }
        if list.is_empty() {
            Ok(LoadPlan { parameters, skipped })
        } else {
            Err(ProblemList { list, quantized, gguf: self.is_gguf() })
        }
    }
}

/// The number of sources of a complete parameter.
fn source_count(parameter: &ParameterShape) -> usize {
    if parameter.kind == ParameterKind::Experts { parameter.shape[0] } else { 1 }
}

/// A size in the config that the model in these files cannot have. Checked first: listing the parameters of such a
/// model would exhaust memory.
fn implausible(config: &ModelConfig, tensors: usize, unread: Option<usize>) -> Option<String> {
    let layers = config.num_hidden_layers;
    if let Some(unread) = unread
        && layers > tensors + unread
    {
        return Some(format!("`num_hidden_layers` is {layers}, and the files contain {tensors} tensors"));
    }
    let experts = config.moe.as_ref().map_or(0, |moe| moe.n_routed_experts);
    if experts > MOST_EXPERTS {
        return Some(format!("`n_routed_experts` is {experts}"));
    }
    // Also limits the list of missing tensors, which has an entry for each expert of each layer.
    let all = layers.saturating_mul(experts);
    if all > unread.map_or(MOST_UNREAD, |unread| MOST_STACKED + tensors + unread) {
        return Some(format!("{layers} layers have {experts} experts each, and the files contain {tensors} tensors"));
    }
    let moe = config.moe.as_ref().map_or([0; 2], |moe| [moe.moe_intermediate_size, moe.n_shared_experts]);
    let widths = [config.vocab_size, config.hidden_size, config.intermediate_size, config.num_attention_heads];
    let heads = [config.qk_head_dim(), config.cache_values_per_token()];
    let widest = widths.into_iter().chain(moe).chain(heads).max().unwrap_or(0);
    if layers > WIDEST || widest > WIDEST {
        return Some(format!("a size of {} exceeds that of every model of the family", layers.max(widest)));
    }
    None
}

/// The name by which a tensor is matched.
fn key_in<'n>(checkpoint: &Checkpoint, name: &'n str) -> &'n str {
    // The names in burnpack and GGUF files have no variants.
    if checkpoint.is_burnpack() || checkpoint.is_gguf() { name } else { names::key(name) }
}

/// Whether two shapes differ only in outermost dimensions of 1, which ggml omits.
fn equal_but_for_ones(a: &[usize], b: &[usize]) -> bool {
    let inner = |shape: &[usize]| shape.iter().position(|size| *size != 1).map_or(shape.len(), |at| at);
    a[inner(a)..] == b[inner(b)..]
}

struct TensorMatcher<'a> {
    checkpoint: &'a Checkpoint,
    scheme: QuantScheme,
    problems: Vec<Problem>,
    by_key: HashMap<&'a str, usize>,
    used: Vec<bool>,
    /// Tensors whose dtype has been reported. `gate_up_proj` is looked up for `gate_proj` and again for `up_proj`, and
    /// must be reported once.
    reported_dtypes: HashSet<&'a str>,
    /// Whether a required tensor may be in a file that could not be read.
    wants_unreadable: bool,
}

impl<'a> TensorMatcher<'a> {
    fn new(checkpoint: &'a Checkpoint, scheme: QuantScheme) -> Self {
        let tensors = checkpoint.tensor_list();
        let mut by_key = HashMap::with_capacity(tensors.len());
        let mut problems = Vec::new();
        for (index, tensor) in tensors.iter().enumerate() {
            let key = key_in(checkpoint, &tensor.name);
            if let Some(other) = by_key.insert(key, index) {
                problems.push(Problem::Duplicate { tensor: tensors[other].name.clone(), other: tensor.name.clone() });
            }
        }
        let used = vec![false; tensors.len()];
        Self { checkpoint, scheme, problems, by_key, used, reported_dtypes: HashSet::new(), wants_unreadable: false }
    }

    fn plan(&mut self, parameter: ParameterShape) -> PlannedParameter {
        let wanted = names::hugging_face_tensors(&parameter);
        if self.checkpoint.is_burnpack() {
            return self.plan_in_burnpack(parameter, wanted);
        }
        if self.checkpoint.is_gguf() {
            return self.plan_in_gguf(parameter, wanted);
        }
        let transposed = names::transposed(parameter.kind);
        // If files contain both layouts, the separate tensors are used, and the stack is reported as unexpected.
        let one_by_one = wanted.iter().any(|tensor| {
            let packed = names::packed_names(&tensor.name).values;
            self.by_key.contains_key(names::key(&tensor.name)) || self.by_key.contains_key(names::key(&packed))
        });
        let stacked = names::stacked(&parameter)
            .filter(|_| !one_by_one)
            .filter(|stacked| self.may_exist(names::key(&stacked.tensor.name)));
        let sources = match stacked {
            Some(stacked) => self.match_stacked(wanted, stacked, transposed),
            None => wanted.into_iter().filter_map(|tensor| self.match_tensor(tensor, transposed)).collect(),
        };
        PlannedParameter { parameter, sources }
    }

    /// A burnpack file contains each parameter under its own path and in its own shape, a stack of experts as one
    /// tensor.
    fn plan_in_burnpack(&mut self, parameter: ParameterShape, wanted: Vec<HfTensor>) -> PlannedParameter {
        let tensor = HfTensor { name: parameter.path.clone(), shape: parameter.shape.clone() };
        let Some((stored_index, part)) = self.find(&tensor) else {
            return PlannedParameter { parameter, sources: Vec::new() };
        };
        let Some(dtype) = self.plain_dtype(stored_index) else {
            return PlannedParameter { parameter, sources: Vec::new() };
        };
        let transposed = names::transposed(parameter.kind);
        let length = part.range.len() / wanted.len().max(1);
        let sources = wanted.into_iter().enumerate().map(|(at, tensor)| {
            let start = part.range.start + at * length;
            let part = FileRange { shard: part.shard, range: start..start + length };
            SourceTensor { tensor, stored_index, dtype, part, encoding: Encoding::Plain(Layout::Burn), transposed }
        });
        PlannedParameter { sources: sources.collect(), parameter }
    }

    fn may_exist(&self, key: &str) -> bool {
        self.by_key.contains_key(key) || self.unreadable(key)
    }

    /// Whether the tensor may be in a file that could not be read.
    fn unreadable(&self, key: &str) -> bool {
        self.checkpoint.unreadable_keys.as_ref().is_none_or(|unread| unread.contains(key))
    }

    fn stored(&self, stored_index: usize) -> &'a StoredTensor {
        &self.checkpoint.tensor_list()[stored_index]
    }

    /// Finds a tensor and checks its shape; adds a problem if it is missing or has another shape.
    fn find(&mut self, tensor: &HfTensor) -> Option<(usize, FileRange)> {
        let key = key_in(self.checkpoint, &tensor.name);
        let Some(&stored_index) = self.by_key.get(key) else {
            self.missing(key, &tensor.name);
            return None;
        };
        // `gate_up_proj` is looked up twice and reported once.
        let first_use = !std::mem::replace(&mut self.used[stored_index], true);
        let found = self.stored(stored_index);
        let fits =
            found.shape == tensor.shape || self.checkpoint.is_gguf() && equal_but_for_ones(&found.shape, &tensor.shape);
        if first_use && !fits {
            self.wrong_shape(found, found.shape.clone(), tensor.shape.clone());
        }
        fits.then(|| (stored_index, FileRange { shard: found.shard, range: found.range.clone() }))
    }

    fn missing(&mut self, key: &str, name: &str) {
        if self.unreadable(key) {
            self.wants_unreadable = true;
        } else {
            self.problems.push(Problem::Missing { tensor: name.to_owned() });
        }
    }

    fn wrong_shape(&mut self, tensor: &StoredTensor, found: Vec<usize>, expected: Vec<usize>) {
        let (tensor, file) = (tensor.name.clone(), tensor.file.clone());
        self.problems.push(Problem::WrongShape { tensor, file, found, expected });
    }

    fn wrong_dtype(&mut self, tensor: &'a StoredTensor) {
        if self.reported_dtypes.insert(&tensor.name) {
            self.problems.push(Problem::WrongDtype {
                tensor: tensor.name.clone(),
                file: tensor.file.clone(),
                dtype: tensor.dtype.to_string(),
            });
        }
    }

    /// The dtype of an unquantized tensor; adds a problem if weights cannot have it.
    fn plain_dtype(&mut self, stored_index: usize) -> Option<WeightDtype> {
        let found = self.stored(stored_index);
        let dtype = found.dtype.weight_dtype();
        if dtype.is_none() {
            self.wrong_dtype(found);
        }
        dtype
    }

    fn match_tensor(&mut self, tensor: HfTensor, transposed: bool) -> Option<SourceTensor> {
        if self.checkpoint.tied_head() == TiedHead::HeadOnly && names::key(&tensor.name) == names::EMBEDDING {
            let head = HfTensor { name: names::HEAD.into(), shape: tensor.shape.clone() };
            // Keeps the embedding's name and shape, under which it is saved. Both are `[vocab, hidden]` in files.
            return self.match_by_name(head, transposed).map(|source| SourceTensor { tensor, ..source });
        }
        self.match_by_name(tensor, transposed)
    }

    fn match_by_name(&mut self, tensor: HfTensor, transposed: bool) -> Option<SourceTensor> {
        let packed = names::packed_names(&tensor.name);
        let key = names::key(&tensor.name);
        if !self.by_key.contains_key(key) && self.may_exist(names::key(&packed.values)) {
            return self.match_packed(tensor, packed, transposed);
        }
        let (stored_index, part) = self.find(&tensor)?;
        if self.stored(stored_index).dtype == Dtype::F8_E4M3 {
            return self.match_fp8(tensor, stored_index, part, transposed);
        }
        let dtype = self.plain_dtype(stored_index)?;
        Some(SourceTensor {
            tensor,
            stored_index,
            dtype,
            part,
            encoding: Encoding::Plain(Layout::HuggingFace),
            transposed,
        })
    }

    /// An FP8 matrix with its scales: one for the matrix, or one per row or per block.
    fn match_fp8(
        &mut self,
        tensor: HfTensor,
        stored_index: usize,
        part: FileRange,
        transposed: bool,
    ) -> Option<SourceTensor> {
        let &[rows, columns] = tensor.shape.as_slice() else {
            self.wrong_dtype(self.stored(stored_index));
            return None;
        };
        if let Some(problem) = self.scheme.fp8_problem.clone() {
            self.unsupported(stored_index, problem);
            names::fp8_scales(&tensor.name).iter().for_each(|name| self.mark_used(name));
            return None;
        }
        let [deepseek, compressed] = names::fp8_scales(&tensor.name);
        // compressed-tensors' name wins if both exist; the other one is then reported as unexpected.
        let other = self.by_key.contains_key(names::key(&compressed));
        let name = if other { compressed } else { deepseek };
        let found = self.by_key.get(names::key(&name)).map(|&scale| self.stored(scale).shape.as_slice());
        let (block, shape) = match self.scheme.fp8_block([rows, columns], found) {
            Ok(known) => known,
            Err(problem) => {
                self.unsupported(stored_index, problem);
                self.mark_used(&name);
                return None;
            }
        };
        let scale = self.match_scale(HfTensor { name, shape })?;
        Some(SourceTensor {
            tensor,
            stored_index,
            dtype: WeightDtype::Bf16, // FP8 scales are f32, but the models compute in bf16
            part,
            encoding: Encoding::Fp8 { scale, block },
            transposed,
        })
    }

    /// Adds the problem that a tensor is quantized in an unsupported way.
    fn unsupported(&mut self, stored_index: usize, problem: String) {
        let StoredTensor { name, file, .. } = self.stored(stored_index);
        self.problems.push(Problem::QuantizedTensor { tensor: name.clone(), file: file.clone(), problem });
    }

    /// Marks a tensor as used, if it exists: its matrix has been reported, so that the tensor must not be reported as
    /// unexpected, too.
    fn mark_used(&mut self, name: &str) {
        if let Some(&stored_index) = self.by_key.get(names::key(name)) {
            self.used[stored_index] = true;
        }
    }

    fn match_scale(&mut self, scale: HfTensor) -> Option<(FileRange, WeightDtype)> {
        let (stored_index, part) = self.find(&scale)?;
        Some((part, self.plain_dtype(stored_index)?))
    }

    /// A matrix of packed integers: values, the scales of its groups, and its shape.
    fn match_packed(&mut self, tensor: HfTensor, packed: names::PackedNames, transposed: bool) -> Option<SourceTensor> {
        let &[rows, columns] = tensor.shape.as_slice() else {
            self.missing(names::key(&tensor.name), &tensor.name);
            return None;
        };
        let stored_index = self.by_key.get(names::key(&packed.values)).copied();
        let words = stored_index.and_then(|stored_index| match *self.stored(stored_index).shape.as_slice() {
            [found, words] if found == rows => Some(words),
            _ => None,
        });
        let bits = match (self.scheme.packed_problem.clone(), self.scheme.packed_bits(columns, words), stored_index) {
            (Some(problem), _, Some(stored_index)) | (None, Err(problem), Some(stored_index)) => {
                self.unsupported(stored_index, problem);
                [&packed.values, &packed.scale, &packed.shape].into_iter().for_each(|name| self.mark_used(name));
                self.mark_used(&format!("{}_zero_point", tensor.name));
                return None;
            }
            (_, bits, _) => bits.unwrap_or(Bits::Four),
        };
        let words = columns.div_ceil(values_per_word(bits));
        let values = self.find(&HfTensor { name: packed.values, shape: vec![rows, words] });
        let scale = self.match_group_scales(packed.scale, rows, columns);
        // All three tensors are looked up before the first return, so that every problem is listed and none is reported
        // as unexpected.
        self.check_packed_shape(&packed.shape, &tensor.shape);
        let (stored_index, part) = values?;
        let found = self.stored(stored_index);
        if found.dtype != Dtype::I32 {
            self.wrong_dtype(found);
            return None;
        }
        let (scale, group) = scale?;
        if let Err(problem) = self.scheme.check_group(group) {
            self.unsupported(stored_index, problem);
            return None;
        }
        Some(SourceTensor {
            tensor,
            stored_index,
            dtype: scale.1, // as compressed-tensors dequantizes
            part,
            encoding: Encoding::Packed { bits, scale, group },
            transposed,
        })
    }

    /// The scales `[rows, columns / group]`, and the group size that follows from their shape.
    fn match_group_scales(
        &mut self,
        name: String,
        rows: usize,
        columns: usize,
    ) -> Option<((FileRange, WeightDtype), usize)> {
        let key = names::key(&name);
        let groups = match self.by_key.get(key).map(|&stored_index| self.stored(stored_index).shape.as_slice()) {
            Some(&[_, groups]) if groups > 0 && columns.is_multiple_of(groups) => groups,
            // No group size gives this shape: the problem then names the shape for the group size of Kimi-K2.
            _ => columns.div_ceil(USUAL_GROUP),
        };
        let scale = self.match_scale(HfTensor { name, shape: vec![rows, groups] })?;
        columns.is_multiple_of(groups).then(|| (scale, columns / groups))
    }

    /// Checks `weight_shape`, which contains the matrix's shape as two integers.
    fn check_packed_shape(&mut self, name: &str, expected: &[usize]) {
        let key = names::key(name);
        let Some(&stored_index) = self.by_key.get(key) else { return self.missing(key, name) };
        self.used[stored_index] = true;
        let found = self.stored(stored_index);
        let size = match found.dtype {
            StoredDtype::Plain(Dtype::I32) => 4,
            StoredDtype::Plain(Dtype::I64) => 8,
            _ => return self.wrong_dtype(found),
        };
        if found.shape != [2] {
            return self.wrong_shape(found, found.shape.clone(), vec![2]);
        }
        let mut bytes = vec![0; 2 * size];
        let part = FileRange { shard: found.shard, range: found.range.clone() };
        if let Err(error) = self.checkpoint.read_part(&part, &mut bytes) {
            let (file, problem) = (found.file.clone(), error.to_string());
            return self.problems.push(Problem::QuantizedTensor { tensor: found.name.clone(), file, problem });
        }
        let stored: Vec<u64> = bytes
            .chunks_exact(size)
            .map(|bytes| bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
            .collect();
        if !stored.iter().copied().eq(expected.iter().map(|&size| size as u64)) {
            let stored = stored.into_iter().map(|size| usize::try_from(size).unwrap_or(usize::MAX)).collect();
            self.wrong_shape(found, stored, expected.to_vec());
        }
    }

    /// The rows of each expert in a stack. They are contiguous, so that a source is a plain range of the file.
    fn match_stacked(&mut self, wanted: Vec<HfTensor>, stacked: Stacked, transposed: bool) -> Vec<SourceTensor> {
        let Some((stored_index, FileRange { shard, range })) = self.find(&stacked.tensor) else { return Vec::new() };
        let Some(dtype) = self.plain_dtype(stored_index) else { return Vec::new() };
        let (height, row) = (stacked.tensor.shape[1], stacked.tensor.shape[2] * dtype.size());
        let part = |expert: usize| -> Range<usize> {
            let first = range.start + (expert * height + stacked.rows.start) * row;
            first..first + stacked.rows.len() * row
        };
        wanted
            .into_iter()
            .enumerate()
            .map(|(expert, tensor)| SourceTensor {
                tensor,
                stored_index,
                dtype,
                part: FileRange { shard, range: part(expert) },
                encoding: Encoding::Plain(Layout::HuggingFace),
                transposed,
            })
            .collect()
    }

    /// Sorts the tensors that no parameter uses into ignored and unexpected ones.
    fn sort_unused(&mut self) -> BTreeMap<SkipReason, Vec<String>> {
        let mut skipped: BTreeMap<SkipReason, Vec<String>> = BTreeMap::new();
        let tensors = self.checkpoint.tensor_list();
        let config = self.checkpoint.config();
        let mtp_layers = names::mtp_layers_of(tensors.iter().map(|tensor| tensor.name.as_str()), config);
        let is_undeclared_mtp =
            |name: &str| names::layer_of_tensor(name).is_some_and(|layer| mtp_layers.contains(&layer));
        for (tensor, _) in self.checkpoint.tensor_list().iter().zip(&self.used).filter(|(_, used)| !**used) {
            let reason = if self.checkpoint.is_burnpack() {
                None
            } else if self.checkpoint.is_gguf() {
                gguf_skip_reason(&tensor.name, config)
            } else {
                names::skip_reason(&tensor.name, config)
                    .or_else(|| is_undeclared_mtp(&tensor.name).then_some(SkipReason::UndeclaredPrediction))
            };
            match reason {
                Some(reason) => skipped.entry(reason).or_default().push(tensor.name.clone()),
                None => {
                    self.problems.push(Problem::Unexpected { tensor: tensor.name.clone(), file: tensor.file.clone() })
                }
            }
        }
        skipped
    }
}

/// Why a tensor of a GGUF file that the model does not use is ignored; `None` if it is unexpected.
fn gguf_skip_reason(name: &str, config: &ModelConfig) -> Option<SkipReason> {
    if name == ROPE_FACTORS {
        // Compared with the scaling when the file was opened.
        return Some(SkipReason::InverseFrequencies);
    }
    let layers = config.num_hidden_layers;
    let predicting = layers..layers.saturating_add(names::declared_mtp_layers(config));
    gguf::layer_of(name).is_some_and(|layer| predicting.contains(&layer)).then_some(SkipReason::MultiTokenPrediction)
}

//! Every tensor of a checkpoint against every parameter of its model, before a byte is copied.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use moonlight_model::ModelConfig;
use moonlight_model::config::{ParameterKind, ParameterShape};
use safetensors::Dtype;

use crate::checkpoint::{Checkpoint, StoredTensor};
use crate::dtype::conversion::WeightDtype;
use crate::dtype::dequantize::{Encoding, Layout, Part, Piece};
use crate::dtype::quant::{NIBBLES_PER_WORD, Scheme};
use crate::error::CheckpointError;
use crate::mapping::names::{self, HfTensor, SkipReason, Stacked};
use crate::report::validation::{Problem, Problems};

/// More experts than any router of the family is made for.
const MOST_EXPERTS: usize = 1 << 16;
/// More routed experts in all layers together than any model of the family has (Kimi-K2: 23,040), beside those that have
/// tensors of their own.
const MOST_STACKED: usize = 1 << 15;
/// The same where a file cannot be read and may hold any tensor.
const MOST_UNREAD: usize = 1 << 17;
/// Values of a row that share a scale in Kimi-K2-Thinking and Kimi-K2.5.
const USUAL_GROUP: usize = 32;
/// Wider than any matrix of the family; products of three such numbers fit 64 bits.
const WIDEST: usize = 1 << 21;

/// Where each parameter's values are.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) parameters: Vec<Planned>,
    pub(crate) skipped: BTreeMap<SkipReason, Vec<String>>,
}

/// Where one parameter's values are.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) parameter: ParameterShape,
    /// One, or one for each expert.
    pub(crate) pieces: Vec<Piece>,
}

impl Planned {
    /// The narrowest dtype that loses nothing.
    pub(crate) fn stored(&self) -> WeightDtype {
        self.pieces.iter().map(|piece| piece.dtype).reduce(WeightDtype::widest).unwrap_or(WeightDtype::F32)
    }
}

/// Which parameters are planned for, and what may be missing.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Scope<'a> {
    /// All of them.
    Whole,
    /// Those that the files hold whole: files and tensors may be missing, but nothing may be wrong.
    Present,
    /// Those at or below a path of the module. Files that none of them lies in may be missing or broken.
    Below(&'a str),
}

impl Checkpoint {
    /// Everything that keeps this checkpoint from being loaded; empty where nothing does.
    pub fn problems(&self) -> Vec<Problem> {
        match self.plan(Scope::Whole) {
            Ok(_) => Vec::new(),
            Err(problems) => problems.list,
        }
    }

    /// The names of tensors that loading passes over. Empty where the checkpoint has
    /// [`problems`](Checkpoint::problems).
    pub fn skipped(&self) -> BTreeMap<SkipReason, Vec<String>> {
        self.plan(Scope::Whole).map(|plan| plan.skipped).unwrap_or_default()
    }

    /// The `quant_method` of the configuration, where the weights are quantised.
    pub(crate) fn quantisation(&self) -> Option<String> {
        Scheme::of(self.config()).method
    }

    pub(crate) fn checked_plan(&self, scope: Scope<'_>) -> Result<Plan, CheckpointError> {
        self.plan(scope).map_err(|problems| CheckpointError::Misfit { dir: self.dir().to_path_buf(), problems })
    }

    pub(crate) fn plan(&self, scope: Scope<'_>) -> Result<Plan, Problems> {
        let scheme = Scheme::of(self.config());
        let quantised = scheme.method.clone();
        if let Some(problem) =
            implausible(self.config(), self.tensor_list().len(), self.unread.as_ref().map(|set| set.len()))
        {
            let mut list = self.broken.clone();
            list.push(Problem::Implausible { problem });
            return Err(Problems { list, quantised });
        }
        let wanted: Vec<ParameterShape> = self
            .config()
            .parameter_shapes()
            .into_iter()
            .filter(|parameter| match scope {
                Scope::Whole | Scope::Present => true,
                Scope::Below(prefix) => {
                    let rest = parameter.path.strip_prefix(prefix);
                    prefix.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
                }
            })
            .collect();
        let mut matching = Matching::new(self, scheme);
        let mut parameters: Vec<Planned> = wanted.into_iter().map(|parameter| matching.plan(parameter)).collect();
        let skipped = if matches!(scope, Scope::Below(_)) { BTreeMap::new() } else { matching.rest() };
        let Matching { problems: found, unreadable_wanted, .. } = matching;
        let mut list = match scope {
            Scope::Below(_) if !unreadable_wanted => Vec::new(),
            _ => self.broken.clone(),
        };
        list.extend(found);
        if matches!(scope, Scope::Present) {
            list.retain(|problem| !problem.is_absence());
            parameters.retain(|planned| planned.pieces.len() == pieces_of(&planned.parameter));
        }
        if list.is_empty() { Ok(Plan { parameters, skipped }) } else { Err(Problems { list, quantised }) }
    }
}

/// How many pieces a parameter is made of.
fn pieces_of(parameter: &ParameterShape) -> usize {
    if parameter.kind == ParameterKind::Experts { parameter.shape[0] } else { 1 }
}

/// What the configuration asks for that no such files can hold; checked first, so that the list of parameters is not
/// longer than memory.
fn implausible(config: &ModelConfig, tensors: usize, unread: Option<usize>) -> Option<String> {
    let layers = config.num_hidden_layers;
    if let Some(unread) = unread
        && layers > tensors + unread
    {
        return Some(format!("`num_hidden_layers` is {layers}, and the files hold {tensors} tensors"));
    }
    let experts = config.moe.as_ref().map_or(0, |moe| moe.n_routed_experts);
    if experts > MOST_EXPERTS {
        return Some(format!("`n_routed_experts` is {experts}"));
    }
    // Experts without end in layers without end would be a list without end of what is missing.
    let all = layers.saturating_mul(experts);
    if all > unread.map_or(MOST_UNREAD, |unread| MOST_STACKED + tensors + unread) {
        return Some(format!("{layers} layers have {experts} experts each, and the files hold {tensors} tensors"));
    }
    let moe = config.moe.as_ref().map_or([0; 2], |moe| [moe.moe_intermediate_size, moe.n_shared_experts]);
    let widths = [config.vocab_size, config.hidden_size, config.intermediate_size, config.num_attention_heads];
    let heads = [config.qk_head_dim(), config.cache_values_per_token()];
    let widest = widths.into_iter().chain(moe).chain(heads).max().unwrap_or(0);
    if layers > WIDEST || widest > WIDEST {
        return Some(format!("a size of {} is larger than any model's of the family", layers.max(widest)));
    }
    None
}

struct Matching<'a> {
    checkpoint: &'a Checkpoint,
    scheme: Scheme,
    problems: Vec<Problem>,
    by_key: HashMap<&'a str, usize>,
    used: Vec<bool>,
    /// Tensors whose dtype has been complained of: gate_up_proj is asked for twice.
    of_wrong_dtype: HashSet<&'a str>,
    /// Whether a tensor that was asked for may well lie in a file that could not be read.
    unreadable_wanted: bool,
}

impl<'a> Matching<'a> {
    fn new(checkpoint: &'a Checkpoint, scheme: Scheme) -> Self {
        let tensors = checkpoint.tensor_list();
        let mut by_key = HashMap::with_capacity(tensors.len());
        let mut problems = Vec::new();
        for (index, tensor) in tensors.iter().enumerate() {
            let key = if checkpoint.is_burnpack() { tensor.name.as_str() } else { names::key(&tensor.name) };
            if let Some(other) = by_key.insert(key, index) {
                problems.push(Problem::Twice { tensor: tensors[other].name.clone(), other: tensor.name.clone() });
            }
        }
        let used = vec![false; tensors.len()];
        Self { checkpoint, scheme, problems, by_key, used, of_wrong_dtype: HashSet::new(), unreadable_wanted: false }
    }

    fn plan(&mut self, parameter: ParameterShape) -> Planned {
        let wanted = names::hugging_face_tensors(&parameter);
        if self.checkpoint.is_burnpack() {
            return self.plan_in_burnpack(parameter, wanted);
        }
        let turns = names::transposed(parameter.kind);
        let one_by_one = wanted.iter().any(|tensor| {
            let packed = names::packed(&tensor.name).values;
            self.by_key.contains_key(names::key(&tensor.name)) || self.by_key.contains_key(names::key(&packed))
        });
        let stacked = names::stacked(&parameter)
            .filter(|_| !one_by_one)
            .filter(|stacked| self.knows(names::key(&stacked.tensor.name)));
        let pieces = match stacked {
            Some(stacked) => self.take_stacked(wanted, stacked, turns),
            None => wanted.into_iter().filter_map(|tensor| self.take_whole(tensor, turns)).collect(),
        };
        Planned { parameter, pieces }
    }

    /// A burnpack file holds each parameter under its own path and in its own shape, a stack of experts in one.
    fn plan_in_burnpack(&mut self, parameter: ParameterShape, wanted: Vec<HfTensor>) -> Planned {
        let tensor = HfTensor { name: parameter.path.clone(), shape: parameter.shape.clone() };
        let Some((source, part)) = self.find(&tensor) else { return Planned { parameter, pieces: Vec::new() } };
        let Some(dtype) = self.plain_dtype(source) else { return Planned { parameter, pieces: Vec::new() } };
        let turns = names::transposed(parameter.kind);
        let length = part.range.len() / wanted.len().max(1);
        let pieces = wanted.into_iter().enumerate().map(|(at, tensor)| {
            let start = part.range.start + at * length;
            let part = Part { shard: part.shard, range: start..start + length };
            Piece { tensor, source, dtype, part, encoding: Encoding::Plain(Layout::Burn), turns }
        });
        Planned { pieces: pieces.collect(), parameter }
    }

    fn knows(&self, key: &str) -> bool {
        self.by_key.contains_key(key) || self.unreadable(key)
    }

    /// Whether the tensor may well lie in a file that could not be read.
    fn unreadable(&self, key: &str) -> bool {
        self.checkpoint.unread.as_ref().is_none_or(|unread| unread.contains(key))
    }

    fn stored(&self, source: usize) -> &'a StoredTensor {
        &self.checkpoint.tensor_list()[source]
    }

    /// Finds a tensor and checks its shape; what is wrong joins the problems.
    fn find(&mut self, tensor: &HfTensor) -> Option<(usize, Part)> {
        let key = if self.checkpoint.is_burnpack() { tensor.name.as_str() } else { names::key(&tensor.name) };
        let Some(&source) = self.by_key.get(key) else {
            self.missing(key, &tensor.name);
            return None;
        };
        // gate_up_proj is asked for twice, and complained of once.
        let first_use = !std::mem::replace(&mut self.used[source], true);
        let found = self.stored(source);
        let fits = found.shape == tensor.shape;
        if first_use && !fits {
            self.misshapen(found, found.shape.clone(), tensor.shape.clone());
        }
        fits.then(|| (source, Part { shard: found.shard, range: found.range.clone() }))
    }

    fn missing(&mut self, key: &str, name: &str) {
        if self.unreadable(key) {
            self.unreadable_wanted = true;
        } else {
            self.problems.push(Problem::Missing { tensor: name.to_owned() });
        }
    }

    fn misshapen(&mut self, tensor: &StoredTensor, found: Vec<usize>, expected: Vec<usize>) {
        let (tensor, file) = (tensor.name.clone(), tensor.file.clone());
        self.problems.push(Problem::Misshapen { tensor, file, found, expected });
    }

    fn wrong_dtype(&mut self, tensor: &'a StoredTensor) {
        if self.of_wrong_dtype.insert(&tensor.name) {
            self.problems.push(Problem::WrongDtype {
                tensor: tensor.name.clone(),
                file: tensor.file.clone(),
                dtype: tensor.dtype.to_string(),
            });
        }
    }

    /// The dtype of a tensor of plain values; another one joins the problems.
    fn plain_dtype(&mut self, source: usize) -> Option<WeightDtype> {
        let found = self.stored(source);
        let dtype = WeightDtype::from_safetensors(found.dtype);
        if dtype.is_none() {
            self.wrong_dtype(found);
        }
        dtype
    }

    fn take_whole(&mut self, tensor: HfTensor, turns: bool) -> Option<Piece> {
        let packed = names::packed(&tensor.name);
        let key = names::key(&tensor.name);
        if !self.by_key.contains_key(key) && self.knows(names::key(&packed.values)) {
            return self.take_packed(tensor, packed, turns);
        }
        let (source, part) = self.find(&tensor)?;
        if self.stored(source).dtype == Dtype::F8_E4M3 {
            return self.take_fp8(tensor, source, part, turns);
        }
        let dtype = self.plain_dtype(source)?;
        Some(Piece { tensor, source, dtype, part, encoding: Encoding::Plain(Layout::HuggingFace), turns })
    }

    /// An FP8 matrix and the scales of its blocks.
    fn take_fp8(&mut self, tensor: HfTensor, source: usize, part: Part, turns: bool) -> Option<Piece> {
        let &[rows, columns] = tensor.shape.as_slice() else {
            self.wrong_dtype(self.stored(source));
            return None;
        };
        let block = self.scheme.block();
        let [deepseek, compressed] = names::fp8_scales(&tensor.name);
        let other = self.by_key.contains_key(names::key(&compressed));
        let name = if other { compressed } else { deepseek };
        let shape = vec![rows.div_ceil(block[0]), columns.div_ceil(block[1])];
        let scale = self.take_scale(HfTensor { name, shape })?;
        Some(Piece { tensor, source, dtype: WeightDtype::Bf16, part, encoding: Encoding::Fp8 { scale, block }, turns })
    }

    fn take_scale(&mut self, scale: HfTensor) -> Option<(Part, WeightDtype)> {
        let (source, part) = self.find(&scale)?;
        Some((part, self.plain_dtype(source)?))
    }

    /// A matrix of 4-bit values, the scales of its groups, and its shape.
    fn take_packed(&mut self, tensor: HfTensor, packed: names::Packed, turns: bool) -> Option<Piece> {
        let &[rows, columns] = tensor.shape.as_slice() else {
            self.missing(names::key(&tensor.name), &tensor.name);
            return None;
        };
        let words = columns.div_ceil(NIBBLES_PER_WORD);
        let values = self.find(&HfTensor { name: packed.values, shape: vec![rows, words] });
        let scale = self.take_groups(packed.scale, rows, columns);
        self.check_packed_shape(&packed.shape, &tensor.shape);
        let (source, part) = values?;
        let found = self.stored(source);
        if found.dtype != Dtype::I32 {
            self.wrong_dtype(found);
            return None;
        }
        if let Some(problem) = self.scheme.unreadable_packing.clone() {
            self.problems.push(Problem::Packing { tensor: found.name.clone(), file: found.file.clone(), problem });
            return None;
        }
        let (scale, group) = scale?;
        Some(Piece { tensor, source, dtype: scale.1, part, encoding: Encoding::Int4 { scale, group }, turns })
    }

    /// The scales `[rows, columns / group]`, and the group that their shape tells.
    fn take_groups(&mut self, name: String, rows: usize, columns: usize) -> Option<((Part, WeightDtype), usize)> {
        let key = names::key(&name);
        let groups = match self.by_key.get(key).map(|&source| self.stored(source).shape.as_slice()) {
            Some(&[_, groups]) if groups > 0 && columns.is_multiple_of(groups) => groups,
            // Not the shape of such scales, whatever the group: named with the group that Kimi's have.
            _ => columns.div_ceil(USUAL_GROUP),
        };
        let scale = self.take_scale(HfTensor { name, shape: vec![rows, groups] })?;
        columns.is_multiple_of(groups).then(|| (scale, columns / groups))
    }

    /// `weight_shape` says the shape before packing, in two integers.
    fn check_packed_shape(&mut self, name: &str, expected: &[usize]) {
        let key = names::key(name);
        let Some(&source) = self.by_key.get(key) else { return self.missing(key, name) };
        self.used[source] = true;
        let found = self.stored(source);
        let bytes = self.checkpoint.part(&Part { shard: found.shard, range: found.range.clone() });
        let size = match found.dtype {
            Dtype::I32 => 4,
            Dtype::I64 => 8,
            _ => return self.wrong_dtype(found),
        };
        if found.shape != [2] {
            return self.misshapen(found, found.shape.clone(), vec![2]);
        }
        let says: Vec<u64> = bytes
            .chunks_exact(size)
            .map(|bytes| bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
            .collect();
        if !says.iter().copied().eq(expected.iter().map(|&size| size as u64)) {
            let says = says.into_iter().map(|size| usize::try_from(size).unwrap_or(usize::MAX)).collect();
            self.misshapen(found, says, expected.to_vec());
        }
    }

    /// Each expert's rows of a stack: they lie beside one another, so that a piece is a plain part of the file.
    fn take_stacked(&mut self, wanted: Vec<HfTensor>, stacked: Stacked, turns: bool) -> Vec<Piece> {
        let Some((source, Part { shard, range })) = self.find(&stacked.tensor) else { return Vec::new() };
        let Some(dtype) = self.plain_dtype(source) else { return Vec::new() };
        let (height, row) = (stacked.tensor.shape[1], stacked.tensor.shape[2] * dtype.size());
        let part = |expert: usize| -> Range<usize> {
            let first = range.start + (expert * height + stacked.rows.start) * row;
            first..first + stacked.rows.len() * row
        };
        wanted
            .into_iter()
            .enumerate()
            .map(|(expert, tensor)| Piece {
                tensor,
                source,
                dtype,
                part: Part { shard, range: part(expert) },
                encoding: Encoding::Plain(Layout::HuggingFace),
                turns,
            })
            .collect()
    }

    /// Sorts what no parameter took into skipped and unexpected.
    fn rest(&mut self) -> BTreeMap<SkipReason, Vec<String>> {
        let mut skipped: BTreeMap<SkipReason, Vec<String>> = BTreeMap::new();
        for (tensor, _) in self.checkpoint.tensor_list().iter().zip(&self.used).filter(|(_, used)| !**used) {
            let reason = match self.checkpoint.is_burnpack() {
                true => None,
                false => names::skip_reason(&tensor.name, self.checkpoint.config()),
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

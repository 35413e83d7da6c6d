//! Every tensor of a checkpoint against every parameter of its model, before a byte is copied.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use moonlight_model::ModelConfig;
use moonlight_model::config::ParameterShape;

use crate::checkpoint::Checkpoint;
use crate::elements::WeightDtype;
use crate::error::CheckpointError;
use crate::names::{self, HfTensor, SkipReason, Stacked};
use crate::problem::{Problem, Problems};

/// More experts than any router of the family is made for.
const MOST_EXPERTS: usize = 1 << 16;
/// More routed experts in all layers together than any model of the family has (Kimi-K2: 23,040), beside those that have
/// tensors of their own.
const MOST_STACKED: usize = 1 << 15;
/// The same where a file cannot be read and may hold any tensor.
const MOST_UNREAD: usize = 1 << 17;
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

/// One tensor as Hugging Face names it, wherever in the files it is.
#[derive(Debug)]
pub(crate) struct Piece {
    /// The name and shape that it is saved by.
    pub(crate) tensor: HfTensor,
    /// Which of the checkpoint's tensors holds it.
    pub(crate) source: usize,
    pub(crate) dtype: WeightDtype,
    /// Where in the data section of that tensor's file.
    pub(crate) range: Range<usize>,
}

impl Checkpoint {
    /// Everything that keeps this checkpoint from being loaded; empty where nothing does.
    pub fn problems(&self) -> Vec<Problem> {
        match self.plan() {
            Ok(_) => Vec::new(),
            Err(problems) => problems.list,
        }
    }

    /// The names of tensors that loading passes over. Empty where the checkpoint has
    /// [`problems`](Checkpoint::problems).
    pub fn skipped(&self) -> BTreeMap<SkipReason, Vec<String>> {
        self.plan().map(|plan| plan.skipped).unwrap_or_default()
    }

    pub(crate) fn checked_plan(&self) -> Result<Plan, CheckpointError> {
        self.plan().map_err(|problems| CheckpointError::Misfit { dir: self.dir().to_path_buf(), problems })
    }

    fn plan(&self) -> Result<Plan, Problems> {
        let mut problems = self.broken.clone();
        let quantised = self.config().extra.get("quantization_config").map(|quantisation| {
            quantisation.get("quant_method").and_then(|method| method.as_str()).unwrap_or("unknown").to_owned()
        });
        if let Some(problem) =
            implausible(self.config(), self.tensor_list().len(), self.unread.as_ref().map(|set| set.len()))
        {
            problems.push(Problem::Implausible { problem });
            return Err(Problems { list: problems, quantised });
        }
        let mut matching = Matching::new(self, &mut problems);
        let parameters: Vec<Planned> =
            self.config().parameter_shapes().into_iter().map(|parameter| matching.plan(parameter)).collect();
        let skipped = matching.rest();
        if problems.is_empty() { Ok(Plan { parameters, skipped }) } else { Err(Problems { list: problems, quantised }) }
    }
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
    problems: &'a mut Vec<Problem>,
    by_key: HashMap<&'a str, usize>,
    used: Vec<bool>,
}

impl<'a> Matching<'a> {
    fn new(checkpoint: &'a Checkpoint, problems: &'a mut Vec<Problem>) -> Self {
        let tensors = checkpoint.tensor_list();
        let mut by_key = HashMap::with_capacity(tensors.len());
        for (index, tensor) in tensors.iter().enumerate() {
            if let Some(other) = by_key.insert(names::key(&tensor.name), index) {
                problems.push(Problem::Twice { tensor: tensors[other].name.clone(), other: tensor.name.clone() });
            }
        }
        Self { checkpoint, problems, by_key, used: vec![false; tensors.len()] }
    }

    fn plan(&mut self, parameter: ParameterShape) -> Planned {
        let wanted = names::hugging_face_tensors(&parameter);
        let one_by_one = wanted.iter().any(|tensor| self.by_key.contains_key(names::key(&tensor.name)));
        let stacked = names::stacked(&parameter)
            .filter(|_| !one_by_one)
            .filter(|stacked| self.knows(names::key(&stacked.tensor.name)));
        let pieces = match stacked {
            Some(stacked) => self.take_stacked(wanted, stacked),
            None => wanted.into_iter().filter_map(|tensor| self.take_whole(tensor)).collect(),
        };
        Planned { parameter, pieces }
    }

    fn knows(&self, key: &str) -> bool {
        self.by_key.contains_key(key) || self.unreadable(key)
    }

    /// Whether the tensor may well lie in a file that could not be read.
    fn unreadable(&self, key: &str) -> bool {
        self.checkpoint.unread.as_ref().is_none_or(|unread| unread.contains(key))
    }

    /// Finds a tensor and checks its shape and dtype; what is wrong joins the problems.
    fn find(&mut self, tensor: &HfTensor) -> Option<(usize, WeightDtype, Range<usize>)> {
        let key = names::key(&tensor.name);
        let Some(&source) = self.by_key.get(key) else {
            if !self.unreadable(key) {
                self.problems.push(Problem::Missing { tensor: tensor.name.clone() });
            }
            return None;
        };
        // gate_up_proj is asked for twice, and complained of once.
        let first_use = !std::mem::replace(&mut self.used[source], true);
        let found = &self.checkpoint.tensor_list()[source];
        let dtype = WeightDtype::from_safetensors(found.dtype);
        let fits = found.shape == tensor.shape;
        if first_use && dtype.is_none() {
            self.problems.push(Problem::WrongDtype {
                tensor: found.name.clone(),
                file: found.file.clone(),
                dtype: found.dtype.to_string(),
            });
        }
        if first_use && !fits {
            self.problems.push(Problem::Misshapen {
                tensor: found.name.clone(),
                file: found.file.clone(),
                found: found.shape.clone(),
                expected: tensor.shape.clone(),
            });
        }
        dtype.filter(|_| fits).map(|dtype| (source, dtype, found.range.clone()))
    }

    fn take_whole(&mut self, tensor: HfTensor) -> Option<Piece> {
        let (source, dtype, range) = self.find(&tensor)?;
        Some(Piece { tensor, source, dtype, range })
    }

    /// Each expert's rows of a stack: they lie beside one another, so that a piece is a plain part of the file.
    fn take_stacked(&mut self, wanted: Vec<HfTensor>, stacked: Stacked) -> Vec<Piece> {
        let Some((source, dtype, range)) = self.find(&stacked.tensor) else { return Vec::new() };
        let (height, row) = (stacked.tensor.shape[1], stacked.tensor.shape[2] * dtype.size());
        wanted
            .into_iter()
            .enumerate()
            .map(|(expert, tensor)| {
                let first = range.start + (expert * height + stacked.rows.start) * row;
                Piece { tensor, source, dtype, range: first..first + stacked.rows.len() * row }
            })
            .collect()
    }

    /// Sorts what no parameter took into skipped and unexpected.
    fn rest(self) -> BTreeMap<SkipReason, Vec<String>> {
        let mut skipped: BTreeMap<SkipReason, Vec<String>> = BTreeMap::new();
        for (tensor, _) in self.checkpoint.tensor_list().iter().zip(&self.used).filter(|(_, used)| !**used) {
            match names::skip_reason(&tensor.name, self.checkpoint.config()) {
                Some(reason) => skipped.entry(reason).or_default().push(tensor.name.clone()),
                None => {
                    self.problems.push(Problem::Unexpected { tensor: tensor.name.clone(), file: tensor.file.clone() })
                }
            }
        }
        skipped
    }
}

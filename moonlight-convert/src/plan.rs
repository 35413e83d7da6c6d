//! Which tensor of a checkpoint goes where, decided and checked before the first byte is copied.

use std::collections::{BTreeMap, HashMap};

use moonlight_model::config::{ParameterKind, ParameterShape};
use safetensors::Dtype;

use crate::checkpoint::{Checkpoint, StoredTensor};
use crate::error::{CheckpointError, Mismatch};
use crate::names::{self, Place, Skip};

/// How every parameter of the model is filled.
pub(crate) struct Plan<'a> {
    /// By the path of the parameter in the module.
    pub(crate) parameters: HashMap<String, Filling<'a>>,
    /// Tensors that are passed over.
    pub(crate) skipped: BTreeMap<Skip, Vec<String>>,
}

/// Where one parameter's values come from.
pub(crate) struct Filling<'a> {
    /// The parameter.
    pub(crate) parameter: ParameterShape,
    /// Its parts, in the order in which they lie in the parameter.
    pub(crate) parts: Vec<Part<'a>>,
}

/// A matrix or vector of a file.
pub(crate) struct Part<'a> {
    /// The tensor's name in the file.
    pub(crate) name: String,
    pub(crate) tensor: &'a StoredTensor,
    /// The bytes of the part.
    pub(crate) data: &'a [u8],
    /// Rows and columns in the file, where the parameter wants columns and rows.
    pub(crate) transpose: Option<(usize, usize)>,
}

impl<'a> Plan<'a> {
    /// Matches the tensors of a checkpoint with the parameters of its model.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Mismatch`], which names everything that is missing, unexpected, misshapen or of a dtype that
    /// cannot be loaded.
    pub(crate) fn new(checkpoint: &'a Checkpoint) -> Result<Self, CheckpointError> {
        let mut matcher = Matcher {
            checkpoint,
            rest: checkpoint
                .tensors()
                .map(|(name, tensor)| (names::canonical(name), (name.to_owned(), tensor)))
                .collect(),
            mismatch: Mismatch { dir: checkpoint.dir().to_owned(), ..Mismatch::default() },
            held: Vec::new(),
        };
        let parameters = checkpoint
            .config()
            .parameter_shapes()
            .into_iter()
            .map(|parameter| {
                let parts = matcher.parts(&parameter);
                (parameter.path.clone(), Filling { parameter, parts })
            })
            .collect();
        for name in matcher.held {
            matcher.rest.remove(&name);
        }
        let mut skipped: BTreeMap<Skip, Vec<String>> = BTreeMap::new();
        let mut mismatch = matcher.mismatch;
        for (canonical, (name, _)) in matcher.rest {
            match names::skip(&canonical, checkpoint.config()) {
                Some(skip) => skipped.entry(skip).or_default().push(name),
                None => mismatch.unexpected.push(name),
            }
        }
        if mismatch.is_empty() {
            Ok(Self { parameters, skipped })
        } else {
            Err(CheckpointError::Mismatch(mismatch.into()))
        }
    }
}

struct Matcher<'a> {
    checkpoint: &'a Checkpoint,
    /// Tensors that no parameter has asked for yet, by canonical name.
    rest: BTreeMap<String, (String, &'a StoredTensor)>,
    /// Stacked tensors, which two parameters ask for, by canonical name.
    held: Vec<String>,
    mismatch: Mismatch,
}

impl<'a> Matcher<'a> {
    fn parts(&mut self, parameter: &ParameterShape) -> Vec<Part<'a>> {
        match names::place(parameter) {
            Place::Same(name) => self.take(&name, &parameter.shape, None).into_iter().collect(),
            Place::Transposed(name) => self.matrix(&name, parameter.shape[1], parameter.shape[0]).into_iter().collect(),
            Place::Experts(experts) => {
                let stacked = names::stacked(parameter);
                if self.rest.contains_key(&stacked.name) {
                    return self.stacked(stacked);
                }
                experts
                    .into_iter()
                    .filter_map(|name| self.matrix(&name, parameter.shape[2], parameter.shape[1]))
                    .collect()
            }
        }
    }

    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Option<Part<'a>> {
        self.take(name, &[rows, columns], Some((rows, columns)))
    }

    fn take(&mut self, canonical: &str, shape: &[usize], transpose: Option<(usize, usize)>) -> Option<Part<'a>> {
        let Some((name, tensor)) = self.rest.remove(canonical) else {
            self.mismatch.missing.push(canonical.to_owned());
            return None;
        };
        self.fits(&name, tensor, shape).then(|| Part { name, tensor, data: self.checkpoint.data(tensor), transpose })
    }

    fn stacked(&mut self, stacked: names::Stacked) -> Vec<Part<'a>> {
        let (name, tensor) = self.rest[&stacked.name].clone();
        let first = !self.held.contains(&stacked.name);
        if first {
            self.held.push(stacked.name.clone());
        }
        let [experts, rows, columns] = stacked.shape;
        if !self.fits(&name, tensor, &stacked.shape) {
            return Vec::new();
        }
        let data = self.checkpoint.data(tensor);
        let row = data.len() / (experts * rows);
        let transpose = Some((stacked.rows.len(), columns));
        (0..experts)
            .map(|expert| {
                let data = &data[(expert * rows + stacked.rows.start) * row..(expert * rows + stacked.rows.end) * row];
                Part { name: name.clone(), tensor, data, transpose }
            })
            .collect()
    }

    fn fits(&mut self, name: &str, tensor: &StoredTensor, shape: &[usize]) -> bool {
        let entry = (name.to_owned(), tensor.shape.clone(), shape.to_vec());
        if tensor.shape != shape && !self.mismatch.misshapen.contains(&entry) {
            self.mismatch.misshapen.push(entry);
        }
        let supported = matches!(tensor.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
        let entry = (name.to_owned(), format!("{:?}", tensor.dtype));
        if !supported && !self.mismatch.unsupported.contains(&entry) {
            self.mismatch.unsupported.push(entry);
        }
        supported && tensor.shape == shape
    }
}

impl Filling<'_> {
    /// Whether the parameter stays in f32 whatever the weights' dtype.
    pub(crate) fn keeps_f32(&self) -> bool {
        self.parameter.kind == ParameterKind::CorrectionBias
    }
}

//! Optimizer state across processes, by parameter path.
//!
//! Burn's record of a `ModuleOptimizer` is keyed by `ParamId`. Identities are drawn anew whenever a module is built, so
//! a record loaded beside weights that came from somewhere else (a Hugging Face checkpoint, say) matches nothing, and
//! Burn then starts from empty state without a word. The record also holds the path of each parameter; loading here
//! goes by these paths, gives each state the identity that its parameter has now, and refuses what does not fit.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::module::ParamId;
use burn::optim::ModuleOptimizer;
use burn::tensor::Bytes;
use burn_pack::{Reader, Scalar, Tensor, Writer};
use thiserror::Error;

use crate::{AssignedParameter, Assignment, Blocks};

/// The key under which Burn keeps the rank of a parameter's state.
pub(crate) const RANK: &str = "__rank";

/// Why a saved optimizer state could not be loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StateError {
    /// The file cannot be read or is not a burnpack.
    #[error("the optimizer state cannot be read: {0}")]
    Unreadable(String),
    /// An entry has no parameter path beside it.
    #[error("the optimizer state entry `{entry}` names no parameter")]
    Nameless {
        /// The key of the entry.
        entry: String,
    },
    /// The state of a parameter that the module does not have, or that it has as a buffer.
    #[error("the optimizer state holds `{path}`, which the model does not train")]
    UnknownParameter {
        /// The parameter's path in the state.
        path: String,
    },
    /// The state has another shape than its parameter.
    #[error("the optimizer state of `{path}` has shape {found:?}, the parameter has {expected:?}")]
    Shape {
        /// The parameter's path.
        path: String,
        /// The shape in the state.
        found: Vec<usize>,
        /// The shape of the parameter.
        expected: Vec<usize>,
    },
    /// The state is that of another optimizer.
    #[error("the optimizer state of `{path}` is not that of the group `{group}` which takes the parameter now")]
    OtherOptimizer {
        /// The parameter's path.
        path: String,
        /// Its group.
        group: String,
    },
}

impl StateError {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            StateError::UnknownParameter { .. } | StateError::Shape { .. } => {
                Some("the state was saved beside another model".to_string())
            }
            StateError::OtherOptimizer { .. } => {
                Some("resume with the optimizer settings that the run was started with".to_string())
            }
            StateError::Unreadable(_) | StateError::Nameless { .. } => None,
        }
    }
}

impl From<burn_pack::Error> for StateError {
    fn from(error: burn_pack::Error) -> Self {
        StateError::Unreadable(error.to_string())
    }
}

impl Assignment {
    /// The optimizer of [`Assignment::optimizer`] with the state that `ModuleOptimizer::save` wrote to `path`, in this
    /// process or another: every tensor bit for bit, matched by parameter path.
    ///
    /// A parameter without an entry starts without state, as one that had no gradient before the save.
    ///
    /// # Errors
    ///
    /// See [`StateError`].
    pub fn load_optimizer(&self, path: impl AsRef<Path>) -> Result<ModuleOptimizer, StateError> {
        self.restore(Reader::from_file(path)?)
    }

    /// As [`Assignment::load_optimizer`], from the bytes of `ModuleOptimizer::into_bytes`.
    ///
    /// # Errors
    ///
    /// See [`StateError`].
    pub fn load_optimizer_bytes(&self, bytes: Bytes) -> Result<ModuleOptimizer, StateError> {
        self.restore(Reader::from_bytes(bytes)?)
    }

    pub(crate) fn restore(&self, reader: Reader) -> Result<ModuleOptimizer, StateError> {
        let paths = reader.metadata().clone();
        let scalars = reader.scalars().clone();
        let tensors = reader.into_tensors()?;
        let rows: HashMap<&str, &AssignedParameter> =
            self.rows().iter().filter(|row| row.is_optimized()).map(|row| (row.path.as_str(), row)).collect();

        // Old identity -> the parameter as it is now.
        let mut owners: BTreeMap<&str, &AssignedParameter> = BTreeMap::new();
        let mut by_path: Vec<_> = paths.iter().collect();
        by_path.sort_by_key(|(_, path)| *path); // identities are random, messages are not
        for (old, path) in by_path {
            let row = rows.get(path.as_str()).ok_or_else(|| StateError::UnknownParameter { path: path.clone() })?;
            if owners.values().any(|known: &&AssignedParameter| known.path == row.path) {
                return Err(StateError::Unreadable(format!("`{path}` is there twice")));
            }
            owners.insert(old, row);
        }
        let owner = |entry: &str| -> Result<(String, ParamId), StateError> {
            let (old, field) =
                entry.split_once('.').ok_or_else(|| StateError::Nameless { entry: entry.to_string() })?;
            let row = owners.get(old).ok_or_else(|| StateError::Nameless { entry: entry.to_string() })?;
            Ok((format!("{}.{field}", row.id.val()), row.id))
        };

        self.check(&owners, &tensors, &scalars)?;
        let mut renamed = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let (name, id) = owner(&tensor.name)?;
            let (_, dtype, shape, _, bytes) = tensor.into_parts()?;
            renamed.push(Tensor::new(name, dtype, shape, Some(id.val()), bytes));
        }
        let count = renamed.len();
        let mut writer = Writer::new(renamed);
        for (name, value) in scalars {
            writer = writer.with_scalar(&owner(&name)?.0, value);
        }
        for row in owners.values() {
            writer = writer.with_metadata(&row.id.val().to_string(), &row.path);
        }

        let optimizer = self.optimizer();
        let unreadable = |error: burn::store::RecordError| StateError::Unreadable(error.to_string());
        let optimizer = optimizer.from_bytes(writer.into_bytes()?).map_err(unreadable)?;
        let restored = optimizer.to_record().len();
        if restored != count {
            return Err(StateError::Unreadable(format!("{restored} of {count} tensors fit their optimizers")));
        }
        Ok(optimizer)
    }

    /// Shapes and fields against the parameters and their groups.
    fn check(
        &self,
        owners: &BTreeMap<&str, &AssignedParameter>,
        tensors: &[Tensor],
        scalars: &BTreeMap<String, Scalar>,
    ) -> Result<(), StateError> {
        let groups: HashMap<&str, _> = self.groups().collect();
        let mut fields: HashMap<&str, Vec<&str>> = HashMap::new();
        for tensor in tensors {
            let Some((old, field)) = tensor.name.split_once('.') else { continue };
            fields.entry(old).or_default().push(field);
        }
        let mut by_path: Vec<_> = owners.iter().collect();
        by_path.sort_by_key(|(_, row)| &row.path);
        for (old, row) in by_path {
            let Some(group) = groups.get(row.group.as_str()) else { continue };
            let Some((needed, allowed)) = group.settings().state_tensors() else { continue };
            let second_moment = group.muon().and_then(|config| {
                let blocks = if row.blocks == Blocks::Whole { &config.blocks } else { &row.blocks };
                config.clone().with_blocks(blocks.clone()).second_moment_shape(&row.shape)
            });
            let found = fields.get(old).cloned().unwrap_or_default();
            let known = |field: &&str| needed.contains(field) || allowed.contains(field);
            if !needed.iter().all(|field| found.contains(field)) || !found.iter().all(known) {
                return Err(StateError::OtherOptimizer { path: row.path.clone(), group: row.group.clone() });
            }
            // All but Muon's second moments have the parameter's own shape.
            let own = |tensor: &&Tensor| tensor.name.split_once('.').map(|(id, _)| id) == Some(old);
            for tensor in tensors.iter().filter(own) {
                let expected = if tensor.name.ends_with(".second_moment") {
                    // One that is not asked for is dropped at the next step.
                    let Some(shape) = &second_moment else { continue };
                    shape.as_slice()
                } else {
                    row.shape.as_slice()
                };
                if tensor.shape.as_slice() != expected {
                    let (found, expected) = (tensor.shape.as_slice().to_vec(), expected.to_vec());
                    return Err(StateError::Shape { path: row.path.clone(), found, expected });
                }
            }
            let rank = scalars.get(&format!("{old}.{RANK}")).and_then(|rank| usize::try_from(*rank).ok());
            if rank != Some(row.shape.len()) {
                return Err(StateError::Unreadable(format!("the rank of `{}` is not recorded", row.path)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

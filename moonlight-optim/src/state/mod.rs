//! Optimizer state in files, by parameter path.
//!
//! Burn's record of a `ModuleOptimizer` is keyed by `ParamId`. Identities are drawn anew whenever a module is built, so
//! a record loaded beside weights that came from somewhere else (a Hugging Face checkpoint, say) matches nothing, and
//! Burn then starts from empty state without a word. The record also holds the path of each parameter; loading here
//! goes by these paths, gives each state the identity that its parameter has now, and refuses what does not fit.

mod module_optimizer;
pub(crate) mod sharded_state;
#[cfg(test)]
mod tests;

use thiserror::Error;

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

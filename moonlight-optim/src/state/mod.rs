//! Optimizer state in files, by parameter path.
//!
//! Burn's record of a `ModuleOptimizer` is keyed by `ParamId`s, which are drawn at random whenever a module is built. If the
//! weights come from another file, such as a Hugging Face checkpoint, the record matches no parameter, and Burn starts with
//! empty state without an error. The record also has the path of each parameter: loading here matches by path, gives each state
//! the `ParamId` that its parameter has now, and refuses what does not fit.

mod module_optimizer;
pub(crate) mod sharded_state;
#[cfg(test)]
mod tests;

use thiserror::Error;

/// Why a saved optimizer state could not be loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StateError {
    /// The file cannot be read or written, is not a burnpack, or is incomplete.
    #[error("the optimizer state cannot be read: {0}")]
    Unreadable(String),
    /// An entry without a parameter path.
    #[error("the entry `{entry}` of the optimizer state names no parameter")]
    Nameless {
        /// The key of the entry.
        entry: String,
    },
    /// The state of a parameter that the module does not have, or has as a buffer.
    #[error("the optimizer state contains `{path}`, which the model does not train")]
    UnknownParameter {
        /// The path in the state.
        path: String,
    },
    /// A tensor of the state does not have the shape that its parameter and the settings need.
    #[error("the optimizer state of `{path}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The parameter's path.
        path: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that the parameter and the settings of its group need.
        expected: Vec<usize>,
    },
    /// The state belongs to another optimizer, such as AdamW's for a parameter that Muon has now.
    #[error("the optimizer state of `{path}` is of another optimizer than that of its group `{group}`")]
    OtherOptimizer {
        /// The parameter's path.
        path: String,
        /// The group that the parameter is assigned to now.
        group: String,
    },
}

impl StateError {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            StateError::UnknownParameter { .. } | StateError::Shape { .. } => {
                Some("the state was saved with another model; load the one that belongs to it".to_string())
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

#[cfg(test)]
mod message_tests {
    use super::*;
    use crate::messages::{render, seen};

    #[test]
    fn messages() {
        let path = || "layers.0.up.weight".to_string();
        let errors = [
            StateError::Unreadable("a part of the momentum of `layers.0.up.weight` is missing".into()),
            StateError::Nameless { entry: "12345.momentum".into() },
            StateError::UnknownParameter { path: path() },
            StateError::Shape { path: path(), found: vec![4, 5], expected: vec![6, 5] },
            StateError::OtherOptimizer { path: path(), group: "adamw".into() },
        ];
        // A new variant does not compile until it has a name here, and fails the test until it has an example above.
        let name = |error: &StateError| match error {
            StateError::Unreadable(_) => "Unreadable",
            StateError::Nameless { .. } => "Nameless",
            StateError::UnknownParameter { .. } => "UnknownParameter",
            StateError::Shape { .. } => "Shape",
            StateError::OtherOptimizer { .. } => "OtherOptimizer",
        };
        assert_eq!(seen(&errors, name).len(), 5);
        insta::assert_snapshot!(render(&errors, name, StateError::hint));
    }
}

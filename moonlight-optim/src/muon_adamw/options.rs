//! Options of an optimizer, and the errors of building one.

use burn::config::Config;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::DistributedForm;
use crate::StateError;
use crate::distributed::{CollectiveError, Communicator};

/// The dtype in which [`DistributedForm::Flat`] gathers momentum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum GatherPrecision {
    /// bf16, as in the report. Every matrix is rounded, on one rank as on many, so that the world size does not change the
    /// result.
    #[default]
    Bf16,
    /// f32: twice the bytes, and the same update as whole matrices within rounding.
    F32,
}

/// How an optimizer is sharded over the ranks of a process group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct DistributedConfig {
    /// How Muon's work and state are divided: `whole-matrix` or `flat`. Default: `whole-matrix`.
    pub form: DistributedForm,
    /// The dtype in which `flat` gathers momentum: `bf16` or `f32`. Default: `bf16`.
    #[serde(rename = "gather_dtype")]
    pub gather: GatherPrecision,
    /// Elements of a gradient bucket, at least: a bucket is reduced as soon as all of its gradients exist. Larger ones mean
    /// fewer messages, smaller ones overlap better with the backward pass. Default: 2^22.
    pub bucket_elements: usize,
}

impl Default for DistributedConfig {
    fn default() -> Self {
        Self { form: DistributedForm::default(), gather: GatherPrecision::default(), bucket_elements: 1 << 22 }
    }
}

/// [`Config::save`] and [`Config::load`]. Implemented by hand: Burn's derive requires every field in a file.
impl Config for DistributedConfig {}

impl DistributedConfig {
    /// Whole matrices, in buckets of 2^22 elements.
    pub fn new() -> Self {
        Self::default()
    }

    crate::setters::setters! {
        with_form(form: DistributedForm);
        with_gather(gather: GatherPrecision);
        with_bucket_elements(bucket_elements: usize);
    }
}

/// Options of [`Assignment::build`](crate::Assignment::build): the process group of a [`MuonAdamW`](super::MuonAdamW), and
/// how it is sharded. The default is one rank, which holds all state.
#[derive(Clone, Debug)]
pub struct OptimizerOptions {
    pub(super) communicator: Communicator,
    pub(super) distributed: DistributedConfig,
}

impl Default for OptimizerOptions {
    fn default() -> Self {
        Self { communicator: Communicator::single_rank(), distributed: DistributedConfig::default() }
    }
}

impl OptimizerOptions {
    /// One rank, which holds all state.
    pub fn new() -> Self {
        Self::default()
    }

    /// Builds the optimizer of one rank of a process group, which holds a part of the state.
    pub fn with_communicator(mut self, communicator: Communicator) -> Self {
        self.communicator = communicator;
        self
    }

    /// Sets how the ranks divide the optimizer.
    pub fn with_distributed(mut self, config: DistributedConfig) -> Self {
        self.distributed = config;
        self
    }
}

/// Why an optimizer could not be built or loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OptimizerError {
    /// A group whose optimizer is neither Muon nor AdamW.
    #[error("the optimizer of the group `{group}` is neither Muon nor AdamW, so it cannot be sharded")]
    UnknownOptimizer {
        /// The name of the group.
        group: String,
    },
    /// An [`Adaptive`](crate::Adaptive) variant with [`DistributedForm::Flat`].
    #[error("`adaptive` needs whole matrices, and the form `flat` divides them")]
    AdaptiveNeedsWholeMatrices,
    /// A collective failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The saved state could not be used.
    #[error(transparent)]
    State(#[from] StateError),
}

impl OptimizerError {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            OptimizerError::UnknownOptimizer { .. } => Some(
                "use `Assignment::to_module_optimizer`, which takes any optimizer of Burn's, on one rank".to_string(),
            ),
            OptimizerError::AdaptiveNeedsWholeMatrices => Some("set the form to `whole-matrix`".to_string()),
            OptimizerError::Collective(error) => error.hint(),
            OptimizerError::State(error) => error.hint(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::{render, seen};

    #[test]
    fn messages() {
        let errors = [
            OptimizerError::UnknownOptimizer { group: "sgd".into() },
            OptimizerError::AdaptiveNeedsWholeMatrices,
            OptimizerError::Collective(CollectiveError::RankFailed {
                rank: 1,
                message: "no space left on device".into(),
            }),
            OptimizerError::State(StateError::UnknownParameter { path: "head.weight".into() }),
        ];
        // A new variant does not compile until it has a name here, and fails the test until it has an example above.
        let name = |error: &OptimizerError| match error {
            OptimizerError::UnknownOptimizer { .. } => "UnknownOptimizer",
            OptimizerError::AdaptiveNeedsWholeMatrices => "AdaptiveNeedsWholeMatrices",
            OptimizerError::Collective(_) => "Collective",
            OptimizerError::State(_) => "State",
        };
        assert_eq!(seen(&errors, name).len(), 4);
        insta::assert_snapshot!(render(&errors, name, OptimizerError::hint));
    }
}

//! How an optimizer is built from an assignment.

use burn::config::Config;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::DistributedForm;
use crate::StateError;
use crate::distributed::{CollectiveError, Worker};

/// The type in which momentum is gathered for [`DistributedForm::Flat`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum GatherPrecision {
    /// bf16, the report's. Every matrix is rounded, however many ranks hold parts of it, so that the world size does not
    /// change the result.
    #[default]
    Bf16,
    /// f32: twice the bytes, and the update of a single rank.
    F32,
}

/// How an optimizer is distributed over the ranks of a process group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct DistributedConfig {
    /// How Muon's work and state are divided: `whole-matrix` or `flat`. Default: `whole-matrix`.
    pub form: DistributedForm,
    /// The type of the momentum that `flat` gathers: `bf16` or `f32`. Default: `bf16`.
    #[serde(rename = "gather_dtype")]
    pub gather: GatherPrecision,
    /// Elements of a gradient bucket: it is reduced as soon as all of its gradients exist. Default: 2^22.
    pub bucket_elements: usize,
}

impl Default for DistributedConfig {
    fn default() -> Self {
        Self { form: DistributedForm::default(), gather: GatherPrecision::default(), bucket_elements: 1 << 22 }
    }
}

/// [`Config::save`] and [`Config::load`]; unlike a derived config's, a file may leave out any field.
impl Config for DistributedConfig {}

impl DistributedConfig {
    /// Whole matrices.
    pub fn new() -> Self {
        Self::default()
    }

    crate::setters::setters! {
        with_form(form: DistributedForm);
        with_gather(gather: GatherPrecision);
        with_bucket_elements(bucket_elements: usize);
    }
}

/// Where and how a [`MuonAdamW`](super::MuonAdamW) runs. The default is one rank, which holds everything.
#[derive(Clone, Debug)]
pub struct OptimizerOptions {
    pub(super) worker: Worker,
    pub(super) distributed: DistributedConfig,
}

impl Default for OptimizerOptions {
    fn default() -> Self {
        Self { worker: Worker::alone(), distributed: DistributedConfig::default() }
    }
}

impl OptimizerOptions {
    /// One rank.
    pub fn new() -> Self {
        Self::default()
    }

    /// One rank of a process group, each of which holds a part of the optimizer's state.
    pub fn with_worker(mut self, worker: Worker) -> Self {
        self.worker = worker;
        self
    }

    /// How the ranks divide the optimizer.
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
    #[error("the group `{group}` has an optimizer that is neither Muon nor AdamW: it is not known how to divide it")]
    UnknownOptimizer {
        /// Its name.
        group: String,
    },
    /// Second moments of whole updates, on parts of matrices.
    #[error("the flat form has parts of matrices, and `adaptive` needs second moments of whole ones")]
    AdaptiveParts,
    /// The process group failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The saved state could not be used.
    #[error(transparent)]
    State(#[from] StateError),
}

impl OptimizerError {
    /// What to do about it, if known.
    pub fn hint(&self) -> Option<String> {
        match self {
            OptimizerError::UnknownOptimizer { .. } => {
                Some("`Assignment::to_module_optimizer` takes any of Burn's optimizers, on one rank".to_string())
            }
            OptimizerError::AdaptiveParts => Some("use the form `whole-matrix`".to_string()),
            OptimizerError::Collective(error) => error.hint(),
            OptimizerError::State(error) => error.hint(),
        }
    }
}

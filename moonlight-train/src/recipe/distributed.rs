//! `[distributed]`.

use std::time::Duration;

use moonlight_optim::distributed::{DistributedConfig, DistributedForm, GatherPrecision};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::HalfOrFull;
use super::check::Check;

/// How the workers of a run divide Muon; [`DistributedForm`] in a recipe's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FormName {
    /// Each worker has whole matrices, balanced by the cost of their Newton-Schulz.
    WholeMatrix,
    /// The report's Algorithm 1: even parts, and a gather of each matrix.
    Flat,
}

/// `[distributed]`: several workers train one model, each on its share of every step's sequences and with its part of the
/// optimizer. Where the section is absent a run has one worker, or as many as `mpirun` or `srun` started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DistributedRecipe {
    /// `form`: `whole-matrix`, or `flat` for the report's Algorithm 1. Default: `whole-matrix`.
    pub form: FormName,
    /// `devices`: of each process, a worker each: the recipe's device and those that follow it. Default: 1.
    pub devices: usize,
    /// `gather_dtype`: of the momentum that `flat` gathers: `bf16`, the report's, or `f32`. Default: `bf16`.
    pub gather_dtype: HalfOrFull,
    /// `timeout_seconds`: how long a worker may let the others wait without saying that it is at something long. Default:
    /// 20.
    pub timeout_seconds: u64,
}

impl Default for DistributedRecipe {
    fn default() -> Self {
        Self { form: FormName::WholeMatrix, devices: 1, gather_dtype: HalfOrFull::Bf16, timeout_seconds: 20 }
    }
}

impl DistributedRecipe {
    pub(super) fn check(&self, check: &mut Check<'_>) {
        let Self { devices, timeout_seconds, .. } = *self;
        check.require("distributed.devices", (1..=1024).contains(&devices), || {
            format!("is {devices}; it must be from 1 to 1024")
        });
        check.require("distributed.timeout_seconds", (1..=86_400).contains(&timeout_seconds), || {
            format!("is {timeout_seconds}; it must be from 1 second to a day")
        });
    }

    /// What the optimizer is told.
    pub(crate) fn config(&self) -> DistributedConfig {
        DistributedConfig {
            form: match self.form {
                FormName::WholeMatrix => DistributedForm::WholeMatrix,
                FormName::Flat => DistributedForm::Flat,
            },
            gather: match self.gather_dtype {
                HalfOrFull::Bf16 => GatherPrecision::Bf16,
                HalfOrFull::F32 => GatherPrecision::F32,
            },
            ..DistributedConfig::default()
        }
    }

    /// How long a silent worker is waited for.
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds)
    }
}

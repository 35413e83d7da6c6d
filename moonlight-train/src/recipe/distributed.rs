//! `[distributed]`.

use std::str::FromStr;
use std::time::Duration;

use moonlight_optim::distributed::{DistributedConfig, DistributedForm, GatherPrecision};
use serde::Serialize;

use super::HalfOrFull;
use super::section::Section;

/// How the workers of a run divide Muon; [`DistributedForm`] in a recipe's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FormName {
    /// Each worker has whole matrices, balanced by the cost of their Newton-Schulz.
    WholeMatrix,
    /// The report's Algorithm 1: even parts, and a gather of each matrix.
    Flat,
}

impl FromStr for FormName {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "whole-matrix" => Ok(Self::WholeMatrix),
            "flat" => Ok(Self::Flat),
            _ => Err(()),
        }
    }
}

/// `[distributed]`: several workers train one model, each on its share of every step's sequences and with its part of the
/// optimizer. Where the section is absent a run has one worker, or as many as `mpirun` or `srun` started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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
    /// `None` where the recipe has no such section.
    pub(super) fn read(section: &mut Section<'_>) -> Option<Self> {
        let written = section.is_written();
        let default = Self::default();
        let form = section.choice("form", &["whole-matrix", "flat"]).unwrap_or(default.form);
        let devices = section.whole("devices").unwrap_or(1) as usize;
        section
            .require("devices", (1..=1024).contains(&devices), || format!("is {devices}; it must be from 1 to 1024"));
        let gather_dtype = section.choice("gather_dtype", &["bf16", "f32"]).unwrap_or(default.gather_dtype);
        let timeout_seconds = section.whole("timeout_seconds").unwrap_or(default.timeout_seconds);
        section.require("timeout_seconds", (1..=86_400).contains(&timeout_seconds), || {
            format!("is {timeout_seconds}; it must be from 1 second to a day")
        });
        written.then_some(Self { form, devices, gather_dtype, timeout_seconds })
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

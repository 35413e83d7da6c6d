//! `[distributed]`.

use std::borrow::Cow;
use std::time::Duration;

use moonlight_optim::distributed::DistributedConfig;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize};

use super::check::Check;
use super::reader::read_flattened;
use super::schema::merged;

const DESCRIPTION: &str = "Several ranks train one model. Each computes its share of a step's sequences and holds its part of the \
                           optimizer's state. Without this section the world size is 1, or the number of processes that \
                           `mpirun` or `srun` started.";

/// `[distributed]`: several ranks train one model. Its keys are `devices`, `timeout_seconds` and those of
/// [`DistributedConfig`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DistributedRecipe {
    /// Ranks of each process, one for each of its devices.
    pub devices: usize,
    /// Seconds that a rank may be silent before the others end with an error.
    pub timeout_seconds: u64,
    /// How the ranks shard the optimizer.
    #[serde(flatten)]
    pub optimizer: DistributedConfig,
}

/// The keys of `[distributed]` in addition to those of [`DistributedConfig`].
#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default)]
struct Keys {
    /// Devices of each process, from 1 to 1024, with one rank each: `run.device` and the ones after it. Set it to the number
    /// of GPUs of a machine.
    devices: usize,
    /// Seconds, from 1 to 86400, after which a rank that does not respond counts as lost and the run ends. A rank that saves
    /// or compiles kernels announces that and is waited for. Raise it on slow or busy networks.
    timeout_seconds: u64,
}

impl Default for Keys {
    fn default() -> Self {
        Self { devices: 1, timeout_seconds: 20 }
    }
}

impl Default for DistributedRecipe {
    fn default() -> Self {
        Self::of(Keys::default(), DistributedConfig::default())
    }
}

impl<'de> Deserialize<'de> for DistributedRecipe {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (keys, optimizer) = read_flattened(deserializer)?;
        Ok(Self::of(keys, optimizer))
    }
}

impl JsonSchema for DistributedRecipe {
    fn schema_name() -> Cow<'static, str> {
        "DistributedRecipe".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let parts = [Keys::json_schema(generator), DistributedConfig::json_schema(generator)];
        merged(DESCRIPTION, parts)
    }
}

impl DistributedRecipe {
    fn of(Keys { devices, timeout_seconds }: Keys, optimizer: DistributedConfig) -> Self {
        Self { devices, timeout_seconds, optimizer }
    }

    pub(super) fn check(&self, check: &mut Check<'_>) {
        let Self { devices, timeout_seconds, .. } = *self;
        check.require("distributed.devices", (1..=1024).contains(&devices), || {
            format!("is {devices}; it must be from 1 to 1024")
        });
        check.require("distributed.timeout_seconds", (1..=86_400).contains(&timeout_seconds), || {
            format!("is {timeout_seconds}; it must be from 1 second to a day")
        });
    }

    /// These settings as the optimizer takes them.
    pub(crate) fn config(&self) -> DistributedConfig {
        self.optimizer
    }

    /// How long the other ranks wait for a silent one.
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds)
    }
}

//! `[distributed]`.

use std::borrow::Cow;
use std::time::Duration;

use moonlight_optim::distributed::DistributedConfig;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize};

use super::check::Check;
use super::reader::read_flattened;
use super::schema::merged;

const DESCRIPTION: &str = "Several workers train one model, each on its share of every step's sequences and with its part of the \
                           optimizer. Where the section is absent a run has one worker, or as many as `mpirun` or `srun` \
                           started.";

/// `[distributed]`: several workers train one model. A recipe has the keys of [`DistributedConfig`] beside these.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DistributedRecipe {
    /// Workers of each process.
    pub devices: usize,
    /// How long a worker may be silent.
    pub timeout_seconds: u64,
    /// How the workers divide the optimizer.
    #[serde(flatten)]
    pub optimizer: DistributedConfig,
}

/// The keys of `[distributed]` that are not the optimizer's.
#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default)]
struct Keys {
    /// Devices of each process, a worker each: the recipe's device and those that follow it.
    devices: usize,
    /// Seconds that a worker may be silent before the others give it up, unless it has said that it is at something long.
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

    /// The optimizer's own form of these settings.
    pub(crate) fn config(&self) -> DistributedConfig {
        self.optimizer
    }

    /// How long a silent worker is waited for.
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds)
    }
}

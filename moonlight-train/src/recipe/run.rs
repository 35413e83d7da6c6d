//! `[run]` and `[sample]`.

use std::ops::Deref;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de};

use super::check::Check;
use moonlight_infer::expand_env;

/// The run's name, folder, seed and device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// The run's folder is `{dir}/{name}`. Default: the recipe's file name without its ending.
    pub name: String,
    /// The folder of all runs.
    #[serde(deserialize_with = "path")]
    pub dir: PathBuf,
    /// Seeds the initial weights and the order of the data.
    pub seed: u64,
    /// `cpu`, `cuda[:N]`, `wgpu[:N]`, `vulkan[:N]` or `metal`, or `auto` for the first that the build has.
    pub device: DeviceName,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self { name: String::new(), dir: "runs".into(), seed: 0, device: DeviceName("auto".into()) }
    }
}

impl RunConfig {
    pub(super) fn check(&self, check: &mut Check<'_>) {
        let Self { name, .. } = self;
        check.require("run.name", is_folder_name(name), || format!("is `{name}`, which cannot name a folder"));
    }

    /// The folder of this run: `{dir}/{name}`.
    pub fn folder(&self) -> PathBuf {
        self.dir.join(&self.name)
    }
}

/// The name of a device, as `--device` takes it. Whether there is such a device is known when it is opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String")]
pub struct DeviceName(String);

impl TryFrom<String> for DeviceName {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, &'static str> {
        if name.is_empty() { Err("is empty; write `auto` for the default device") } else { Ok(Self(name)) }
    }
}

impl Deref for DeviceName {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

/// Reads a path with `~` and variables expanded.
pub(super) fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let text = String::deserialize(deserializer)?;
    expand_env(&text).map(PathBuf::from).map_err(|name| de::Error::custom(unset(&text, &name)))
}

/// The same, of a path that need not be there.
pub(super) fn optional_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    path(deserializer).map(Some)
}

/// What is wrong with a path in which an environment variable is named that is not set.
fn unset(text: &str, name: &str) -> String {
    format!("is `{text}`, but the environment has no `{name}`")
}

fn is_folder_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

/// What the trained model writes at the end of the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SampleConfig {
    /// The beginning of the text; empty for no sample.
    pub prompt: String,
    /// The most tokens that are added to it.
    pub max_new_tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f64,
    /// Draw from the likeliest tokens that hold this much probability.
    pub top_p: f64,
    /// Draw from this many of the likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Seeds the draws.
    pub seed: u64,
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self { prompt: String::new(), max_new_tokens: 200, temperature: 0.8, top_p: 0.95, top_k: 0, seed: 0 }
    }
}

impl SampleConfig {
    pub(super) fn check(&self, check: &mut Check<'_>) {
        let Self { temperature, top_p, .. } = *self;
        check
            .require("sample.temperature", temperature >= 0.0, || format!("is {temperature}; it must not be negative"));
        check.require("sample.top_p", top_p > 0.0 && top_p <= 1.0, || {
            format!("is {top_p}; it must be above 0 and at most 1")
        });
    }
}

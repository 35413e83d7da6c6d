//! `[run]` and `[sample]`.

use std::ops::Deref;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de};

use super::check::Check;
use moonlight_infer::expand_env;

/// The run's name, its folder, its seed and its device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// The name of the run; its folder is `{dir}/{name}`. Change it to start another run with the same recipe. Default: the
    /// file name of the recipe without its extension.
    pub name: String,
    /// The folder that contains the folders of all runs; `~` and `$NAME` are expanded. Several machines need one that all of
    /// them share.
    #[serde(deserialize_with = "path")]
    pub dir: PathBuf,
    /// The seed of the initial weights, the order of the data, dropout and stochastic rounding. The same seed repeats a run
    /// bit for bit on the CPU; another one shows how much a result depends on chance.
    pub seed: u64,
    /// The device to train on: `cpu`, `cuda[:N]`, `wgpu[:N]`, `vulkan[:N]` or `metal`, with `N` counted from 0, or `auto` for
    /// the first of these that the build contains and the machine has. `--device` overrides it.
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

    /// The run's folder: `{dir}/{name}`.
    pub fn folder(&self) -> PathBuf {
        self.dir.join(&self.name)
    }
}

/// The name of a device, as `--device` takes it. Whether the device exists is checked when it is opened.
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

/// Reads a path, and expands `~` and environment variables.
pub(super) fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let text = String::deserialize(deserializer)?;
    expand_env(&text).map(PathBuf::from).map_err(|name| de::Error::custom(unset(&text, &name)))
}

/// Like [`path`], for a key that may be absent.
pub(super) fn optional_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    path(deserializer).map(Some)
}

/// The problem of a path with an environment variable that is not set.
fn unset(text: &str, name: &str) -> String {
    format!("is `{text}`, but the environment variable `{name}` is not set")
}

fn is_folder_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

/// The text that the model writes at each validation and at the end of the run, a first look at what it has learned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SampleConfig {
    /// The start of the text; empty for no sample.
    pub prompt: String,
    /// The largest number of tokens to add.
    pub max_new_tokens: usize,
    /// The sampling temperature, from 0: logits are divided by it. Lower values give likelier text; 0 always takes the most
    /// likely token.
    pub temperature: f64,
    /// Nucleus sampling, above 0 and at most 1: tokens are drawn from the most likely ones whose probabilities add up to
    /// this. 1 turns it off.
    pub top_p: f64,
    /// Tokens are drawn from this many of the most likely ones; 0 for all.
    pub top_k: usize,
    /// The seed of the sampling.
    pub seed: u64,
    /// Whether a text is written at each validation, into `samples.jsonl` of the run's folder. It does not change the training.
    /// Set it to false if the texts take too long; the one at the end is printed in any case.
    pub at_validation: bool,
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            max_new_tokens: 200,
            temperature: 0.8,
            top_p: 0.95,
            top_k: 0,
            seed: 0,
            at_validation: true,
        }
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

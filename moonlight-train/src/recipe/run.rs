//! `[run]` and `[sample]`.

use std::path::PathBuf;

use moonlight_infer::expand;
use serde::Serialize;

use super::section::Section;

/// `[run]`: the run's name, folder, seed and device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RunConfig {
    /// `name`: the run's folder is `{dir}/{name}`. Default: the recipe's file name without its ending.
    pub name: String,
    /// `dir`: the folder of all runs. Default: `runs`.
    pub dir: PathBuf,
    /// `seed`: of the initial weights and of the order of the data. Default: 0.
    pub seed: u64,
    /// `device`: as `--device`, or `auto` for the first that the build has. Default: `auto`.
    pub device: String,
}

impl RunConfig {
    pub(super) fn read(section: &mut Section<'_>, stem: &str) -> Self {
        let name = section.string("name").unwrap_or_else(|| stem.to_owned());
        section.require("name", is_folder_name(&name), || format!("is `{name}`, which cannot name a folder"));
        let dir = path(section, "dir", "runs");
        let seed = section.whole("seed").unwrap_or(0);
        let device = section.string("device").unwrap_or_else(|| "auto".into());
        section.require("device", !device.is_empty(), || "is empty; write `auto` for the default device".into());
        Self { name, dir, seed, device }
    }

    /// The folder of this run: `{dir}/{name}`.
    pub fn folder(&self) -> PathBuf {
        self.dir.join(&self.name)
    }
}

/// A path with `~` and variables expanded.
pub(super) fn path(section: &mut Section<'_>, key: &str, default: &str) -> PathBuf {
    let text = section.string(key).unwrap_or_else(|| default.to_owned());
    match expand(&text) {
        Ok(path) => PathBuf::from(path),
        Err(name) => {
            section.invalid(key, format!("is `{text}`, but the environment has no `{name}`"), None);
            PathBuf::from(text)
        }
    }
}

fn is_folder_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

/// `[sample]`: what the trained model writes at the end of the run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SampleConfig {
    /// `prompt`: what it goes on from; empty for no sample. Default: empty.
    pub prompt: String,
    /// `max_new_tokens`: the longest continuation. Default: 200.
    pub max_new_tokens: usize,
    /// `temperature`: 0 always takes the likeliest token. Default: 0.8.
    pub temperature: f64,
    /// `top_p`: choose among the likeliest tokens that hold this much probability. Default: 0.95.
    pub top_p: f64,
    /// `top_k`: choose among so many of the likeliest tokens; 0 for all. Default: 0.
    pub top_k: usize,
    /// `seed`: of the draws. Default: 0.
    pub seed: u64,
}

impl SampleConfig {
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let prompt = section.string("prompt").unwrap_or_default();
        let max_new_tokens = section.whole("max_new_tokens").unwrap_or(200) as usize;
        let temperature = section.number("temperature").unwrap_or(0.8);
        section.require("temperature", temperature >= 0.0, || format!("is {temperature}; it must not be negative"));
        let top_p = section.number("top_p").unwrap_or(0.95);
        section
            .require("top_p", top_p > 0.0 && top_p <= 1.0, || format!("is {top_p}; it must be above 0 and at most 1"));
        let top_k = section.whole("top_k").unwrap_or(0) as usize;
        let seed = section.whole("seed").unwrap_or(0);
        Self { prompt, max_new_tokens, temperature, top_p, top_k, seed }
    }
}

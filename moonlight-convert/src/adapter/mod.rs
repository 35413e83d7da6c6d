//! Adapters as peft lays them out: a directory with `adapter_config.json` and `adapter_model.safetensors`.
//!
//! * [`write_adapter`] writes what `peft` loads beside transformers 5; [`load_adapter`] reads that, what peft writes itself,
//!   and the older layout with experts one by one, which vLLM reads.
//! * [`base_of`] finds the model that an adapter belongs to.
//!
//! Two things differ from one to the other. We train the gate and the up projection of an expert by a pair each, while
//! transformers 5 has one parameter for both: its pair has the ranks of ours together, with zeros where they do not meet.
//! And peft on transformers 5 takes a *module* that is called `gate_proj`, `up_proj` or `down_proj` in a model with experts
//! for the experts' (`_convert_peft_config_moe`, peft 0.21), so adapters of dense and shared MLPs are named as
//! *parameters* (`mlp.gate_proj.weight`); beside those peft refuses a dropout, so that it is written as 0.

mod config;
mod error;
mod names;
mod pattern;
mod read;
mod targets;
mod weight_change;
mod write;

use std::path::{Path, PathBuf};

use moonlight_model::lora::{Adapter, LowRankSettings};
use serde::{Deserialize, Serialize};

pub use error::AdapterError;
pub use read::{load_adapter, load_adapter_with_head, read_adapter};
pub use write::write_adapter;

use crate::checkpoint::CONFIG;
use crate::hub;
use config::AdapterConfig;

const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// Where our files say which adapters their matrices are made of; other readers pass it over. `format/shard.rs` reads it.
const NOTES: &str = "moonlight_adapters";

/// What a file of ours says of one adapter, so that training goes on with the bits that it had.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Note {
    path: String,
    rank: usize,
    alpha: f64,
    rslora: bool,
    dropout: f64,
}

impl Note {
    fn of(adapter: &Adapter) -> Self {
        let LowRankSettings { alpha, rslora, dropout } = adapter.settings;
        let rank = adapter.a.shape().last().copied().unwrap_or_default();
        Self { path: adapter.path.clone(), rank, alpha, rslora, dropout }
    }

    fn settings(&self) -> LowRankSettings {
        LowRankSettings { alpha: self.alpha, rslora: self.rslora, dropout: self.dropout }
    }
}

/// Whether a directory holds an adapter and no model.
pub fn is_adapter(dir: &Path) -> bool {
    dir.join(config::ADAPTER_CONFIG).is_file() && !dir.join(CONFIG).exists()
}

/// Reads an `adapter_config.json` for fuzzing: `Err` is the rest of a sentence that begins with the file's name.
#[doc(hidden)]
pub fn read_adapter_config(bytes: &[u8]) -> Result<(), String> {
    let config = AdapterConfig::parse(bytes).map_err(|problem| problem.text)?;
    let names = ["model.layers.1.mlp.experts.7.up_proj", "model.layers.0.self_attn.q_proj.weight"];
    config.of(&names.map(str::to_owned)).map(drop)
}

/// The directory of the model that an adapter was trained on: the path in its configuration, from the working directory or
/// from the adapter's own, or a model in the Hub's cache.
///
/// # Errors
///
/// [`AdapterError`] for a configuration that cannot be read, and [`AdapterError::NoBase`].
pub fn base_of(dir: &Path) -> Result<PathBuf, AdapterError> {
    let config = AdapterConfig::read(dir)?;
    let (base, revision) = (config.base.filter(|base| !base.is_empty()), config.revision);
    let found = base.as_ref().and_then(|base| {
        let beside = dir.join(base);
        let cached = match &revision {
            Some(revision) if !base.contains('@') => hub::resolve(format!("{base}@{revision}")),
            _ => hub::resolve(base),
        };
        let candidates = [Some(PathBuf::from(base)), Some(beside), cached.ok()];
        candidates.into_iter().flatten().find(|path| path.is_dir())
    });
    found.ok_or_else(|| AdapterError::NoBase { dir: dir.to_path_buf(), base })
}

//! LoRA adapters in peft's layout: a directory with `adapter_config.json` and `adapter_model.safetensors`.
//!
//! * [`write_adapter`] writes what peft loads with transformers 5. [`load_adapter`] reads that, what peft itself
//!   writes, and the older layout with one tensor per expert, which vLLM reads.
//! * [`base_of`] finds the base model of an adapter.
//!
//! Two things differ between this project's modules and peft's:
//!
//! * Here the gate and the up projection of an expert have an adapter each, while transformers 5 has one parameter for
//!   both. The saved adapter has the sum of the two ranks, and zeros in the blocks of `B` that would multiply the `A` of
//!   the other projection.
//! * In a model with experts, peft with transformers 5 applies *modules* named `gate_proj`, `up_proj` or `down_proj` to
//!   the experts alone (`_convert_peft_config_moe`, peft 0.21). So adapters of dense and shared MLPs are listed as
//!   *parameters* (`mlp.gate_proj.weight`). peft refuses dropout for adapters of parameters, so that it is written as 0.

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
pub(crate) use read::low_rank_only;
pub use read::{load_adapter, load_adapter_with_head, read_adapter};
pub use write::write_adapter;
pub(crate) use write::write_adapters;

use crate::checkpoint::CONFIG;
use crate::hub;
use config::AdapterConfig;

const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// The metadata key under which this project's files describe their adapters; other readers ignore it.
/// `format/shard.rs` reads it.
const NOTES: &str = "moonlight_adapters";

/// The note on one adapter in a file of this project. With it a resumed run repeats the run bit for bit: peft's layout
/// alone does not show which ranks are those of the gate and which those of the up projection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Note {
    path: String,
    rank: usize,
    alpha: f64,
    rslora: bool,
    dropout: f64,
}

impl Note {
    fn for_adapter(adapter: &Adapter) -> Self {
        let LowRankSettings { alpha, rslora, dropout } = adapter.settings;
        let rank = adapter.a.shape().last().copied().unwrap_or_default();
        Self { path: adapter.path.clone(), rank, alpha, rslora, dropout }
    }

    fn settings(&self) -> LowRankSettings {
        LowRankSettings { alpha: self.alpha, rslora: self.rslora, dropout: self.dropout }
    }
}

/// Whether a directory contains an adapter and no model.
pub fn is_adapter(dir: &Path) -> bool {
    dir.join(config::ADAPTER_CONFIG).is_file() && !dir.join(CONFIG).exists()
}

/// Parses an `adapter_config.json`, for fuzzing. `Err` is the rest of a sentence that begins with the file's name.
#[doc(hidden)]
pub fn read_adapter_config(bytes: &[u8]) -> Result<(), String> {
    let config = AdapterConfig::parse(bytes).map_err(|problem| problem.text)?;
    let names = ["model.layers.1.mlp.experts.7.up_proj", "model.layers.0.self_attn.q_proj.weight"];
    config.settings_of(&names.map(str::to_owned)).map(drop)
}

/// The directory of an adapter's base model: the path in its config, relative to the working directory or to the
/// adapter, or a model in the Hub's cache.
///
/// # Errors
///
/// [`AdapterError`] if the config cannot be read, and [`AdapterError::NoBase`].
pub fn base_of(dir: &Path) -> Result<PathBuf, AdapterError> {
    let config = AdapterConfig::read(dir)?;
    let (base, revision) = (config.base.filter(|base| !base.is_empty()), config.revision);
    let found = base.as_ref().and_then(|base| {
        let relative = dir.join(base);
        let cached = match &revision {
            Some(revision) if !base.contains('@') => hub::resolve(format!("{base}@{revision}")),
            _ => hub::resolve(base),
        };
        let candidates = [Some(PathBuf::from(base)), Some(relative), cached.ok()];
        candidates.into_iter().flatten().find(|path| path.is_dir())
    });
    found.ok_or_else(|| AdapterError::NoBase { dir: dir.to_path_buf(), base })
}

//! `--model`, `--device` and `--dtype`: a model to run.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use moonlight_convert::adapter::is_adapter;
use moonlight_convert::hub;
use moonlight_model::{CausalLm, QuantBits};
use serde_json::Value;

use crate::checkpoint::Checkpoints;
use crate::device::{self, Target};
use crate::error::TrainError;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// Which model to run, and on what.
#[derive(Debug, Args)]
pub(super) struct ModelArguments {
    /// A Hugging Face directory, a checkpoint or folder of a run, or `org/name` in the Hub's cache.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// An adapter to put beside the model, as peft or a `[lora]` run saves it; an adapter alone may be the model.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Keep the layers' weights in so many bits, with a scale for each 64 of them.
    #[arg(long, value_enum)]
    quantise: Option<Quantise>,
    /// cpu, cuda[:N], wgpu[:N], vulkan[:N], metal, or auto for the first that this build has.
    #[arg(long, default_value = "auto")]
    device: String,
    /// f32, bf16, f16, or auto: f32 on the CPU, as stored elsewhere.
    #[arg(long, default_value = "auto")]
    dtype: String,
}

/// `--quantise`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Quantise {
    /// 8 bits.
    Int8,
    /// 4 bits.
    Int4,
}

impl Quantise {
    fn bits(self) -> QuantBits {
        match self {
            Self::Int8 => QuantBits::Eight,
            Self::Int4 => QuantBits::Four,
        }
    }
}

/// A model that is ready to run.
pub(super) struct Opened {
    /// The folder that it came from; an adapter's base.
    pub(super) dir: PathBuf,
    pub(super) model: CausalLm,
    pub(super) tokenizer: Option<Tokenizer>,
    /// Tokens that end a text.
    pub(super) eos: Vec<u32>,
}

impl ModelArguments {
    pub(super) fn open(&self) -> Result<Opened, TrainError> {
        let target = Target::open(&self.device)?;
        let dtype = device::dtype(&self.dtype, &target)?;
        let dir = resolve(&hub::resolve(&self.model)?);
        let adapter = self.adapter.as_deref().map(resolve);
        let Weights { model, base: dir } =
            Weights::open(&dir, adapter.as_deref(), &target.device, dtype, self.quantise.map(Quantise::bits))?;
        let tokenizer = Tokenizer::from_model_dir(&dir)?;
        let eos = generation_eos(&dir).unwrap_or_else(|| model.config().eos_token_id.clone());
        Ok(Opened { dir, model, tokenizer, eos })
    }
}

/// The folder with the weights: the folder itself, the newest checkpoint of a run, or a snapshot of the Hub cache.
pub(super) fn resolve(dir: &Path) -> PathBuf {
    if dir.join("config.json").exists() || is_adapter(dir) {
        return dir.to_owned();
    }
    let run = Checkpoints::new(dir.join("checkpoints"), 0, false, Vec::new(), None);
    if let Some(newest) = run.newest() {
        return newest;
    }
    hub::newest_snapshot(dir).unwrap_or_else(|| dir.to_owned())
}

/// `eos_token_id` of `generation_config.json`, one or a list.
fn generation_eos(dir: &Path) -> Option<Vec<u32>> {
    let text = std::fs::read_to_string(dir.join("generation_config.json")).ok()?;
    let value: Value = serde_json::from_str(&text).ok()?;
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value.get("eos_token_id")? {
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    }
}

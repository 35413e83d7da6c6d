//! `--model`, `--device` and `--dtype`: a model to run.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use moonlight_infer::{OpenOptions, OpenedModel};
use moonlight_model::QuantBits;

use crate::error::TrainError;

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

impl ModelArguments {
    /// Opens the model.
    pub(super) fn open(&self) -> Result<OpenedModel, TrainError> {
        let mut options = OpenOptions::new().with_device(&self.device).with_dtype(&self.dtype);
        if let Some(adapter) = &self.adapter {
            options = options.with_adapter(adapter);
        }
        if let Some(quantise) = self.quantise {
            options = options.with_bits(quantise.bits());
        }
        Ok(options.open(&self.model)?)
    }
}

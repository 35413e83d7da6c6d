//! The options of commands that run a model: `--model`, `--adapter`, `--quantize`, `--device`, `--dtype`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use moonlight_convert::LoadQuantization;
use moonlight_infer::tokenizer::{AddBos, Tokenizer};
use moonlight_infer::{OpenOptions, OpenedModel};
use moonlight_model::QuantBits;

use super::old_names;
use crate::error::TrainError;

/// The model to run, and the device.
#[derive(Debug, Args)]
pub(super) struct ModelArguments {
    /// A Hugging Face directory, a checkpoint or folder of a run, or `org/name` in the Hub's cache
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// A LoRA adapter for the model, as peft or a `[lora]` run saves it; or give the adapter as `--model`
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Quantize the weights of the layers [default: on the CPU as stored, elsewhere dequantized]
    #[arg(long, alias = old_names::QUANTIZE, value_enum)]
    quantize: Option<QuantizeTo>,
    /// cpu, cuda[:N], wgpu[:N], vulkan[:N], metal, or auto for the first that this build has
    #[arg(long, default_value = "auto")]
    device: String,
    /// f32, bf16, f16, or auto (f32 on the CPU, as stored on GPUs)
    #[arg(long, default_value = "auto")]
    dtype: String,
}

/// `--bos` and `--no-bos`.
#[derive(Debug, Args)]
pub(super) struct TextArguments {
    /// Begin each text with BOS even if the tokenizer does not
    #[arg(long, conflicts_with = "no_bos")]
    bos: bool,
    /// Begin no text with BOS even if the tokenizer does
    #[arg(long)]
    no_bos: bool,
}

impl TextArguments {
    /// Whether one of the options is given.
    pub(super) fn is_given(&self) -> bool {
        self.bos || self.no_bos
    }

    /// The tokenizer, which adds BOS as the options say.
    pub(super) fn tokenizer(&self, tokenizer: &Tokenizer) -> Result<Tokenizer, TrainError> {
        let bos = match (self.bos, self.no_bos) {
            (true, _) => AddBos::Always,
            (false, true) => AddBos::Never,
            (false, false) => AddBos::Auto,
        };
        if let Some(note) = tokenizer.bos_conflict().filter(|_| bos == AddBos::Auto) {
            tracing::warn!("{note}; choose with `--bos` or `--no-bos`");
        }
        Ok(tokenizer.clone().with_bos(bos)?)
    }
}

/// `--parse-special`.
#[derive(Debug, Args)]
pub(super) struct ParseArguments {
    /// Encode text such as `<|im_end|>` as the special token, not as its characters
    #[arg(long)]
    pub(super) parse_special: bool,
}

/// The values of `--quantize`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum QuantizeTo {
    /// 8 bits
    Int8,
    /// 4 bits
    Int4,
    /// Dequantize what is stored quantized
    None,
}

impl QuantizeTo {
    pub(super) fn quantization(self) -> LoadQuantization {
        match self {
            Self::Int8 => LoadQuantization::To(QuantBits::Eight),
            Self::Int4 => LoadQuantization::To(QuantBits::Four),
            Self::None => LoadQuantization::Dequantize,
        }
    }
}

impl ModelArguments {
    /// Opens the model, its tokenizer and its adapter.
    pub(super) fn open(&self) -> Result<OpenedModel, TrainError> {
        let mut options = OpenOptions::new().with_device(&self.device).with_dtype(&self.dtype);
        if let Some(adapter) = &self.adapter {
            options = options.with_adapter(adapter);
        }
        if let Some(quantize) = self.quantize {
            options = options.with_quantization(quantize.quantization());
        }
        Ok(options.open(&self.model)?)
    }
}

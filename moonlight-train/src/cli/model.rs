//! `--model`, `--device` and `--dtype`: a model to run.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use moonlight_infer::tokenizer::{AddBos, Tokenizer};
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
    quantise: Option<Quantize>,
    /// cpu, cuda[:N], wgpu[:N], vulkan[:N], metal, or auto for the first that this build has.
    #[arg(long, default_value = "auto")]
    device: String,
    /// f32, bf16, f16, or auto: f32 on the CPU, as stored elsewhere.
    #[arg(long, default_value = "auto")]
    dtype: String,
}

/// How a text becomes tokens.
#[derive(Debug, Args)]
pub(super) struct TextArguments {
    /// Begin each text with BOS, where the tokenizer does not.
    #[arg(long, conflicts_with = "no_bos")]
    bos: bool,
    /// Put nothing before a text, where the tokenizer begins texts with BOS.
    #[arg(long)]
    no_bos: bool,
}

impl TextArguments {
    /// Whether there is a wish.
    pub(super) fn is_given(&self) -> bool {
        self.bos || self.no_bos
    }

    /// The tokenizer for texts, which begins them as it is told.
    pub(super) fn tokenizer(&self, tokenizer: &Tokenizer) -> Result<Tokenizer, TrainError> {
        let bos = match (self.bos, self.no_bos) {
            (true, _) => AddBos::Always,
            (false, true) => AddBos::Never,
            (false, false) => AddBos::Auto,
        };
        if let Some(note) = tokenizer.bos_conflict().filter(|_| bos == AddBos::Auto) {
            tracing::warn!("{note}; `--bos` or `--no-bos` decides");
        }
        Ok(tokenizer.clone().with_bos(bos)?)
    }
}

/// `--parse-special`.
#[derive(Debug, Args)]
pub(super) struct ParseArguments {
    /// Read special tokens such as `<|im_end|>` out of texts that spell them; else they are the characters that they are.
    #[arg(long)]
    pub(super) parse_special: bool,
}

/// `--quantise`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Quantize {
    /// 8 bits.
    Int8,
    /// 4 bits.
    Int4,
}

impl Quantize {
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

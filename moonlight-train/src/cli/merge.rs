//! `moonlight merge`.

use std::path::PathBuf;

use burn::tensor::DType;
use clap::Args;
use moonlight_convert::adapter::base_of;
use moonlight_convert::{Checkpoint, CheckpointError, LoadQuantization, SaveOptions, replace_directory, write_into};
use moonlight_infer::device::{self, ComputeDevice};
use moonlight_infer::{LoadedModel, load_model, resolve_model, resolve_weights};

use crate::error::TrainError;
use crate::output_file::Unfinished;

/// Merge a LoRA adapter into the weights of its model
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The model that the adapter was trained on [default: the one that the adapter names]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// The adapter, or the folder of a `[lora]` run, whose newest checkpoint is used
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The directory for the merged model; it must be absent or empty
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// f32, bf16 or f16 [default: as the model is stored]
    #[arg(long)]
    dtype: Option<String>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let output = &arguments.output;
    if std::fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(CheckpointError::Exists { dir: output.clone() }.into());
    }
    let target = ComputeDevice::open("cpu").or_else(|_| ComputeDevice::open("auto"))?;
    let dtype = arguments.dtype.as_deref().map(|dtype| device::parse_dtype(dtype, &target)).transpose()?.flatten();
    let adapter = resolve_weights(&arguments.adapter)?;
    let base = match &arguments.model {
        Some(model) => resolve_model(model)?,
        None => resolve_weights(&base_of(&adapter)?)?,
    };
    // The sum is computed in f32 and rounded once, to the dtype of the loaded model. To write f32, the model must be loaded as f32.
    let loaded = dtype.filter(|&dtype| dtype == DType::F32);
    let LoadedModel { model, dir: base } =
        load_model(&base, Some(&adapter), &target.device, loaded, LoadQuantization::Dequantize)?;
    let options = SaveOptions { dtype, sidecars_from: Some(base.to_path_buf()), ..SaveOptions::default() };
    let count = model.adapters().len();
    // Tensors of the base that the model does not use; the merged model lacks them.
    let checkpoint = Checkpoint::open(&base)?;
    let mut notes = checkpoint.skipped_notes();
    if checkpoint.stored_bits().is_some() {
        notes.push("the weights of the model are stored quantized; the merged model has them dequantized".into());
    }
    let mut unfinished = None;
    replace_directory(output, |new| {
        // From now on, a signal that ends the program removes the new directory.
        unfinished = Some(Unfinished::new(new));
        write_into(&model.merge(), new, &options)
    })?;
    for note in notes {
        tracing::info!("note: {note}");
    }
    let output = arguments.output.display();
    match count {
        // An adapter that changes the weights themselves, as DoRA does, has no low-rank parts to count.
        0 => tracing::info!("merged the adapter; wrote `{output}`"),
        _ => tracing::info!("merged the adapters of {count} projections; wrote `{output}`"),
    }
    Ok(())
}

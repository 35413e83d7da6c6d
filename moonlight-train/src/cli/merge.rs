//! `moonlight merge`.

use std::path::PathBuf;

use burn::tensor::DType;
use clap::Args;
use moonlight_convert::adapter::base_of;
use moonlight_convert::{Checkpoint, CheckpointError, SaveOptions, replace_directory, write_into};
use moonlight_infer::device::{self, ComputeDevice};
use moonlight_infer::{LoadedModel, load_model, resolve_model, resolve_weights};

use crate::error::TrainError;
use crate::output_file::Unfinished;

/// Add an adapter to the weights of its model.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The model that the adapter belongs to; else what the adapter itself names.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// The adapter, or a `[lora]` run, whose newest checkpoint is taken.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Where the whole model goes.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// f32, bf16 or f16; else as the model's weights are stored.
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
    // As stored, unless that is narrower than what is written: the sum is taken in f32 and rounded once.
    let loaded = dtype.filter(|&dtype| dtype == DType::F32);
    let LoadedModel { model, dir: base } = load_model(&base, Some(&adapter), &target.device, loaded, None)?;
    let options = SaveOptions { dtype, sidecars_from: Some(base.to_path_buf()), ..SaveOptions::default() };
    let count = model.adapters().len();
    // What is written lacks these of the base.
    let skipped = Checkpoint::open(&base)?.skipped_notes();
    let mut unfinished = None;
    replace_directory(output, |new| {
        // A signal ends the program and takes along what is written.
        unfinished = Some(Unfinished::new(new));
        write_into(&model.merge(), new, &options)
    })?;
    for note in skipped {
        tracing::info!("note: {note}");
    }
    let output = arguments.output.display();
    match count {
        // It changes the weights themselves, as DoRA does.
        0 => tracing::info!("the adapter is merged into `{output}`"),
        _ => tracing::info!("{count} adapters merged into `{output}`"),
    }
    Ok(())
}

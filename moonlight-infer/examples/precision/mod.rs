//! The precision of a model by the arguments `[f32|bf16] [int8|int4]`, for examples that measure it on the CPU.

use moonlight_convert::LoadQuantization;
use moonlight_infer::OpenOptions;
use moonlight_model::QuantBits;

/// How to open a model, by the arguments after its path.
pub(crate) fn open_options(mut arguments: impl Iterator<Item = String>) -> Result<OpenOptions, String> {
    let options = OpenOptions::new().with_device("cpu").with_dtype(arguments.next().as_deref().unwrap_or("f32"));
    match arguments.next().as_deref() {
        None => Ok(options),
        Some("int8") => Ok(options.with_quantization(LoadQuantization::To(QuantBits::Eight))),
        Some("int4") => Ok(options.with_quantization(LoadQuantization::To(QuantBits::Four))),
        Some(other) => Err(format!("unknown precision `{other}`")),
    }
}

//! Names of options that an earlier version had. They keep working and are not shown in the help.

/// `plan --gpus`.
pub(super) const GPUS: &str = "workers";
/// `--quantize`.
pub(super) const QUANTIZE: &str = "quantise";

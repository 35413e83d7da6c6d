//! Names that options had in an earlier version. They keep working, but the help does not show them.

/// `plan --gpus`.
pub(super) const GPUS: &str = "workers";
/// `--quantize`.
pub(super) const QUANTIZE: &str = "quantise";

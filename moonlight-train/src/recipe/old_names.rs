//! Names of keys that an earlier version had.

/// Keys that were renamed, as `section.key`, with their names today. Recipes and checkpoints of earlier versions have the old
/// names and mean the same.
pub(crate) const RENAMED_KEYS: &[(&str, &str)] = &[("model.quantise", "model.quantize")];

//! Keys of earlier versions.

/// Renamed keys as `(old, new)`, each `section.key`. Recipes and checkpoints of earlier versions contain the old names.
pub(crate) const RENAMED_KEYS: &[(&str, &str)] = &[("model.quantise", "model.quantize")];

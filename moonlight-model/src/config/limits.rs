//! Upper bounds for the values in a config, and checks whose errors name the field. Files are untrusted: without bounds, a few bytes
//! could request terabytes or overflow a product.

use super::error::ConfigError;

/// More layers than any decoder has. Bounds the lists that have an entry for each layer.
pub(crate) const MAX_LAYERS: usize = 10_000;
/// More heads, or dimensions of a head, or shared experts, than any decoder has.
pub(crate) const MAX_HEADS: usize = 1 << 14;
/// Wider than any published matrix. Chosen so that the parameter count of a projection fits in 64 bits: `MAX_WIDTH^2 * MAX_EXPERTS`
/// for experts, and heads times head width times `MAX_WIDTH` for attention.
pub(crate) const MAX_WIDTH: usize = 1 << 21;
/// The largest number of routed experts. The router has a bitmap of this size on the stack.
pub(crate) const MAX_EXPERTS: usize = 1 << 10;
/// Token ids have 32 bits.
pub(crate) const MAX_VOCABULARY: usize = u32::MAX as usize;
/// Positions have 32 bits.
pub(crate) const MAX_LENGTH: usize = u32::MAX as usize;

/// Returns [`ConfigError::Invalid`] for `field` unless `condition` holds.
pub(crate) fn require(
    condition: bool,
    field: &'static str,
    problem: impl FnOnce() -> String,
) -> Result<(), ConfigError> {
    if condition { Ok(()) } else { Err(ConfigError::Invalid { field, problem: problem() }) }
}

pub(crate) fn check_positive(value: usize, field: &'static str) -> Result<(), ConfigError> {
    require(value > 0, field, || "must be at least 1".into())
}

/// At least 1 and at most `most`.
pub(crate) fn check_size(value: usize, field: &'static str, most: usize) -> Result<(), ConfigError> {
    check_positive(value, field)?;
    check_at_most(value, field, most)
}

pub(crate) fn check_at_most(value: usize, field: &'static str, most: usize) -> Result<(), ConfigError> {
    require(value <= most, field, || format!("is {value}, more than the limit of {most}"))
}

pub(crate) fn check_positive_number(value: f64, field: &'static str) -> Result<(), ConfigError> {
    require(value.is_finite() && value > 0.0, field, || format!("must be a positive number, not {value}"))
}

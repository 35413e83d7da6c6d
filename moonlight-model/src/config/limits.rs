//! Bounds of what a configuration may ask for, and the checks that name the field.

use super::error::ConfigError;

/// More layers than any decoder has. Lists by layer are no longer than this, whatever a file says.
pub(crate) const MAX_LAYERS: usize = 10_000;
/// More heads, or dimensions of a head, or shared experts, than any decoder has.
pub(crate) const MAX_HEADS: usize = 1 << 14;
/// Wider than any matrix is. The products of an expert's two sides, or of heads, their dimensions and a width, and the
/// number of routed experts fit 64 bits.
pub(crate) const MAX_WIDTH: usize = 1 << 21;
/// The most routed experts that a router takes: it keeps a bit for each while it chooses.
pub(crate) const MAX_EXPERTS: usize = 1 << 10;
/// Token ids have 32 bits.
pub(crate) const MAX_VOCABULARY: usize = u32::MAX as usize;
/// Longer than any text.
pub(crate) const MAX_LENGTH: usize = u32::MAX as usize;

/// Fails with [`ConfigError::Invalid`] for `field` where `condition` does not hold.
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
    require(value <= most, field, || format!("is {value}, more than any model of the family has ({most} at most)"))
}

pub(crate) fn check_positive_number(value: f64, field: &'static str) -> Result<(), ConfigError> {
    require(value.is_finite() && value > 0.0, field, || format!("must be a positive number, not {value}"))
}

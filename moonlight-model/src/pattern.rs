//! [`NamePattern`]: globs over the dotted paths of parameters and projections.

use glob::{MatchOptions, Pattern};

/// A glob over dotted names: `*` matches any characters within one name, `**` any number of names, `?` one character and
/// `[0-9]` one of a set. It matches whole paths.
///
/// ```
/// use moonlight_model::NamePattern;
///
/// let pattern = NamePattern::new("layers.*.mlp.**")?;
/// assert!(pattern.matches("layers.3.mlp.experts.gate_proj"));
/// assert!(!pattern.matches("layers.3.self_attn.q_proj.weight"));
/// # Ok::<(), moonlight_model::PatternError>(())
/// ```
#[derive(Debug, Clone)]
pub struct NamePattern(Pattern);

/// A glob is malformed. It displays as the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PatternError(String);

impl NamePattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    ///
    /// [`PatternError`] if the glob is malformed.
    pub fn new(pattern: &str) -> Result<Self, PatternError> {
        // `glob` matches file paths, in which `*` stops at a `/`. Here it must stop at a dot.
        Pattern::new(&pattern.replace('.', "/")).map(Self).map_err(|error| PatternError(error.msg.to_owned()))
    }

    /// Whether the whole name matches.
    pub fn matches(&self, name: &str) -> bool {
        let options =
            MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: false };
        self.0.matches_with(&name.replace('.', "/"), options)
    }
}

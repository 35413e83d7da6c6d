//! Patterns over names of parameters and projections.

use glob::{MatchOptions, Pattern};

/// A glob over dotted names: `*` matches any characters within one name, `**` any number
/// of names, `?` for one character, `[0-9]` for one of a set.
#[derive(Debug, Clone)]
pub struct NamePattern(Pattern);

/// A malformed pattern; the text says what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PatternError(String);

impl NamePattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    ///
    /// [`PatternError`] for a malformed glob.
    pub fn new(pattern: &str) -> Result<Self, PatternError> {
        Pattern::new(&pattern.replace('.', "/")).map(Self).map_err(|error| PatternError(error.msg.to_owned()))
    }

    /// Whether the whole of a name matches.
    pub fn matches(&self, name: &str) -> bool {
        let options =
            MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: false };
        self.0.matches_with(&name.replace('.', "/"), options)
    }
}

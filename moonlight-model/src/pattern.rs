//! Patterns over names of parameters and projections.

use glob::{MatchOptions, Pattern};

/// A glob over dotted names: `*` matches any characters within one name, `**` any number
/// of names, `?` for one character, `[0-9]` for one of a set.
#[derive(Debug, Clone)]
pub struct NamePattern(Pattern);

impl NamePattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn new(pattern: &str) -> Result<Self, String> {
        Pattern::new(&pattern.replace('.', "/")).map(Self).map_err(|error| error.msg.to_owned())
    }

    /// Whether the whole of a name matches.
    pub fn matches(&self, name: &str) -> bool {
        let options =
            MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: false };
        self.0.matches_with(&name.replace('.', "/"), options)
    }
}

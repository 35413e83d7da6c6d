//! Patterns over module paths.

use glob::{MatchOptions, Pattern};

/// A glob over a parameter's path in which the dots are what slashes are for files: `*` stands for any characters
/// within one name, `**` for any number of names, `?` for one character, `[0-9]` for one of a set.
#[derive(Clone, Debug)]
pub(crate) struct PathPattern(Pattern);

impl PathPattern {
    pub(crate) fn new(pattern: &str) -> Result<Self, String> {
        Pattern::new(&pattern.replace('.', "/")).map(Self).map_err(|error| error.msg.to_string())
    }

    pub(crate) fn matches(&self, path: &str) -> bool {
        let options =
            MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: false };
        self.0.matches_with(&path.replace('.', "/"), options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, path: &str) -> bool {
        PathPattern::new(pattern).unwrap().matches(path)
    }

    #[test]
    fn stars_stay_within_a_name_and_double_stars_do_not() {
        assert!(matches("embed_tokens.*", "embed_tokens.weight"));
        assert!(!matches("embed_tokens", "embed_tokens.weight"));
        assert!(matches("**.router.weight", "layers.1.mlp.router.weight"));
        assert!(!matches("layers.*.weight", "layers.1.mlp.weight"));
        assert!(matches("layers.*.mlp.**", "layers.1.mlp.experts.gate_proj"));
        assert!(matches("**.embed_tokens.**", "embed_tokens.weight"));
        assert!(matches("**.embed_tokens.**", "model.embed_tokens.weight"));
        assert!(!matches("**.embed_tokens.**", "model.my_embed_tokens.weight"));
        assert!(matches("**", "anything.at.all"));
        assert!(matches("layers.[0-3].**", "layers.2.mlp.up_proj.weight"));
    }

    #[test]
    fn a_malformed_pattern_is_refused() {
        assert!(PathPattern::new("layers.**x").is_err());
        assert!(PathPattern::new("layers.[0").is_err());
    }
}

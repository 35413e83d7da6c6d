//! Patterns over module paths.

use glob::{MatchOptions, Pattern};

/// A glob over a parameter's path, in which dots separate names as slashes do in file paths: `*` matches any characters within
/// one name, `**` any number of names, `?` one character, `[0-9]` one of a set.
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
    fn a_star_matches_within_a_name_and_a_double_star_across_names() {
        assert!(matches("embed_tokens.*", "embed_tokens.weight"));
        assert!(!matches("embed_tokens", "embed_tokens.weight"));
        assert!(matches("**.router.weight", "layers.1.mlp.router.weight"));
        assert!(!matches("layers.*.weight", "layers.1.mlp.weight"));
        assert!(matches("layers.*.mlp.**", "layers.1.mlp.experts.gate_proj"));
        assert!(matches("**.embed_tokens.**", "embed_tokens.weight"));
        assert!(matches("**.embed_tokens.**", "model.embed_tokens.weight"));
        assert!(!matches("**.embed_tokens.**", "model.my_embed_tokens.weight"));
        assert!(matches("**", "any.path.whatever"));
        assert!(matches("layers.[0-3].**", "layers.2.mlp.up_proj.weight"));
    }

    #[test]
    fn a_malformed_pattern_is_refused() {
        assert!(PathPattern::new("layers.**x").is_err());
        assert!(PathPattern::new("layers.[0").is_err());
    }
}

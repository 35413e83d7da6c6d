//! Checks of what types cannot express: ranges, and keys that need or exclude each other.

use super::RecipeError;
use super::document::Node;

/// Collects the problems of a recipe. The first one is reported.
pub(super) struct Check<'a> {
    document: &'a Node,
    problems: Vec<RecipeError>,
}

impl<'a> Check<'a> {
    pub(super) fn new(document: &'a Node) -> Self {
        Self { document, problems: Vec::new() }
    }

    /// Whether the key `section.key` is written in the recipe.
    pub(super) fn has(&self, key: &str) -> bool {
        self.document.get(key).is_some()
    }

    /// The place of the key; without one in the recipe, that of its section or file.
    pub(super) fn place(&self, key: &str) -> String {
        self.document.place(key).to_string()
    }

    /// Adds `problem`, the rest of a sentence that starts with the key, unless `condition` holds.
    pub(super) fn require(&mut self, key: &str, condition: bool, problem: impl FnOnce() -> String) {
        if !condition {
            self.invalid(key, problem(), None);
        }
    }

    /// Adds that the value of a key is invalid.
    pub(super) fn invalid(&mut self, key: &str, problem: impl Into<String>, hint: Option<String>) {
        let place = self.place(key);
        self.problem(RecipeError::Invalid { place, key: key.to_owned(), problem: problem.into(), hint });
    }

    /// Adds that a required key is absent.
    pub(super) fn missing(&mut self, key: &str, hint: &str) {
        let place = self.document.place.to_string();
        self.problem(RecipeError::Missing { place, key: key.to_owned(), hint: hint.to_owned() });
    }

    /// Adds a problem of another kind.
    pub(super) fn problem(&mut self, problem: RecipeError) {
        self.problems.push(problem);
    }

    pub(super) fn finish(self) -> Result<(), RecipeError> {
        self.problems.into_iter().next().map_or(Ok(()), Err)
    }
}

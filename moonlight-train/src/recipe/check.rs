//! What types cannot say of a recipe: ranges, and keys that go together or do not.

use super::RecipeError;
use super::document::Node;

/// Gathers what is wrong with a recipe; the first problem is the one that is reported.
pub(super) struct Check<'a> {
    document: &'a Node,
    problems: Vec<RecipeError>,
}

impl<'a> Check<'a> {
    pub(super) fn new(document: &'a Node) -> Self {
        Self { document, problems: Vec::new() }
    }

    /// Whether the recipe has the key, `section.key`.
    pub(super) fn has(&self, key: &str) -> bool {
        self.document.get(key).is_some()
    }

    /// Where the key was written, or where it is missed.
    pub(super) fn place(&self, key: &str) -> String {
        self.document.place(key).to_string()
    }

    /// Notes `problem`, the rest of a sentence that begins with the key, where `condition` does not hold.
    pub(super) fn require(&mut self, key: &str, condition: bool, problem: impl FnOnce() -> String) {
        if !condition {
            self.invalid(key, problem(), None);
        }
    }

    /// Notes that the value of a key is wrong.
    pub(super) fn invalid(&mut self, key: &str, problem: impl Into<String>, hint: Option<String>) {
        let place = self.place(key);
        self.problem(RecipeError::Invalid { place, key: key.to_owned(), problem: problem.into(), hint });
    }

    /// Notes that a key without which there is no run is absent.
    pub(super) fn missing(&mut self, key: &str, hint: &str) {
        let place = self.document.place.to_string();
        self.problem(RecipeError::Missing { place, key: key.to_owned(), hint: hint.to_owned() });
    }

    /// Notes a problem of another kind.
    pub(super) fn problem(&mut self, problem: RecipeError) {
        self.problems.push(problem);
    }

    pub(super) fn finish(self) -> Result<(), RecipeError> {
        self.problems.into_iter().next().map_or(Ok(()), Err)
    }
}

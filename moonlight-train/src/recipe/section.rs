//! Reading a section key by key: what is absent gets its default, what is wrong is noted and named.

use std::str::FromStr;

use toml::Value;

use super::RecipeError;
use super::tree::{Branch, Leaf, Place, Tree};

/// Everything that was found wrong, and every key that was asked for.
///
/// Problems are gathered instead of returned so that an unknown key, which is often a misspelt required one, is
/// reported before the absence of the latter.
#[derive(Debug)]
pub(super) struct Reader {
    file: String,
    tree: Tree,
    known: Vec<(&'static str, Vec<String>)>,
    unknown: Vec<(String, String, Place)>,
    problems: Vec<RecipeError>,
}

/// One section while it is being read.
#[derive(Debug)]
pub(super) struct Section<'a> {
    name: &'static str,
    reader: &'a mut Reader,
    branch: Branch,
    places: Vec<(String, Place)>,
    known: Vec<String>,
}

impl Reader {
    pub(super) fn new(tree: Tree, file: &str) -> Self {
        Self { file: file.to_owned(), tree, known: Vec::new(), unknown: Vec::new(), problems: Vec::new() }
    }

    /// Reads one section with `read`; keys that it does not ask for are unknown.
    pub(super) fn section<T>(&mut self, name: &'static str, read: impl FnOnce(&mut Section<'_>) -> T) -> T {
        let branch = self.tree.sections.remove(name).unwrap_or_default();
        let mut section = Section { name, reader: self, branch, places: Vec::new(), known: Vec::new() };
        let result = read(&mut section);
        let Section { branch, known, .. } = section;
        self.unknown.extend(branch.leaves.into_iter().map(|(key, leaf)| (name.to_owned(), key, leaf.place)));
        self.known.push((name, known));
        result
    }

    /// Notes a problem.
    pub(super) fn problem(&mut self, error: RecipeError) {
        self.problems.push(error);
    }

    /// The first problem, unknown keys before all others.
    pub(super) fn finish(mut self) -> Result<(), RecipeError> {
        let sections: Vec<String> = self.known.iter().map(|(name, _)| (*name).to_owned()).collect();
        if let Some((name, branch)) = self.tree.sections.iter().next() {
            let place = branch.place.clone().unwrap_or(Place::Line(self.file.clone(), 1));
            let nearest = nearest(name, sections.iter().map(String::as_str)).map(|name| format!("[{name}]"));
            let known = sections.iter().map(|name| format!("[{name}]")).collect();
            return Err(RecipeError::UnknownKey { place: place.to_string(), key: format!("[{name}]"), nearest, known });
        }
        if let Some((key, place)) = self.tree.strays.iter().next() {
            let nearest = self.anywhere(key);
            let known = sections.iter().map(|name| format!("[{name}]")).collect();
            return Err(RecipeError::UnknownKey { place: place.to_string(), key: key.clone(), nearest, known });
        }
        self.unknown.sort_by_key(|(_, _, place)| match place {
            Place::Line(_, line) => *line,
            Place::Set(_) => usize::MAX,
        });
        if let Some((section, key, place)) = self.unknown.first() {
            let known =
                self.known.iter().find(|(name, _)| name == section).map(|(_, keys)| keys.clone()).unwrap_or_default();
            let nearest = self
                .known
                .iter()
                .find(|(name, keys)| name != section && keys.contains(key))
                .map(|(name, _)| format!("{name}.{key}"))
                .or_else(|| {
                    nearest(key, known.iter().map(String::as_str)).map(|nearest| format!("{section}.{nearest}"))
                });
            return Err(RecipeError::UnknownKey {
                place: place.to_string(),
                key: format!("{section}.{key}"),
                nearest,
                known,
            });
        }
        self.problems.into_iter().next().map_or(Ok(()), Err)
    }

    /// The known `section.key` whose key is most like `key`.
    fn anywhere(&self, key: &str) -> Option<String> {
        let all = self.known.iter().flat_map(|(name, keys)| keys.iter().map(move |known| (name, known)));
        all.map(|(name, known)| (strsim::normalized_damerau_levenshtein(key, known), format!("{name}.{known}")))
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .map(|(_, known)| known)
    }
}

/// The candidate that is spelled most like `key`.
fn nearest<'a>(key: &str, candidates: impl Iterator<Item = &'a str>) -> Option<String> {
    candidates
        .map(|candidate| (strsim::normalized_damerau_levenshtein(key, candidate), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate.to_owned())
}

impl Section<'_> {
    /// Whether the recipe has the key (it stays to be read).
    pub(super) fn has(&self, key: &str) -> bool {
        self.branch.leaves.contains_key(key)
    }

    /// Whether the recipe has the section.
    pub(super) fn is_written(&self) -> bool {
        self.branch.place.is_some() || !self.branch.leaves.is_empty() || !self.places.is_empty()
    }

    fn take(&mut self, key: &str) -> Option<Leaf> {
        self.known.push(key.to_owned());
        let leaf = self.branch.leaves.remove(key)?;
        self.places.push((key.to_owned(), leaf.place.clone()));
        Some(leaf)
    }

    /// The place of a key that was read; the section's where the key is a default.
    pub(super) fn place(&self, key: &str) -> String {
        let own = self.places.iter().find(|(name, _)| name == key).map(|(_, place)| place);
        match own.or(self.branch.place.as_ref()) {
            Some(place) => place.to_string(),
            None => self.reader.file.clone(),
        }
    }

    /// Notes that the value of a key is wrong.
    pub(super) fn invalid(&mut self, key: &str, problem: impl Into<String>, hint: Option<&str>) {
        let error = RecipeError::Invalid {
            place: self.place(key),
            key: format!("{}.{key}", self.name),
            problem: problem.into(),
            hint: hint.map(str::to_owned),
        };
        self.reader.problem(error);
    }

    /// Notes a key that nothing reads in a table within the section; `path` is its whole name.
    pub(super) fn unknown_inner(&mut self, path: &str, key: &str, known: &[&str]) {
        let error = RecipeError::UnknownKey {
            place: self.place(path.split(['[', '.']).next().unwrap_or(path)),
            key: format!("{}.{path}", self.name),
            nearest: nearest(key, known.iter().copied()),
            known: known.iter().map(|&key| key.to_owned()).collect(),
        };
        self.reader.problem(error);
    }

    /// Notes a problem of another kind.
    pub(super) fn problem(&mut self, error: RecipeError) {
        self.reader.problem(error);
    }

    /// Notes that a key without which there is no run is absent.
    pub(super) fn missing(&mut self, key: &str, hint: &str) {
        let error = RecipeError::Missing {
            place: self.reader.file.clone(),
            key: format!("{}.{key}", self.name),
            hint: hint.to_owned(),
        };
        self.reader.problem(error);
    }

    /// Notes `problem` where `condition` does not hold.
    pub(super) fn require(&mut self, key: &str, condition: bool, problem: impl FnOnce() -> String) {
        if !condition {
            self.invalid(key, problem(), None);
        }
    }

    fn optional<T>(&mut self, key: &str, expected: &str, read: impl Fn(&Leaf) -> Option<T>) -> Option<T> {
        let leaf = self.take(key)?;
        let value = read(&leaf);
        if value.is_none() {
            let given = leaf.text.unwrap_or_else(|| leaf.value.to_string());
            self.invalid(key, format!("must be {expected}, not {given}"), None);
        }
        value
    }

    /// A whole number from 0; `1e6` is one.
    pub(super) fn whole(&mut self, key: &str) -> Option<u64> {
        self.optional(key, "a whole number from 0", |leaf| whole_number(&leaf.value))
    }

    /// A finite number.
    pub(super) fn number(&mut self, key: &str) -> Option<f64> {
        self.optional(key, "a number", |leaf| number(&leaf.value))
    }

    pub(super) fn boolean(&mut self, key: &str) -> Option<bool> {
        self.optional(key, "true or false", |leaf| leaf.value.as_bool())
    }

    pub(super) fn string(&mut self, key: &str) -> Option<String> {
        self.optional(key, "a string", |leaf| match &leaf.value {
            Value::String(text) => Some(text.clone()),
            Value::Array(_) | Value::Table(_) => None,
            _ => leaf.text.clone(),
        })
    }

    /// A list of strings; one string is a list of one.
    pub(super) fn strings(&mut self, key: &str) -> Option<Vec<String>> {
        self.optional(key, "a list of strings", |leaf| match &leaf.value {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(items) => items.iter().map(|item| item.as_str().map(str::to_owned)).collect(),
            _ => None,
        })
    }

    /// A list of numbers of a given length.
    pub(super) fn pair(&mut self, key: &str) -> Option<[f64; 2]> {
        self.optional(key, "a list of two numbers", |leaf| match leaf.value.as_array()?.as_slice() {
            [first, second] => Some([number(first)?, number(second)?]),
            _ => None,
        })
    }

    /// One of a list of names.
    pub(super) fn choice<T: FromStr>(&mut self, key: &str, names: &[&str]) -> Option<T> {
        let name = self.string(key)?;
        let value = name.parse().ok();
        if value.is_none() {
            let nearest = nearest(&name, names.iter().copied()).map(|name| format!("the nearest is `{name}`"));
            self.invalid(key, format!("is `{name}`; it must be one of: {}", names.join(", ")), nearest.as_deref());
        }
        value
    }

    /// The tables of an array of tables.
    pub(super) fn tables(&mut self, key: &str) -> Option<Vec<toml::Table>> {
        self.optional(key, "a list of tables", |leaf| {
            leaf.value.as_array()?.iter().map(|item| item.as_table().cloned()).collect()
        })
    }

    /// Every key of the section that is in `names`, as written.
    pub(super) fn rest(&mut self, names: &[&str]) -> toml::Table {
        names.iter().filter_map(|name| self.take(name).map(|leaf| ((*name).to_owned(), leaf.value))).collect()
    }
}

/// The value as a whole number from 0.
pub(super) fn whole_number(value: &Value) -> Option<u64> {
    match value {
        Value::Integer(number) => u64::try_from(*number).ok(),
        // 2^53: beyond it a float no longer counts by ones.
        Value::Float(number) if number.fract() == 0.0 && (0.0..9_007_199_254_740_992.0).contains(number) => {
            Some(*number as u64)
        }
        _ => None,
    }
}

/// The value as a finite number.
pub(super) fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Integer(number) => Some(*number as f64),
        Value::Float(number) if number.is_finite() => Some(*number),
        _ => None,
    }
}

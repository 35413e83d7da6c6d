//! TOML as a tree whose values know the line that they stand on, and `--set` laid over it.

use std::collections::BTreeMap;

use toml::de::{DeTable, DeValue};
use toml::{Spanned, Value};

use super::RecipeError;

/// Where a value was written.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Place {
    /// `file:line`.
    Line(String, usize),
    /// The argument of a `--set`.
    Set(String),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Line(file, line) => write!(f, "{file}:{line}"),
            Self::Set(text) => write!(f, "--set {text}"),
        }
    }
}

/// A value and where it was written.
#[derive(Debug, Clone)]
pub(super) struct Leaf {
    pub(super) value: Value,
    pub(super) place: Place,
    /// The value as typed, where it came from a `--set`: `--set run.name=7` names a run `7`.
    pub(super) text: Option<String>,
}

/// The sections of a recipe: `[section] key = value`.
#[derive(Debug, Default)]
pub(super) struct Tree {
    pub(super) sections: BTreeMap<String, Branch>,
    /// Keys outside any section.
    pub(super) strays: BTreeMap<String, Place>,
}

/// One section.
#[derive(Debug, Default)]
pub(super) struct Branch {
    pub(super) place: Option<Place>,
    pub(super) leaves: BTreeMap<String, Leaf>,
}

impl Tree {
    /// Parses a document; `file` is what messages call it.
    pub(super) fn parse(text: &str, file: &str) -> Result<Self, RecipeError> {
        let syntax = |error: toml::de::Error| RecipeError::Syntax {
            place: format!("{file}:{}", error.span().map_or(1, |span| line_of(text, span.start))),
            problem: error.message().to_owned(),
        };
        let values: toml::Table = toml::from_str(text).map_err(syntax)?;
        let spans = DeTable::parse(text).map_err(syntax)?;
        let place = |start: usize| Place::Line(file.to_owned(), line_of(text, start));
        let mut tree = Self::default();
        for (key, item) in spans.get_ref() {
            let name = key.get_ref().to_string();
            let here = place(key.span().start);
            match (item.get_ref(), values.get(&name)) {
                (DeValue::Table(keys), Some(Value::Table(values))) => {
                    let branch = tree.sections.entry(name).or_default();
                    branch.place = Some(here);
                    for (key, value) in values {
                        let start = key_start(keys, key).unwrap_or(key_span_start(item));
                        let leaf = Leaf { value: value.clone(), place: place(start), text: None };
                        branch.leaves.insert(key.clone(), leaf);
                    }
                }
                _ => {
                    tree.strays.insert(name, here);
                }
            }
        }
        Ok(tree)
    }

    /// Lays `section.key=value` over the tree. The value is TOML; what is not (a bare word, a path) is a string.
    pub(super) fn set(&mut self, assignment: &str) -> Result<(), RecipeError> {
        let place = Place::Set(assignment.to_owned());
        let syntax = |problem: &str| RecipeError::Syntax { place: place.to_string(), problem: problem.to_owned() };
        let (path, text) =
            assignment.split_once('=').ok_or_else(|| syntax("there is no `=`: write section.key=value"))?;
        let (path, text) = (path.trim(), text.trim());
        let (section, key) =
            path.split_once('.').ok_or_else(|| syntax("the key needs its section: write section.key=value"))?;
        let value = match toml::from_str::<toml::Table>(&format!("value = {text}")) {
            Ok(mut table) if table.len() == 1 => table.remove("value").unwrap_or(Value::String(text.to_owned())),
            // An open bracket, brace or quote was meant as TOML.
            Err(error) if text.starts_with(['[', '{', '"', '\'']) => {
                return Err(syntax(&format!("`{text}` is not a TOML value: {}", error.message())));
            }
            _ => Value::String(text.to_owned()),
        };
        let mut keys = key.split('.').rev();
        let mut value = value;
        let mut name = keys.next().unwrap_or(key).to_owned();
        for outer in keys {
            // `model.rope_scaling.factor=4` changes one key of an inner table.
            value = Value::Table([(name, value)].into_iter().collect());
            name = outer.to_owned();
        }
        let branch = self.sections.entry(section.to_owned()).or_default();
        branch.place.get_or_insert(place.clone());
        match branch.leaves.get_mut(&name) {
            Some(leaf) if leaf.value.is_table() && value.is_table() => {
                merge(&mut leaf.value, value);
                leaf.place = place;
            }
            _ => {
                branch.leaves.insert(name, Leaf { value, place, text: Some(text.to_owned()) });
            }
        }
        Ok(())
    }
}

/// Lays one table over another.
fn merge(below: &mut Value, above: Value) {
    match (below, above) {
        (Value::Table(below), Value::Table(above)) => {
            for (key, value) in above {
                match below.get_mut(&key) {
                    Some(inner) => merge(inner, value),
                    None => {
                        below.insert(key, value);
                    }
                }
            }
        }
        (below, above) => *below = above,
    }
}

fn key_start(keys: &DeTable<'_>, name: &str) -> Option<usize> {
    keys.iter().find(|(key, _)| key.get_ref().as_ref() == name).map(|(key, _)| key.span().start)
}

fn key_span_start(item: &Spanned<DeValue<'_>>) -> usize {
    item.span().start
}

/// The line, counted from 1, of a byte of the text.
fn line_of(text: &str, byte: usize) -> usize {
    text.as_bytes().iter().take(byte).filter(|&&byte| byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_know_their_lines() {
        let tree =
            Tree::parse("# a recipe\n[train]\n\nsteps = 3\n[schedule]\n[[schedule.stages]]\nto = 1\n", "r").unwrap();
        assert_eq!(tree.sections["train"].leaves["steps"].place, Place::Line("r".into(), 4));
        assert_eq!(tree.sections["schedule"].leaves["stages"].place, Place::Line("r".into(), 6));
    }

    #[test]
    fn set_takes_toml_or_a_bare_word() {
        let mut tree = Tree::default();
        for set in ["a.b=1e-3", "a.c=bytes", "a.d=[1, 2]", "a.e=", "a.f=\"x\"", "a.g=/tmp/x", "a.h=x # y"] {
            tree.set(set).unwrap();
        }
        let value = |key: &str| tree.sections["a"].leaves[key].value.clone();
        assert_eq!(value("b"), Value::Float(1e-3));
        assert_eq!(value("c"), Value::String("bytes".into()));
        assert_eq!(value("d"), Value::Array(vec![Value::Integer(1), Value::Integer(2)]));
        assert_eq!(value("e"), Value::String(String::new()));
        assert_eq!(value("f"), Value::String("x".into()));
        assert_eq!(value("g"), Value::String("/tmp/x".into()));
        assert_eq!(value("h"), Value::String("x # y".into()));
        assert!(tree.set("a.b").unwrap_err().to_string().contains("no `=`"));
        assert!(tree.set("steps=1").unwrap_err().to_string().contains("needs its section"));
        assert!(tree.set("a.b=[1").unwrap_err().to_string().contains("not a TOML value"));
    }

    #[test]
    fn set_reaches_into_inner_tables() {
        let mut tree = Tree::parse("[model]\nrope = { factor = 2, type = \"yarn\" }\n", "r").unwrap();
        tree.set("model.rope.factor=4").unwrap();
        let rope = &tree.sections["model"].leaves["rope"].value;
        assert_eq!((rope["factor"].as_integer(), rope["type"].as_str()), (Some(4), Some("yarn")));
    }

    #[test]
    fn broken_toml_names_the_line() {
        let error = Tree::parse("[train]\nsteps = = 3\n", "r.toml").unwrap_err().to_string();
        assert!(error.starts_with("r.toml:2: "), "{error}");
    }
}

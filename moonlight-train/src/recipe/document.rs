//! The TOML of a recipe as a tree of values that know their lines. Each `--set` is applied to this tree.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::IntoDeserializer;
use toml::de::{DeString, DeTable, DeValue};
use toml::{Spanned, Value};

use super::RecipeError;

/// Where a value was written.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Location {
    /// A file, for a value that is not written in it.
    File(Arc<str>),
    /// A line of a file, counted from 1.
    Line(Arc<str>, usize),
    /// The argument of a `--set`.
    Set(Arc<str>),
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => write!(f, "{file}"),
            Self::Line(file, line) => write!(f, "{file}:{line}"),
            Self::Set(text) => write!(f, "--set {text}"),
        }
    }
}

/// A value and where it was written.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) place: Location,
    pub(super) item: Item,
}

/// A value. The elements of lists and tables are nodes themselves.
#[derive(Debug, Clone)]
pub(super) enum Item {
    /// A string, number, boolean or date. If it came from a `--set`, also the text that was typed: `run.name=7` parses as a
    /// number, but names a run `7`.
    Scalar(Value, Option<Arc<str>>),
    List(Vec<Node>),
    Table(BTreeMap<String, Node>),
}

impl Node {
    /// Parses a document. `file` is its name in messages.
    pub(super) fn parse(text: &str, file: &str) -> Result<Self, RecipeError> {
        let file = Arc::from(file);
        let line = |byte: usize| text.as_bytes().iter().take(byte).filter(|&&byte| byte == b'\n').count() + 1;
        let place = |byte: usize| Location::Line(Arc::clone(&file), line(byte));
        let syntax = |error: toml::de::Error| RecipeError::Syntax {
            place: place(error.span().map_or(0, |span| span.start)).to_string(),
            problem: error.message().to_owned(),
        };
        let table = DeTable::parse(text).map_err(syntax)?;
        let item = Item::Table(entries(table.into_inner(), &place).map_err(syntax)?);
        Ok(Self { place: Location::File(file.clone()), item })
    }

    /// Applies `section.key=value`. The value is TOML; a value that does not parse, such as a bare word or a path, is a string.
    pub(super) fn set(&mut self, assignment: &str) -> Result<(), RecipeError> {
        let place = Location::Set(assignment.into());
        let syntax = |problem: &str| RecipeError::Syntax { place: place.to_string(), problem: problem.to_owned() };
        let (path, text) =
            assignment.split_once('=').ok_or_else(|| syntax("it has no `=`: write `section.key=value`"))?;
        let (path, text) = (path.trim(), text.trim());
        if !path.contains('.') {
            return Err(syntax("the key needs its section: write `section.key=value`"));
        }
        let value = match toml::from_str::<toml::Table>(&format!("value = {text}")) {
            Ok(mut table) if table.len() == 1 => table.remove("value"),
            // A text that starts with a bracket, brace or quote is an error and not a string: it was meant as TOML.
            Err(error) if text.starts_with(['[', '{', '"', '\'']) => {
                return Err(syntax(&format!("`{text}` is not a TOML value: {}", error.message())));
            }
            _ => None,
        };
        let value = value.unwrap_or_else(|| Value::String(text.to_owned()));
        let mut target = self;
        for key in path.split('.') {
            target = target.entry(key, &place);
        }
        let mut written = Self::of_value(value, &place);
        if let Item::Scalar(_, typed) = &mut written.item {
            *typed = Some(text.into());
        }
        target.merge(written);
        Ok(())
    }

    /// Moves the value of a renamed key to its new name.
    pub(super) fn rename(&mut self, old: &str, new: &str) -> Result<(), RecipeError> {
        let names = old.split_once('.').zip(new.split_once('.'));
        let Some(((section, old_key), (_, new_key))) = names else { return Ok(()) };
        let Item::Table(sections) = &mut self.item else { return Ok(()) };
        let Some(Self { item: Item::Table(keys), .. }) = sections.get_mut(section) else { return Ok(()) };
        let Some(value) = keys.remove(old_key) else { return Ok(()) };
        let place = value.place.to_string();
        match keys.insert(new_key.to_owned(), value) {
            None => Ok(()),
            Some(_) => Err(RecipeError::Invalid {
                place,
                key: old.to_owned(),
                problem: format!("is the former name of `{new}`, which is set as well"),
                hint: Some(format!("keep `{new}` only")),
            }),
        }
    }

    /// The entry of a table, created as an empty table if it is absent. A value that is not a table becomes an empty one first.
    fn entry(&mut self, key: &str, place: &Location) -> &mut Self {
        let empty = || Self { place: place.clone(), item: Item::Table(BTreeMap::new()) };
        if !matches!(self.item, Item::Table(_)) {
            *self = empty();
        }
        match &mut self.item {
            Item::Table(table) => table.entry(key.to_owned()).or_insert_with(empty),
            _ => unreachable!("a value that is not a table was replaced by one"),
        }
    }

    /// Merges the table `above` into this one; any other value is replaced.
    fn merge(&mut self, above: Self) {
        match (&mut self.item, above.item) {
            (Item::Table(below), Item::Table(entries)) => {
                for (key, node) in entries {
                    match below.get_mut(&key) {
                        Some(inner) => inner.merge(node),
                        None => {
                            below.insert(key, node);
                        }
                    }
                }
                // The section keeps its line; the entries that came from `above` have their own places.
            }
            (_, item) => *self = Self { place: above.place, item },
        }
    }

    /// The node at `section.key`, or `section.list[0].key`.
    pub(super) fn get(&self, path: &str) -> Option<&Self> {
        path.split(['.', '[']).filter(|part| !part.is_empty()).try_fold(self, |node, part| match &node.item {
            Item::Table(table) => table.get(part),
            Item::List(list) => list.get(part.strip_suffix(']')?.parse::<usize>().ok()?),
            Item::Scalar(..) => None,
        })
    }

    /// The place of a key; without one in the recipe, that of its section or file.
    pub(super) fn place(&self, path: &str) -> &Location {
        match (self.get(path), path.rfind(['.', '['])) {
            (Some(node), _) => &node.place,
            (None, Some(end)) => self.place(&path[..end]),
            (None, None) => &self.place,
        }
    }

    /// The value as TOML, or as it was typed in a `--set`.
    pub(super) fn as_written(&self) -> String {
        match &self.item {
            Item::Scalar(_, Some(text)) => text.to_string(),
            _ => self.to_value().to_string(),
        }
    }

    fn to_value(&self) -> Value {
        match &self.item {
            Item::Scalar(value, _) => value.clone(),
            Item::List(list) => Value::Array(list.iter().map(Self::to_value).collect()),
            Item::Table(table) => {
                Value::Table(table.iter().map(|(key, node)| (key.clone(), node.to_value())).collect())
            }
        }
    }

    /// A node for a value whose parts all have the same place.
    fn of_value(value: Value, place: &Location) -> Self {
        let item = match value {
            Value::Array(list) => Item::List(list.into_iter().map(|value| Self::of_value(value, place)).collect()),
            Value::Table(table) => {
                Item::Table(table.into_iter().map(|(key, value)| (key, Self::of_value(value, place))).collect())
            }
            scalar => Item::Scalar(scalar, None),
        };
        Self { place: place.clone(), item }
    }
}

/// The node of a parsed value at the place `at`. The place of a table's entry is that of its key.
fn node(value: Spanned<DeValue<'_>>, at: Location, place: &dyn Fn(usize) -> Location) -> Result<Node, toml::de::Error> {
    let item = match value.get_ref() {
        DeValue::Table(_) | DeValue::Array(_) => match value.into_inner() {
            DeValue::Table(table) => Item::Table(entries(table, place)?),
            DeValue::Array(list) => {
                let element = |value: Spanned<DeValue<'_>>| {
                    let at = place(value.span().start);
                    node(value, at, place)
                };
                Item::List(list.into_iter().map(element).collect::<Result<_, _>>()?)
            }
            _ => unreachable!("the outer match admits tables and arrays only"),
        },
        _ => Item::Scalar(Value::deserialize(value.into_deserializer())?, None),
    };
    Ok(Node { place: at, item })
}

fn entries(table: DeTable<'_>, place: &dyn Fn(usize) -> Location) -> Result<BTreeMap<String, Node>, toml::de::Error> {
    let entry = |(key, value): (Spanned<DeString<'_>>, _)| {
        let at = place(key.span().start);
        Ok((key.into_inner().into_owned(), node(value, at, place)?))
    };
    table.into_iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(tree: &Node, path: &str) -> Value {
        tree.get(path).unwrap().to_value()
    }

    #[test]
    fn every_value_has_its_line() {
        let text = "# a recipe\n[train]\n\nsteps = 3\n[schedule]\n[[schedule.stages]]\nto = 1\n";
        let tree = Node::parse(text, "r").unwrap();
        assert_eq!(*tree.place("train.steps"), Location::Line("r".into(), 4));
        assert_eq!(*tree.place("train.keep"), Location::Line("r".into(), 2));
        assert_eq!(*tree.place("schedule.stages"), Location::Line("r".into(), 6));
        assert_eq!(*tree.place("schedule.stages[0].to"), Location::Line("r".into(), 7));
        assert_eq!(*tree.place("run.name"), Location::File("r".into()));
    }

    #[test]
    fn set_accepts_toml_or_a_bare_word() {
        let mut tree = Node::parse("", "r").unwrap();
        for set in ["a.b=1e-3", "a.c=bytes", "a.d=[1, 2]", "a.e=", "a.f=\"x\"", "a.g=/tmp/x", "a.h=x # y"] {
            tree.set(set).unwrap();
        }
        assert_eq!(value(&tree, "a.b"), Value::Float(1e-3));
        assert_eq!(value(&tree, "a.c"), Value::String("bytes".into()));
        assert_eq!(value(&tree, "a.d"), Value::Array(vec![Value::Integer(1), Value::Integer(2)]));
        assert_eq!(value(&tree, "a.e"), Value::String(String::new()));
        assert_eq!(value(&tree, "a.f"), Value::String("x".into()));
        assert_eq!(value(&tree, "a.g"), Value::String("/tmp/x".into()));
        assert_eq!(value(&tree, "a.h"), Value::String("x # y".into()));
        assert!(tree.set("a.b").unwrap_err().to_string().contains("no `=`"));
        assert!(tree.set("steps=1").unwrap_err().to_string().contains("needs its section"));
        assert!(tree.set("a.b=[1").unwrap_err().to_string().contains("not a TOML value"));
    }

    #[test]
    fn set_changes_a_key_of_an_inner_table() {
        let mut tree = Node::parse("[model]\nrope = { factor = 2, type = \"yarn\" }\n", "r").unwrap();
        tree.set("model.rope.factor=4").unwrap();
        let rope = value(&tree, "model.rope");
        assert_eq!((rope["factor"].as_integer(), rope["type"].as_str()), (Some(4), Some("yarn")));
        assert_eq!(*tree.place("model.rope.factor"), Location::Set("model.rope.factor=4".into()));
        assert_eq!(*tree.place("model.rope.type"), Location::Line("r".into(), 2));
    }

    #[test]
    fn a_renamed_key_is_moved_and_both_names_at_once_are_an_error() {
        let mut tree = Node::parse("[model]\nold = 1\n", "r").unwrap();
        tree.rename("model.old", "model.new").unwrap();
        tree.rename("none.old", "none.new").unwrap();
        assert_eq!(value(&tree, "model.new"), Value::Integer(1));
        assert!(tree.get("model.old").is_none());
        assert_eq!(*tree.place("model.new"), Location::Line("r".into(), 2));
        tree.set("model.old=2").unwrap();
        let error = tree.rename("model.old", "model.new").unwrap_err().to_string();
        assert_eq!(error, "--set model.old=2: `model.old` is the former name of `model.new`, which is set as well");
    }

    #[test]
    fn invalid_toml_is_an_error_with_its_line() {
        let error = Node::parse("[train]\nsteps = = 3\n", "r.toml").unwrap_err().to_string();
        assert!(error.starts_with("r.toml:2: "), "{error}");
    }
}

//! The JSON schema of recipes, made from the types that are read: for editors, for the reference page, and to find keys that
//! nothing reads.

use std::sync::LazyLock;

use schemars::Schema;
use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use serde_json::{Map, Value, json};

use super::document::{Item, Node, Place};
use super::reader::nearest;
use super::{Recipe, RecipeError};

static SCHEMA: LazyLock<Value> = LazyLock::new(|| schema().to_value());

/// The JSON schema (draft 7) of recipes, as in `configs/recipe.schema.json`.
pub fn schema() -> Schema {
    let mut schema = SchemaSettings::draft07().into_generator().into_root_schema_for::<Recipe>();
    RecursiveTransform(strings_or_one).transform(&mut schema);
    schema
}

/// A list of strings may be written as its only one.
fn strings_or_one(schema: &mut Schema) {
    if schema.get("type") == Some(&json!("array")) && schema.get("items") == Some(&json!({"type": "string"})) {
        schema.insert("type".into(), json!(["array", "string"]));
    }
}

/// The schema of structs that are read from one table by [`flat`](super::reader::flat): a key is the first's that has it.
pub(super) fn merged<const N: usize>(description: &str, parts: [Schema; N]) -> Schema {
    let mut properties = Map::new();
    for part in parts {
        let Some(Value::Object(keys)) = part.get("properties") else { continue };
        for (key, value) in keys {
            properties.entry(key).or_insert_with(|| value.clone());
        }
    }
    schemars::json_schema!({
        "description": description, "type": "object", "properties": properties, "additionalProperties": false
    })
}

/// What a schema says of tables and lists: its alternatives taken together.
#[derive(Default)]
struct Known<'a> {
    keys: Map<String, Value>,
    items: Vec<&'a Value>,
    /// Whether other keys may stand there as well.
    open: bool,
}

impl<'a> Known<'a> {
    fn of(schemas: impl IntoIterator<Item = &'a Value>, root: &'a Value) -> Self {
        let mut known = Self::default();
        for schema in schemas {
            known.add(schema, root);
        }
        known.open |= known.keys.is_empty();
        known
    }

    fn add(&mut self, schema: &'a Value, root: &'a Value) {
        if let Some(name) = schema["$ref"].as_str().and_then(|path| path.strip_prefix('#')) {
            self.add(root.pointer(name).unwrap_or(&Value::Null), root);
        }
        for choices in ["allOf", "anyOf", "oneOf"] {
            schema[choices].as_array().into_iter().flatten().for_each(|schema| self.add(schema, root));
        }
        self.items.extend(schema.get("items"));
        self.open |= !matches!(schema.get("additionalProperties"), None | Some(Value::Bool(false)));
        for (key, value) in schema["properties"].as_object().into_iter().flatten() {
            self.keys.entry(key).or_insert_with(|| json!([])).as_array_mut().expect("it is a list").push(value.clone());
        }
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.keys.keys().map(String::as_str)
    }

    /// What is said of one of the keys.
    fn inner(&self, key: &str) -> Vec<&Value> {
        self.keys.get(key).and_then(Value::as_array).into_iter().flatten().collect()
    }
}

/// The first key, by line, that nothing reads; a section before all others.
pub(super) fn unknown_key(document: &Node) -> Option<RecipeError> {
    let root = &*SCHEMA;
    let sections = Known::of([root], root);
    let Item::Table(written) = &document.item else { return None };
    let stray = |(_, node): &(&String, &Node)| !matches!(node.item, Item::Table(_));
    let unknown = || written.iter().filter(|(key, _)| !sections.keys.contains_key(*key));
    if let Some((key, node)) = unknown().find(|entry| !stray(entry)).or_else(|| unknown().next()) {
        let named = !stray(&(key, node));
        let bracketed = |name: &str| format!("[{name}]");
        return Some(RecipeError::UnknownKey {
            place: node.place.to_string(),
            key: if named { bracketed(key) } else { key.clone() },
            nearest: if named {
                nearest(key, sections.names()).map(|name| bracketed(&name))
            } else {
                let all: Vec<String> = all_keys(&sections, root);
                let last = |key: &str| key.rsplit('.').next().unwrap_or(key).to_owned();
                let names: Vec<String> = all.iter().map(|key| last(key)).collect();
                let name = nearest(key, names.iter().map(String::as_str));
                name.and_then(|name| all.into_iter().find(|key| last(key) == name))
            },
            known: sections.names().map(bracketed).collect(),
        });
    }
    let mut found = Vec::new();
    for (section, node) in written {
        unknown_in(node, &sections.inner(section), root, section, &mut found);
    }
    let line = |place: &Place| match place {
        Place::Line(_, line) => *line,
        Place::File(_) | Place::Set(_) => usize::MAX,
    };
    found.sort_by_key(|(place, _)| line(place));
    let (_, mut error) = found.into_iter().next()?;
    if let RecipeError::UnknownKey { key, nearest, .. } = &mut error
        && let Some((section, name)) = key.split_once('.')
        && let Some(elsewhere) = all_keys(&sections, root)
            .into_iter()
            .find(|known| known.split_once('.').is_some_and(|(of, it)| of != section && it == name))
    {
        *nearest = Some(elsewhere);
    }
    Some(error)
}

/// `section.key` of every key of every section.
fn all_keys(sections: &Known<'_>, root: &Value) -> Vec<String> {
    let of = |section: &str| {
        let keys = Known::of(sections.inner(section), root);
        keys.names().map(|key| format!("{section}.{key}")).collect::<Vec<_>>()
    };
    sections.names().flat_map(of).collect()
}

fn unknown_in(node: &Node, schemas: &[&Value], root: &Value, path: &str, found: &mut Vec<(Place, RecipeError)>) {
    let known = Known::of(schemas.iter().copied(), root);
    match &node.item {
        Item::Table(table) => {
            for (key, node) in table {
                let inner = format!("{path}.{key}");
                if known.keys.contains_key(key) {
                    unknown_in(node, &known.inner(key), root, &inner, found);
                } else if !known.open {
                    let name = nearest(key, known.names());
                    // A section's keys are named whole, those of tables within it are not.
                    let nearest =
                        if path.contains(['.', '[']) { name } else { name.map(|name| format!("{path}.{name}")) };
                    let known = known.names().map(str::to_owned).collect();
                    let place = node.place.to_string();
                    found.push((node.place.clone(), RecipeError::UnknownKey { place, key: inner, nearest, known }));
                }
            }
        }
        Item::List(list) => {
            for (index, node) in list.iter().enumerate() {
                unknown_in(node, &known.items, root, &format!("{path}[{index}]"), found);
            }
        }
        Item::Scalar(..) => {}
    }
}

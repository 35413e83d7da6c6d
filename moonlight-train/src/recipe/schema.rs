//! The JSON schema of recipes, generated from the recipe's types: for editors, for the reference page, and to find unknown keys.

use std::sync::LazyLock;

use schemars::Schema;
use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use serde_json::{Map, Value, json};

use super::document::{Item, Location, Node};
use super::reader::nearest;
use super::{Recipe, RecipeError};

static SCHEMA: LazyLock<Value> = LazyLock::new(|| schema().to_value());

/// The JSON schema (draft 7) of recipes, as in `configs/recipe.schema.json`.
pub fn schema() -> Schema {
    let mut schema = SchemaSettings::draft07().into_generator().into_root_schema_for::<Recipe>();
    RecursiveTransform(strings_or_one).transform(&mut schema);
    schema
}

/// A list of one string may be written as that string.
fn strings_or_one(schema: &mut Schema) {
    if schema.get("type") == Some(&json!("array")) && schema.get("items") == Some(&json!({"type": "string"})) {
        schema.insert("type".into(), json!(["array", "string"]));
    }
}

/// The schema of structs that [`read_flattened`](super::reader::read_flattened) reads from one table. A key belongs to the
/// first struct that has it.
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

/// The keys of a table and the elements of a list that a schema allows, over all of its alternatives.
#[derive(Default)]
struct AllowedKeys<'a> {
    keys: Vec<(&'a str, &'a Value)>,
    items: Vec<&'a Value>,
    /// Whether any other key is allowed too.
    open: bool,
}

impl<'a> AllowedKeys<'a> {
    fn of(schemas: &[&'a Value], root: &'a Value) -> Self {
        let mut known = Self::default();
        schemas.iter().for_each(|schema| known.add(schema, root));
        known.open |= known.keys.is_empty();
        known
    }

    fn add(&mut self, schema: &'a Value, root: &'a Value) {
        let referred = schema["$ref"].as_str().and_then(|path| root.pointer(path.strip_prefix('#')?));
        let choices = ["allOf", "anyOf", "oneOf"].into_iter().filter_map(|of| schema[of].as_array()).flatten();
        referred.into_iter().chain(choices).for_each(|schema| self.add(schema, root));
        self.keys
            .extend(schema["properties"].as_object().into_iter().flatten().map(|(key, value)| (key.as_str(), value)));
        self.items.extend(schema.get("items"));
        self.open |= !matches!(schema.get("additionalProperties"), None | Some(Value::Bool(false)));
    }

    fn names(&self) -> impl Iterator<Item = &'a str> {
        self.keys.iter().map(|(key, _)| *key)
    }

    /// The schemas of one key.
    fn inner(&self, name: &str) -> Vec<&'a Value> {
        self.keys.iter().filter(|(key, _)| *key == name).map(|(_, schema)| *schema).collect()
    }
}

/// The error for the first unknown key by line. Unknown sections come first.
pub(super) fn unknown_key(document: &Node) -> Option<RecipeError> {
    let root = &*SCHEMA;
    let sections = AllowedKeys::of(&[root], root);
    let Item::Table(written) = &document.item else { return None };
    let mut unknown: Vec<_> = written.iter().filter(|(name, _)| sections.inner(name).is_empty()).collect();
    unknown.sort_by_key(|(_, node)| !matches!(node.item, Item::Table(_)));
    // `(section, key)` of every key of every section.
    let keys = || {
        let of = |name| AllowedKeys::of(&sections.inner(name), root).keys.into_iter().map(move |(key, _)| (name, key));
        sections.names().flat_map(of)
    };
    if let Some((name, node)) = unknown.first() {
        let is_section = matches!(node.item, Item::Table(_));
        let nearest = if is_section {
            nearest(name, sections.names()).map(|name| format!("[{name}]"))
        } else {
            let near = nearest(name, keys().map(|(_, key)| key));
            keys().find(|(_, key)| near.as_deref() == Some(key)).map(|(section, key)| format!("{section}.{key}"))
        };
        return Some(RecipeError::UnknownKey {
            place: node.place.to_string(),
            key: if is_section { format!("[{name}]") } else { (*name).clone() },
            nearest,
            known: sections.names().map(|name| format!("[{name}]")).collect(),
        });
    }
    let mut found = Vec::new();
    for (name, node) in written {
        let elsewhere = |unknown: &str| keys().find(|(section, key)| section != name && *key == unknown);
        unknown_in(
            node,
            &sections.inner(name),
            root,
            name,
            &|key| elsewhere(key).map(|(section, key)| format!("{section}.{key}")),
            &mut found,
        );
    }
    found.sort_by_key(|(place, _)| match place {
        Location::Line(_, line) => *line,
        Location::File(_) | Location::Set(_) => usize::MAX,
    });
    found.into_iter().next().map(|(_, error)| error)
}

/// Finds the unknown keys of a section, or of a table or list in it. `elsewhere` looks up the name in the other sections.
fn unknown_in(
    node: &Node,
    schemas: &[&Value],
    root: &Value,
    path: &str,
    elsewhere: &dyn Fn(&str) -> Option<String>,
    found: &mut Vec<(Location, RecipeError)>,
) {
    let known = AllowedKeys::of(schemas, root);
    match &node.item {
        Item::Table(table) => {
            for (key, node) in table {
                let inner = known.inner(key);
                let full_name = format!("{path}.{key}");
                if !inner.is_empty() {
                    unknown_in(node, &inner, root, &full_name, elsewhere, found);
                } else if !known.open {
                    // The nearest key is given with its section, but inside a table of a section by its name only.
                    let near = nearest(key, known.names());
                    let nearest = match path.contains(['.', '[']) {
                        true => near,
                        false => elsewhere(key).or_else(|| near.map(|near| format!("{path}.{near}"))),
                    };
                    let known = known.names().map(str::to_owned).collect();
                    let place = node.place.to_string();
                    found.push((node.place.clone(), RecipeError::UnknownKey { place, key: full_name, nearest, known }));
                }
            }
        }
        Item::List(list) => {
            for (index, node) in list.iter().enumerate() {
                unknown_in(node, &known.items, root, &format!("{path}[{index}]"), elsewhere, found);
            }
        }
        Item::Scalar(..) => {}
    }
}

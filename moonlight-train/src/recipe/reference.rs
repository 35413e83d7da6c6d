//! Generates the JSON schema of recipes and the reference page of all keys, and checks that both files are current.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use super::schema;

/// The environment variable that makes the tests write the files instead of comparing them.
const UPDATE: &str = "UPDATE_RECIPE_REFERENCE";
/// The files, relative to the repository.
const SCHEMA_FILE: &str = "configs/recipe.schema.json";
const PAGE_FILE: &str = "docs/src/reference/recipe.md";

fn assert_current(file: &str, generated: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(&path, generated).unwrap();
    }
    let current = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        current == generated,
        "`{file}` differs from what the types of recipes generate. Update it with:\n\n    \
         {UPDATE}=1 cargo test -p moonlight-train --lib recipe::reference\n"
    );
}

#[test]
fn the_schema_is_current() {
    let text = serde_json::to_string_pretty(&schema()).unwrap();
    assert_current(SCHEMA_FILE, &(text + "\n"));
}

#[test]
fn the_reference_page_is_current() {
    assert_current(PAGE_FILE, &page(&schema().to_value()));
}

/// Every recipe names the schema by which an editor checks it.
#[test]
fn recipes_name_their_schema() {
    for file in super::tests::toml_files("configs") {
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("#:schema recipe.schema.json\n"), "{}", file.display());
    }
}

const HEAD: &str = "\
<!-- Generated from the doc comments in moonlight-train/src/recipe; edit those, and not this page. -->

# Recipe keys

You will find every key of a recipe: what it does, its type, its default and its range.

A recipe is a TOML file that describes a run completely; `moonlight train RECIPE.toml` runs it. Every key has a default, except for the few that are
required. `--set section.key=value` overrides a value of the file. An unknown key, a wrong type or an impossible value is an error that names the key
and the line. The run's folder contains a `recipe.toml` with every default written out.

Editors with the taplo language server (Even Better TOML) complete and check the keys of a recipe whose first line is
`#:schema recipe.schema.json`, a path relative to the recipe or a URL.
";

/// The page of all keys.
fn page(root: &Value) -> String {
    let mut page = String::from(HEAD);
    for (section, schema) in properties(root) {
        let parts = resolved(schema, root);
        let description = parts.iter().rev().find_map(|part| part["description"].as_str()).unwrap_or_default();
        writeln!(page, "\n## `[{section}]`\n\n{}\n", line(description)).unwrap();
        let mut plain = Vec::new();
        for (key, schema) in parts.iter().flat_map(|part| properties(part)) {
            // Keys that only some architectures have are described in `config.json` files, and listed by name.
            match schema.as_object().is_some_and(|schema| schema.len() == 1) {
                true => plain.push(format!("`{key}`")),
                false => entry(&mut page, key, schema, root, 0),
            }
        }
        if !plain.is_empty() {
            writeln!(page, "* as in a published `config.json`: {}", plain.join(", ")).unwrap();
        }
    }
    page
}

/// Writes a line for a key, and one for each of its choices and inner keys.
fn entry(page: &mut String, key: &str, schema: &Value, root: &Value, depth: usize) {
    let parts = resolved(schema, root);
    let indent = "  ".repeat(depth);
    let of = |key: &str| parts.iter().find_map(|part| part[key].as_str()).map(line);
    let description = of("description").unwrap_or_default();
    // A default that depends on other keys is in the description.
    let has_default = description.contains("Default:") || description.contains("Required.");
    let default = parts.iter().find_map(|part| part.get("default")).filter(|value| !has_default && is_plain(value));
    let default = default.map(|value| format!(", default `{value}`")).unwrap_or_default();
    writeln!(page, "{indent}* `{key}` ({}{default}): {description}", kind(&parts, root)).unwrap();
    let choices = parts.iter().flat_map(|part| ["oneOf", "anyOf"].map(|of| part[of].as_array())).flatten().flatten();
    for choice in choices {
        let description = line(choice["description"].as_str().unwrap_or_default());
        let names = choice["enum"].as_array().cloned().unwrap_or_else(|| vec![choice["const"].clone()]);
        for name in names.iter().filter_map(Value::as_str) {
            writeln!(page, "{indent}  * `\"{name}\"`: {description}").unwrap();
        }
        for (name, schema) in properties(choice) {
            writeln!(page, "{indent}  * `{{ {name} = ... }}`: {description}").unwrap();
            for (key, schema) in resolved(schema, root).iter().flat_map(|part| properties(part)) {
                entry(page, key, schema, root, depth + 2);
            }
        }
    }
    let items = parts.iter().filter_map(|part| part.get("items")).filter(|items| items.is_object());
    let items = items.flat_map(|items| resolved(items, root));
    for (key, schema) in parts.iter().copied().chain(items).flat_map(properties) {
        entry(page, key, schema, root, depth + 1);
    }
}

fn properties(schema: &Value) -> impl Iterator<Item = (&String, &Value)> {
    schema["properties"].as_object().into_iter().flatten()
}

/// A schema, and every schema that it refers to or combines.
fn resolved<'a>(schema: &'a Value, root: &'a Value) -> Vec<&'a Value> {
    let referred = schema["$ref"].as_str().and_then(|path| root.pointer(path.strip_prefix('#')?));
    let all = schema["allOf"].as_array().into_iter().flatten();
    // `Option<T>`: T, or null.
    let optional = schema["anyOf"].as_array().filter(|any| any.iter().any(|schema| schema["type"] == "null"));
    let inner = referred.into_iter().chain(all).chain(optional.into_iter().flatten());
    std::iter::once(schema).chain(inner.flat_map(|schema| resolved(schema, root))).collect()
}

/// The type of a value, in words.
fn kind(parts: &[&Value], root: &Value) -> String {
    let words = |name: &str| match name {
        "integer" => Some("whole number"),
        "number" => Some("number"),
        "boolean" => Some("true or false"),
        "string" => Some("string"),
        "object" => Some("table"),
        "array" => Some("list"),
        _ => None,
    };
    let types = parts.iter().flat_map(|part| match &part["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
        one => one.as_str().into_iter().collect::<Vec<_>>(),
    });
    let Some(word) = types.filter_map(words).next() else { return "a choice".into() };
    let items: Vec<_> = parts.iter().filter_map(|part| part.get("items")).filter(|items| items.is_object()).collect();
    match (word, items.first()) {
        ("list", Some(items)) => format!("list of {}s", kind(&resolved(items, root), root)),
        _ => word.to_owned(),
    }
}

/// Whether a default is worth showing: not null, empty or a table.
fn is_plain(value: &Value) -> bool {
    match value {
        Value::Null | Value::Object(_) => false,
        Value::String(text) => !text.is_empty(),
        _ => true,
    }
}

/// A doc comment in one line, its links to Rust items as plain code.
fn line(text: &str) -> String {
    let mut text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    while let Some(start) = text.find("](crate::") {
        let end = text[start..].find(')').map_or(text.len(), |length| start + length + 1);
        text.replace_range(start..end, "]");
    }
    text.replace("[`", "`").replace("`]", "`")
}

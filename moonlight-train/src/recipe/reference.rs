//! `configs/recipe.schema.json` and `docs/src/reference/recipe.md`, made from the schema, and the test that they are current.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use super::schema;

/// Set to write the files instead of comparing them.
const UPDATE: &str = "UPDATE_RECIPE_REFERENCE";

fn is_current(file: &str, made: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(&path, made).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == made,
        "`{file}` is not what the types of recipes say. Write it anew with:\n\n    \
         {UPDATE}=1 cargo test -p moonlight-train --lib recipe::reference\n"
    );
}

#[test]
fn the_schema_is_current() {
    let text = serde_json::to_string_pretty(&schema()).unwrap();
    is_current("configs/recipe.schema.json", &(text + "\n"));
}

#[test]
fn the_reference_page_is_current() {
    is_current("docs/src/reference/recipe.md", &page(&schema().to_value()));
}

/// Every recipe says which schema an editor checks it by.
#[test]
fn recipes_name_their_schema() {
    for file in super::tests::toml_files("configs") {
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("#:schema recipe.schema.json\n"), "{}", file.display());
    }
}

const HEAD: &str = "\
<!-- Made from the types of recipes (moonlight-train/src/recipe): change their docs, not this page. -->

# Recipes

A recipe is a TOML file that says everything about a run; `moonlight train RECIPE.toml` runs it. Every key has a default but the few that are
*required*. `--set section.key=value` lays a value over the file's. An unknown key, a wrong type or an impossible value is an error that names
the key and the line. The run's folder keeps a `recipe.toml` in which every default is spelled out.

Editors with the taplo language server (Even Better TOML) complete and check the keys of a recipe that begins with the line
`#:schema recipe.schema.json`, a path relative to the recipe or a URL.
";

/// The page of all keys.
fn page(root: &Value) -> String {
    let mut page = String::from(HEAD);
    for (section, said) in properties(root) {
        let told = parts(said, root);
        let description = told.iter().rev().find_map(|part| part["description"].as_str()).unwrap_or_default();
        writeln!(page, "\n## `[{section}]`\n\n{}\n", line(description)).unwrap();
        let mut plain = Vec::new();
        for (key, said) in told.iter().flat_map(|part| properties(part)) {
            // The keys of a published config.json have no docs of ours.
            match said.as_object().is_some_and(|said| said.len() == 1) {
                true => plain.push(format!("`{key}`")),
                false => entry(&mut page, key, said, root, 0),
            }
        }
        if !plain.is_empty() {
            writeln!(page, "* as in the published `config.json`: {}", plain.join(", ")).unwrap();
        }
    }
    page
}

/// A line for a key, and one for each of its choices or of the keys within it.
fn entry(page: &mut String, key: &str, said: &Value, root: &Value, depth: usize) {
    let parts = parts(said, root);
    let indent = "  ".repeat(depth);
    let of = |key: &str| parts.iter().find_map(|part| part[key].as_str()).map(line);
    let description = of("description").unwrap_or_default();
    // Some defaults follow from other keys, and some docs say theirs.
    let told = description.contains("Default:") || description.contains("Required.");
    let default = parts.iter().find_map(|part| part.get("default")).filter(|value| !told && is_plain(value));
    let default = default.map(|value| format!(", default `{value}`")).unwrap_or_default();
    writeln!(page, "{indent}* `{key}` ({}{default}): {description}", kind(&parts, root)).unwrap();
    let choices = parts.iter().flat_map(|part| ["oneOf", "anyOf"].map(|of| part[of].as_array())).flatten().flatten();
    for choice in choices {
        let description = line(choice["description"].as_str().unwrap_or_default());
        let names = choice["enum"].as_array().cloned().unwrap_or_else(|| vec![choice["const"].clone()]);
        for name in names.iter().filter_map(Value::as_str) {
            writeln!(page, "{indent}  * `\"{name}\"`: {description}").unwrap();
        }
        for (name, said) in properties(choice) {
            writeln!(page, "{indent}  * `{{ {name} = ... }}`: {description}").unwrap();
            for (key, said) in self::parts(said, root).iter().flat_map(|part| properties(part)) {
                entry(page, key, said, root, depth + 2);
            }
        }
    }
    let items = parts.iter().filter_map(|part| part.get("items")).filter(|items| items.is_object());
    let items = items.flat_map(|items| self::parts(items, root));
    for (key, said) in parts.iter().copied().chain(items).flat_map(properties) {
        entry(page, key, said, root, depth + 1);
    }
}

fn properties(schema: &Value) -> impl Iterator<Item = (&String, &Value)> {
    schema["properties"].as_object().into_iter().flatten()
}

/// A schema and what it refers to.
fn parts<'a>(schema: &'a Value, root: &'a Value) -> Vec<&'a Value> {
    let referred = schema["$ref"].as_str().and_then(|path| root.pointer(path.strip_prefix('#')?));
    let all = schema["allOf"].as_array().into_iter().flatten();
    // `Option<T>`: T, or null.
    let optional = schema["anyOf"].as_array().filter(|any| any.iter().any(|schema| schema["type"] == "null"));
    let inner = referred.into_iter().chain(all).chain(optional.into_iter().flatten());
    std::iter::once(schema).chain(inner.flat_map(|schema| parts(schema, root))).collect()
}

/// What may be written, in words.
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
        ("list", Some(items)) => format!("list of {}s", kind(&self::parts(items, root), root)),
        _ => word.to_owned(),
    }
}

/// Whether a default says more than that there is nothing.
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

//! The filter `tojson`: Python's `json.dumps`.

use std::fmt::Write;

use minijinja::value::{Rest, Value, ValueKind, ValueOrKwargs};
use minijinja::{Error, State};

use super::repr::{FueledString, is_a_dict, write_number};
use super::{FIRST_PRIVATE, MAX_DEPTH, bind_arguments, is_true};
use crate::chat::sandbox::invalid_operation;

/// The limit of `indent`, which is written before each value once for each level of nesting.
const MAX_INDENT: i64 = 100;

/// `json.dumps` with the arguments that the `tojson` of transformers accepts.
pub(super) fn tojson(state: &State, value: Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let settings = bind_arguments(arguments, ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let [ascii, indent, separators, sorted] = settings;
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            // Clamped before the allocation; a value above the limit is reported below.
            None => " ".repeat(i64::try_from(indent)?.clamp(0, MAX_INDENT + 1) as usize),
        }),
    };
    if indent.as_ref().is_some_and(|indent| indent.len() > MAX_INDENT as usize) {
        return Err(invalid_operation(format!("`indent` of `tojson` exceeds the limit of {MAX_INDENT}")));
    }
    let [mut between, mut after_key] = if indent.is_some() { [",", ": "] } else { [", ", ": "] }.map(String::from);
    if let Some(separators) = separators.filter(|separators| !separators.is_none()) {
        let texts: Vec<Value> = separators.try_iter()?.collect();
        let [Some(first), Some(second)] = [0, 1].map(|index| texts.get(index).and_then(Value::as_str)) else {
            return Err(invalid_operation("`separators` of `tojson` must be two strings"));
        };
        [between, after_key] = [first.to_owned(), second.to_owned()];
    }
    let style = Style { ascii: is_true(&ascii), indent, between, after_key, sorted: is_true(&sorted) };
    let mut text = String::new();
    dumps(&mut FueledString { text: &mut text, paid: 0 }, state, &value, &style, 0)?;
    Ok(Value::from(text))
}

/// The arguments of `json.dumps`.
struct Style {
    ascii: bool,
    indent: Option<String>,
    between: String,
    after_key: String,
    sorted: bool,
}

impl Style {
    fn line(&self, out: &mut FueledString<'_>, depth: usize) {
        if let Some(indent) = &self.indent {
            out.push("\n");
            (0..depth).for_each(|_| out.push(indent));
        }
    }
}

fn dumps(out: &mut FueledString<'_>, state: &State, value: &Value, style: &Style, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(invalid_operation(format!("nested values exceed the limit of {MAX_DEPTH} levels")));
    }
    match value.kind() {
        ValueKind::None => out.push("null"),
        ValueKind::Bool => out.push(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => write_number(out.text, value, ["NaN", "Infinity", "-Infinity"]),
        ValueKind::String => write_json(out.text, value.as_str().unwrap_or_default(), style.ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            let mut any = false;
            out.push("[");
            for item in value.try_iter()? {
                if any {
                    out.push(&style.between);
                }
                any = true;
                style.line(out, depth + 1);
                dumps(out, state, &item, style, depth + 1)?;
            }
            if any {
                style.line(out, depth);
            }
            out.push("]");
        }
        ValueKind::Map if is_a_dict(value) => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            state.consume_fuel(keys.len() as u64)?;
            if style.sorted {
                keys.sort();
            }
            let any = !keys.is_empty();
            out.push("{");
            for (index, key) in keys.into_iter().enumerate() {
                if index > 0 {
                    out.push(&style.between);
                }
                style.line(out, depth + 1);
                write_key(out, &key, style)?;
                out.push(&style.after_key);
                dumps(out, state, &value.get_item(&key)?, style, depth + 1)?;
            }
            if any {
                style.line(out, depth);
            }
            out.push("}");
        }
        kind => return Err(invalid_operation(format!("`tojson` does not support values of the kind `{kind}`"))),
    }
    out.pay(state)
}

fn write_key(out: &mut FueledString<'_>, key: &Value, style: &Style) -> Result<(), Error> {
    match key.kind() {
        ValueKind::String => write_json(out.text, key.as_str().unwrap_or_default(), style.ascii),
        ValueKind::None => out.push("\"null\""),
        ValueKind::Bool => out.push(if key.is_true() { "\"true\"" } else { "\"false\"" }),
        ValueKind::Number => {
            out.push("\"");
            write_number(out.text, key, ["NaN", "Infinity", "-Infinity"]);
            out.push("\"");
        }
        kind => return Err(invalid_operation(format!("`tojson` does not support keys of the kind `{kind}`"))),
    }
    Ok(())
}

fn write_json(out: &mut String, text: &str, ascii: bool) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\0'..='\u{1f}' => {
                let _ = write!(out, "\\u{:04x}", u32::from(character));
            }
            // Python escapes all but printable ASCII, U+7F included.
            _ if ascii && character > '~' && character < FIRST_PRIVATE => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            _ => out.push(character),
        }
    }
    out.push('"');
}

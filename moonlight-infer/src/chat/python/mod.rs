//! Python's semantics for templates, which are written for Jinja in Python and print Python's values.
//!
//! transformers renders templates with `ImmutableSandboxedEnvironment`, and its `tojson` is `json.dumps`. minijinja is
//! close; this module replaces what differs:
//!
//! * `repr.rs`: how values are written (`str` and `repr`);
//! * `json.rs`: `tojson`;
//! * `filters.rs`: filters and `dict`;
//! * `methods.rs`: methods of strings, lists and maps.
//!
//! A template that fails in Python should fail here too, rather than render a different text.

mod filters;
mod json;
mod methods;
mod repr;

use minijinja::value::{Kwargs, Rest, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, Output, State};

use super::sandbox::invalid_operation;
use filters::{default, dict, float, indent, int, join};
use json::tojson;
pub(super) use methods::method;
pub(super) use repr::python_str;

/// The limit of nesting of a value that is written.
const MAX_DEPTH: usize = 200;
/// The first of the characters that stand for special tokens of a message (`special_tokens.rs`). They must not be written as
/// escape sequences, from which the special tokens could not be restored.
const FIRST_PRIVATE: char = '\u{10_0000}';
/// The bytes of written text that cost one step of fuel.
const BYTES_PER_STEP: usize = 16;

/// Replaces what the engine does differently from Python.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_formatter(|output: &mut Output, state: &mut State, value: &Value| {
        // Most of what is written is text.
        match value.as_str() {
            Some(text) if !matches!(state.auto_escape(), minijinja::AutoEscape::Html) => Ok(output.write_str(text)?),
            Some(_) => minijinja::escape_formatter(output, state, value),
            None => Ok(output.write_str(&python_str(state, value)?)?),
        }
    });
    // Extensions of minijinja, with which a template would fail in transformers.
    for filter in ["bool", "split", "lines", "attr"] {
        environment.remove_filter(filter);
    }
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |state: &State, value: Value| -> Result<Value, Error> {
        if value.as_str().is_some() { Ok(value) } else { python_str(state, &value).map(Value::from) }
    });
    environment.add_filter("join", join);
    environment.add_filter("indent", indent);
    environment.add_filter("trim", |state: &State, value: Value, set: Option<&str>| -> Result<Value, Error> {
        let text = python_str(state, &value)?;
        state.consume_fuel((text.len().saturating_mul(set.map_or(1, str::len)) / BYTES_PER_STEP) as u64)?;
        Ok(Value::from(match set {
            Some(set) => text.trim_matches(|character| set.contains(character)),
            None => text.trim_matches(is_space),
        }))
    });
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    for name in ["e", "escape", "forceescape"] {
        environment.add_filter(name, |state: &State, value: Value| -> Result<String, Error> {
            let text = python_str(state, &value)?;
            let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            Ok(escaped.replace('\'', "&#39;").replace('"', "&#34;"))
        });
    }
    environment.add_test("iterable", |value: &Value| {
        use ValueKind::{Iterable, Map, Seq, String, Undefined};
        matches!(value.kind(), Undefined | String | Seq | Iterable | Map)
    });
    environment.add_test("sequence", |value: &Value| {
        // Jinja tests for a length and for items by index or key, which strings, dicts and undefined values also have.
        matches!(value.kind(), ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map)
            || is_a_list(value)
    });
    environment.add_test("callable", |value: &Value| {
        let name = value.as_object().map(|object| object.type_name()).unwrap_or_default();
        value.kind() == ValueKind::Plain || name.contains("Macro") || name.contains("Function")
    });
    environment.add_function("dict", dict);
    environment.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.to_vec()));
    environment.add_function("joiner", |separator: Option<Value>| {
        minijinja_contrib::globals::joiner(Some(separator.unwrap_or_else(|| ", ".into())))
    });
}

/// Whether a lazy iterator of the engine is a list in Python: a slice of a list, or the sum of two lists.
fn is_a_list(value: &Value) -> bool {
    // Other lazy iterators (`items()`, `range`) have no length or no items by index.
    value.kind() == ValueKind::Iterable && value.len().is_some() && value.get_item(&Value::from(0)).is_ok()
}

/// Binds positional and named arguments to `names` as Python does in a call.
fn bind_arguments<const N: usize>(
    arguments: Rest<ValueOrKwargs>,
    names: [&'static str; N],
) -> Result<[Option<Value>; N], Error> {
    let arguments = arguments.into_values();
    let (positional, named): (&[Value], Kwargs) = from_args(&arguments)?;
    if positional.len() > N {
        return Err(invalid_operation(format!("too many arguments: {} for {N}", positional.len())));
    }
    let mut bound = [const { None }; N];
    for (index, (slot, name)) in bound.iter_mut().zip(names).enumerate() {
        *slot = match (positional.get(index), named.get::<Option<Value>>(name)?) {
            (Some(_), Some(_)) => return Err(invalid_operation(format!("`{name}` is passed twice"))),
            (Some(value), None) => Some(value.clone()),
            (None, value) => value,
        };
    }
    named.assert_all_used()?;
    Ok(bound)
}

fn is_true(setting: &Option<Value>) -> bool {
    setting.as_ref().is_some_and(Value::is_true)
}

/// The value to iterate over in place of `value`. As in Python, `none` and numbers are refused; an undefined value is an
/// empty list.
pub(super) fn check_iterable(state: &State, value: Value) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        // A list, because the engine's iterator over characters has no length and therefore no `loop.last`.
        state.consume_fuel(text.len() as u64 / 2)?;
        return Ok(text.chars().map(Value::from).collect());
    }
    match value.kind() {
        ValueKind::None => Err(invalid_operation("`none` is not iterable")),
        ValueKind::Number | ValueKind::Bool => Err(invalid_operation(format!("a {} is not iterable", value.kind()))),
        _ => Ok(value),
    }
}

/// Python's `str.isspace` for one character: Unicode's white space and the four ASCII separators.
fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

//! Filters that minijinja implements differently from Jinja or Python, and the function `dict`.

use minijinja::value::{Kwargs, Rest, Value, ValueKind, ValueOrKwargs};
use minijinja::{Error, State};

use super::methods::{is_line_break, split_lines};
use super::repr::python_str;
use super::{BYTES_PER_STEP, bind_arguments, check_iterable, is_true};
use crate::chat::sandbox::invalid_operation;

/// Jinja's `join`, of the `str` of values or of an attribute of each.
pub(super) fn join(state: &State, values: Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let [separator, attribute] = bind_arguments(arguments, ["d", "attribute"])?;
    let separator = separator.map(|separator| python_str(state, &separator)).transpose()?.unwrap_or_default();
    let mut text = String::new();
    if values.is_undefined() {
        return Ok(Value::from(text));
    }
    for (index, item) in check_iterable(state, values)?.try_iter()?.enumerate() {
        let item = match &attribute {
            Some(attribute) => attribute_path(&item, attribute)?,
            None => item,
        };
        let item = python_str(state, &item)?;
        state.consume_fuel(1 + ((separator.len() + item.len()) / BYTES_PER_STEP) as u64)?;
        if index > 0 {
            text.push_str(&separator);
        }
        text.push_str(&item);
    }
    Ok(Value::from(text))
}

/// The value at a dotted path of attributes and indices, such as `a.0.b`.
fn attribute_path(value: &Value, attribute: &Value) -> Result<Value, Error> {
    let Some(names) = attribute.as_str() else { return value.get_item(attribute) };
    let mut found = value.clone();
    for name in names.split('.') {
        found = match name.parse::<usize>() {
            Ok(index) => found.get_item(&Value::from(index))?,
            Err(_) => found.get_item(&Value::from(name))?,
        };
    }
    Ok(found)
}

/// Jinja's `indent`, by a number of spaces or by a string. The first line and empty ones are indented only on request.
pub(super) fn indent(state: &State, text: Value, arguments: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let [width, first, blank] = bind_arguments(arguments, ["width", "first", "blank"])?;
    let (first, blank) = (is_true(&first), is_true(&blank));
    let indent = match width {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => {
                let width = usize::try_from(i64::try_from(width)?).unwrap_or(0);
                state.consume_fuel((width / BYTES_PER_STEP) as u64)?;
                " ".repeat(width)
            }
        },
    };
    // As in Jinja, which adds a line break so that `splitlines` keeps an empty last line.
    let text = python_str(state, &text)? + "\n";
    let breaks = text.chars().filter(|&character| is_line_break(character)).count();
    state.consume_fuel((breaks.saturating_mul(32 + indent.len()) / BYTES_PER_STEP) as u64)?;
    let lines = split_lines(&text, false);
    let mut indented = if first { indent.clone() } else { String::new() };
    for (index, line) in lines.into_iter().enumerate() {
        if index > 0 {
            indented.push('\n');
            if blank || !line.is_empty() {
                indented.push_str(&indent);
            }
        }
        indented.push_str(line);
    }
    Ok(indented)
}

/// Jinja's `int`: what Python's `int` parses, else the integer part of what `float` parses, else the default.
pub(super) fn int(value: Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let [default, base] = bind_arguments(arguments, ["default", "base"])?;
    let default = default.unwrap_or_else(|| Value::from(0));
    let base = base.map(u32::try_from).transpose()?.unwrap_or(10);
    if let Some(text) = value.as_str() {
        let text = text.trim();
        let (negative, digits) = match text.strip_prefix('-') {
            Some(digits) => (true, digits),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        let lower = digits.to_ascii_lowercase();
        let prefix = match base {
            2 => "0b",
            8 => "0o",
            16 => "0x",
            _ => "",
        };
        let digits = lower.strip_prefix(prefix).unwrap_or(&lower).replace('_', "");
        let read = if (2..=36).contains(&base) { i128::from_str_radix(&digits, base).ok() } else { None };
        // `from_str_radix` would accept a second sign.
        let read = read.filter(|_| digits.starts_with(|first: char| first.is_ascii_alphanumeric()));
        return Ok(match (read, text.parse::<f64>()) {
            (Some(number), _) => Value::from(if negative { -number } else { number }),
            // i128 ends at 1.7e38.
            (None, Ok(number)) if number.is_finite() && number.abs() < 1e38 => Value::from(number.trunc() as i128),
            _ => default,
        });
    }
    Ok(match value.kind() {
        ValueKind::Bool => Value::from(i64::from(value.is_true())),
        ValueKind::Number if value.is_integer() => value,
        ValueKind::Number => match f64::try_from(value) {
            Ok(number) if number.is_finite() && number.abs() < 1e38 => Value::from(number.trunc() as i128),
            _ => default,
        },
        _ => default,
    })
}

/// Jinja's `float`: what Python's `float` parses, else the default.
pub(super) fn float(value: Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let [default] = bind_arguments(arguments, ["default"])?;
    let default = default.unwrap_or_else(|| Value::from(0.0));
    let read = match value.as_str() {
        Some(text) => text.trim().replace('_', "").parse::<f64>().ok(),
        None if value.kind() == ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        None if value.kind() == ValueKind::Number => f64::try_from(value).ok(),
        None => None,
    };
    Ok(read.map_or(default, Value::from))
}

/// Jinja's `default`: replaces an undefined value, and with `boolean` also one that is false.
pub(super) fn default(value: Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let [default, boolean] = bind_arguments(arguments, ["default_value", "boolean"])?;
    let is_missing = value.is_undefined() || (is_true(&boolean) && !value.is_true());
    Ok(if is_missing { default.unwrap_or_else(|| Value::from("")) } else { value })
}

/// Python's `dict`, from another dict or from pairs, and from named arguments.
pub(super) fn dict(state: &State, first: Option<Value>, named: Kwargs) -> Result<Value, Error> {
    let mut entries: Vec<(Value, Value)> = Vec::new();
    match first {
        None => {}
        Some(map) if map.kind() == ValueKind::Map => {
            for key in map.try_iter()? {
                state.consume_fuel(1)?;
                let value = map.get_item(&key)?;
                entries.push((key, value));
            }
        }
        Some(pairs) => {
            for pair in pairs.try_iter()? {
                state.consume_fuel(1)?;
                let pair: Vec<Value> = pair.try_iter()?.take(3).collect();
                let [key, value] = <[Value; 2]>::try_from(pair).map_err(|_| invalid_operation("`dict` takes pairs"))?;
                entries.push((key, value));
            }
        }
    }
    for name in named.args() {
        entries.push((Value::from(name), named.get::<Value>(name)?));
    }
    // If a key occurs twice, the last value wins and the position of the first is kept, as in Python.
    Ok(Value::from_pairs(entries))
}

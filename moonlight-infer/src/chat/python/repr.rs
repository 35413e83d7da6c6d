//! Values as Python's `str` and `repr` write them.

use std::fmt::Write;

use minijinja::value::{Tuple, Value, ValueKind};
use minijinja::{Error, State};

use super::{BYTES_PER_STEP, FIRST_PRIVATE, MAX_DEPTH};
use crate::chat::sandbox::invalid_operation;

/// Python's `str` of a value.
pub(in crate::chat) fn python_str(state: &State, value: &Value) -> Result<String, Error> {
    let mut text = String::new();
    match value.as_str() {
        Some(plain) => text.push_str(plain),
        None if value.is_undefined() => {}
        None => write_repr(&mut FueledString { text: &mut text, paid: 0 }, state, value, 0)?,
    }
    Ok(text)
}

/// A string whose growth consumes fuel.
pub(super) struct FueledString<'a> {
    pub(super) text: &'a mut String,
    /// Bytes for which fuel has been consumed.
    pub(super) paid: usize,
}

impl FueledString<'_> {
    pub(super) fn pay(&mut self, state: &State) -> Result<(), Error> {
        let grown = self.text.len() - self.paid;
        self.paid = self.text.len();
        state.consume_fuel(1 + (grown / BYTES_PER_STEP) as u64)
    }

    pub(super) fn push(&mut self, text: &str) {
        self.text.push_str(text);
    }
}

/// Python's `repr` of a value.
fn write_repr(out: &mut FueledString<'_>, state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(invalid_operation(format!("nested values exceed the limit of {MAX_DEPTH} levels")));
    }
    let items = |out: &mut FueledString<'_>, ends: [&str; 2]| -> Result<(), Error> {
        out.push(ends[0]);
        for (index, item) in value.try_iter()?.enumerate() {
            if index > 0 {
                out.push(", ");
            }
            write_repr(out, state, &item, depth + 1)?;
        }
        out.push(ends[1]);
        Ok(())
    };
    match value.kind() {
        ValueKind::String => write_quoted(out.text, value.as_str().unwrap_or_default()),
        ValueKind::Number => write_number(out.text, value, ["nan", "inf", "-inf"]),
        ValueKind::Undefined => out.push("Undefined"),
        ValueKind::Seq => match value.downcast_object_ref::<Tuple>() {
            Some(_) if value.len() == Some(1) => items(out, ["(", ",)"])?,
            Some(_) => items(out, ["(", ")"])?,
            None => items(out, ["[", "]"])?,
        },
        ValueKind::Iterable => items(out, ["[", "]"])?,
        ValueKind::Map if is_a_dict(value) => {
            out.push("{");
            for (index, key) in value.try_iter()?.enumerate() {
                if index > 0 {
                    out.push(", ");
                }
                write_repr(out, state, &key, depth + 1)?;
                out.push(": ");
                write_repr(out, state, &value.get_item(&key)?, depth + 1)?;
            }
            out.push("}");
        }
        // `True`, `False`, `None`, and objects of the engine.
        _ => {
            let _ = write!(out.text, "{value}");
        }
    }
    out.pay(state)
}

/// Whether a map is a dict in Python. Namespaces, loops and macros are not, although they are maps to the engine.
pub(super) fn is_a_dict(value: &Value) -> bool {
    let name = value.as_object().map(|object| object.type_name()).unwrap_or_default();
    !["Namespace", "Loop", "Macro"].iter().any(|kind| name.contains(kind))
}

/// Writes a number as Python does: the shortest digits that parse to the same float, with an exponent below 1e-4 and from
/// 1e16 upward (`1e-05`, `1e+16`).
pub(super) fn write_number(out: &mut String, value: &Value, [nan, inf, minus_inf]: [&str; 3]) {
    if value.is_integer() {
        let _ = write!(out, "{value}");
        return;
    }
    let number = f64::try_from(value.clone()).unwrap_or(f64::NAN);
    if number.is_nan() {
        out.push_str(nan);
    } else if number.is_infinite() {
        out.push_str(if number > 0.0 { inf } else { minus_inf });
    } else {
        write_float(out, number);
    }
}

fn write_float(out: &mut String, number: f64) {
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            let _ = write!(out, "{digits}e{sign}{:02}", exponent.abs());
        }
        _ => {
            let _ = write!(out, "{number}");
            if number.fract() == 0.0 {
                out.push_str(".0");
            }
        }
    }
}

/// Writes Python's `repr` of a string: in single quotes, unless it contains these and no double ones.
fn write_quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => {
                if character == quote {
                    out.push('\\');
                }
                out.push(character);
            }
            _ if character >= FIRST_PRIVATE || is_printable(character) => out.push(character),
            '\0'..='\u{ff}' => {
                let _ = write!(out, "\\x{:02x}", u32::from(character));
            }
            '\u{100}'..='\u{ffff}' => {
                let _ = write!(out, "\\u{:04x}", u32::from(character));
            }
            _ => {
                let _ = write!(out, "\\U{:08x}", u32::from(character));
            }
        }
    }
    out.push(quote);
}

/// Python's `str.isprintable` for one character. Rust's `escape_debug` is based on the same Unicode categories.
fn is_printable(character: char) -> bool {
    // The character is the second of a string, because `escape_debug` also escapes a combining character at the start.
    let mut pair = String::from("a");
    pair.push(character);
    pair.escape_debug().nth(1).is_none_or(|escaped| escaped != '\\')
}

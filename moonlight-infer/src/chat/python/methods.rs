//! Python's methods of strings, lists and maps.

use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, State};

use super::filters::dict;
use super::repr::is_a_dict;
use super::{BYTES_PER_STEP, check_iterable, is_space};
use crate::chat::sandbox::invalid_operation;

/// Calls a method; `None` if it is not implemented here, so that the caller tries minijinja's `pycompat`.
pub(in crate::chat) fn method(
    state: &State,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Option<Value>, Error> {
    match (value.as_str(), value.kind()) {
        (Some(text), _) => str_method(state, text, name, arguments),
        (None, ValueKind::Seq | ValueKind::Iterable) => list_method(state, value, name, arguments),
        (None, ValueKind::Map) => map_method(state, value, name, arguments),
        _ => Ok(None),
    }
}

fn map_method(state: &State, value: &Value, name: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    match name {
        "copy" if arguments.is_empty() && is_a_dict(value) => {
            dict(state, Some(value.clone()), Kwargs::from_iter([] as [(&str, Value); 0])).map(Some)
        }
        "pop" | "update" | "setdefault" | "clear" | "popitem" => {
            Err(invalid_operation(format!("`{name}` modifies a map, which is not supported")))
        }
        _ => Ok(None),
    }
}

fn list_method(state: &State, value: &Value, name: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    Ok(match name {
        "index" => {
            let (needle,): (&Value,) = from_args(arguments)?;
            for (index, item) in value.try_iter()?.enumerate() {
                state.consume_fuel(1)?;
                if item == *needle {
                    return Ok(Some(Value::from(index)));
                }
            }
            return Err(invalid_operation("`index` does not find the value in the list"));
        }
        "copy" if arguments.is_empty() => {
            let mut items = Vec::new();
            for item in value.try_iter()? {
                state.consume_fuel(1)?;
                items.push(item);
            }
            Some(Value::from(items))
        }
        "append" | "extend" | "insert" | "pop" | "remove" | "reverse" | "sort" | "clear" => {
            return Err(invalid_operation(format!("`{name}` modifies a list, which is not supported")));
        }
        _ => None,
    })
}

/// The line breaks of Python's `str.splitlines`.
pub(super) fn is_line_break(character: char) -> bool {
    matches!(character, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// Python's `str.splitlines`; `keep` is its `keepends`.
pub(super) fn split_lines(text: &str, keep: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some((at, first)) = rest.char_indices().find(|(_, character)| is_line_break(*character)) {
        let end = at + if rest[at..].starts_with("\r\n") { 2 } else { first.len_utf8() };
        lines.push(&rest[..if keep { end } else { at }]);
        rest = &rest[end..];
    }
    lines.extend((!rest.is_empty()).then_some(rest));
    lines
}

fn str_method(state: &State, text: &str, name: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    let pay = |bytes: usize| state.consume_fuel((bytes / BYTES_PER_STEP) as u64);
    // Reading costs a quarter of writing: a step for 64 bytes.
    pay(text.len() / 4)?;
    // 64 bytes for the value of each part, consumed before the list is allocated.
    let pay_for_parts = |parts: usize| pay(parts.saturating_mul(64));
    let list = |parts: Vec<&str>| Ok(Some(parts.into_iter().map(Value::from).collect()));
    Ok(Some(match name {
        "strip" | "lstrip" | "rstrip" => {
            let (set,): (Option<&str>,) = from_args(arguments)?;
            let set: Option<Vec<char>> = set.map(|set| set.chars().collect());
            // Each character of the text is compared with each of the set.
            pay(text.len().saturating_mul(set.as_ref().map_or(0, Vec::len)))?;
            let strips = |character: char| set.as_ref().map_or(is_space(character), |set| set.contains(&character));
            Value::from(match name {
                "strip" => text.trim_matches(strips),
                "lstrip" => text.trim_start_matches(strips),
                _ => text.trim_end_matches(strips),
            })
        }
        "split" | "rsplit" => {
            let (positional, named): (&[Value], Kwargs) = from_args(arguments)?;
            let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
                let value = match positional.get(index) {
                    Some(value) => Some(value.clone()),
                    None => named.get::<Option<Value>>(name)?,
                };
                Ok(value.filter(|value| !value.is_none()))
            };
            let separator = argument(0, "sep")?;
            let max_split = argument(1, "maxsplit")?.map(i64::try_from).transpose()?.unwrap_or(-1);
            named.assert_all_used()?;
            let max_parts = usize::try_from(max_split).map_or(usize::MAX, |splits| splits.saturating_add(1));
            return match separator {
                None => {
                    pay_for_parts(text.chars().filter(|&character| is_space(character)).count().min(max_parts))?;
                    list(split_at_spaces(text, max_parts, name == "rsplit"))
                }
                Some(separator) => match separator.as_str() {
                    None => Err(invalid_operation(format!("`{name}` takes a string"))),
                    Some("") => Err(invalid_operation(format!("`{name}` does not take an empty separator"))),
                    Some(separator) if name == "split" => {
                        pay_for_parts(text.matches(separator).count().min(max_parts))?;
                        list(text.splitn(max_parts, separator).collect())
                    }
                    Some(separator) => {
                        pay_for_parts(text.matches(separator).count().min(max_parts))?;
                        let mut parts: Vec<&str> = text.rsplitn(max_parts, separator).collect();
                        parts.reverse();
                        list(parts)
                    }
                },
            };
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            if separator.is_empty() {
                return Err(invalid_operation(format!("`{name}` does not take an empty separator")));
            }
            let parts = match (name, text.split_once(separator), text.rsplit_once(separator)) {
                ("partition", Some((before, after)), _) | ("rpartition", _, Some((before, after))) => {
                    [before, separator, after]
                }
                ("partition", ..) => [text, "", ""],
                _ => ["", "", text],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "splitlines" => {
            let (positional, named): (&[Value], Kwargs) = from_args(arguments)?;
            let keep = match positional.first() {
                Some(keep) => keep.is_true(),
                None => named.get::<Option<bool>>("keepends")?.unwrap_or(false),
            };
            pay_for_parts(text.chars().filter(|&character| is_line_break(character)).count())?;
            return list(split_lines(text, keep));
        }
        "startswith" | "endswith" => {
            let (needle, start, end): (&Value, Option<i64>, Option<i64>) = from_args(arguments)?;
            let Some(part) = slice_characters(text, start, end) else {
                return Ok(Some(Value::from(false)));
            };
            let fits = |needle: &Value| match needle.as_str() {
                Some(needle) if name == "startswith" => Ok(part.starts_with(needle)),
                Some(needle) => Ok(part.ends_with(needle)),
                None => Err(invalid_operation(format!("`{name}` takes a string or a tuple of strings"))),
            };
            if needle.downcast_object_ref::<Tuple>().is_some() {
                let mut any = false;
                for needle in needle.try_iter()? {
                    any |= fits(&needle)?;
                }
                Value::from(any)
            } else {
                Value::from(fits(needle)?)
            }
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let (needle, start, end): (&str, Option<i64>, Option<i64>) = from_args(arguments)?;
            let part = slice_characters(text, start, end);
            if name == "count" {
                return Ok(Some(Value::from(part.map_or(0, |part| match needle {
                    "" => part.chars().count() + 1,
                    needle => part.matches(needle).count(),
                }))));
            }
            let found = part.and_then(|part| {
                let at = if name.starts_with('r') { part.rfind(needle) } else { part.find(needle) }?;
                // Python counts from the start of the text, also with a `start`.
                let before = part.as_ptr() as usize - text.as_ptr() as usize;
                Some(text[..before + at].chars().count())
            });
            match found {
                Some(at) => Value::from(at),
                None if name.ends_with("index") => {
                    return Err(invalid_operation(format!("`{name}` does not find the string")));
                }
                None => Value::from(-1),
            }
        }
        "title" => {
            let () = from_args(arguments)?;
            let mut inside = false;
            let mut title = String::with_capacity(text.len());
            for character in text.chars() {
                if inside {
                    title.extend(character.to_lowercase());
                } else {
                    title.extend(character.to_uppercase());
                }
                inside = character.is_alphabetic();
            }
            Value::from(title)
        }
        "swapcase" => {
            let () = from_args(arguments)?;
            let mut swapped = String::with_capacity(text.len());
            for character in text.chars() {
                match character.is_uppercase() {
                    true => swapped.extend(character.to_lowercase()),
                    false => swapped.extend(character.to_uppercase()),
                }
            }
            Value::from(swapped)
        }
        "casefold" => return Err(invalid_operation("`casefold` is not supported; `lower` is")),
        "removeprefix" | "removesuffix" => {
            let (needle,): (&str,) = from_args(arguments)?;
            let rest = if name == "removeprefix" { text.strip_prefix(needle) } else { text.strip_suffix(needle) };
            Value::from(rest.unwrap_or(text))
        }
        "zfill" | "ljust" | "rjust" | "center" => {
            let (width, fill): (i64, Option<&str>) = from_args(arguments)?;
            let length = text.chars().count();
            let missing = usize::try_from(width).unwrap_or(0).saturating_sub(length);
            let fill = if name == "zfill" { "0" } else { fill.unwrap_or(" ") };
            if fill.chars().count() != 1 {
                return Err(invalid_operation(format!("`{name}` takes a fill of one character")));
            }
            pay(missing.saturating_mul(fill.len()))?;
            let left = match name {
                "ljust" => 0,
                // As in CPython: if the number of fill characters is odd, the extra one is on the left for an odd width.
                "center" => missing / 2 + (missing & usize::try_from(width).unwrap_or(0) & 1),
                _ => missing,
            };
            let sign = if name == "zfill" && text.starts_with(['-', '+']) { &text[..1] } else { "" };
            let (before, after) = (fill.repeat(left), fill.repeat(missing - left));
            Value::from(format!("{sign}{before}{}{after}", &text[sign.len()..]))
        }
        "isspace" => {
            let () = from_args(arguments)?;
            Value::from(!text.is_empty() && text.chars().all(is_space))
        }
        "isdigit" | "isdecimal" => {
            let () = from_args(arguments)?;
            let is_digit = |character: char| match character {
                '\0'..='\x7f' => Some(character.is_ascii_digit()),
                // Superscripts and subscripts are digits, but not decimals.
                '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉' => Some(name == "isdigit"),
                _ if !character.is_numeric() => Some(false),
                _ => None,
            };
            let mut all = !text.is_empty();
            for character in text.chars() {
                match is_digit(character) {
                    Some(digit) => all &= digit,
                    // The standard library has no tables that distinguish digits of other scripts from fractions.
                    None => return Err(invalid_operation(format!("`{name}` does not support `{character}`"))),
                }
            }
            Value::from(all)
        }
        "join" => {
            let (items,): (Value,) = from_args(arguments)?;
            let mut whole = String::new();
            for (index, item) in check_iterable(state, items)?.try_iter()?.enumerate() {
                let Some(item) = item.as_str() else { return Err(invalid_operation("`join` takes strings")) };
                state.consume_fuel(1 + ((text.len() + item.len()) / BYTES_PER_STEP) as u64)?;
                if index > 0 {
                    whole.push_str(text);
                }
                whole.push_str(item);
            }
            Value::from(whole)
        }
        _ => return Ok(None),
    }))
}

/// Python's `str.split` and `str.rsplit` without a separator.
fn split_at_spaces(text: &str, max_parts: usize, from_end: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = if from_end { text.trim_end_matches(is_space) } else { text.trim_start_matches(is_space) };
    while !rest.is_empty() {
        if parts.len() + 1 >= max_parts {
            parts.push(if from_end { rest.trim_end_matches(is_space) } else { rest });
            break;
        }
        if from_end {
            let start = rest.char_indices().rev().find(|(_, character)| is_space(*character));
            let start = start.map_or(0, |(at, character)| at + character.len_utf8());
            parts.push(&rest[start..]);
            rest = rest[..start].trim_end_matches(is_space);
        } else {
            let end = rest.find(is_space).unwrap_or(rest.len());
            parts.push(&rest[..end]);
            rest = rest[end..].trim_start_matches(is_space);
        }
    }
    if from_end {
        parts.reverse();
    }
    parts
}

/// `text[start:end]` in characters; `None` if the start is after the end of the text or of the slice, where Python does not
/// find even an empty string.
fn slice_characters(text: &str, start: Option<i64>, end: Option<i64>) -> Option<&str> {
    if start.is_none() && end.is_none() {
        return Some(text);
    }
    let length = text.chars().count() as i64;
    // A negative index counts from the end.
    let clamp = |index: i64| if index < 0 { (length + index).max(0) } else { index.min(length) };
    let (first, last) = (clamp(start.unwrap_or(0)), clamp(end.unwrap_or(length)));
    if start.unwrap_or(0) > length || first > last {
        return None;
    }
    let byte = |index: i64| text.char_indices().nth(index as usize).map_or(text.len(), |(at, _)| at);
    Some(&text[byte(first)..byte(last)])
}

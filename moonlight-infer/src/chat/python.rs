//! What templates compute, as Python computes it: Jinja's templates are written for Python, and print its values.
//!
//! transformers renders templates with `ImmutableSandboxedEnvironment`, and with a `tojson` of its own that is
//! `json.dumps`. minijinja comes near to it; what differs is replaced here: how values are written ([`write_str`]),
//! `tojson` ([`dumps`]), tests, filters, `dict`, and the methods of texts, lists and maps ([`method`]). What Python
//! refuses is refused where that can be seen, rather than rendered as another text.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, Output, State};

use super::sandbox::refused_value;

/// Values in values, as deep as they are written.
const MAX_DEPTH: usize = 200;
/// Characters of the planes for private use stand for special tokens that people spelled, or mark places. They are never
/// escaped: see `encoder.rs`.
const FIRST_PRIVATE: char = '\u{10_0000}';
/// Characters by which JSON is indented, at most: they come before each value, once for each that it is in.
const MAX_INDENT: i64 = 100;
/// Bytes that are written for one step.
const BYTES_PER_STEP: usize = 16;

/// Puts into an environment what Python has otherwise than the engine.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_formatter(|output: &mut Output, state: &mut State, value: &Value| {
        // Most of what is written is text.
        match value.as_str() {
            Some(text) if !matches!(state.auto_escape(), minijinja::AutoEscape::Html) => Ok(output.write_str(text)?),
            Some(_) => minijinja::escape_formatter(output, state, value),
            None => Ok(output.write_str(&str_of(state, value)?)?),
        }
    });
    // Of minijinja alone: Jinja knows none of them, and a template that names them is not one for transformers.
    for filter in ["bool", "split", "lines", "attr"] {
        environment.remove_filter(filter);
    }
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |state: &State, value: Value| -> Result<Value, Error> {
        if value.as_str().is_some() { Ok(value) } else { str_of(state, &value).map(Value::from) }
    });
    environment.add_filter("join", join);
    environment.add_filter("indent", indent);
    environment.add_filter("trim", |state: &State, value: Value, set: Option<&str>| -> Result<Value, Error> {
        let text = str_of(state, &value)?;
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
            let text = str_of(state, &value)?;
            let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            Ok(escaped.replace('\'', "&#39;").replace('"', "&#34;"))
        });
    }
    environment.add_test("iterable", |value: &Value| {
        use ValueKind::{Iterable, Map, Seq, String, Undefined};
        matches!(value.kind(), Undefined | String | Seq | Iterable | Map)
    });
    environment.add_test("sequence", |value: &Value| {
        // Whatever has a length and items by number or key; Python's texts, dicts and undefined values do.
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

/// A list that the engine makes as it is asked for: a slice, or the sum of two.
fn is_a_list(value: &Value) -> bool {
    // What else is made as it is asked for (`items()`, `range`) has no items by number that can be told from these.
    value.kind() == ValueKind::Iterable && value.len().is_some() && value.get_item(&Value::from(0)).is_ok()
}

/// What Python's `str` makes of a value.
pub(super) fn str_of(state: &State, value: &Value) -> Result<String, Error> {
    let mut text = String::new();
    match value.as_str() {
        Some(plain) => text.push_str(plain),
        None if value.is_undefined() => {}
        None => write_repr(&mut FueledString { text: &mut text, paid: 0 }, state, value, 0)?,
    }
    Ok(text)
}

/// A text that is paid for as it grows.
struct FueledString<'a> {
    text: &'a mut String,
    paid: usize,
}

impl FueledString<'_> {
    fn pay(&mut self, state: &State) -> Result<(), Error> {
        let grown = self.text.len() - self.paid;
        self.paid = self.text.len();
        state.consume_fuel(1 + (grown / BYTES_PER_STEP) as u64)
    }

    fn push(&mut self, text: &str) {
        self.text.push_str(text);
    }
}

/// What Python's `repr` makes of a value.
fn write_repr(out: &mut FueledString<'_>, state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(refused_value(format!("a value exceeds the limit of {MAX_DEPTH} in each other")));
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
        // `True`, `None`, and objects of the engine.
        _ => {
            let _ = write!(out.text, "{value}");
        }
    }
    out.pay(state)
}

/// Namespaces, loops and macros are no dicts, though the engine gives their parts by name.
fn is_a_dict(value: &Value) -> bool {
    let name = value.as_object().map(|object| object.type_name()).unwrap_or_default();
    !["Namespace", "Loop", "Macro"].iter().any(|kind| name.contains(kind))
}

/// A number as Python writes it: of the shortest digits, `1e-05` and `1e+16` where the point would be far.
fn write_number(out: &mut String, value: &Value, [nan, inf, minus_inf]: [&str; 3]) {
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

/// A text in quotes, as Python's `repr` writes it.
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

/// Whether Python's `str.isprintable` holds: the standard library's table is made of the same categories.
fn is_printable(character: char) -> bool {
    // The first character of a text is escaped where it would combine with what stands before it; the second is not.
    let mut pair = String::from("a");
    pair.push(character);
    pair.escape_debug().nth(1).is_none_or(|escaped| escaped != '\\')
}

/// Arguments by place or by name, as `names` has them in order; none that is left over.
fn bind_arguments<const N: usize>(
    arguments: Rest<ValueOrKwargs>,
    names: [&'static str; N],
) -> Result<[Option<Value>; N], Error> {
    let arguments = arguments.into_values();
    let (positional, named): (&[Value], Kwargs) = from_args(&arguments)?;
    if positional.len() > N {
        return Err(refused_value(format!("too many arguments: {} for {N}", positional.len())));
    }
    let mut bind_arguments = [const { None }; N];
    for (index, (place, name)) in bind_arguments.iter_mut().zip(names).enumerate() {
        *place = match (positional.get(index), named.get::<Option<Value>>(name)?) {
            (Some(_), Some(_)) => return Err(refused_value(format!("`{name}` is given twice"))),
            (Some(value), None) => Some(value.clone()),
            (None, value) => value,
        };
    }
    named.assert_all_used()?;
    Ok(bind_arguments)
}

fn is_true(setting: &Option<Value>) -> bool {
    setting.as_ref().is_some_and(Value::is_true)
}

/// `json.dumps` as transformers offers it to templates.
fn tojson(state: &State, value: Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let settings = bind_arguments(arguments, ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let [ascii, indent, separators, sorted] = settings;
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(i64::try_from(indent)?.clamp(0, MAX_INDENT + 1) as usize),
        }),
    };
    if indent.as_ref().is_some_and(|indent| indent.len() > MAX_INDENT as usize) {
        return Err(refused_value(format!("`indent` of `tojson` exceeds the limit of {MAX_INDENT}")));
    }
    let [mut between, mut after_key] = if indent.is_some() { [",", ": "] } else { [", ", ": "] }.map(String::from);
    if let Some(separators) = separators.filter(|separators| !separators.is_none()) {
        let texts: Vec<Value> = separators.try_iter()?.collect();
        let [Some(first), Some(second)] = [0, 1].map(|index| texts.get(index).and_then(Value::as_str)) else {
            return Err(refused_value("`separators` of `tojson` are two texts"));
        };
        [between, after_key] = [first.to_owned(), second.to_owned()];
    }
    let style = Style { ascii: is_true(&ascii), indent, between, after_key, sorted: is_true(&sorted) };
    let mut text = String::new();
    dumps(&mut FueledString { text: &mut text, paid: 0 }, state, &value, &style, 0)?;
    Ok(Value::from(text))
}

/// How JSON is written.
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
        return Err(refused_value(format!("a value exceeds the limit of {MAX_DEPTH} in each other")));
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
        kind => return Err(refused_value(format!("`tojson` takes no value of the kind `{kind}`"))),
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
        kind => return Err(refused_value(format!("`tojson` takes no key of the kind `{kind}`"))),
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

/// Jinja's `join`: of values as they are written, perhaps of an attribute of each.
fn join(state: &State, values: Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let [separator, attribute] = bind_arguments(arguments, ["d", "attribute"])?;
    let separator = separator.map(|separator| str_of(state, &separator)).transpose()?.unwrap_or_default();
    let mut text = String::new();
    if values.is_undefined() {
        return Ok(Value::from(text));
    }
    for (index, item) in check_iterable(state, values)?.try_iter()?.enumerate() {
        let item = match &attribute {
            Some(attribute) => attribute_path(&item, attribute)?,
            None => item,
        };
        let item = str_of(state, &item)?;
        state.consume_fuel(1 + ((separator.len() + item.len()) / BYTES_PER_STEP) as u64)?;
        if index > 0 {
            text.push_str(&separator);
        }
        text.push_str(&item);
    }
    Ok(Value::from(text))
}

/// `a.0.b` of a value.
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

/// Jinja's `indent`: by so many spaces or by a text, of all lines but the first and those without anything in them.
fn indent(state: &State, text: Value, arguments: Rest<ValueOrKwargs>) -> Result<String, Error> {
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
    let text = str_of(state, &text)? + "\n";
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

/// What a loop goes over: Python refuses `none` and numbers, and takes an undefined value for nothing.
pub(super) fn check_iterable(state: &State, value: Value) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        // The engine does not know how many characters there are, and so no last one.
        state.consume_fuel(text.len() as u64 / 2)?;
        return Ok(text.chars().map(Value::from).collect());
    }
    match value.kind() {
        ValueKind::None => Err(refused_value("`none` is not iterable")),
        ValueKind::Number | ValueKind::Bool => Err(refused_value(format!("a {} is not iterable", value.kind()))),
        _ => Ok(value),
    }
}

/// Jinja's `int`: what Python's `int` reads, the integer part of what `float` reads, or a default.
fn int(value: Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
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
        let read = read.filter(|_| digits.starts_with(|first: char| first.is_ascii_alphanumeric()));
        return Ok(match (read, text.parse::<f64>()) {
            (Some(number), _) => Value::from(if negative { -number } else { number }),
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

/// Jinja's `float`.
fn float(value: Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
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

/// Jinja's `default`: for what is undefined, or with `boolean` for what is not true.
fn default(value: Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let [default, boolean] = bind_arguments(arguments, ["default_value", "boolean"])?;
    let wanted = value.is_undefined() || (is_true(&boolean) && !value.is_true());
    Ok(if wanted { default.unwrap_or_else(|| Value::from("")) } else { value })
}

/// Python's `dict`: of another, of pairs, and of named values.
fn dict(state: &State, first: Option<Value>, named: Kwargs) -> Result<Value, Error> {
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
                let [key, value] = <[Value; 2]>::try_from(pair).map_err(|_| refused_value("`dict` takes pairs"))?;
                entries.push((key, value));
            }
        }
    }
    for name in named.args() {
        entries.push((Value::from(name), named.get::<Value>(name)?));
    }
    // Of entries with the same key the last is kept, where the first was: as in Python.
    Ok(Value::from_pairs(entries))
}

/// Python's methods; `None` for one that the engine's own table has, or nobody.
pub(super) fn method(state: &State, value: &Value, name: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    match (value.as_str(), value.kind()) {
        (Some(text), _) => method_of_text(state, text, name, arguments),
        (None, ValueKind::Seq | ValueKind::Iterable) => method_of_list(state, value, name, arguments),
        (None, ValueKind::Map) => method_of_map(state, value, name, arguments),
        _ => Ok(None),
    }
}

fn method_of_map(state: &State, value: &Value, name: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    match name {
        "copy" if arguments.is_empty() && is_a_dict(value) => {
            dict(state, Some(value.clone()), Kwargs::from_iter([] as [(&str, Value); 0])).map(Some)
        }
        "pop" | "update" | "setdefault" | "clear" | "popitem" => Err(refused_value(format!("`{name}` would change a map"))),
        _ => Ok(None),
    }
}

fn method_of_list(state: &State, value: &Value, name: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    Ok(match name {
        "index" => {
            let (wanted,): (&Value,) = from_args(arguments)?;
            for (index, item) in value.try_iter()?.enumerate() {
                state.consume_fuel(1)?;
                if item == *wanted {
                    return Ok(Some(Value::from(index)));
                }
            }
            return Err(refused_value("`index` finds nothing in the list"));
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
            return Err(refused_value(format!("`{name}` would change a list")));
        }
        _ => None,
    })
}

/// Python's `str.isspace`.
fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

/// Where Python's `str.splitlines` breaks.
fn is_line_break(character: char) -> bool {
    matches!(character, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// Python's `str.splitlines`, with what breaks the lines or without it.
fn split_lines(text: &str, keep: bool) -> Vec<&str> {
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

fn method_of_text(state: &State, text: &str, name: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    let pay = |bytes: usize| state.consume_fuel((bytes / BYTES_PER_STEP) as u64);
    pay(text.len() / 4)?;
    // Paid for before there are any.
    let room = |parts: usize| pay(parts.saturating_mul(64));
    let list = |parts: Vec<&str>| Ok(Some(parts.into_iter().map(Value::from).collect()));
    Ok(Some(match name {
        "strip" | "lstrip" | "rstrip" => {
            let (set,): (Option<&str>,) = from_args(arguments)?;
            let set: Option<Vec<char>> = set.map(|set| set.chars().collect());
            // Each character of the one is looked for among those of the other.
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
                let given = match positional.get(index) {
                    Some(value) => Some(value.clone()),
                    None => named.get::<Option<Value>>(name)?,
                };
                Ok(given.filter(|value| !value.is_none()))
            };
            let separator = argument(0, "sep")?;
            let most = argument(1, "maxsplit")?.map(i64::try_from).transpose()?.unwrap_or(-1);
            named.assert_all_used()?;
            let most = usize::try_from(most).map_or(usize::MAX, |most| most.saturating_add(1));
            return match separator {
                None => {
                    room(text.chars().filter(|&character| is_space(character)).count().min(most))?;
                    list(split_at_spaces(text, most, name == "rsplit"))
                }
                Some(separator) => match separator.as_str() {
                    None => Err(refused_value(format!("`{name}` takes a text"))),
                    Some("") => Err(refused_value(format!("`{name}` takes no empty separator"))),
                    Some(separator) if name == "split" => {
                        room(text.matches(separator).count().min(most))?;
                        list(text.splitn(most, separator).collect())
                    }
                    Some(separator) => {
                        room(text.matches(separator).count().min(most))?;
                        let mut parts: Vec<&str> = text.rsplitn(most, separator).collect();
                        parts.reverse();
                        list(parts)
                    }
                },
            };
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            if separator.is_empty() {
                return Err(refused_value(format!("`{name}` takes no empty separator")));
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
            room(text.chars().filter(|&character| is_line_break(character)).count())?;
            return list(split_lines(text, keep));
        }
        "startswith" | "endswith" => {
            let (wanted, start, end): (&Value, Option<i64>, Option<i64>) = from_args(arguments)?;
            let Some(slice_characters) = slice_characters(text, start, end) else { return Ok(Some(Value::from(false))) };
            let fits = |wanted: &Value| match wanted.as_str() {
                Some(wanted) if name == "startswith" => Ok(slice_characters.starts_with(wanted)),
                Some(wanted) => Ok(slice_characters.ends_with(wanted)),
                None => Err(refused_value(format!("`{name}` takes a text or a tuple of texts"))),
            };
            if wanted.downcast_object_ref::<Tuple>().is_some() {
                let mut any = false;
                for wanted in wanted.try_iter()? {
                    any |= fits(&wanted)?;
                }
                Value::from(any)
            } else {
                Value::from(fits(wanted)?)
            }
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let (wanted, start, end): (&str, Option<i64>, Option<i64>) = from_args(arguments)?;
            let slice_characters = slice_characters(text, start, end);
            if name == "count" {
                return Ok(Some(Value::from(slice_characters.map_or(0, |slice_characters| match wanted {
                    "" => slice_characters.chars().count() + 1,
                    wanted => slice_characters.matches(wanted).count(),
                }))));
            }
            let found = slice_characters.and_then(|slice_characters| {
                let at = if name.starts_with('r') { slice_characters.rfind(wanted) } else { slice_characters.find(wanted) }?;
                let before = slice_characters.as_ptr() as usize - text.as_ptr() as usize;
                Some(text[..before + at].chars().count())
            });
            match found {
                Some(at) => Value::from(at),
                None if name.ends_with("index") => return Err(refused_value(format!("`{name}` finds nothing in the text"))),
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
        "casefold" => return Err(refused_value("`casefold` is not known; `lower` is")),
        "removeprefix" | "removesuffix" => {
            let (wanted,): (&str,) = from_args(arguments)?;
            let rest = if name == "removeprefix" { text.strip_prefix(wanted) } else { text.strip_suffix(wanted) };
            Value::from(rest.unwrap_or(text))
        }
        "zfill" | "ljust" | "rjust" | "center" => {
            let (width, fill): (i64, Option<&str>) = from_args(arguments)?;
            let length = text.chars().count();
            let missing = usize::try_from(width).unwrap_or(0).saturating_sub(length);
            let fill = if name == "zfill" { "0" } else { fill.unwrap_or(" ") };
            if fill.chars().count() != 1 {
                return Err(refused_value(format!("`{name}` fills with one character")));
            }
            pay(missing.saturating_mul(fill.len()))?;
            let left = match name {
                "ljust" => 0,
                // As CPython has it: of an odd number the one more is on the left where the width is odd, too.
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
                // Superscripts are digits and no decimals.
                '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉' => Some(name == "isdigit"),
                _ if !character.is_numeric() => Some(false),
                _ => None,
            };
            let mut all = !text.is_empty();
            for character in text.chars() {
                match is_digit(character) {
                    Some(digit) => all &= digit,
                    // Fractions and digits of other scripts are told apart by tables that are not here.
                    None => return Err(refused_value(format!("`{name}` of `{character}` is not known"))),
                }
            }
            Value::from(all)
        }
        "join" => {
            let (items,): (Value,) = from_args(arguments)?;
            let mut whole = String::new();
            for (index, item) in check_iterable(state, items)?.try_iter()?.enumerate() {
                let Some(item) = item.as_str() else { return Err(refused_value("`join` takes texts")) };
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

fn split_at_spaces(text: &str, most: usize, from_end: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = if from_end { text.trim_end_matches(is_space) } else { text.trim_start_matches(is_space) };
    while !rest.is_empty() {
        if parts.len() + 1 >= most {
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

/// `text[start:end]` in characters; `None` where the start is behind the end of the text.
fn slice_characters(text: &str, start: Option<i64>, end: Option<i64>) -> Option<&str> {
    if start.is_none() && end.is_none() {
        return Some(text);
    }
    let length = text.chars().count() as i64;
    let at = |place: i64| if place < 0 { (length + place).max(0) } else { place.min(length) };
    let (from, out) = (at(start.unwrap_or(0)), at(end.unwrap_or(length)));
    if start.unwrap_or(0) > length || from > out {
        return None;
    }
    let byte = |place: i64| text.char_indices().nth(place as usize).map_or(text.len(), |(at, _)| at);
    Some(&text[byte(from)..byte(out)])
}

//! Parses a record as Python's `json` does, which accepts more than standard JSON:
//!
//! * `NaN`, `Infinity` and `-Infinity` are values (see [`non_finite_to_json`]), and `1e400` is `Infinity`;
//! * integers have any number of digits (see [`large_integer_digits`]), and `-0` is 0;
//! * a lone surrogate, which is not a character, is read as U+FFFD and counted;
//! * if a key is repeated, the last value counts.
//!
//! Records are nested at most 127 levels deep, the limit of serde_json.

use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};

use moonlight_convert::Printable;

/// The limit of values in a record, because a value may take many times as many bytes in memory as in the file.
pub const MAX_VALUES: usize = 4 << 20;

/// The keys of the objects that represent a non-finite number, and an integer of more than 64 bits. U+FFFF is a noncharacter,
/// so no record has such a key.
const NON_FINITE_KEY: &str = "\u{FFFF}float";
const LARGE_INTEGER_KEY: &str = "\u{FFFF}integer";

/// Why a record cannot be parsed. Positions are lines and columns within the record, from 1; columns count characters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JsonError {
    /// Bytes that are not UTF-8.
    #[error("the record is not UTF-8: byte {byte} is invalid")]
    NotUtf8 {
        /// The first invalid byte, from 1.
        byte: usize,
        /// Its line and column.
        at: (usize, usize),
    },
    /// Text that is not JSON.
    #[error("the record is not JSON: {}", Printable(problem))]
    NotJson {
        /// The message of the parser.
        problem: String,
        /// Its line and column.
        at: (usize, usize),
    },
    /// JSON without the expected fields.
    #[error("{}", Printable(problem))]
    Shape {
        /// The sentence.
        problem: String,
        /// The line and column, if they are known.
        at: Option<(usize, usize)>,
    },
    /// More values than [`MAX_VALUES`].
    #[error("the record has more than {MAX_VALUES} values")]
    TooManyValues,
}

impl JsonError {
    /// The line and the column within the record, if they are known.
    pub fn at(&self) -> Option<(usize, usize)> {
        match self {
            Self::NotUtf8 { at, .. } | Self::NotJson { at, .. } => Some(*at),
            Self::Shape { at, .. } => *at,
            Self::TooManyValues => None,
        }
    }

    /// Whether the bytes are not JSON. Then the end of the record may not be known either.
    pub fn is_no_json(&self) -> bool {
        matches!(self, Self::NotJson { .. } | Self::NotUtf8 { .. })
    }

    /// The message without its subject.
    pub fn problem(&self) -> String {
        match self {
            Self::NotJson { problem, .. } | Self::Shape { problem, .. } => problem.clone(),
            error => error.to_string(),
        }
    }

    /// What to do, if it is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotUtf8 { .. } => {
                Some("convert the file to UTF-8 (for example `iconv -f WINDOWS-1252 -t UTF-8`)".into())
            }
            _ => None,
        }
    }
}

/// A parsed record.
#[derive(Debug, Clone, PartialEq)]
pub struct ParsedJson {
    /// The value, with objects in place of non-finite numbers ([`non_finite_to_json`]) and large integers
    /// ([`large_integer_digits`]).
    pub value: Value,
    /// The number of lone surrogates that were read as U+FFFD.
    pub replaced: usize,
}

/// Parses a record.
///
/// # Errors
///
/// [`JsonError`].
pub fn parse(json: &[u8]) -> Result<ParsedJson, JsonError> {
    let standard = StandardJson::rewrite(json)?;
    if standard.values > MAX_VALUES {
        return Err(JsonError::TooManyValues);
    }
    let value = match standard.numbers.is_empty() {
        true => serde_json::from_str(standard.text()),
        false => {
            let mut deserializer = serde_json::Deserializer::from_str(standard.text());
            let read = serde::de::DeserializeSeed::deserialize(ValueSeed(&standard), &mut deserializer);
            read.and_then(|value| deserializer.end().map(|()| value))
        }
    };
    match value {
        Ok(value) => Ok(ParsedJson { value, replaced: standard.replaced }),
        Err(error) => Err(standard.error(&error)),
    }
}

/// The number of lone surrogates (`\ud83d` without its other half) in a record; each is read as U+FFFD.
pub fn lone_surrogates(json: &[u8]) -> usize {
    // Nearly all records have no such escape, and need not be parsed.
    match memchr::memmem::find(json, b"\\u") {
        None => 0,
        Some(_) => StandardJson::rewrite(json).map_or(0, |standard| standard.replaced),
    }
}

/// The JSON that represents `NaN`, `Infinity` or `-Infinity`, which standard JSON lacks: an object with a reserved key, so
/// that it is not mistaken for a string, a number or a list.
pub fn non_finite_to_json(number: f64) -> Value {
    let name = if number.is_nan() {
        "NaN"
    } else if number > 0.0 {
        "Infinity"
    } else {
        "-Infinity"
    };
    Value::Object(Map::from_iter([(NON_FINITE_KEY.to_owned(), name.into())]))
}

/// The inverse of [`non_finite_to_json`]; `None` for any other value.
pub fn non_finite_from_json(value: &Value) -> Option<f64> {
    let object = value.as_object().filter(|object| object.len() == 1)?;
    match object.get(NON_FINITE_KEY)?.as_str()? {
        "NaN" => Some(f64::NAN),
        "Infinity" => Some(f64::INFINITY),
        "-Infinity" => Some(f64::NEG_INFINITY),
        _ => None,
    }
}

/// The digits of an integer that does not fit into 64 bits, with its `-` if it is negative; `None` for any other value. Like a
/// non-finite number, such an integer is an object with a reserved key.
pub fn large_integer_digits(value: &Value) -> Option<&str> {
    let object = value.as_object().filter(|object| object.len() == 1)?;
    object.get(LARGE_INTEGER_KEY)?.as_str()
}

/// A record of `format = "tokens"`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokensRecord {
    /// The values of `tokens`, or of `input_ids` if the record has no `tokens`.
    pub tokens: Vec<u32>,
    /// The names of other fields, up to 16.
    pub unread: Vec<String>,
}

/// The limit of other fields that are listed in [`TokensRecord::unread`].
const MAX_UNREAD: usize = 16;
/// Fields that select which tokens are learned.
const LOSS_MASK_FIELDS: [&str; 6] =
    ["labels", "loss_mask", "weights", "completion_mask", "assistant_masks", "assistant_mask"];

/// Parses `{"tokens": [...]}` without building a JSON value, which would take many bytes for each token.
///
/// # Errors
///
/// [`JsonError`]. A field that selects which tokens are learned is an error, because all tokens are learned.
pub fn parse_tokens(json: &[u8]) -> Result<TokensRecord, JsonError> {
    let standard = StandardJson::rewrite(json)?;
    let fields: TokensFields = serde_json::from_str(standard.text()).map_err(|error| match error.classify() {
        serde_json::error::Category::Data => {
            JsonError::Shape { problem: without_place(&error), at: Some(standard.position(&error)) }
        }
        _ => standard.error(&error),
    })?;
    let shape = |problem: String| JsonError::Shape { problem, at: None };
    if fields.masks_tokens {
        return Err(shape(
            "the record has an `attention_mask` with a 0; with `format = \"tokens\"` every token is attended to and learned"
                .into(),
        ));
    }
    if let (Some(tokens), Some(ids)) = (&fields.tokens, &fields.input_ids)
        && tokens != ids
    {
        return Err(shape("the record has both `tokens` and `input_ids`, and they differ".into()));
    }
    if let Some(mask) = fields.others.iter().find(|name| LOSS_MASK_FIELDS.contains(&name.as_str())) {
        return Err(shape(format!(
            "the record has `{mask}`, which says what is learned; with `format = \"tokens\"` every token is learned"
        )));
    }
    match fields.tokens.or(fields.input_ids) {
        Some(tokens) => Ok(TokensRecord { tokens, unread: fields.others }),
        None => Err(shape("missing field `tokens`".into())),
    }
}

/// The fields of a record of tokens. `Deserialize` is not derived, because that would refuse a repeated key. Here the last
/// value counts, as in Python.
#[derive(Default)]
struct TokensFields {
    tokens: Option<Vec<u32>>,
    input_ids: Option<Vec<u32>>,
    /// Whether an attention mask has a 0.
    masks_tokens: bool,
    others: Vec<String>,
}

impl<'de> Deserialize<'de> for TokensFields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = TokensFields;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object with `tokens`")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TokensFields, A::Error> {
                let mut fields = TokensFields::default();
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "tokens" => fields.tokens = map.next_value()?,
                        "input_ids" => fields.input_ids = map.next_value()?,
                        _ => {
                            // Beyond the limit only the fields that are an error matter.
                            let is_kept = LOSS_MASK_FIELDS.contains(&key.as_str()) || fields.others.len() < MAX_UNREAD;
                            // A null counts as an absent field.
                            let absent = if key == "attention_mask" {
                                let mask = map.next_value::<Option<HasZero>>()?;
                                fields.masks_tokens = mask.as_ref().is_some_and(|mask| mask.0);
                                mask.is_none()
                            } else {
                                map.next_value::<Option<IgnoredAny>>()?.is_none()
                            };
                            if is_kept && !absent && !fields.others.contains(&key) {
                                fields.others.push(key);
                            }
                        }
                    }
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// Whether a number is 0, or any number in a list.
struct HasZero(bool);

impl<'de> Deserialize<'de> for HasZero {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Numbers;
        impl<'de> Visitor<'de> for Numbers {
            type Value = HasZero;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("a list of numbers")
            }

            fn visit_bool<E>(self, value: bool) -> Result<HasZero, E> {
                Ok(HasZero(!value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<HasZero, E> {
                Ok(HasZero(value == 0))
            }

            fn visit_u64<E>(self, value: u64) -> Result<HasZero, E> {
                Ok(HasZero(value == 0))
            }

            fn visit_f64<E>(self, value: f64) -> Result<HasZero, E> {
                Ok(HasZero(value == 0.0))
            }

            fn visit_unit<E>(self) -> Result<HasZero, E> {
                Ok(HasZero(false))
            }

            /// Called for a number that `StandardJson` replaced by a string of its length: `-0` is the empty string.
            fn visit_str<E>(self, text: &str) -> Result<HasZero, E> {
                Ok(HasZero(text.is_empty()))
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<HasZero, A::Error> {
                let mut found = false;
                while let Some(HasZero(is_zero)) = list.next_element()? {
                    found |= is_zero;
                }
                Ok(HasZero(found))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<HasZero, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(HasZero(false))
            }
        }
        deserializer.deserialize_any(Numbers)
    }
}

/// The message of the parser without its position, which is reported separately and relative to the file.
fn without_place(error: &serde_json::Error) -> String {
    let problem = error.to_string();
    problem.split(" at line ").next().unwrap_or_default().to_owned()
}

/// A record rewritten as standard JSON of the same length, so that positions remain valid.
struct StandardJson<'a> {
    text: std::borrow::Cow<'a, str>,
    /// The ranges of `NaN` and other numbers that serde_json does not read as Python does, with their values. In `text` they
    /// are strings of the same length.
    numbers: Vec<(Range<usize>, Value)>,
    /// The number of lone surrogates that were replaced.
    replaced: usize,
    /// A lower bound of the number of values.
    values: usize,
}

impl<'a> StandardJson<'a> {
    fn rewrite(json: &'a [u8]) -> Result<Self, JsonError> {
        let text = std::str::from_utf8(json).map_err(|error| JsonError::NotUtf8 {
            byte: error.valid_up_to() + 1,
            at: line_and_column(json, error.valid_up_to()),
        })?;
        let (mut numbers, mut lone, mut values) = (Vec::new(), Vec::new(), 0);
        let (mut at, mut quoted) = (0, false);
        while at < json.len() {
            match json[at] {
                b'"' => quoted = !quoted,
                b'\\' if quoted => match surrogate(&json[at..]) {
                    Some(0xD800..=0xDBFF) if matches!(surrogate(&json[at + 6..]), Some(0xDC00..=0xDFFF)) => at += 11, // a pair
                    Some(0xD800..=0xDFFF) => {
                        lone.push(at);
                        at += 5;
                    }
                    _ => at += 1,
                },
                b',' | b':' | b'[' | b'{' if !quoted => values += 1,
                b'N' | b'I' | b'-' | b'0'..=b'9' if !quoted => {
                    let (length, number) = number(&json[at..]);
                    numbers.extend(number.map(|number| (at..at + length, number)));
                    at += length - 1;
                }
                _ => {}
            }
            at += 1;
        }
        let replaced = lone.len();
        if numbers.is_empty() && lone.is_empty() {
            return Ok(Self { text: text.into(), numbers, replaced, values });
        }
        let mut bytes = json.to_owned();
        for at in lone {
            bytes[at..at + 6].copy_from_slice(b"\\ufffd");
        }
        for (range, _) in &numbers {
            bytes[range.clone()].fill(b'?');
            (bytes[range.start], bytes[range.end - 1]) = (b'"', b'"');
        }
        let text = String::from_utf8(bytes).map_err(|_| JsonError::NotUtf8 { byte: 1, at: (1, 1) })?;
        Ok(Self { text: text.into(), numbers, replaced, values })
    }

    fn text(&self) -> &str {
        &self.text
    }

    /// The number that a string in `text` replaces; `None` for an ordinary string. The parser must have borrowed the string
    /// from `text`.
    fn number(&self, text: &str) -> Option<Value> {
        // Looked up by address, because the record may contain an equal string. The range starts at the quotation mark.
        let at = (text.as_ptr() as usize).checked_sub(self.text.as_ptr() as usize)?.checked_sub(1)?;
        let index = self.numbers.binary_search_by_key(&at, |(range, _)| range.start).ok()?;
        Some(self.numbers[index].1.clone())
    }

    fn position(&self, error: &serde_json::Error) -> (usize, usize) {
        let line = self.text.split('\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
        // The parser's columns count bytes.
        let bytes = error.column().saturating_sub(1).min(line.len());
        (error.line().max(1), 1 + characters(&line.as_bytes()[..bytes]))
    }

    fn error(&self, error: &serde_json::Error) -> JsonError {
        JsonError::NotJson { problem: without_place(error), at: self.position(error) }
    }
}

fn characters(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count()
}

/// The line and column of a byte offset.
fn line_and_column(bytes: &[u8], at: usize) -> (usize, usize) {
    let before = &bytes[..at];
    let start = memchr::memrchr(b'\n', before).map_or(0, |line_break| line_break + 1);
    (1 + memchr::memchr_iter(b'\n', before).count(), 1 + characters(&before[start..]))
}

/// The UTF-16 code unit of an escape `\uXXXX` at the start of `bytes`.
fn surrogate(bytes: &[u8]) -> Option<u16> {
    let digits = bytes.strip_prefix(b"\\u")?.get(..4)?;
    let digits = std::str::from_utf8(digits).ok().filter(|digits| !digits.starts_with('+'))?;
    u16::from_str_radix(digits, 16).ok()
}

/// The length of a number, or of anything that starts like one, at the start of `bytes`. Also its value, if serde_json would
/// read the number differently from Python.
fn number(bytes: &[u8]) -> (usize, Option<Value>) {
    let known = [(&b"NaN"[..], f64::NAN), (b"Infinity", f64::INFINITY), (b"-Infinity", f64::NEG_INFINITY)];
    let ends = |length: usize| matches!(bytes[length..].trim_ascii_start().first(), None | Some(b',' | b'}' | b']'));
    if let Some((word, number)) = known.into_iter().find(|(word, _)| bytes.starts_with(word)) {
        return (word.len(), ends(word.len()).then(|| non_finite_to_json(number)));
    }
    let is_numeric = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E');
    let length = bytes.iter().position(|byte| !is_numeric(byte)).unwrap_or(bytes.len()).max(1);
    let text = std::str::from_utf8(&bytes[..length]).unwrap_or_default();
    let digits = text.strip_prefix('-').unwrap_or(text);
    let is_integer =
        digits.bytes().all(|digit| digit.is_ascii_digit()) && (digits.len() == 1 || !digits.starts_with('0'));
    // Anything that is not a number is left for the parser to refuse. Up to 18 digits always fit into 64 bits.
    let value = if text == "-0" {
        Some(0.into())
    } else if is_integer && digits.len() >= 19 && text.parse::<i64>().is_err() && text.parse::<u64>().is_err() {
        Some(Value::Object(Map::from_iter([(LARGE_INTEGER_KEY.to_owned(), text.into())])))
    } else if !is_integer && is_fraction(digits) {
        text.parse().ok().filter(|number: &f64| number.is_infinite()).map(non_finite_to_json)
    } else {
        None
    };
    (length, value.filter(|_| ends(length)))
}

/// Whether a text without sign is a number in JSON's grammar, with or without a fraction and an exponent.
fn is_fraction(text: &str) -> bool {
    let all = |digits: &str| !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
    let (number, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
    all(whole)
        && (whole.len() == 1 || !whole.starts_with('0'))
        && all(part)
        && all(exponent.strip_prefix(['+', '-']).unwrap_or(exponent))
}

/// Deserializes a value of [`StandardJson`], and restores the numbers that were replaced by strings.
#[derive(Clone, Copy)]
struct ValueSeed<'a>(&'a StandardJson<'a>);

impl<'de> serde::de::DeserializeSeed<'de> for ValueSeed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueSeed<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("any value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Value, E> {
        Ok(self.0.number(text).unwrap_or_else(|| text.into()))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = sequence.next_element_seed(self)? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            object.insert(key, map.next_value_seed(self)?);
        }
        Ok(object.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read(json: &str) -> Value {
        parse(json.as_bytes()).unwrap().value
    }

    fn error_of(json: &[u8]) -> (String, Option<(usize, usize)>) {
        let error = parse(json).unwrap_err();
        (error.to_string(), error.at())
    }

    /// The expected values are those of Python 3's `json.loads`, except that it keeps lone surrogates.
    #[test]
    fn json_is_read_as_python_reads_it() {
        assert_eq!(read(r#"{"a": 1, "b": 2, "a": 3}"#).to_string(), r#"{"a":3,"b":2}"#);
        assert_eq!(
            read(r#" {"a": [1.5, "x\"y\u00e4", null, true, -3]} "#),
            json!({"a": [1.5, "x\"yä", null, true, -3]})
        );
        assert_eq!(read(r#""\ud83d\ude00 \\ud83d""#), json!("😀 \\ud83d"));
    }

    #[test]
    fn non_finite_numbers_are_objects_with_a_reserved_key() {
        let value = read(r#"{"a": NaN, "b": [-Infinity, Infinity ], "c": "NaN", "d": "?", "e\n": "\"?\"", "f": 2}"#);
        assert!(non_finite_from_json(&value["a"]).unwrap().is_nan());
        assert_eq!(non_finite_from_json(&value["b"][0]), Some(f64::NEG_INFINITY));
        assert_eq!(non_finite_from_json(&value["b"][1]), Some(f64::INFINITY));
        assert_eq!((&value["c"], &value["d"], &value["e\n"]), (&json!("NaN"), &json!("?"), &json!("\"?\"")));
        assert!(value["a"].is_object() && non_finite_from_json(&value["c"]).is_none());
        for wrong in ["{NaN: 1}", "[NaNa]", "[nan]", "[+Infinity]", "[- Infinity]", "{\"a\": NaN \"b\"}", "[NaN] 1"] {
            assert!(parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    /// The expected values are those of Python 3.11's `json.loads`.
    #[test]
    fn integers_have_any_number_of_digits() {
        for digits in ["12345678901234567890123", "-9223372036854775809", "18446744073709551616", &"7".repeat(400)] {
            let value = read(&format!("{{\"a\":[{digits} , 1],\"b\":\"{digits}\"}}"));
            assert_eq!(large_integer_digits(&value["a"][0]), Some(digits));
            assert_eq!((&value["a"][1], &value["b"]), (&json!(1), &json!(digits)));
        }
        for digits in ["18446744073709551615", "-9223372036854775808", "9223372036854775807"] {
            assert_eq!(read(digits).to_string(), digits);
        }
        assert_eq!(read("[-0, -0.0, 0e5, -0]").to_string(), "[0,-0.0,0.0,0]");
        let infinite = format!("[1E400, -1e+999, 1.5, {}.0, 1e-999]", "9".repeat(400));
        let value = read(&infinite);
        assert_eq!(
            [0, 1, 3].map(|index| non_finite_from_json(&value[index])),
            [f64::INFINITY, f64::NEG_INFINITY, f64::INFINITY].map(Some)
        );
        assert_eq!((&value[2], &value[4]), (&json!(1.5), &json!(0.0)));
        for wrong in [
            "01e999",
            "[1e]",
            "-",
            "[--1]",
            "00000000000000000000000",
            "[1.e999]",
            "1 2",
            "[-01]",
            "[12345678901234567890123x]",
        ] {
            assert!(parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
        // An object of a record is not taken for a number.
        let object = json!({"$float": "NaN"});
        assert_eq!((read(&object.to_string()), non_finite_from_json(&object)), (object.clone(), None));
    }

    #[test]
    fn lone_surrogates_are_replaced_and_counted() {
        for (json, expected, count) in [
            (r#""cut \ud83d here""#, "cut \u{fffd} here", 1),
            (r#""\udc00\ud83d\ud83d\ude00\ud83d""#, "\u{fffd}\u{fffd}😀\u{fffd}", 3),
            (r#""\\\ud83d""#, "\\\u{fffd}", 1),
            (r#""\\ud83d""#, "\\ud83d", 0),
            (r#""\uD83D\n""#, "\u{fffd}\n", 1),
        ] {
            let parsed = parse(json.as_bytes()).unwrap();
            assert_eq!((parsed.value, parsed.replaced), (json!(expected), count), "{json}");
            assert_eq!(lone_surrogates(json.as_bytes()), count);
        }
    }

    #[test]
    fn errors_have_their_line_and_column() {
        assert_eq!(error_of(b"{"), ("the record is not JSON: EOF while parsing an object".into(), Some((1, 1))));
        assert_eq!(
            error_of("{\"ü\": \"é\" x".as_bytes()),
            ("the record is not JSON: expected `,` or `}`".into(), Some((1, 11)))
        );
        assert_eq!(error_of(b"{\n  \"a\": x}"), ("the record is not JSON: expected value".into(), Some((2, 8))));
        assert_eq!(error_of(b"{} {}"), ("the record is not JSON: trailing characters".into(), Some((1, 4))));
        assert_eq!(error_of(b"{\n\"\xff"), ("the record is not UTF-8: byte 4 is invalid".into(), Some((2, 2))));
        let deep = "[".repeat(1000) + &"]".repeat(1000);
        assert_eq!(error_of(deep.as_bytes()).0, "the record is not JSON: recursion limit exceeded");
        let deep = format!("[NaN,{deep}]");
        assert_eq!(error_of(deep.as_bytes()).0, "the record is not JSON: recursion limit exceeded");
        let many = format!("[{}1]", "1,".repeat(MAX_VALUES));
        assert_eq!(error_of(many.as_bytes()), (format!("the record has more than {MAX_VALUES} values"), None));
        let text = format!("[\"\\\"{}\"]", "1,".repeat(MAX_VALUES));
        assert!(parse(text.as_bytes()).is_ok());
    }

    #[test]
    fn tokens_are_read_from_either_field() {
        let read = |json: &str| parse_tokens(json.as_bytes()).map_err(|error| (error.to_string(), error.at()));
        let tokens = |tokens: &[u32], unread: &[&str]| {
            let unread = unread.iter().map(ToString::to_string).collect();
            Ok(TokensRecord { tokens: tokens.to_vec(), unread })
        };
        assert_eq!(
            read(r#"{"tokens": [1, 2], "id": NaN, "a": {"tokens": 3}, "labels": null}"#),
            tokens(&[1, 2], &["id", "a"])
        );
        assert_eq!(read(r#"{"input_ids": [3], "attention_mask": [1]}"#), tokens(&[3], &["attention_mask"]));
        assert_eq!(read(r#"{"tokens": [1], "tokens": [2]}"#), tokens(&[2], &[]));
        assert_eq!(read(r#"{"text": "x"}"#), Err(("missing field `tokens`".into(), None)));
        assert_eq!(read(r#"{"tokens": [1, -1]}"#).unwrap_err().0, "invalid value: integer `-1`, expected u32");
        assert!(read(r#"{"tokens": [1, NaN]}"#).is_err() && read(r#"{"tokens": NaN}"#).is_err());
        assert!(read(r#"{"tokens": [1], "labels": [1]}"#).unwrap_err().0.starts_with("the record has `labels`"));
        assert!(read("[1]").is_err() && read("{\"tokens\": [1]} x").is_err());
        for masks_tokens in ["[1, 0]", "[[1, 0]]", "[true, false]", "[1.0, 0.0]"] {
            let error = read(&format!("{{\"input_ids\": [3, 4], \"attention_mask\": {masks_tokens}}}")).unwrap_err().0;
            assert!(error.starts_with("the record has an `attention_mask` with a 0"), "{error}");
        }
        assert_eq!(read(r#"{"input_ids": [3], "attention_mask": null}"#), tokens(&[3], &[]));
        assert_eq!(read(r#"{"input_ids": [3], "tokens": [3]}"#), tokens(&[3], &[]));
        assert_eq!(
            read(r#"{"input_ids": [4], "tokens": [3]}"#).unwrap_err().0,
            "the record has both `tokens` and `input_ids`, and they differ"
        );
    }

    proptest! {
        /// Standard JSON is parsed as serde_json parses it.
        #[test]
        fn standard_json_is_parsed_like_serde_json(text in r#"[\[\]{}",:\\ \na1.\-eu0Nü]{0,40}"#) {
            // Python reads `-0` differently.
            prop_assume!(!text.contains("-0"));
            let expected: Result<Value, _> = serde_json::from_str(&text);
            match (parse(text.as_bytes()), expected) {
                (Ok(parsed), Ok(expected)) => prop_assert_eq!(parsed.value, expected),
                // More than the standard is accepted, never less.
                (read, expected) => prop_assert!(expected.is_err(), "{:?}", read),
            }
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes: Vec<u8>, text in r#"[\\ud8Dc0"N aIfinty,\[\]-]{0,40}"#) {
            drop((parse(&bytes), parse_tokens(&bytes)));
            drop((parse(text.as_bytes()), parse_tokens(text.as_bytes())));
        }
    }
}

//! The fields of a request's JSON body. Each is taken by its name and its type; what remains is unknown, and refused.
//!
//! Values are parsed only when they are taken, and directly into their type: a list of a million token ids takes the memory of
//! the ids, not that of a million JSON values.

use std::borrow::Cow;
use std::fmt;

use moonlight_convert::printable;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use super::error::ApiError;

/// The limit of fields in one body; OpenAI's largest request has about 40.
const MAX_FIELDS: usize = 128;

/// A name from a request in backticks, on one line and not longer than a line.
pub(super) fn quoted(text: &str) -> String {
    const MAX_CHARACTERS: usize = 80;
    let text = printable(text);
    match text.char_indices().nth(MAX_CHARACTERS) {
        Some((end, _)) => format!("`{}…`", &text[..end]),
        None => format!("`{text}`"),
    }
}

/// The fields that were not taken yet.
#[derive(Debug)]
pub(super) struct Fields<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Fields<'a> {
    /// Parses the body of a request, a JSON object. A field that is given twice is an error, because implementations differ
    /// in which value counts.
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(body).map_err(|error| json_error(&error))
    }

    /// The JSON text of a field, unless it is null.
    pub(super) fn take_raw(&mut self, name: &str) -> Option<&'a RawValue> {
        let index = self.0.iter().position(|(known, _)| known == name)?;
        Some(self.0.swap_remove(index).1).filter(|value| value.get() != "null")
    }

    /// A field of a type that is described by `expected`: "must be a boolean". `None` if it is absent or null.
    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &str, expected: &str) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.take_raw(name) else { return Ok(None) };
        parse_field(name, raw, expected).map(Some)
    }

    /// A required string.
    pub(super) fn take_name(&mut self, name: &'static str) -> Result<String, ApiError> {
        self.take(name, "must be a string")?.ok_or(ApiError::Missing { name })
    }

    /// A boolean, by default false.
    pub(super) fn take_bool(&mut self, name: &str) -> Result<bool, ApiError> {
        Ok(self.take(name, "must be `true` or `false`")?.unwrap_or(false))
    }

    /// A number for which `accepts` returns true.
    pub(super) fn take_number(
        &mut self,
        name: &str,
        expected: &str,
        accepts: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ApiError> {
        let Some(raw) = self.take_raw(name) else { return Ok(None) };
        let number: f64 = parse_field(name, raw, expected)?;
        match number.is_finite() && accepts(number) {
            true => Ok(Some(number)),
            false => Err(expected_error(name, raw, expected)),
        }
    }

    /// An integer from `least` to `most`.
    pub(super) fn take_integer(&mut self, name: &str, least: i64, most: i64) -> Result<Option<i64>, ApiError> {
        let expected = match (least, most) {
            (i64::MIN, i64::MAX) => "must be an integer".to_owned(),
            (_, i64::MAX) => format!("must be an integer of at least {least}"),
            _ => format!("must be an integer from {least} to {most}"),
        };
        let Some(raw) = self.take_raw(name) else { return Ok(None) };
        // Some clients write integers as `16.0`.
        let integer = |number: f64| (number.fract() == 0.0 && number.abs() < 9e15).then_some(number as i64);
        let value = parse_field::<i64>(name, raw, &expected)
            .or_else(|error| serde_json::from_str(raw.get()).ok().and_then(integer).ok_or(error))?;
        match (least..=most).contains(&value) {
            true => Ok(Some(value)),
            false => Err(expected_error(name, raw, &expected)),
        }
    }

    /// Removes fields that have no effect on the result, whatever their values.
    pub(super) fn ignore(&mut self, names: &[&str]) {
        self.0.retain(|(name, _)| !names.contains(&name.as_ref()));
    }

    /// Refuses a field by its name, except for null and the listed values (as compact JSON), which ask for nothing.
    pub(super) fn refuse(&mut self, name: &str, neutral: &[&str], reason: &'static str) -> Result<(), ApiError> {
        let Some(raw) = self.take_raw(name) else { return Ok(()) };
        let compact: String = raw.get().chars().filter(|character| !character.is_ascii_whitespace()).collect();
        match neutral.contains(&compact.as_str()) {
            true => Ok(()),
            false => Err(ApiError::unsupported(name, reason)),
        }
    }

    /// Refuses the fields that are left.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        match self.0.into_iter().find(|(_, value)| value.get() != "null") {
            None => Ok(()),
            Some((name, _)) => Err(ApiError::UnknownField { name: name.into_owned() }),
        }
    }
}

/// The value of a field, or an error with what is expected.
pub(super) fn parse_field<'a, T: Deserialize<'a>>(
    name: &str,
    raw: &'a RawValue,
    expected: &str,
) -> Result<T, ApiError> {
    serde_json::from_str(raw.get()).map_err(|_| expected_error(name, raw, expected))
}

/// "`n` must be an integer, and is `"x"`".
pub(super) fn expected_error(name: &str, raw: &RawValue, expected: &str) -> ApiError {
    ApiError::field(name, format!("{expected}, and is {}", quoted(raw.get())))
}

/// The error for a body that is not JSON, or not an object with fields.
fn json_error(error: &serde_json::Error) -> ApiError {
    let (line, column) = (error.line(), error.column());
    let text = error.to_string();
    let problem = text.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&text);
    let kind = if error.is_data() { "not a request" } else { "not JSON" };
    ApiError::Json { problem: format!("{kind}: {}", printable(problem)), line, column }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object<'a>(std::marker::PhantomData<&'a ()>);
        impl<'de: 'a, 'a> Visitor<'de> for Object<'a> {
            type Value = Fields<'a>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields: Vec<(Cow<'a, str>, &'a RawValue)> = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if fields.iter().any(|(known, _)| *known == name) {
                        return Err(A::Error::custom(format_args!("{} is given twice", quoted(&name))));
                    }
                    if fields.len() == MAX_FIELDS {
                        return Err(A::Error::custom(format_args!("there are more than {MAX_FIELDS} fields")));
                    }
                    fields.push((name.into(), map.next_value()?));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Object(std::marker::PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(body: &str, take: impl Fn(&mut Fields<'_>) -> Result<(), ApiError>) -> String {
        let mut fields = Fields::parse(body.as_bytes()).unwrap();
        take(&mut fields).and_then(|()| fields.finish()).unwrap_err().to_string()
    }

    #[test]
    fn a_body_that_is_not_an_object_names_the_position() {
        let problem = |body: &[u8]| Fields::parse(body).unwrap_err().to_string();
        assert_eq!(problem(b""), "the body is not JSON: EOF while parsing a value (line 1, column 0)");
        assert_eq!(problem(b"{\n \"a\": ]}"), "the body is not JSON: expected value (line 2, column 7)");
        assert_eq!(
            problem(b"[1]"),
            "the body is not a request: invalid type: sequence, expected an object (line 1, column 0)"
        );
        assert!(problem(b"{\"a\": 1, \"a\": 2}").contains("`a` is given twice"));
        assert!(problem(b"{\"a\": \"\xff\"}").contains("invalid unicode code point"));
        // Nesting is skipped without recursion, and limited where a value is parsed.
        let deep = format!("{{\"a\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let mut fields = Fields::parse(deep.as_bytes()).unwrap();
        let error = fields.take::<serde_json::Value>("a", "must be JSON").unwrap_err().to_string();
        assert!(error.starts_with("`a` must be JSON, and is `[[["), "{error}");
        let many: Vec<String> = (0..200).map(|index| format!("\"{index}\": 1")).collect();
        assert!(problem(format!("{{{}}}", many.join(",")).as_bytes()).contains("more than 128 fields"));
    }

    #[test]
    fn fields_that_are_not_taken_are_unknown() {
        assert_eq!(error("{\"temprature\": 1}", |_| Ok(())), "unknown field `temprature`");
        let mut fields = Fields::parse(b"{\"user\": 3, \"x\": null}").unwrap();
        fields.ignore(&["user"]);
        fields.finish().unwrap();
    }

    #[test]
    fn a_value_of_the_wrong_type_is_shown() {
        let n = |fields: &mut Fields<'_>| fields.take_integer("n", 1, 128).map(drop);
        assert_eq!(error("{\"n\": \"two\"}", n), "`n` must be an integer from 1 to 128, and is `\"two\"`");
        assert_eq!(error("{\"n\": 0}", n), "`n` must be an integer from 1 to 128, and is `0`");
        assert_eq!(error("{\"n\": 1.5}", n), "`n` must be an integer from 1 to 128, and is `1.5`");
        let mut fields = Fields::parse(b"{\"n\": 2.0}").unwrap();
        assert_eq!(fields.take_integer("n", 1, 128).unwrap(), Some(2));
        let long = format!("{{\"n\": \"{}\"}}", "x".repeat(1000));
        assert!(error(&long, n).len() < 200);
    }

    #[test]
    fn a_refused_field_may_have_a_neutral_value() {
        let take = |fields: &mut Fields<'_>| fields.refuse("response_format", &["{\"type\":\"text\"}"], "no grammar");
        let mut fields = Fields::parse(b"{\"response_format\": {\"type\": \"text\"}}").unwrap();
        take(&mut fields).and_then(|()| fields.finish()).unwrap();
        let expected = "`response_format` is not supported: no grammar";
        assert_eq!(error("{\"response_format\": {\"type\": \"json_object\"}}", take), expected);
    }
}

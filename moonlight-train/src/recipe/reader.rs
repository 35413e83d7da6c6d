//! A serde deserializer over the tree of a recipe. It checks types, and its errors name the key and its line.
//!
//! The names of keys and choices come from the types that are read (`#[derive(Deserialize)]`), and are not listed again here.
//! It accepts more than serde's derives do: an integer may be written as `1e6`; a list of one string as that string; and the
//! name of a choice alone if all of its settings have defaults (`scale = "report"`).

use std::cell::RefCell;
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, Expected, IntoDeserializer, Unexpected, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};
use toml::Value;

use super::RecipeError;
use super::document::{Item, Node};

/// Reads a value of any type from the tree.
///
/// # Errors
///
/// [`RecipeError::Missing`] or [`RecipeError::Invalid`], for the first key that is wrong.
pub(super) fn read<'de, T: Deserialize<'de>>(root: &'de Node) -> Result<T, RecipeError> {
    T::deserialize(Reader { node: root, path: String::new(), parts: None }).map_err(|error| match error.problem {
        Problem::Missing(key) => RecipeError::Missing { place: error.place, key, hint: String::new() },
        Problem::Expected(problem) => RecipeError::Invalid { place: error.place, key: error.path, problem, hint: None },
        Problem::Custom(problem, hint) => RecipeError::Invalid { place: error.place, key: error.path, problem, hint },
    })
}

/// From here f64 skips whole numbers.
const TWO_TO_53: f64 = 9_007_199_254_740_992.0;

/// The name of the newtype by which [`read_flattened`] asks the reader to share a table.
const FLATTENED: &str = "$flat";

/// Reads a tuple of structs from the keys of one table. Each struct gets its keys, except those that an earlier struct has, and
/// a map gets the rest. `#[serde(flatten)]` does the same, but buffers the values and loses their lines.
pub(super) fn read_flattened<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    struct Parts<T>(std::marker::PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Parts<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a table")
        }

        fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
            T::deserialize(deserializer)
        }
    }
    deserializer.deserialize_newtype_struct(FLATTENED, Parts(std::marker::PhantomData))
}

/// What is wrong with a value, and where; place and path are empty until [`Reader::locate`] fills them in.
#[derive(Debug)]
struct Error {
    place: String,
    path: String,
    problem: Problem,
}

#[derive(Debug)]
enum Problem {
    /// A required key, by its full name once that is known.
    Missing(String),
    /// What the value must be.
    Expected(String),
    /// The rest of a sentence that starts with the key, and a hint.
    Custom(String, Option<String>),
}

impl Error {
    fn new(problem: Problem) -> Self {
        Self { place: String::new(), path: String::new(), problem }
    }

    /// A value of another type than `expected`, in serde's words.
    fn expected(expected: &str) -> Self {
        let words = match expected {
            "u64" | "usize" => "a whole number from 0",
            "u32" => "a whole number from 0 to 4294967295",
            "f64" | "f32" => "a number",
            "a boolean" => "true or false",
            other => other,
        };
        Self::new(Problem::Expected(words.to_owned()))
    }

    /// The error for a `name` that is not one of the choices `names`.
    fn choice(name: &str, names: &[&str]) -> Self {
        let problem = format!("is `{name}`; it must be one of: {}", names.join(", "));
        let nearest = nearest(name, names.iter().copied()).map(|name| format!("write `{name}` if that is meant"));
        Self::new(Problem::Custom(problem, nearest))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.problem {
            Problem::Missing(key) => write!(f, "`{key}` is missing"),
            Problem::Expected(problem) | Problem::Custom(problem, _) => f.write_str(problem),
        }
    }
}

impl std::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(Problem::Custom(message.to_string(), None))
    }

    fn invalid_type(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::expected(&expected.to_string())
    }

    fn invalid_value(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::expected(&expected.to_string())
    }

    fn invalid_length(_: usize, expected: &dyn Expected) -> Self {
        Self::expected(&expected.to_string())
    }

    fn unknown_variant(name: &str, names: &'static [&'static str]) -> Self {
        Self::choice(name, names)
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(Problem::Missing(field.to_owned()))
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self::custom(format_args!("has `{field}` twice, once by another name"))
    }
}

/// The candidate whose spelling is most similar to `name`.
pub(super) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<String> {
    candidates
        .map(|candidate| (strsim::normalized_damerau_levenshtein(name, candidate), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate.to_owned())
}

/// Deserializes the value of one node.
struct Reader<'de, 'p> {
    node: &'de Node,
    /// `section.list[0].key`.
    path: String,
    /// Within [`read_flattened`]: the keys of the structs that were read already.
    parts: Option<&'p RefCell<Vec<&'static str>>>,
}

impl<'de> Reader<'de, '_> {
    /// Adds this value's place and path to an error, unless a reader further inside has added its own.
    fn locate<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        result.map_err(|mut error| {
            if error.place.is_empty() {
                error.place = self.node.place.to_string();
                error.path.clone_from(&self.path);
                match &mut error.problem {
                    Problem::Missing(key) if !self.path.is_empty() => *key = format!("{}.{key}", self.path),
                    Problem::Expected(what) => *what = format!("must be {what}, not {}", self.node.as_written()),
                    _ => {}
                }
            }
            error
        })
    }

    fn inner(&self, node: &'de Node, step: fmt::Arguments<'_>) -> Reader<'de, 'static> {
        let dot = if self.path.is_empty() { "" } else { "." };
        let path = match step.to_string() {
            index if index.starts_with('[') => format!("{}{index}", self.path),
            key => format!("{}{dot}{key}", self.path),
        };
        Reader { node, path, parts: None }
    }

    /// The string, or the number that a `--set` typed where a string is wanted.
    fn text(&self) -> Option<&'de str> {
        match &self.node.item {
            Item::Scalar(Value::String(text), _) => Some(text),
            Item::Scalar(_, typed) => typed.as_deref(),
            _ => None,
        }
    }

    /// Reads the entries of a table in the given order.
    fn entries<V: Visitor<'de>>(self, entries: Vec<(&'de str, &'de Node)>, visitor: V) -> Result<V::Value, Error> {
        let readers: Vec<_> =
            entries.into_iter().map(|(key, node)| (key, self.inner(node, format_args!("{key}")))).collect();
        self.locate(visitor.visit_map(Entries { left: readers.into_iter(), value: None }))
    }
}

impl<'de> IntoDeserializer<'de, Error> for Reader<'de, '_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Reader<'de, '_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.node.item {
            Item::List(_) => self.deserialize_seq(visitor),
            Item::Table(_) => self.deserialize_map(visitor),
            Item::Scalar(value, _) => {
                let result = match value {
                    Value::Integer(number) => visitor.visit_i64(*number),
                    // `1e6` is a whole number too. From 2^53 it may differ from the number that was written, so it stays a float.
                    Value::Float(number) if number.fract() == 0.0 && (0.0..TWO_TO_53).contains(number) => {
                        visitor.visit_i64(*number as i64)
                    }
                    Value::Float(number) if number.is_finite() => visitor.visit_f64(*number),
                    Value::Float(_) => Err(Error::expected("f64")),
                    Value::Boolean(flag) => visitor.visit_bool(*flag),
                    Value::String(text) => visitor.visit_str(text),
                    date => visitor.visit_string(date.to_string()),
                };
                self.locate(result)
            }
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let text = self.text().ok_or_else(|| Error::expected("a string"));
        self.locate(text.and_then(|text| visitor.visit_borrowed_str(text)))
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value, Error> {
        if name == FLATTENED {
            let taken = RefCell::new(Vec::new());
            return visitor.visit_newtype_struct(Reader { parts: Some(&taken), ..self });
        }
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let elements: Vec<_> = match &self.node.item {
            Item::List(list) => {
                list.iter().enumerate().map(|(index, node)| self.inner(node, format_args!("[{index}]"))).collect()
            }
            Item::Scalar(Value::String(_), _) => {
                vec![Reader { node: self.node, path: self.path.clone(), parts: None }]
            }
            _ => return self.locate(Err(Error::expected("a list"))),
        };
        self.locate(visitor.visit_seq(Elements(elements.into_iter())))
    }

    /// All tuples of recipes are lists of numbers, except for those of [`read_flattened`].
    fn deserialize_tuple<V: Visitor<'de>>(self, length: usize, visitor: V) -> Result<V::Value, Error> {
        if let Some(taken) = self.parts {
            let part = |_| Reader { node: self.node, path: self.path.clone(), parts: Some(taken) };
            return visitor.visit_seq(de::value::SeqDeserializer::new((0..length).map(part)));
        }
        match &self.node.item {
            Item::List(list) if list.len() == length => self.deserialize_seq(visitor),
            _ => {
                let count = ["no", "one", "two", "three"].get(length).map_or(length.to_string(), |it| (*it).to_owned());
                self.locate(Err(Error::expected(&format!("a list of {count} numbers"))))
            }
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let Item::Table(table) = &self.node.item else { return self.locate(Err(Error::expected("a table"))) };
        let taken = self.parts.map(|parts| parts.borrow().clone()).unwrap_or_default();
        let left = table.iter().filter(|(key, _)| !taken.contains(&key.as_str()));
        self.entries(left.map(|(key, node)| (key.as_str(), node)).collect(), visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let Item::Table(table) = &self.node.item else { return self.locate(Err(Error::expected("a table"))) };
        // A key that an earlier struct has is absent for this one, which gets its default.
        let mut free = fields.to_vec();
        if let Some(parts) = self.parts {
            let mut taken = parts.borrow_mut();
            free.retain(|field| !taken.contains(field));
            taken.extend(fields);
        }
        let known = free.iter().filter_map(|field| table.get_key_value(*field));
        self.entries(known.map(|(key, node)| (key.as_str(), node)).collect(), visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let (name, settings) = match (&self.node.item, self.text()) {
            (_, Some(name)) => (name, None),
            (Item::Table(table), _) if table.len() == 1 => {
                let (name, node) = table.iter().next().expect("the table has one entry");
                (name.as_str(), Some(node))
            }
            _ => return self.locate(Err(Error::expected(&format!("one of: {}", variants.join(", "))))),
        };
        if !variants.contains(&name) {
            return self.locate(Err(Error::choice(name, variants)));
        }
        let settings = settings.map(|node| self.inner(node, format_args!("{name}")));
        self.locate(visitor.visit_enum(Choice { name, settings }))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct tuple_struct identifier
    }
}

impl<'de> Reader<'de, 'static> {
    /// Reads a value. Adds the place to errors of `deserialize_with` and `try_from`, which occur after the value was read.
    fn read<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, Error> {
        let place = Reader { node: self.node, path: self.path.clone(), parts: None };
        place.locate(seed.deserialize(self))
    }
}

/// The entries of a table.
struct Entries<'de> {
    left: std::vec::IntoIter<(&'de str, Reader<'de, 'static>)>,
    /// The value of the key that was read last.
    value: Option<Reader<'de, 'static>>,
}

impl<'de> de::MapAccess<'de> for Entries<'de> {
    type Error = Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Error> {
        let Some((key, value)) = self.left.next() else { return Ok(None) };
        self.value = Some(value);
        seed.deserialize(de::value::BorrowedStrDeserializer::new(key)).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        self.value.take().expect("a value is read after its key").read(seed)
    }
}

/// The elements of a list.
struct Elements<'de>(std::vec::IntoIter<Reader<'de, 'static>>);

impl<'de> de::SeqAccess<'de> for Elements<'de> {
    type Error = Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Error> {
        self.0.next().map(|element| element.read(seed)).transpose()
    }
}

/// A variant of an enum, with or without settings.
struct Choice<'de> {
    name: &'de str,
    settings: Option<Reader<'de, 'static>>,
}

impl<'de> de::EnumAccess<'de> for Choice<'de> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self), Error> {
        let name: de::value::BorrowedStrDeserializer<'de, Error> = de::value::BorrowedStrDeserializer::new(self.name);
        Ok((seed.deserialize(name)?, self))
    }
}

impl<'de> de::VariantAccess<'de> for Choice<'de> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        match self.settings {
            None => Ok(()),
            Some(reader) => reader.locate(Err(de::Error::custom("has no settings: write the name only"))),
        }
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, Error> {
        match self.settings {
            Some(reader) => seed.deserialize(reader),
            None => Err(de::Error::custom(format_args!("needs a value: write {{ {} = ... }}", self.name))),
        }
    }

    fn tuple_variant<V: Visitor<'de>>(self, length: usize, visitor: V) -> Result<V::Value, Error> {
        match self.settings {
            Some(reader) => reader.deserialize_tuple(length, visitor),
            None => Err(de::Error::custom(format_args!("needs values: write {{ {} = [...] }}", self.name))),
        }
    }

    fn struct_variant<V: Visitor<'de>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, Error> {
        match self.settings {
            Some(reader) => reader.deserialize_struct("", fields, visitor),
            None => {
                // The name alone: every setting has its default, and one without a default is reported as missing.
                let none = std::iter::empty::<(&str, Reader<'de, 'static>)>();
                visitor.visit_map(de::value::MapDeserializer::new(none)).map_err(|mut error: Error| {
                    if let Problem::Missing(key) = &mut error.problem {
                        *key = format!("{}.{key}", self.name);
                    }
                    error
                })
            }
        }
    }
}

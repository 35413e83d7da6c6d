//! The values of the metadata, and the bytes that they are in a file.

use std::io::Read;

use crate::printable::Printable;

/// The deepest nesting of arrays. No known key has an array of arrays.
const DEEPEST: usize = 4;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names of the types are those of the format")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// The elements of an array, all of one type.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names of the types are those of the format")]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// The number of each type in a file.
mod code {
    pub(super) const U8: u32 = 0;
    pub(super) const I8: u32 = 1;
    pub(super) const U16: u32 = 2;
    pub(super) const I16: u32 = 3;
    pub(super) const U32: u32 = 4;
    pub(super) const I32: u32 = 5;
    pub(super) const F32: u32 = 6;
    pub(super) const BOOL: u32 = 7;
    pub(super) const STRING: u32 = 8;
    pub(super) const ARRAY: u32 = 9;
    pub(super) const U64: u32 = 10;
    pub(super) const I64: u32 = 11;
    pub(super) const F64: u32 = 12;
}

impl Value {
    /// A non-negative integer of any width.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::U64(value) => Some(value),
            Self::I8(value) => value.try_into().ok(),
            Self::I16(value) => value.try_into().ok(),
            Self::I32(value) => value.try_into().ok(),
            Self::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// A floating-point number of either width.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(value) => Some(value.into()),
            Self::F64(value) => Some(value),
            _ => None,
        }
    }

    /// A boolean.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(value) = self { Some(*value) } else { None }
    }

    /// A string.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(value) = self { Some(value) } else { None }
    }

    /// An array.
    pub fn as_array(&self) -> Option<&Array> {
        if let Self::Array(value) = self { Some(value) } else { None }
    }

    /// An array of strings.
    pub fn as_strings(&self) -> Option<&[String]> {
        if let Self::Array(Array::String(values)) = self { Some(values) } else { None }
    }

    /// The name of the type, such as `u32`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::F32(_) => "f32",
            Self::Bool(_) => "bool",
            Self::String(_) => "string",
            Self::Array(_) => "array",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F64(_) => "f64",
        }
    }

    pub(super) fn read<R: Read>(input: &mut Input<R>) -> Result<Self, String> {
        Ok(match input.u32()? {
            code::U8 => Self::U8(u8::from_le_bytes(input.array()?)),
            code::I8 => Self::I8(i8::from_le_bytes(input.array()?)),
            code::U16 => Self::U16(u16::from_le_bytes(input.array()?)),
            code::I16 => Self::I16(i16::from_le_bytes(input.array()?)),
            code::U32 => Self::U32(input.u32()?),
            code::I32 => Self::I32(i32::from_le_bytes(input.array()?)),
            code::F32 => Self::F32(f32::from_le_bytes(input.array()?)),
            code::BOOL => Self::Bool(boolean(input.array::<1>()?[0])?),
            code::STRING => Self::String(input.string()?),
            code::ARRAY => Self::Array(Array::read(input, 1)?),
            code::U64 => Self::U64(input.u64()?),
            code::I64 => Self::I64(i64::from_le_bytes(input.array()?)),
            code::F64 => Self::F64(f64::from_le_bytes(input.array()?)),
            other => return Err(format!("the unknown value type {other}")),
        })
    }

    pub(super) fn write(&self, output: &mut Vec<u8>) {
        let mut put = |code: u32, bytes: &[u8]| {
            output.extend(code.to_le_bytes());
            output.extend(bytes);
        };
        match self {
            Self::U8(value) => put(code::U8, &value.to_le_bytes()),
            Self::I8(value) => put(code::I8, &value.to_le_bytes()),
            Self::U16(value) => put(code::U16, &value.to_le_bytes()),
            Self::I16(value) => put(code::I16, &value.to_le_bytes()),
            Self::U32(value) => put(code::U32, &value.to_le_bytes()),
            Self::I32(value) => put(code::I32, &value.to_le_bytes()),
            Self::F32(value) => put(code::F32, &value.to_le_bytes()),
            Self::Bool(value) => put(code::BOOL, &[u8::from(*value)]),
            Self::String(value) => {
                put(code::STRING, &[]);
                write_string(value, output);
            }
            Self::Array(values) => {
                put(code::ARRAY, &[]);
                values.write(output);
            }
            Self::U64(value) => put(code::U64, &value.to_le_bytes()),
            Self::I64(value) => put(code::I64, &value.to_le_bytes()),
            Self::F64(value) => put(code::F64, &value.to_le_bytes()),
        }
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<f32> for Value {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::String(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::String(value)
    }
}

impl From<Vec<String>> for Value {
    fn from(values: Vec<String>) -> Self {
        Self::Array(Array::String(values))
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::I8(values) => values.len(),
            Self::U16(values) => values.len(),
            Self::I16(values) => values.len(),
            Self::U32(values) => values.len(),
            Self::I32(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::Bool(values) => values.len(),
            Self::String(values) => values.len(),
            Self::Array(values) => values.len(),
            Self::U64(values) => values.len(),
            Self::I64(values) => values.len(),
            Self::F64(values) => values.len(),
        }
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn read<R: Read>(input: &mut Input<R>, depth: usize) -> Result<Self, String> {
        let element = input.u32()?;
        let count = input.u64()?;
        Ok(match element {
            code::U8 => Self::U8(input.numbers(count, u8::from_le_bytes)?),
            code::I8 => Self::I8(input.numbers(count, i8::from_le_bytes)?),
            code::U16 => Self::U16(input.numbers(count, u16::from_le_bytes)?),
            code::I16 => Self::I16(input.numbers(count, i16::from_le_bytes)?),
            code::U32 => Self::U32(input.numbers(count, u32::from_le_bytes)?),
            code::I32 => Self::I32(input.numbers(count, i32::from_le_bytes)?),
            code::F32 => Self::F32(input.numbers(count, f32::from_le_bytes)?),
            code::BOOL => {
                let bytes = input.numbers(count, u8::from_le_bytes)?;
                Self::Bool(bytes.into_iter().map(boolean).collect::<Result<_, _>>()?)
            }
            // A string has at least its length, an array its type and length.
            code::STRING => Self::String(input.elements(count, 8, Input::string)?),
            code::ARRAY if depth == DEEPEST => return Err(format!("arrays nested more than {DEEPEST} deep")),
            code::ARRAY => Self::Array(input.elements(count, 12, |input| Self::read(input, depth + 1))?),
            code::U64 => Self::U64(input.numbers(count, u64::from_le_bytes)?),
            code::I64 => Self::I64(input.numbers(count, i64::from_le_bytes)?),
            code::F64 => Self::F64(input.numbers(count, f64::from_le_bytes)?),
            other => return Err(format!("an array of the unknown value type {other}")),
        })
    }

    fn write(&self, output: &mut Vec<u8>) {
        let mut begin = |code: u32| {
            output.extend(code.to_le_bytes());
            output.extend((self.len() as u64).to_le_bytes());
        };
        match self {
            Self::U8(values) => {
                begin(code::U8);
                output.extend(values);
            }
            Self::I8(values) => {
                begin(code::I8);
                output.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Self::U16(values) => {
                begin(code::U16);
                output.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Self::I16(values) => {
                begin(code::I16);
                output.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Self::U32(values) => {
                begin(code::U32);
                output.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Self::I32(values) => {
                begin(code::I32);
                output.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Self::F32(values) => {
                begin(code::F32);
                output.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Self::Bool(values) => {
                begin(code::BOOL);
                output.extend(values.iter().map(|value| u8::from(*value)));
            }
            Self::String(values) => {
                begin(code::STRING);
                values.iter().for_each(|value| write_string(value, output));
            }
            Self::Array(values) => {
                begin(code::ARRAY);
                values.iter().for_each(|value| value.write(output));
            }
            Self::U64(values) => {
                begin(code::U64);
                output.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Self::I64(values) => {
                begin(code::I64);
                output.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Self::F64(values) => {
                begin(code::F64);
                output.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
        }
    }
}

fn boolean(byte: u8) -> Result<bool, String> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(format!("a boolean with the value {other}")),
    }
}

pub(super) fn write_string(value: &str, output: &mut Vec<u8>) {
    output.extend((value.len() as u64).to_le_bytes());
    output.extend(value.as_bytes());
}

/// The metadata of a file: values by key, in the order of the file. Keys are unique.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
}

impl Metadata {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|(other, _)| other == key).map(|(_, value)| value)
    }

    /// Sets the value of a key; a new key comes last.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        let (key, value) = (key.into(), value.into());
        match self.entries.iter_mut().find(|(other, _)| *other == key) {
            Some((_, old)) => *old = value,
            None => self.entries.push((key, value)),
        }
    }

    /// Keys and values in the order of the file.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The non-negative integer under a key, if it exists.
    ///
    /// # Errors
    ///
    /// The rest of a sentence that begins with the file's name, if the value is something else.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, String> {
        self.typed(key, Value::as_u64, "a non-negative integer")
    }

    /// The floating-point number under a key, if it exists.
    ///
    /// # Errors
    ///
    /// The rest of a sentence that begins with the file's name, if the value is something else.
    pub fn f64(&self, key: &str) -> Result<Option<f64>, String> {
        self.typed(key, Value::as_f64, "a floating-point number")
    }

    /// The boolean under a key, if it exists.
    ///
    /// # Errors
    ///
    /// The rest of a sentence that begins with the file's name, if the value is something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, String> {
        self.typed(key, Value::as_bool, "a boolean")
    }

    /// The string under a key, if it exists.
    ///
    /// # Errors
    ///
    /// The rest of a sentence that begins with the file's name, if the value is something else.
    pub fn str(&self, key: &str) -> Result<Option<&str>, String> {
        self.typed(key, Value::as_str, "a string")
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        as_type: impl Fn(&'a Value) -> Option<T>,
        wanted: &str,
    ) -> Result<Option<T>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match as_type(value) {
            Some(value) => Ok(Some(value)),
            None => {
                Err(format!("has invalid metadata: `{}` is of type {}, not {wanted}", Printable(key), value.kind()))
            }
        }
    }

    /// For the parser, which has checked that the keys are unique.
    pub(super) fn from_unique(entries: Vec<(String, Value)>) -> Self {
        Self { entries }
    }
}

impl FromIterator<(String, Value)> for Metadata {
    fn from_iter<I: IntoIterator<Item = (String, Value)>>(entries: I) -> Self {
        let mut metadata = Self::default();
        metadata.extend(entries);
        metadata
    }
}

impl Extend<(String, Value)> for Metadata {
    fn extend<I: IntoIterator<Item = (String, Value)>>(&mut self, entries: I) {
        for (key, value) in entries {
            self.insert(key, value);
        }
    }
}

/// The bytes of a header, with a limit: no length in them is trusted before it is compared with what is left.
pub(super) struct Input<R> {
    reader: R,
    at: u64,
    end: u64,
}

impl<R: Read> Input<R> {
    /// Reads at most `end` bytes.
    pub(super) fn new(reader: R, end: u64) -> Self {
        Self { reader, at: 0, end }
    }

    /// The number of bytes read.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Checks that `count` elements of at least `least` bytes can follow.
    pub(super) fn expect(&self, count: u64, least: u64) -> Result<usize, String> {
        let left = self.end - self.at;
        match count.checked_mul(least) {
            Some(bytes) if bytes <= left => Ok(count as usize), // at most `left`, the length of a file
            _ if least == 1 => Err(format!("{count} bytes, where only {left} follow")),
            _ => Err(format!("{count} elements of {least} or more bytes, where only {left} bytes follow")),
        }
    }

    fn bytes(&mut self, count: u64) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; self.expect(count, 1)?];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.expect(N as u64, 1)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, target: &mut [u8]) -> Result<(), String> {
        self.reader.read_exact(target).map_err(|error| format!("bytes that cannot be read: {error}"))?;
        self.at += target.len() as u64;
        Ok(())
    }

    pub(super) fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn string(&mut self) -> Result<String, String> {
        let length = self.u64()?;
        String::from_utf8(self.bytes(length)?).map_err(|_| "a string that is not UTF-8".into())
    }

    fn numbers<T, const N: usize>(&mut self, count: u64, from: fn([u8; N]) -> T) -> Result<Vec<T>, String> {
        let bytes = self.expect(count, N as u64)? * N;
        let bytes = self.bytes(bytes as u64)?;
        let (chunks, _) = bytes.as_chunks::<N>();
        Ok(chunks.iter().map(|chunk| from(*chunk)).collect())
    }

    fn elements<T>(
        &mut self,
        count: u64,
        least: u64,
        read: impl Fn(&mut Self) -> Result<T, String>,
    ) -> Result<Vec<T>, String> {
        let mut elements = Vec::with_capacity(self.expect(count, least)?);
        for _ in 0..count {
            elements.push(read(self)?);
        }
        Ok(elements)
    }
}

//! Enums that serde reads from a name or a table.
//!
//! For a variant with fields, serde's derive reads `{ report = { factor = 0.3 } }` and refuses `"report"`. Here the name alone
//! is accepted, too: it is the variant with the defaults of its fields.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::{MapAccessDeserializer, MapDeserializer, StrDeserializer};
use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, IntoDeserializer, MapAccess, VariantAccess, Visitor,
};

/// An enum with serde's derived, externally tagged reader. Implemented by [`name_or_table`].
pub(crate) trait Tagged: Sized {
    /// What a value is, for messages: "a scale".
    const EXPECTED: &'static str;

    fn read_tagged<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error>;
}

/// Reads a name or a table.
pub(crate) fn read<'de, T: Tagged, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    deserializer.deserialize_any(NameOrTable(PhantomData))
}

struct NameOrTable<T>(PhantomData<T>);

impl<'de, T: Tagged> Visitor<'de> for NameOrTable<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: a name, or a table of one name and its settings", T::EXPECTED)
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<T, E> {
        T::read_tagged(Named { name, error: PhantomData })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::read_tagged(MapAccessDeserializer::new(map))
    }
}

/// A deserializer of a variant that is given by its name alone.
struct Named<'a, E> {
    name: &'a str,
    error: PhantomData<E>,
}

impl<'de, E: Error> Deserializer<'de> for Named<'_, E> {
    type Error = E;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, E> {
        visitor.visit_enum(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de, 'a, E: Error> EnumAccess<'de> for Named<'a, E> {
    type Error = E;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), E> {
        let name: StrDeserializer<'a, E> = self.name.into_deserializer();
        Ok((seed.deserialize(name)?, self))
    }
}

impl<'de, E: Error> VariantAccess<'de> for Named<'_, E> {
    type Error = E;

    fn unit_variant(self) -> Result<(), E> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _seed: T) -> Result<T::Value, E> {
        Err(E::custom(format_args!("`{0}` needs a value, as in `{{ {0} = ... }}`", self.name)))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, _visitor: V) -> Result<V::Value, E> {
        Err(E::custom(format_args!("`{0}` needs values, as in `{{ {0} = [...] }}`", self.name)))
    }

    fn struct_variant<V: Visitor<'de>>(self, _fields: &'static [&'static str], visitor: V) -> Result<V::Value, E> {
        // An empty table: each field takes its default, and serde reports one that has none.
        visitor.visit_map(MapDeserializer::new(std::iter::empty::<(&str, &str)>()))
    }
}

/// Implements `Deserialize` from a name or a table, and `Serialize`, for an enum with `#[serde(remote = "Self")]`. `remote` turns
/// serde's derived code into inherent functions, so that the traits can be implemented here.
macro_rules! name_or_table {
    ($type:ident, $expected:literal) => {
        impl $crate::name_or_table::Tagged for $type {
            const EXPECTED: &'static str = $expected;

            fn read_tagged<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $type::deserialize(deserializer)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::name_or_table::read(deserializer)
            }
        }

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                $type::serialize(self, serializer)
            }
        }
    };
}
pub(crate) use name_or_table;

/// Adds the bare names of variants with fields, which [`name_or_table`] reads, to the schema of an enum.
#[cfg(feature = "schema")]
pub(crate) fn allow_names(schema: &mut schemars::Schema, names: &[&str]) {
    let alone = schemars::json_schema!({
        "description": "The name alone: the defaults of its settings.",
        "type": "string",
        "enum": names,
    });
    if let Some(variants) = schema.get_mut("oneOf").and_then(|variants| variants.as_array_mut()) {
        variants.push(alone.to_value());
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use crate::{Adaptive, MuonConfig, UpdateScale};

    fn read<T: for<'de> Deserialize<'de>>(text: &str) -> Result<T, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_name_alone_takes_the_defaults_of_its_fields() {
        assert_eq!(read(r#""report""#), Ok(UpdateScale::Report { factor: 0.2 }));
        assert_eq!(read(r#"{"report": {"factor": 0.3}}"#), Ok(UpdateScale::Report { factor: 0.3 }));
        assert_eq!(read(r#""spectral""#), Ok(UpdateScale::Spectral));
        assert_eq!(read(r#""nor_muon""#), Ok(Adaptive::nor_muon()));
        let unsigned = Adaptive::AdaMuon { beta_2: 0.95, epsilon: 1e-8, sign: false };
        assert_eq!(read(r#"{"ada_muon": {"sign": false}}"#), Ok(unsigned));
    }

    #[test]
    fn errors_name_the_wrong_variant_or_field() {
        let error = read::<UpdateScale>(r#""repport""#).unwrap_err();
        assert!(error.contains("unknown variant `repport`, expected one of `report`"), "{error}");
        let error = read::<UpdateScale>(r#"{"report": {"faktor": 1.0}}"#).unwrap_err();
        assert!(error.contains("unknown field `faktor`"), "{error}");
        let error = read::<UpdateScale>("3").unwrap_err();
        assert!(error.contains("a name, or a table of one name and its settings"), "{error}");
        let error = read::<MuonConfig>(r#"{"scale": "unit", "momentun": 1}"#).unwrap_err();
        assert!(error.contains("unknown field `momentun`"), "{error}");
    }

    #[cfg(feature = "schema")]
    #[test]
    fn the_schema_has_the_serde_names_and_the_bare_names() {
        let schema = schemars::schema_for!(MuonConfig).to_value();
        let properties = schema["properties"].as_object().unwrap();
        let written = serde_json::to_value(MuonConfig::new()).unwrap();
        let names = |object: &serde_json::Map<String, serde_json::Value>| {
            object.keys().cloned().collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(names(properties), names(written.as_object().unwrap()));
        let scale = schema["$defs"]["UpdateScale"]["oneOf"].as_array().unwrap();
        assert!(
            scale.iter().any(|variant| variant["enum"] == serde_json::json!(["report", "update_norm", "hidden_size"]))
        );
        assert!(scale.iter().any(|variant| !variant["properties"]["report"].is_null()));
    }
}

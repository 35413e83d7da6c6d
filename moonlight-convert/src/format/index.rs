//! `model.safetensors.index.json`, which maps tensors to shards.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::CheckpointError;
use crate::io::confined_dir::ConfinedDir;
use crate::printable::is_command;

/// The index's file name.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The file name of weights in a single file, without an index.
pub(crate) const SINGLE: &str = "model.safetensors";

/// Size limit of an index in bytes; that of Kimi-K2, with 139,644 tensors, has about 15 MB.
const LONGEST: u64 = 100_000_000;

/// The index in the layout of transformers.
#[derive(Debug, Serialize)]
pub(crate) struct Index {
    /// Empty for an index that was read.
    pub(crate) metadata: serde_json::Map<String, serde_json::Value>,
    /// Tensor name to file name.
    pub(crate) weight_map: BTreeMap<String, String>,
}

/// The fields that are read.
#[derive(Deserialize)]
struct IndexFile {
    #[serde(rename = "metadata", default)]
    _metadata: IgnoredAny,
    #[serde(deserialize_with = "unique_keys")]
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads the index and checks that every file in it is inside the directory; `None` without an index.
    pub(crate) fn read(confined: &ConfinedDir, dir: &Path) -> Result<Option<Self>, CheckpointError> {
        let Some(text) = confined.read(INDEX, LONGEST)? else { return Ok(None) };
        Self::parse(&text, dir.join(INDEX)).map(Some)
    }

    pub(crate) fn parse(text: &[u8], path: PathBuf) -> Result<Self, CheckpointError> {
        let problem = match serde_json::from_slice::<IndexFile>(text) {
            Err(error) => format!("is not an index of safetensors files: {error}"),
            Ok(IndexFile { weight_map, .. }) if weight_map.is_empty() => "lists no tensors".into(),
            Ok(IndexFile { weight_map, .. }) => {
                return match weight_map.iter().find(|(_, file)| !is_inside(file)) {
                    None => Ok(Self { metadata: serde_json::Map::new(), weight_map }),
                    Some((tensor, entry)) => {
                        Err(CheckpointError::OutsideDirectory { path, tensor: tensor.clone(), entry: entry.clone() })
                    }
                };
            }
        };
        Err(CheckpointError::Index { path, problem })
    }

    pub(crate) fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("an index is maps of strings and numbers");
        text.push('\n');
        text
    }
}

/// A map without duplicate keys. JSON libraries differ in whether the first or the last duplicate counts, so that two
/// programs would see two models.
fn unique_keys<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
    struct UniqueKeys;
    impl<'de> Visitor<'de> for UniqueKeys {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a map of tensors to files")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
            let mut map = BTreeMap::new();
            while let Some((tensor, file)) = access.next_entry::<String, String>()? {
                if let Some(problem) = unprintable(&tensor) {
                    return Err(A::Error::custom(problem));
                }
                match map.entry(tensor) {
                    Entry::Vacant(entry) => entry.insert(file),
                    Entry::Occupied(entry) => {
                        return Err(A::Error::custom(format!("`{}` is listed twice", entry.key())));
                    }
                };
            }
            Ok(map)
        }
    }
    deserializer.deserialize_map(UniqueKeys)
}

/// The problem with a name that contains a terminal command or a line break, which could forge a line of a report.
pub(crate) fn unprintable(name: &str) -> Option<String> {
    let character = name.chars().find(|character| is_command(*character))?;
    Some(format!("the name `{}` contains the control character U+{:04X}", name.escape_debug(), u32::from(character)))
}

/// Whether a relative path stays below its directory. Symbolic links are checked when the file is opened.
pub(crate) fn is_inside(file: &str) -> bool {
    let mut components = Path::new(file).components().peekable();
    components.peek().is_some()
        && components.all(|component| matches!(component, Component::Normal(_)))
        && !file.contains(['\\', ':'])
        && unprintable(file).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_outside_the_directory_are_recognized() {
        for file in ["model-1-of-27.safetensors", "shards/a.safetensors", "..model"] {
            assert!(is_inside(file), "{file}");
        }
        for file in [
            "../../etc/passwd",
            "a/../../b",
            "/etc/passwd",
            "..",
            "",
            "C:\\weights",
            "..\\weights",
            "a\0b",
            "a\x1b[2J",
            "a\u{202e}b",
        ] {
            assert!(!is_inside(file), "{file}");
        }
    }

    #[test]
    fn inconsistent_indexes_are_refused() {
        let error = |text: &str| Index::parse(text.as_bytes(), "index".into()).unwrap_err().to_string();
        let map = |entries: &str| format!(r#"{{"metadata": {{"total_size": 1e9}}, "weight_map": {{{entries}}}}}"#);
        assert_eq!(Index::parse(map(r#""a": "b""#).as_bytes(), "index".into()).unwrap().weight_map["a"], "b");
        assert!(error(&map(r#""a": "b", "a": "c""#)).contains("`a` is listed twice"));
        assert!(error(&map("")).contains("lists no tensors"));
        assert!(error(&map(r#""a": "/etc/passwd""#)).contains("maps the tensor `a` to `/etc/passwd`"));
        assert!(error(&map(r#""a\u001b[2J": "b""#)).contains("control character U+001B"));
        assert!(error(&map(r#""a": 1"#)).contains("invalid type"));
        assert!(error(r#"{"weight_map": {}, "weight_map": {}}"#).contains("duplicate field"));
        assert!(error("{").contains("EOF"));
        assert!(error(&"[".repeat(100_000)).contains("is not an index"));
        assert!(Index::parse(b"\xFF", "index".into()).is_err());
    }
}

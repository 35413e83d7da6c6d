//! `model.safetensors.index.json`: which tensor lies in which shard.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use crate::error::CheckpointError;

/// The index's file name.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The file name of weights that need no index.
pub(crate) const SINGLE: &str = "model.safetensors";

/// The index, as transformers writes it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Index {
    #[serde(default)]
    pub(crate) metadata: serde_json::Map<String, serde_json::Value>,
    /// Tensor name to file name.
    pub(crate) weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads the index and checks that every entry is a file below the index's directory.
    pub(crate) fn read(path: &Path) -> Result<Self, CheckpointError> {
        let text = fs::read(path).map_err(CheckpointError::read(path))?;
        let index: Self = serde_json::from_slice(&text).map_err(|error| CheckpointError::Index {
            path: path.to_path_buf(),
            problem: format!("is not an index of safetensors files: {error}"),
        })?;
        if index.weight_map.is_empty() {
            return Err(CheckpointError::Index { path: path.to_path_buf(), problem: "lists no tensor".into() });
        }
        match index.weight_map.iter().find(|(_, file)| !stays_inside(file)) {
            None => Ok(index),
            Some((tensor, entry)) => {
                Err(CheckpointError::Escape { path: path.to_path_buf(), tensor: tensor.clone(), entry: entry.clone() })
            }
        }
    }

    pub(crate) fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("an index is maps of strings and numbers");
        text.push('\n');
        text
    }
}

/// Whether a relative path names something below where it starts from. Links are followed (a Hub cache is made of
/// them): what matters is what the entry itself can say.
pub(crate) fn stays_inside(file: &str) -> bool {
    let mut components = Path::new(file).components().peekable();
    components.peek().is_some()
        && components.all(|component| matches!(component, Component::Normal(_)))
        && !file.contains(['\\', '\0'])
        && !file.contains(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_stay_inside() {
        for file in ["model-1-of-27.safetensors", "shards/a.safetensors", "..model"] {
            assert!(stays_inside(file), "{file}");
        }
        for file in ["../../etc/passwd", "a/../../b", "/etc/passwd", "..", "", "C:\\weights", "..\\weights"] {
            assert!(!stays_inside(file), "{file}");
        }
    }
}

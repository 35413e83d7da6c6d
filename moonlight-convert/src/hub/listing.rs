//! The files of a repository, and the selection of those to download.

use glob::Pattern;
use serde::Deserialize;

use super::digest::Digest;
use super::is_commit;
use crate::format::index::is_inside;
use crate::format::sidecars::belongs_to_checkpoint;

/// The files of a repository at a commit.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<RemoteFile>,
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RemoteFile {
    /// Its path in the repository, which has been checked to stay below the snapshot.
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) digest: Digest,
}

/// The fields read from the Hub's answer to `/api/models/REPO/revision/REVISION?blobs=true`.
#[derive(Deserialize)]
struct ListResponse {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl Listing {
    /// Parses the answer, and refuses names and digests that could lead out of the cache.
    pub(super) fn parse(answer: &[u8], wanted: &FileSelection) -> Result<Self, String> {
        let ListResponse { sha, siblings } = serde_json::from_slice(answer).map_err(|error| error.to_string())?;
        if !is_commit(&sha) {
            return Err(format!("`{}` is not a commit", sha.escape_debug()));
        }
        let mut files = Vec::new();
        for sibling in siblings.into_iter().filter(|sibling| wanted.includes(&sibling.rfilename)) {
            files.push(sibling.checked()?);
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(pair) = files.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(format!("`{}` is listed twice", pair[0].name));
        }
        Ok(Self { commit: sha.to_ascii_lowercase(), files })
    }
}

impl Sibling {
    fn checked(self) -> Result<RemoteFile, String> {
        let name = self.rfilename;
        if !is_inside(&name) {
            return Err(format!("`{}` is not a file below the repository", name.escape_debug()));
        }
        let (digest, size) = match self.lfs {
            Some(lfs) => (Digest::sha256(&lfs.sha256), Some(lfs.size)),
            None => (self.blob_id.as_deref().and_then(Digest::git), self.size),
        };
        match (digest, size) {
            (Some(digest), Some(size)) => Ok(RemoteFile { name, size, digest }),
            _ => Err(format!("it has no size or digest for `{name}`")),
        }
    }
}

/// The selection of files to download.
#[derive(Debug)]
pub(super) enum FileSelection {
    /// The files of a checkpoint: config, index, safetensors, tokenizer, remote code; nothing in folders.
    Checkpoint,
    /// Files that match one of the patterns; `*` also matches `/`, as in `huggingface_hub`.
    Matching(Vec<Pattern>),
}

impl FileSelection {
    fn includes(&self, name: &str) -> bool {
        match self {
            Self::Checkpoint => !name.contains('/') && belongs_to_checkpoint(name),
            Self::Matching(patterns) => patterns.iter().any(|pattern| pattern.matches(name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SHA: &str = "4e735b07a89f73647dfab71ab91b840f362ede5b";

    fn parse(siblings: &serde_json::Value, wanted: &FileSelection) -> Result<Vec<String>, String> {
        let answer = json!({"sha": SHA, "private": false, "siblings": siblings}).to_string();
        Listing::parse(answer.as_bytes(), wanted).map(|list| list.files.into_iter().map(|file| file.name).collect())
    }

    fn file(name: &str) -> serde_json::Value {
        json!({"rfilename": name, "size": 3, "blobId": SHA})
    }

    #[test]
    fn checkpoint_files_are_selected() {
        let names = [
            "README.md",
            "config.json",
            "figures/scaling.png",
            "model-1-of-2.safetensors",
            "modeling_deepseek.py",
            "model.safetensors.index.json",
            "original/model.safetensors",
            "pytorch_model.bin",
            "tiktoken.model",
        ];
        let all = json!(names.map(file));
        let taken = parse(&all, &FileSelection::Checkpoint).unwrap();
        let expected = [
            "config.json",
            "model-1-of-2.safetensors",
            "model.safetensors.index.json",
            "modeling_deepseek.py",
            "tiktoken.model",
        ];
        assert_eq!(taken, expected);
        let patterns = ["*.bin", "*scaling*"].map(|pattern| Pattern::new(pattern).unwrap()).to_vec();
        assert_eq!(
            parse(&all, &FileSelection::Matching(patterns)).unwrap(),
            ["figures/scaling.png", "pytorch_model.bin"]
        );
    }

    #[test]
    fn names_and_digests_that_lead_out_of_the_cache_are_refused() {
        let all = FileSelection::Matching(vec![Pattern::new("*").unwrap()]);
        for name in ["../config.json", "/etc/passwd", "a/../../b", "a\\b", "C:x", "a\nb"] {
            let error = parse(&json!([file(name)]), &all).unwrap_err();
            assert!(error.contains("not a file below"), "{error}");
        }
        let with = |sibling| parse(&json!([sibling]), &all).unwrap_err();
        assert!(with(json!({"rfilename": "a", "size": 1, "blobId": "../../etc"})).contains("digest for `a`"));
        assert!(with(json!({"rfilename": "a", "size": 1})).contains("digest for `a`"));
        assert!(with(json!({"rfilename": "a", "blobId": SHA})).contains("digest for `a`"));
        assert!(with(json!({"rfilename": "a", "lfs": {"sha256": SHA, "size": 1}})).contains("digest for `a`"));
        assert!(with(json!({"rfilename": "a", "size": -1, "blobId": SHA})).contains("invalid value"));
        assert!(parse(&json!([file("a"), file("a")]), &all).unwrap_err().contains("`a` is listed twice"));
        assert!(Listing::parse(br#"{"sha": "../x", "siblings": []}"#, &all).unwrap_err().contains("is not a commit"));
        assert!(Listing::parse(b"<html>", &all).is_err());
    }
}

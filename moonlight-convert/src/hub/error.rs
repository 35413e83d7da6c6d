//! Errors of downloads.

use std::io;
use std::path::PathBuf;

use crate::error::{Bytes, CheckpointError};
use crate::io::file_error::is_full;
use crate::printable::Printable;

/// Why a download failed. What was received stays in the cache, and the same command resumes from it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DownloadError {
    /// The name is not valid for a repository.
    #[error("`{}` is not the name of a model on the Hub", Printable(repo))]
    Name {
        /// The text as given.
        repo: String,
    },
    /// The text is not valid for a branch, tag or commit.
    #[error("`{}` is not a branch, tag or commit", Printable(revision))]
    Revision {
        /// The text as given.
        revision: String,
    },
    /// The pattern is not a valid glob.
    #[error("`{}` is not a pattern of file names: {problem}", Printable(pattern))]
    Pattern {
        /// The text as given.
        pattern: String,
        /// What is wrong.
        problem: String,
    },
    /// `HF_HUB_OFFLINE` is set, and the cache has no snapshot.
    #[error("`{repo}` at `{revision}` is not in the cache `{}`, and `HF_HUB_OFFLINE` forbids downloads", Printable(cache.display()))]
    Offline {
        /// The repository.
        repo: String,
        /// The revision.
        revision: String,
        /// The cache.
        cache: PathBuf,
    },
    /// The server requires a token, or the token has no access.
    #[error("the Hub denies access to `{repo}` {} (status {status})", if *token { "with this token" } else { "without a token" })]
    Refused {
        /// The repository.
        repo: String,
        /// 401 or 403.
        status: u16,
        /// Whether a token was sent.
        token: bool,
        /// The page of the model.
        page: String,
    },
    /// The repository, revision or file does not exist.
    #[error("{} does not exist (status 404)", Printable(what))]
    NotFound {
        /// The missing item, as a noun phrase.
        what: String,
    },
    /// The token in the environment is invalid.
    #[error("the token in {} {problem}", Printable(place))]
    Token {
        /// The variable or file that it comes from.
        place: String,
        /// What is wrong, as the rest of a sentence that does not show the token.
        problem: String,
    },
    /// `HF_ENDPOINT` is not a valid address.
    #[error("`HF_ENDPOINT` is not a server address: {problem}")]
    Endpoint {
        /// What is wrong.
        problem: String,
    },
    /// The server is unreachable.
    #[error("`{}` cannot be reached: {}", Printable(endpoint), Printable(problem))]
    Network {
        /// The server.
        endpoint: String,
        /// The network error.
        problem: String,
    },
    /// The server answered with an error status.
    #[error("`{}` answered with status {status}", Printable(url))]
    Status {
        /// The address without credentials.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// The server's list of files is invalid.
    #[error(
        "the list of files that `{}` gives for `{repo}` cannot be used: {}",
        Printable(endpoint),
        Printable(problem)
    )]
    List {
        /// The server.
        endpoint: String,
        /// The repository.
        repo: String,
        /// What is wrong.
        problem: String,
    },
    /// No file of the repository matches.
    #[error("`{repo}` has no file that matches")]
    NoMatch {
        /// The repository.
        repo: String,
    },
    /// The disk has too little free space.
    #[error("too little disk space for {} of downloads: the disk of `{}` has {} free", Bytes(*needed), Printable(cache.display()), Bytes(*free))]
    Full {
        /// The cache.
        cache: PathBuf,
        /// Bytes that remain to be downloaded.
        needed: u64,
        /// Free space in bytes.
        free: u64,
    },
    /// The connection failed too often without progress.
    #[error("`{file}` is incomplete after {tries} attempts, with {got} of {size} bytes: {}", Printable(problem))]
    Incomplete {
        /// The file.
        file: String,
        /// Bytes received so far.
        got: u64,
        /// Size of the file in bytes.
        size: u64,
        /// Number of attempts.
        tries: u32,
        /// Why the last attempt failed.
        problem: String,
    },
    /// The received file differs from the one listed.
    #[error("`{file}` is damaged: its digest is {found}, and the Hub lists {expected}")]
    Digest {
        /// The file.
        file: String,
        /// The digest in the list.
        expected: String,
        /// The digest of the received bytes.
        found: String,
    },
    /// A file of the cache cannot be read or written.
    #[error("`{}` in the Hub's cache cannot be {}: {source}", Printable(path.display()), if *write { "written" } else { "read" })]
    Cache {
        /// The file.
        path: PathBuf,
        /// Whether writing failed; otherwise reading.
        write: bool,
        /// The system's error.
        source: io::Error,
    },
    /// The snapshot in the cache cannot be opened.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The download was stopped because another file failed.
    #[error("the download was stopped")]
    Aborted,
}

impl DownloadError {
    pub(super) fn read(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Cache { path, write: false, source }
    }

    pub(super) fn write(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Cache { path, write: true, source }
    }

    /// What to do, where something helps.
    pub fn hint(&self) -> Option<String> {
        let again = "run the same command again; it resumes where it stopped";
        match self {
            Self::Name { .. } => Some("use the form `organization/model`, e.g. `moonshotai/Moonlight-16B-A3B`".into()),
            Self::Refused { token: false, page, .. } => Some(format!(
                "request access at {page} and set `HF_TOKEN`, if the model is private or gated; check the name otherwise"
            )),
            Self::Refused { token: true, page, .. } => Some(format!(
                "check that the token in `HF_TOKEN` (or of `hf auth login`) is valid, and request access at {page}"
            )),
            Self::Checkpoint(error) => error.hint(),
            Self::Token { .. } => Some("copy the token again, without other characters".into()),
            Self::Endpoint { .. } => {
                Some("set it to `https://` or `http://` and a host, e.g. `https://huggingface.co`".into())
            }
            Self::NotFound { .. } => Some("check the name and revision on the model's page".into()),
            Self::Offline { .. } => Some("unset `HF_HUB_OFFLINE`".into()),
            Self::Network { .. } => {
                Some("check the network, `HTTPS_PROXY`, and `HF_ENDPOINT` if you use a mirror".into())
            }
            Self::Status { status: 429, .. } => Some("wait, or set `HF_TOKEN`: the Hub limits the rate of requests".into()),
            Self::Status { status: 500.., .. } | Self::Incomplete { .. } => Some(again.into()),
            Self::NoMatch { .. } => Some("use the pattern `*` for all files".into()),
            Self::Full { .. } => Some("free some disk space, or move the cache with `HF_HOME`".into()),
            Self::Digest { .. } => Some(
                "run the same command again; the damaged file has been removed. If it is damaged again, check proxies on the way"
                    .into(),
            ),
            Self::Cache { source, write: true, .. } if is_full(source) => Some(format!("free some disk space and {again}")),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{every_variant, rendered};

    #[test]
    fn messages_and_hints() {
        use DownloadError as E;
        let repo = || "moonshotai/Kimi".to_owned();
        let page = || "https://huggingface.co/moonshotai/Kimi".to_owned();
        let file = || "model.safetensors".to_owned();
        let examples = every_variant!(DownloadError:
            E::Name { .. } => [E::Name { repo: "../etc".into() }],
            E::Revision { .. } => [E::Revision { revision: "../v1".into() }],
            E::Pattern { .. } => [E::Pattern { pattern: "***".into(), problem: "wildcards are `*` or `**`".into() }],
            E::Offline { .. } => [E::Offline { repo: repo(), revision: "main".into(), cache: "cache".into() }],
            E::Refused { .. } => [
                E::Refused { repo: repo(), status: 401, token: false, page: page() },
                E::Refused { repo: repo(), status: 403, token: true, page: page() },
            ],
            E::NotFound { .. } => [E::NotFound { what: "the file `config.json` in `moonshotai/Kimi`".into() }],
            E::Token { .. } => [E::Token { place: "`HF_TOKEN`".into(), problem: "has more than one line".into() }],
            E::Endpoint { .. } => [E::Endpoint { problem: "it is not a valid address".into() }],
            E::Network { .. } => [E::Network { endpoint: "https://hub".into(), problem: "connection refused".into() }],
            E::Status { .. } => [
                E::Status { url: page(), status: 429 },
                E::Status { url: page(), status: 500 },
                E::Status { url: page(), status: 418 },
            ],
            E::List { .. } => [E::List {
                endpoint: "https://hub".into(),
                repo: repo(),
                problem: "`config.json` is listed twice".into(),
            }],
            E::NoMatch { .. } => [E::NoMatch { repo: repo() }],
            E::Full { .. } => [E::Full { cache: "cache".into(), needed: 31_920_223_872, free: 5_300_000 }],
            E::Incomplete { .. } => [E::Incomplete {
                file: file(),
                got: 5,
                size: 10,
                tries: 6,
                problem: "the connection was closed".into(),
            }],
            E::Digest { .. } => [E::Digest { file: file(), expected: "00ff".into(), found: "ff00".into() }],
            E::Cache { .. } => [
                E::read("cache/blobs/00ff")(io::ErrorKind::PermissionDenied.into()),
                E::write("cache/blobs/00ff")(io::ErrorKind::StorageFull.into()),
            ],
            E::Checkpoint(_) => [E::Checkpoint(CheckpointError::Link { path: "cache/snapshots/00ff".into() })],
            E::Aborted => [E::Aborted],
        );
        let text: String = examples.iter().map(|error| rendered(error, error.hint())).collect();
        insta::assert_snapshot!(text);
    }
}

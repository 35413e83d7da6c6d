//! What can go wrong between the Hub and its cache.

use std::io;
use std::path::PathBuf;

use crate::error::{Bytes, CheckpointError};
use crate::io::file_error::is_full;
use crate::printable::Printable;

/// A download that did not end with every file in the cache. What was fetched stays there, and the same command goes on
/// from it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DownloadError {
    /// Not the name of a repository.
    #[error("`{}` is not the name of a model on the Hub", Printable(repo))]
    Name {
        /// As given.
        repo: String,
    },
    /// Not a branch, tag or commit.
    #[error("`{}` is not a branch, tag or commit", Printable(revision))]
    Revision {
        /// As given.
        revision: String,
    },
    /// Not a glob.
    #[error("`{}` is not a pattern of file names: {problem}", Printable(pattern))]
    Pattern {
        /// As given.
        pattern: String,
        /// What is wrong with it.
        problem: String,
    },
    /// `HF_HUB_OFFLINE` is set, and the cache has no snapshot.
    #[error("`{repo}` at `{revision}` is not in the cache `{}`, and `HF_HUB_OFFLINE` forbids to fetch it", Printable(cache.display()))]
    Offline {
        /// The repository.
        repo: String,
        /// The revision.
        revision: String,
        /// The cache.
        cache: PathBuf,
    },
    /// The server wants to know who asks, or will not give it to who asks.
    #[error("the Hub does not let {} read `{repo}` (status {status})", if *token { "the owner of this token" } else { "anybody" })]
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
    /// There is no such repository, revision or file.
    #[error("there is no {} (status 404)", Printable(what))]
    NotFound {
        /// What was asked for.
        what: String,
    },
    /// The token in the environment is none.
    #[error("the token in {} {problem}", Printable(place))]
    Token {
        /// The variable or file that it comes from.
        place: String,
        /// What is wrong with it, as the rest of a sentence that does not show it.
        problem: String,
    },
    /// `HF_ENDPOINT` is no address.
    #[error("`HF_ENDPOINT` is no address of a server: {problem}")]
    Endpoint {
        /// What is wrong with it.
        problem: String,
    },
    /// The server cannot be reached.
    #[error("`{}` cannot be reached: {}", Printable(endpoint), Printable(problem))]
    Network {
        /// The server.
        endpoint: String,
        /// What went wrong.
        problem: String,
    },
    /// The server answered with an error.
    #[error("`{}` answers with status {status}", Printable(url))]
    Status {
        /// What was asked for.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// The server's list of files is not what it must be.
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
        /// What is wrong with it.
        problem: String,
    },
    /// No file is asked for.
    #[error("`{repo}` has no file that matches")]
    NoMatch {
        /// The repository.
        repo: String,
    },
    /// The disk has no room for what is missing.
    #[error("{} are to be fetched, and the disk of `{}` has {} free", Bytes(*needed), Printable(cache.display()), Bytes(*free))]
    Full {
        /// The cache.
        cache: PathBuf,
        /// Bytes that are missing.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The connection broke again and again.
    #[error("`{file}` stops at {got} of {size} bytes after {tries} tries: {}", Printable(problem))]
    Incomplete {
        /// The file.
        file: String,
        /// Bytes that are there.
        got: u64,
        /// Bytes of the whole.
        size: u64,
        /// Tries in all.
        tries: u32,
        /// How the last one ended.
        problem: String,
    },
    /// A file that is not the one that the repository lists.
    #[error("`{file}` is damaged: its digest is {found} and the Hub lists {expected}")]
    Digest {
        /// The file.
        file: String,
        /// What the Hub says.
        expected: String,
        /// What was received.
        found: String,
    },
    /// A file of the cache cannot be read or written.
    #[error("the cache's `{}` cannot be {}: {source}", Printable(path.display()), if *write { "written" } else { "read" })]
    Cache {
        /// The file.
        path: PathBuf,
        /// Whether it was to be written.
        write: bool,
        /// Why.
        source: io::Error,
    },
    /// The cache holds something that is not read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Another file failed first.
    #[error("the download was given up")]
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

    /// What to do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        let again = "run the same command again: it goes on from what is there";
        match self {
            Self::Name { .. } => Some("a name is `organization/model`, e.g. `moonshotai/Moonlight-16B-A3B`".into()),
            Self::Refused { token: false, page, .. } => Some(format!(
                "it does not exist, or is private or gated: ask for access at {page} and set `HF_TOKEN` to a token of yours"
            )),
            Self::Refused { token: true, page, .. } => Some(format!(
                "look whether the token in `HF_TOKEN` (or `hf auth login`) is valid, and ask for access at {page}"
            )),
            Self::Checkpoint(error) => error.hint(),
            Self::Token { .. } => Some("copy the token once more, without anything before, in or behind it".into()),
            Self::Endpoint { .. } => {
                Some("it begins with `https://` or `http://` and a host, e.g. `https://huggingface.co`".into())
            }
            Self::NotFound { .. } => Some("look for the name and revision on the model's page".into()),
            Self::Offline { .. } => Some("unset `HF_HUB_OFFLINE`".into()),
            Self::Network { .. } => {
                Some("look at the network, at `HTTPS_PROXY`, and at `HF_ENDPOINT` if a mirror is meant".into())
            }
            Self::Status { status: 429, .. } => Some("the Hub asks to wait; a token in `HF_TOKEN` may do more".into()),
            Self::Status { status: 500.., .. } | Self::Incomplete { .. } => Some(again.into()),
            Self::NoMatch { .. } => Some("the pattern `*` takes every file".into()),
            Self::Full { .. } => Some("free some space, or put the cache elsewhere by `HF_HOME`".into()),
            Self::Digest { .. } => Some(
                "the damaged file is removed; if it comes damaged again, something between the Hub and here changes it"
                    .into(),
            ),
            Self::Cache { source, write: true, .. } if is_full(source) => Some(format!("free some space, and {again}")),
            _ => None,
        }
    }
}

//! How a download goes, told while it goes.

/// Something that happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DownloadEvent<'a> {
    /// What is to be had is known.
    Started {
        /// Files.
        files: usize,
        /// Bytes of all of them.
        bytes: u64,
    },
    /// So many bytes were in the cache already and are right, as far as can be said before a file is whole.
    Cached {
        /// The bytes.
        bytes: u64,
    },
    /// So many bytes came.
    Fetched {
        /// The bytes.
        bytes: u64,
    },
    /// So many bytes that were there are of no use.
    Discarded {
        /// The bytes.
        bytes: u64,
    },
    /// A file is asked for once more.
    Retrying {
        /// The file.
        file: &'a str,
        /// Why.
        problem: &'a str,
    },
    /// Another process writes the same file: it is waited for.
    Waiting {
        /// The file.
        file: &'a str,
    },
    /// A file is in the cache, whole and checked.
    Finished {
        /// The file.
        file: &'a str,
        /// Its size.
        bytes: u64,
        /// Whether anything of it had to be fetched.
        fetched: bool,
    },
}

//! Progress of a download.

/// An event of a download, from which a program draws a progress bar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DownloadEvent<'a> {
    /// The list of files has been received.
    Started {
        /// Number of files.
        files: usize,
        /// Their total size in bytes.
        bytes: u64,
    },
    /// Bytes were already in the cache, complete and checked or part of a file that is checked when it is complete.
    Cached {
        /// Number of bytes.
        bytes: u64,
    },
    /// Bytes were received.
    Fetched {
        /// Number of bytes.
        bytes: u64,
    },
    /// Bytes that were in the cache or received had to be discarded.
    Discarded {
        /// Number of bytes.
        bytes: u64,
    },
    /// A request for a file is repeated.
    Retrying {
        /// The file's name in the repository.
        file: &'a str,
        /// Why the previous one failed.
        problem: &'a str,
    },
    /// Another process is downloading the same file. This one waits for it.
    Waiting {
        /// The file's name in the repository.
        file: &'a str,
    },
    /// A file is in the cache, complete and checked.
    Finished {
        /// The file's name in the repository.
        file: &'a str,
        /// Its size in bytes.
        bytes: u64,
        /// Whether any part of it had to be downloaded.
        fetched: bool,
    },
}

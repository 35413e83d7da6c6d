//! Input and output: prefetching, parallel copying, writing, and replacing directories atomically.

pub(crate) mod atomic_dir;
pub(crate) mod confined_dir;
pub(crate) mod disk_space;
pub(crate) mod file_error;
pub(crate) mod parallel_copy;
pub(crate) mod prefetch;
pub(crate) mod read_at;
pub mod storage;
pub(crate) mod temporary;
pub(crate) mod writer;

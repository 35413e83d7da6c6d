//! The subcommands, one a file.

pub(crate) mod convert;
#[cfg(feature = "download")]
pub(crate) mod download;
pub(crate) mod inspect;
mod progress;
pub(crate) mod tokenizer;
pub(crate) mod verify;

//! The subcommands, one a file, and what helps against their errors.

pub(crate) mod convert;
#[cfg(feature = "download")]
pub(crate) mod download;
pub(crate) mod hint;
pub(crate) mod inspect;
pub(crate) mod output;
mod progress;
#[cfg(all(test, feature = "download"))]
mod reference;
pub(crate) mod signals;
pub(crate) mod tokenizer;
pub(crate) mod verify;

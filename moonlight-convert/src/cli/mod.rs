//! The subcommands, one per file, and hints in terms of this program's options.

mod adapter;
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
mod units;
pub(crate) mod verify;

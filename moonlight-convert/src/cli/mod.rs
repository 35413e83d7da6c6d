//! The subcommands, one a file.

pub(crate) mod convert;
pub(crate) mod inspect;
mod progress;
pub(crate) mod verify;

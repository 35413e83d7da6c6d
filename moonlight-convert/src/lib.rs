#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! * [`Checkpoint`] is an opened and validated directory; [`load`](fn@load) makes a model of it, [`save`](fn@save) writes one.
//! * [`report`] describes, checks and compares checkpoints; [`manifest`] detects later damage.
//! * [`adapter`] reads and writes LoRA adapters in peft's layout.
//! * [`hub`] finds models in the Hub's cache and downloads into it; [`tokenizer`] writes `tokenizer.json`.
//!
//! `mapping/names.rs` is the only file that spells a tensor name of Hugging Face, and `adapter/names.rs` one of peft.
//!
//! Errors are values ([`CheckpointError`], [`adapter::AdapterError`]): a sentence, and a `hint()` where something helps.

pub mod adapter;
mod checkpoint;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
mod dtype;
mod error;
mod format;
#[doc(hidden)]
pub mod fuzzing;
mod hangup;
pub mod hub;
mod io;
mod load;
pub mod manifest;
mod mapping;
mod module_path;
mod printable;
mod progress;
mod quantize;
pub mod report;
mod save;
pub mod tokenizer;

pub use checkpoint::{Checkpoint, StoredTensor, TiedHead, WeightFile};
pub use dtype::conversion::WeightDtype;
pub use error::CheckpointError;
pub use format::gguf;
#[doc(hidden)]
pub use format::pack_quantized::{WrittenTensor, written_config, written_tensors};
pub use format::sidecars::sidecars_in;
pub use format::tensor_entry::StoredDtype;
#[doc(hidden)]
pub use hangup::hangup_is_ignored;
pub use io::atomic_dir::{clean_leftovers, remove_directory, replace_directory};
pub use io::confined_dir::ConfinedDir;
pub use io::file_error::{Access, FileError};
#[doc(hidden)]
pub use io::storage;
#[doc(hidden)]
pub use io::temporary::new_file;
pub use load::quantized::LoadQuantization;
pub use load::{LoadReport, Loaded, load};
pub use mapping::names::{HfTensor, SkipReason, hugging_face_tensors};
pub use printable::{Printable, printable, printable_lines};
pub use progress::Progress;
pub use quantize::QuantizeReport;
pub use save::{Format, SaveOptions, save, write_into};

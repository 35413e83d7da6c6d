//! Hugging Face checkpoints of the Moonlight family to Burn modules and back.
//!
//! ```
//! use burn::tensor::{DType, Device};
//! use moonlight_convert::{SaveOptions, load, save};
//! use moonlight_model::ModelConfig;
//!
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("model");
//! # let mut config = ModelConfig::preset("bench-small")?;
//! # (config.vocab_size, config.num_hidden_layers, config.hidden_size) = (64, 2, 32);
//! let device = Device::default();
//! let model = config.init(&device);
//! save(&model, &path, &SaveOptions { dtype: Some(DType::BF16), ..SaveOptions::default() })?;
//!
//! let loaded = load(&path, &device, None)?; // as stored: bf16
//! assert_eq!(loaded.model.dtype(), DType::BF16);
//! println!("{}", loaded.report);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! * [`Checkpoint`] is a directory, opened and checked but not read; [`load`] makes a model of it.
//! * [`save`] writes a directory that transformers, vLLM and SGLang open, in one step that a crash cannot halve.
//! * [`Checkpoint::convert`] rewrites one without building the model: in another dtype, in other files, as Burn's burnpack
//!   and back, in little memory, whatever its size.
//! * [`Checkpoint::load_part`] loads one layer, or any other part, without reading the rest.
//! * [`report`] has what is said of a checkpoint: [`Checkpoint::summary`], [`Checkpoint::problems`],
//!   [`Checkpoint::compare`], [`report::check_digests`].
//! * [`manifest`] says whether a checkpoint is what was written.
//! * [`adapter`] reads and writes LoRA adapters as peft lays them out.
//!
//! Files are read at their places, and all metadata is validated before use. Weights may be bf16, f16 or f32, FP8 in blocks or
//! INT4 in groups; quantized ones are dequantized on the way. `mapping/names.rs` is the only file that spells a tensor name
//! of Hugging Face's, `adapter/names.rs` one of peft's.
//!
//! Errors are values ([`CheckpointError`], [`adapter::AdapterError`]): a sentence, and a `hint()` where we know what helps.

pub mod adapter;
mod checkpoint;
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
mod printable;
mod progress;
pub mod report;
mod save;
pub mod tokenizer;

pub use checkpoint::{Checkpoint, StoredTensor, TiedHead, WeightFile};
pub use dtype::conversion::WeightDtype;
pub use error::CheckpointError;
pub use format::sidecars::sidecars_in;
#[doc(hidden)]
pub use hangup::hangup_is_ignored;
pub use io::atomic_dir::{clean_leftovers, remove_directory, replace_directory};
pub use io::confined_dir::ConfinedDir;
pub use io::file_error::{Access, FileError};
#[doc(hidden)]
pub use io::storage;
pub use load::{LoadReport, Loaded, load};
pub use mapping::names::{HfTensor, SkipReason, hugging_face_tensors};
pub use printable::{Printable, printable, printable_lines};
pub use progress::Progress;
pub use save::{Format, SaveOptions, save, write_into};

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

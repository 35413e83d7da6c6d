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
//!   and back; [`Checkpoint::compare`] says how far two are apart; both in little memory, whatever their size.
//! * [`Checkpoint::load_part`] loads one layer, or any other part, without reading the rest.
//! * [`Checkpoint::summary`] says what is in one, and [`check_digests`] whether its files are what they should be.
//! * [`adapter`] reads and writes LoRA adapters as peft lays them out.
//! * `mapping/names.rs` is the only place that spells a name of Hugging Face's, `adapter/names.rs` one of peft's.
//!
//! Files are mapped into memory and their headers checked before use; nothing of a file is believed because the file says
//! so. Weights may be bf16, f16 or f32, FP8 in blocks or INT4 in groups; quantised ones are read as what they stand for.

pub mod adapter;
mod checkpoint;
mod dtype;
mod error;
mod format;
pub mod hub;
mod io;
mod load;
mod mapping;
mod progress;
mod published;
mod report;
mod save;
pub mod tokenizer;

pub use checkpoint::{Checkpoint, StoredTensor, WeightFile};
pub use dtype::conversion::WeightDtype;
pub use error::CheckpointError;
pub use format::sidecars::companions_in;
pub use io::atomic_dir::replace_directory;
pub use load::{LoadReport, Loaded, load};
pub use mapping::names::{HfTensor, SkipReason, hugging_face_tensors};
pub use progress::Progress;
pub use published::{PublishedFile, published_files};
pub use report::compare::{Comparison, Difference, Distance};
pub use report::digests::{CheckedFile, check_digests};
pub use report::summary::{OfDtype, OfFile, Parameters, Skipped, State, Summary, Wrong, unfinished};
pub use report::validation::{Problem, Problems};
pub use save::{Format, SaveOptions, save, write_into};

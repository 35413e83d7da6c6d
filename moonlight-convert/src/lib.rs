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
//! * `names.rs` is the only place that spells a name of Hugging Face's, `adapter/names.rs` one of peft's.
//!
//! Files are mapped into memory and their headers checked before use; nothing of a file is believed because the file says
//! so. Weights may be bf16, f16 or f32, FP8 in blocks or INT4 in groups; quantised ones are read as what they stand for.

pub mod adapter;
mod burnpack;
mod check;
mod checkpoint;
mod companions;
mod compare;
mod decode;
mod digest;
mod elements;
mod error;
pub mod hub;
mod huge_pages;
mod index;
mod inside;
mod load;
mod names;
mod problem;
mod progress;
mod published;
mod quantised;
mod room;
mod save;
mod shard;
mod staging;
mod stream;
mod summary;
pub mod tokenizer;
mod transfer;
mod transposition;
mod writer;

pub use checkpoint::{Checkpoint, StoredTensor, WeightFile};
pub use companions::companions_in;
pub use compare::{Comparison, Difference, Distance};
pub use digest::{CheckedFile, check_digests};
pub use elements::WeightDtype;
pub use error::CheckpointError;
pub use load::{LoadReport, Loaded, load};
pub use names::{HfTensor, SkipReason, hugging_face_tensors};
pub use problem::{Problem, Problems};
pub use progress::Progress;
pub use published::{PublishedFile, published_files};
pub use save::{Format, SaveOptions, save, write_into};
pub use staging::replace_directory;
pub use summary::{OfDtype, OfFile, Parameters, Skipped, State, Summary, Wrong, unfinished};

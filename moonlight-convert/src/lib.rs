//! Hugging Face checkpoints of the DeepSeek-V3 family as Burn modules, and back.
//!
//! ```no_run
//! use std::path::Path;
//! use burn::tensor::{DType, Device};
//! use moonlight_convert::{SaveOptions, load, save};
//!
//! let loaded = load(Path::new("Moonlight-16B-A3B-Instruct"), &Device::default(), Some(DType::BF16))?;
//! let model = loaded.model; // a `moonlight_model::CausalLm`
//! save(&model, Path::new("tuned"), &SaveOptions::default())?;
//! # Ok::<(), moonlight_convert::CheckpointError>(())
//! ```
//!
//! Opening maps the files and checks every header against its file; loading checks every name, shape and dtype against
//! the model before it copies the first byte. Saving writes a directory that transformers opens, all or nothing.

mod checkpoint;
mod error;
mod load;
mod names;
mod plan;
mod replace;
mod save;
mod values;

pub use checkpoint::{Checkpoint, Shard, StoredTensor};
pub use error::{CheckpointError, Mismatch};
pub use load::{Loaded, load};
pub use names::Skip;
pub use replace::replace_directory;
pub use save::{SaveOptions, save, write_into};

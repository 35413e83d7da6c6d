#![doc = include_str!("../README.md")]

mod catch_panic;
pub mod chat;
pub mod device;
#[cfg(feature = "server")]
pub mod engine;
mod error;
pub mod eval;
mod expand_env;
pub mod generate;
#[cfg(any(feature = "cuda", feature = "wgpu", feature = "vulkan", feature = "metal"))]
mod gpu_runtime;
mod load_model;
mod model_dir;
mod model_files;
mod moonlight_template;
mod open;
pub mod parquet;
pub mod records;
pub mod run_dir;
pub mod score;
#[cfg(feature = "server")]
pub mod server;
pub mod token_reader;
pub mod tokenizer;

pub use chat::{ChatEncoder, ChatTemplate, Message};
pub use error::InferError;
pub use eval::evaluate;
pub use expand_env::expand_env;
pub use generate::{Generated, Sampler, Sampling, Session, StopReason, generate, generate_many};
pub use load_model::{LoadedModel, load_base, load_model};
pub use model_dir::{ModelDir, resolve_model, resolve_weights};
pub use open::{OpenOptions, OpenedModel};
pub use score::score;
pub use tokenizer::Tokenizer;

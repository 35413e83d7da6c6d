#![doc = include_str!("../README.md")]

pub mod chat;
pub mod device;
mod error;
pub mod eval;
mod expand;
mod files;
pub mod generate;
mod guard;
pub mod jsonl;
mod load_model;
mod model_dir;
mod moonlight_template;
mod open;
pub mod parquet;
pub mod records;
pub mod run_dir;
pub mod score;
pub mod tokenizer;

pub use chat::{ChatEncoder, ChatTemplate, Message};
pub use error::InferError;
pub use eval::evaluate;
pub use expand::expand;
pub use generate::{Generated, Sampler, Sampling, Session, Stop, generate, generate_many};
pub use load_model::{LoadedModel, load_base, load_model};
pub use model_dir::{ModelDir, resolve_model, weights_in};
pub use open::{OpenOptions, OpenedModel};
pub use score::score;
pub use tokenizer::Tokenizer;

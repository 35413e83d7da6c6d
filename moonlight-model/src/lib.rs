//! The Moonlight family of language models for [Burn](https://burn.dev).

pub mod config;

pub use config::{ConfigError, ModelConfig};

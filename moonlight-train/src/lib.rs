//! Pre-training, resuming, generating and scoring with the Moonlight family: the library behind `moonlight`.

pub mod bigram;
pub mod chat;
pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod device;
pub mod error;
pub mod eval;
mod frozen;
pub mod generate;
pub mod metrics;
pub mod plan;
pub mod plots;
pub mod recipe;
pub mod schedule;
pub mod score;
pub mod spectrum;
pub mod tensorboard;
pub mod tokenizer;
pub mod trainer;
pub mod weights;

//! Pre-training, resuming, generating and scoring with the Moonlight family: the library behind `moonlight`.

pub mod analysis;
pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod error;
mod frozen;
pub mod metrics;
pub mod plan;
pub mod recipe;
pub mod schedule;
pub mod tensorboard;
pub mod trainer;

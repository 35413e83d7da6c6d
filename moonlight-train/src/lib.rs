#![doc = include_str!("../README.md")]

pub mod analysis;
pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod error;
mod frozen;
mod hints;
pub mod metrics;
pub mod plan;
pub mod recipe;
pub mod schedule;
pub mod tensorboard;
pub mod trainer;

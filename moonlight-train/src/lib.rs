#![doc = include_str!("../README.md")]
// `print!` and its like panic if stdout or stderr is closed or full; `cli/output.rs` and the log do not.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod analysis;
pub mod checkpoint;
pub mod cli;
pub mod corpus;
pub mod data;
pub mod error;
mod file_id;
mod frozen;
mod hints;
pub mod metrics;
mod output_file;
pub mod plan;
pub mod recipe;
pub mod schedule;
#[cfg(feature = "server")]
pub mod serve;
pub mod study;
pub mod tensorboard;
pub mod trainer;

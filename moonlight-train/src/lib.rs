#![doc = include_str!("../README.md")]
// The macros end the program where stdout or stderr is closed or full: `cli/output.rs` and the log are used in their place.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod analysis;
pub mod checkpoint;
pub mod cli;
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
pub mod tensorboard;
pub mod trainer;

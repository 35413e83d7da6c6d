//! A CUDA device in software: the driver's library `libcuda.so`, which runs the PTX of a program on the CPU and checks each
//! access to memory. What a program needs to run on it, and what it does not show, is in README.md.

mod assemble;
mod compile;
pub mod counts;
pub mod driver;
mod fault;
mod finding;
mod log;
pub mod memory;
pub mod ptx;
pub mod run;
pub mod settings;
pub mod translate;

//! Runs kernels: blocks on threads of the host, threads of a block as fibers.

mod barrier;
mod block;
mod check;
mod copies;
mod fiber;
mod launch;
pub mod matrix;
mod moves;
mod race;
mod thread;
pub mod warp;

pub(crate) use block::{Fault, FaultKind};
pub(crate) use launch::{Launch, run};
pub(crate) use thread::Entry;

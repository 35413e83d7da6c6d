//! Bytes that a worker sends.

use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicU64, Ordering};

/// What a message is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Gradients on their way to who needs their sum.
    ReduceScatter,
    /// Parts of momentum on their way to who orthogonalises the whole.
    AllToAll,
    /// Updated parameters on their way to everybody.
    AllGather,
    /// A tensor of one worker's.
    Broadcast,
    /// Losses, norms, loads: 8 bytes each.
    Numbers,
    /// Nothing but the waiting for each other.
    Barrier,
}

impl Operation {
    /// All, in the order of [`Traffic`]'s fields.
    const ALL: [Operation; 6] = [
        Operation::ReduceScatter,
        Operation::AllToAll,
        Operation::AllGather,
        Operation::Broadcast,
        Operation::Numbers,
        Operation::Barrier,
    ];

    /// With an article, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Operation::ReduceScatter => "a reduce-scatter",
            Operation::AllToAll => "an all-to-all",
            Operation::AllGather => "an all-gather",
            Operation::Broadcast => "a broadcast",
            Operation::Numbers => "an exchange of numbers",
            Operation::Barrier => "a barrier",
        }
    }
}

/// Bytes that a worker gave to other workers, by what they were part of: what is handed to the engine, without its
/// headers and acknowledgements. An all-reduce is a reduce-scatter and an all-gather.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Gradients.
    pub reduce_scatter: u64,
    /// Momentum.
    pub all_to_all: u64,
    /// Parameters.
    pub all_gather: u64,
    /// Whole tensors from one worker.
    pub broadcast: u64,
    /// Numbers of the host.
    pub numbers: u64,
}

impl Traffic {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.reduce_scatter + self.all_to_all + self.all_gather + self.broadcast + self.numbers
    }
}

impl Add for Traffic {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            reduce_scatter: self.reduce_scatter + other.reduce_scatter,
            all_to_all: self.all_to_all + other.all_to_all,
            all_gather: self.all_gather + other.all_gather,
            broadcast: self.broadcast + other.broadcast,
            numbers: self.numbers + other.numbers,
        }
    }
}

impl Sub for Traffic {
    type Output = Self;

    /// What came since `earlier`.
    fn sub(self, earlier: Self) -> Self {
        Self {
            reduce_scatter: self.reduce_scatter - earlier.reduce_scatter,
            all_to_all: self.all_to_all - earlier.all_to_all,
            all_gather: self.all_gather - earlier.all_gather,
            broadcast: self.broadcast - earlier.broadcast,
            numbers: self.numbers - earlier.numbers,
        }
    }
}

/// A counter that several threads may read.
#[derive(Debug, Default)]
pub(super) struct Counter([AtomicU64; Operation::ALL.len()]);

impl Counter {
    pub(super) fn add(&self, operation: Operation, bytes: usize) {
        self.0[operation as usize].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Traffic {
        let of = |operation: Operation| self.0[operation as usize].load(Ordering::Relaxed);
        Traffic {
            reduce_scatter: of(Operation::ReduceScatter),
            all_to_all: of(Operation::AllToAll),
            all_gather: of(Operation::AllGather),
            broadcast: of(Operation::Broadcast),
            numbers: of(Operation::Numbers),
        }
    }
}

//! Communication statistics: bytes that a worker sends.

use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicU64, Ordering};

/// The operation that a message belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Sums of gradients, each to its owner.
    ReduceScatter,
    /// Parts of momentum, to the ranks that orthogonalise the whole.
    AllToAll,
    /// Updated parameters, to all.
    AllGather,
    /// A tensor of one worker, to all.
    Broadcast,
    /// Losses, norms, loads: f64, to all.
    Numbers,
    /// No data.
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

/// Bytes that a worker sent to other workers, by operation: payload, without the transport's headers. An all-reduce
/// counts as a reduce-scatter and an all-gather.
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
    /// Numbers.
    pub numbers: u64,
}

impl Traffic {
    /// The sum over the operations.
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

    /// What was sent after `earlier`.
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

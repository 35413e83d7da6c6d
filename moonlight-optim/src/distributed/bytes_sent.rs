//! Communication volume: the bytes that a rank sends, by collective.

use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicU64, Ordering};

/// The collective that a message belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CollectiveOp {
    /// Sums of gradients, each to its owner.
    ReduceScatter,
    /// Parts of momentum, to the ranks that orthogonalize the whole matrix.
    AllToAll,
    /// Updated parameters, to all ranks.
    AllGather,
    /// One rank's tensor, to all ranks.
    Broadcast,
    /// f64 scalars (losses, norms, expert loads), to all ranks.
    AllGatherF64,
    /// No data.
    Barrier,
}

impl CollectiveOp {
    /// All variants. Their number is the length of [`SentCounter`], which is indexed by a variant's discriminant.
    const ALL: [CollectiveOp; 6] = [
        CollectiveOp::ReduceScatter,
        CollectiveOp::AllToAll,
        CollectiveOp::AllGather,
        CollectiveOp::Broadcast,
        CollectiveOp::AllGatherF64,
        CollectiveOp::Barrier,
    ];

    /// The name with its article, for messages.
    pub fn name(self) -> &'static str {
        match self {
            CollectiveOp::ReduceScatter => "a reduce-scatter",
            CollectiveOp::AllToAll => "an all-to-all",
            CollectiveOp::AllGather => "an all-gather",
            CollectiveOp::Broadcast => "a broadcast",
            CollectiveOp::AllGatherF64 => "an all-gather of scalars",
            CollectiveOp::Barrier => "a barrier",
        }
    }
}

/// Bytes that a rank sent to other ranks, by collective: payload, without the transport's headers. An all-reduce counts as a
/// reduce-scatter and an all-gather.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BytesSent {
    /// Gradients.
    pub reduce_scatter: u64,
    /// Momentum.
    pub all_to_all: u64,
    /// Parameters.
    pub all_gather: u64,
    /// Whole tensors of one rank.
    pub broadcast: u64,
    /// f64 scalars.
    pub scalars: u64,
}

impl BytesSent {
    /// The sum over the collectives.
    pub fn total(&self) -> u64 {
        self.reduce_scatter + self.all_to_all + self.all_gather + self.broadcast + self.scalars
    }
}

impl Add for BytesSent {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            reduce_scatter: self.reduce_scatter + other.reduce_scatter,
            all_to_all: self.all_to_all + other.all_to_all,
            all_gather: self.all_gather + other.all_gather,
            broadcast: self.broadcast + other.broadcast,
            scalars: self.scalars + other.scalars,
        }
    }
}

impl Sub for BytesSent {
    type Output = Self;

    /// What was sent since `earlier`.
    fn sub(self, earlier: Self) -> Self {
        Self {
            reduce_scatter: self.reduce_scatter - earlier.reduce_scatter,
            all_to_all: self.all_to_all - earlier.all_to_all,
            all_gather: self.all_gather - earlier.all_gather,
            broadcast: self.broadcast - earlier.broadcast,
            scalars: self.scalars - earlier.scalars,
        }
    }
}

/// Counts bytes. The communication thread adds to it while other threads may read it.
#[derive(Debug, Default)]
pub(super) struct SentCounter([AtomicU64; CollectiveOp::ALL.len()]);

impl SentCounter {
    pub(super) fn add(&self, operation: CollectiveOp, bytes: usize) {
        // Relaxed: the counters order no other memory.
        self.0[operation as usize].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> BytesSent {
        let of = |operation: CollectiveOp| self.0[operation as usize].load(Ordering::Relaxed);
        BytesSent {
            reduce_scatter: of(CollectiveOp::ReduceScatter),
            all_to_all: of(CollectiveOp::AllToAll),
            all_gather: of(CollectiveOp::AllGather),
            broadcast: of(CollectiveOp::Broadcast),
            scalars: of(CollectiveOp::AllGatherF64),
        }
    }
}

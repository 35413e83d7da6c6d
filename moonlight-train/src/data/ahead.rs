//! The next step's batches, made while a step is computed.

use std::ops::Range;
use std::panic::resume_unwind;
use std::thread::{JoinHandle, spawn};

use super::{DataError, DataPosition, HostBatch, TrainStream};

/// The batches of a step; see [`TrainStream::next_share`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// Sequences of the step.
    pub sequences: usize,
    /// Which of them are wanted.
    pub share: Range<usize>,
    /// Batches that these are cut into.
    pub batches: usize,
}

/// A stream that is one step ahead of whoever reads it, on a thread of its own.
pub struct Ahead {
    /// Behind what was handed out.
    stream: TrainStream,
    prepared: Option<(Want, JoinHandle<Prepared>)>,
}

/// Batches, and the stream behind them.
type Prepared = (Result<Vec<HostBatch>, DataError>, TrainStream);

impl Ahead {
    /// Reads on from where `stream` stands.
    pub fn new(stream: TrainStream) -> Self {
        Self { stream, prepared: None }
    }

    /// The batches of the next step. Those of the step after it, `then`, are begun; if they turn out not to be what is
    /// wanted next, they are made anew.
    ///
    /// # Errors
    ///
    /// Those of [`TrainStream::next_share`].
    pub fn next(&mut self, want: &Want, then: Option<Want>) -> Result<Vec<HostBatch>, DataError> {
        let (batches, stream) = match self.prepared.take() {
            Some((prepared, thread)) if prepared == *want => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
            _ => prepare(self.stream.clone(), want),
        };
        self.stream = stream;
        if let Some(then) = then {
            let (stream, wanted) = (self.stream.clone(), then.clone());
            self.prepared = Some((then, spawn(move || prepare(stream, &wanted))));
        }
        batches
    }

    /// Where the next batch begins, of those that were not handed out.
    pub fn position(&self) -> DataPosition {
        self.stream.position()
    }
}

fn prepare(mut stream: TrainStream, want: &Want) -> Prepared {
    let batches = stream.next_share(want.sequences, want.share.clone(), want.batches);
    (batches, stream)
}

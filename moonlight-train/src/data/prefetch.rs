//! Prefetch: the next step's batches are read and laid out while a step is computed.

use std::ops::Range;
use std::panic::resume_unwind;
use std::thread::{JoinHandle, spawn};

use super::{DataError, DataPosition, HostBatch, TrainStream};

/// The batches of a step; see [`TrainStream::next_share`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchRequest {
    /// Sequences of the step.
    pub sequences: usize,
    /// The part of them that this rank needs.
    pub share: Range<usize>,
    /// The number of micro-batches to divide this part into.
    pub batches: usize,
}

/// Reads a stream one step in advance, on another thread.
pub struct Prefetcher {
    /// The stream after the batches that were returned; checkpoints store its position.
    stream: TrainStream,
    prefetched: Option<(BatchRequest, JoinHandle<Prefetched>)>,
}

/// Batches, and the stream after them.
type Prefetched = (Result<Vec<HostBatch>, DataError>, TrainStream);

impl Prefetcher {
    /// Continues from the position of `stream`.
    pub fn new(stream: TrainStream) -> Self {
        Self { stream, prefetched: None }
    }

    /// Returns the batches of the next step, and starts to read those of the step after it, `then`. If the next call has another
    /// request than `then`, the prefetched batches are dropped and the requested ones are read from the same position.
    ///
    /// # Errors
    ///
    /// Those of [`TrainStream::next_share`].
    pub fn next(&mut self, request: &BatchRequest, then: Option<BatchRequest>) -> Result<Vec<HostBatch>, DataError> {
        let (batches, stream) = match self.prefetched.take() {
            Some((prefetched, thread)) if prefetched == *request => {
                thread.join().unwrap_or_else(|panic| resume_unwind(panic))
            }
            _ => read(self.stream.clone(), request),
        };
        self.stream = stream;
        // The thread advances a clone, so that nothing is lost if its batches are dropped.
        if let Some(then) = then {
            let (stream, request) = (self.stream.clone(), then.clone());
            self.prefetched = Some((then, spawn(move || read(stream, &request))));
        }
        batches
    }

    /// The position of the first batch that was not returned. A prefetched batch does not count, so a run that resumes from
    /// here reads it again.
    pub fn position(&self) -> DataPosition {
        self.stream.position()
    }
}

fn read(mut stream: TrainStream, request: &BatchRequest) -> Prefetched {
    let batches = stream.next_share(request.sequences, request.share.clone(), request.batches);
    (batches, stream)
}

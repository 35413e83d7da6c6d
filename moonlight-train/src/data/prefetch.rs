//! The next step's batches, made while a step is computed.

use std::ops::Range;
use std::panic::resume_unwind;
use std::thread::{JoinHandle, spawn};

use super::{DataError, DataPosition, HostBatch, TrainStream};

/// The batches of a step; see [`TrainStream::next_share`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchRequest {
    /// Sequences of the step.
    pub sequences: usize,
    /// Which of them are wanted.
    pub share: Range<usize>,
    /// Batches that these are cut into.
    pub batches: usize,
}

/// A stream that is read one step ahead, on a thread of its own.
pub struct Prefetcher {
    /// The stream after the batches that were handed out.
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

    /// The batches of the next step. Those of the step after it, `then`, are begun on another thread; if another request
    /// comes next after all, they are dropped and its batches made from the same position.
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
        if let Some(then) = then {
            let (stream, request) = (self.stream.clone(), then.clone());
            self.prefetched = Some((then, spawn(move || read(stream, &request))));
        }
        batches
    }

    /// Where the next batch begins, of those that were not handed out.
    pub fn position(&self) -> DataPosition {
        self.stream.position()
    }
}

fn read(mut stream: TrainStream, request: &BatchRequest) -> Prefetched {
    let batches = stream.next_share(request.sequences, request.share.clone(), request.batches);
    (batches, stream)
}

//! What the model reads: files to tokens, tokens to sequences, sequences to batches.

mod batch;
mod error;

pub use batch::HostBatch;
pub use error::DataError;

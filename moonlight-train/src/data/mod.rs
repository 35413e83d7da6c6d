//! What the model reads: files to tokens, tokens to sequences, sequences to batches.
//!
//! * `files.rs`: globs to files.
//! * `text_file.rs`: how a file of texts is read: whole, or a document in each record.
//! * `tokenize.rs`: files to documents of tokens, in parallel; conversations with a weight for each token.
//! * `report.rs`: what was found while reading.
//! * `token_store.rs`: the documents on disk, kept for the next run and checked when they are opened.
//! * `packing.rs`: which documents share a sequence, where none may be cut.
//! * `sequences.rs`: documents to sequences, packed or one by one.
//! * `shuffle.rs`: the order of an epoch.
//! * `stream.rs`: batches without end, from any position, and the share of each worker.
//! * `prefetch.rs`: the next step's batches, made while a step is computed.
//! * `dataset.rs`: all of it together: the training and the validation data of a run.
//! * `bigram.rs`: the loss of a bigram model of the data, to compare with.
//! * `inspect.rs`: statistics and samples, to look at before a run.

mod batch;
mod bigram;
mod cuts;
mod dataset;
mod error;
mod files;
#[doc(hidden)]
pub mod fuzz;
mod hash;
mod inspect;
mod packing;
mod prefetch;
mod report;
mod sequences;
mod shuffle;
mod stream;
mod text_file;
mod token_store;
mod tokenize;

pub use batch::HostBatch;
pub(crate) use batch::mask_scale;
pub use bigram::bigram_loss;
pub use dataset::Dataset;
pub use error::DataError;
pub use inspect::{Inspection, Sample, SplitStats};
pub use prefetch::{BatchRequest, Prefetcher};
pub(crate) use stream::MAX_STEP_TOKENS;
pub use stream::{DataPosition, TrainStream};

#[cfg(test)]
mod tests;

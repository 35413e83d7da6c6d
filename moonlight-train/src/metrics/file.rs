//! `metrics.jsonl`: one JSON object for each logged step and each validation.

use std::path::Path;

use super::record_file::RecordFile;
use super::{Metrics, Reporter};
use crate::error::TrainError;

/// The open file.
#[derive(Debug)]
pub(crate) struct MetricsFile(RecordFile);

impl MetricsFile {
    /// Opens the file for a run that resumes after `step`; see [`RecordFile::open`].
    pub(crate) fn open(path: &Path, step: u64) -> Result<Self, TrainError> {
        RecordFile::open(path, step).map(Self)
    }
}

impl Reporter for MetricsFile {
    fn report(&mut self, metrics: &Metrics) -> Result<(), TrainError> {
        self.0.append(metrics);
        Ok(())
    }
}

//! `metrics.jsonl`: a line for each step that is logged and for each validation.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Metrics, Reporter};
use crate::error::TrainError;

/// The open file.
#[derive(Debug)]
pub(crate) struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens the file for a run that resumes from `step`: lines of later steps, left by the run that was stopped, are
    /// dropped, and so is a last line that was cut short.
    pub(crate) fn open(path: &Path, step: u64) -> Result<Self, TrainError> {
        let kept = match File::open(path) {
            Ok(file) => lines_until(BufReader::new(file), step).map_err(TrainError::read(path))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(TrainError::read(path)(error)),
        };
        let temporary = path.with_extension("jsonl.tmp");
        fs::write(&temporary, kept).map_err(TrainError::write(&temporary))?;
        fs::rename(&temporary, path).map_err(TrainError::write(path))?;
        let file = OpenOptions::new().append(true).open(path).map_err(TrainError::write(path))?;
        Ok(Self { path: path.to_owned(), file })
    }
}

impl Reporter for MetricsFile {
    fn report(&mut self, metrics: &Metrics) -> Result<(), TrainError> {
        let mut line = serde_json::to_string(metrics).expect("numbers and names are always JSON");
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(TrainError::write(&self.path))
    }
}

fn lines_until(file: impl BufRead, step: u64) -> std::io::Result<String> {
    let mut kept = String::new();
    for line in file.lines() {
        let line = line?;
        let Ok(value) = serde_json::from_str::<Value>(&line) else { continue };
        if value["step"].as_u64().is_some_and(|of| of <= step) {
            kept.push_str(&line);
            kept.push('\n');
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_after_the_checkpoint_are_dropped() {
        let text = "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"st";
        assert_eq!(lines_until(text.as_bytes(), 2).unwrap(), "{\"step\":1}\n{\"step\":2}\n");
    }
}

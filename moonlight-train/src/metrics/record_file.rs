//! A file in a run's folder with one JSON object for each record, in the order of the steps.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use moonlight_convert::new_file;
use serde::Serialize;
use serde_json::Value;

use crate::error::TrainError;

/// A longer line was not written by this program, and is dropped when a run resumes.
const MAX_LINE_BYTES: u64 = 1 << 20;

/// The open file. A line that cannot be written is lost, but the run continues: its checkpoints are worth more.
#[derive(Debug)]
pub(crate) struct RecordFile {
    path: PathBuf,
    file: File,
    /// Consecutive lines that could not be written.
    lost: u64,
}

impl RecordFile {
    /// Opens the file for a run that resumes after `step`. Lines of later steps, which the interrupted run wrote after its
    /// last checkpoint, are dropped, and so are lines that are not records, such as a last line that was cut short.
    ///
    /// The file is replaced and not changed, so that a reader which has it open reads the old lines to their end.
    pub(crate) fn open(path: &Path, step: u64) -> Result<Self, TrainError> {
        let folder = path.parent().unwrap_or(Path::new("."));
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let mut kept = new_file(folder, &format!(".{stem}."), ".tmp").map_err(TrainError::write(folder))?;
        match File::open(path) {
            Ok(file) => keep_until(BufReader::new(file), step, kept.as_file_mut()).map_err(TrainError::write(path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(TrainError::read(path)(error)),
        }
        kept.persist(path).map_err(|error| TrainError::write(path)(error.error))?;
        let file = OpenOptions::new().append(true).open(path).map_err(TrainError::write(path))?;
        Ok(Self { path: path.to_owned(), file, lost: 0 })
    }

    /// Appends a record.
    pub(crate) fn append(&mut self, record: &impl Serialize) {
        let mut line = serde_json::to_string(record).expect("numbers, names and texts are always JSON");
        line.push('\n');
        if self.lost > 0 {
            // The last line may have been written in part: end it, so that this one starts on its own.
            line.insert(0, '\n');
        }
        match self.file.write_all(line.as_bytes()) {
            Ok(()) => {
                if self.lost > 0 {
                    tracing::warn!("`{}` can be written again; {} lines are lost", self.path.display(), self.lost);
                }
                self.lost = 0;
            }
            Err(error) => {
                if self.lost == 0 {
                    tracing::warn!("`{}` cannot be written: {error}; the run continues", self.path.display());
                }
                self.lost += 1;
            }
        }
    }
}

/// The records of such a file. Other lines are left out: the last line is incomplete if the run is still training or
/// was killed.
pub(crate) fn read_records(path: &Path) -> Result<Vec<Value>, TrainError> {
    let text = fs::read_to_string(path).map_err(TrainError::read(path))?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// Copies the records up to `step`.
fn keep_until(mut file: impl BufRead, step: u64, kept: &mut impl Write) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if file.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let Ok(value) = serde_json::from_slice::<Value>(&line) else { continue };
        if value["step"].as_u64().is_some_and(|line_step| line_step <= step) {
            kept.write_all(line.trim_ascii_end())?;
            kept.write_all(b"\n")?;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn kept(text: &[u8], step: u64) -> String {
        let mut kept = Vec::new();
        keep_until(text, step, &mut kept).unwrap();
        String::from_utf8(kept).unwrap()
    }

    #[test]
    fn lines_after_the_checkpoint_are_dropped() {
        let text = "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"st";
        assert_eq!(kept(text.as_bytes(), 2), "{\"step\":1}\n{\"step\":2}\n");
    }

    #[test]
    fn lines_that_are_not_records_are_dropped_whatever_their_bytes() {
        let mut text = b"{\"step\":1}\n\xff\xfe{\"step\":1}\n\n[]\n".to_vec();
        text.extend(vec![b' '; 3 << 20]);
        text.extend(b"\n{\"step\":2}");
        assert_eq!(kept(&text, 9), "{\"step\":1}\n{\"step\":2}\n");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_costs_lines_but_not_the_run() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("metrics.jsonl");
        let mut metrics = RecordFile::open(&path, 0).unwrap();
        let record = |step| json!({"step": step});
        metrics.append(&record(1));
        let disk = std::mem::replace(&mut metrics.file, OpenOptions::new().write(true).open("/dev/full").unwrap());
        metrics.append(&record(2));
        metrics.append(&record(3));
        assert_eq!(metrics.lost, 2);
        metrics.file = disk;
        metrics.append(&record(4));
        drop(metrics);
        drop(RecordFile::open(&path, 9).unwrap());
        let text = std::fs::read_to_string(&path).unwrap();
        let steps: Vec<u64> =
            text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [1, 4]);
    }
}

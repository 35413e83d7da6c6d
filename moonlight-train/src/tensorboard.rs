//! TensorBoard event files.
//!
//! A file is a sequence of TFRecords, each `length: u64, masked CRC of the length, event, masked CRC of the event`. An event
//! is a protocol buffer (`tensorflow/core/util/event.proto`). Only four of its fields are needed, so they are encoded by hand.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::TrainError;
use crate::metrics::{Metrics, Reporter};

/// Writes scalars to one event file.
#[derive(Debug)]
pub struct EventWriter {
    file: File,
}

impl EventWriter {
    /// Creates a new file in `dir`. A resumed run has several files, and TensorBoard merges them.
    ///
    /// # Errors
    ///
    /// A folder or file that cannot be written.
    pub fn create(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let now = now();
        // The number distinguishes writers that start in the same second.
        let open = |number: u32| {
            let name = format!("events.out.tfevents.{:010}.{number}.moonlight", now as u64);
            File::options().write(true).create_new(true).open(dir.join(name))
        };
        let exists =
            |file: &io::Result<File>| matches!(file, Err(error) if error.kind() == io::ErrorKind::AlreadyExists);
        let file = (0..).map(open).find(|file| !exists(file)).expect("fewer than 2^32 files in a folder")?;
        let mut writer = Self { file };
        let mut event = Vec::new();
        double(&mut event, 1, now); // wall_time
        bytes(&mut event, 3, b"brain.Event:2"); // file_version
        writer.record(&event)?;
        Ok(writer)
    }

    /// Adds the value of `tag` after `step`.
    ///
    /// # Errors
    ///
    /// A file that cannot be written.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f64) -> io::Result<()> {
        let mut summary_value = Vec::new();
        bytes(&mut summary_value, 1, tag.as_bytes()); // tag
        key(&mut summary_value, 2, 5); // simple_value, a float
        summary_value.extend((value as f32).to_le_bytes());
        let mut summary = Vec::new();
        bytes(&mut summary, 1, &summary_value); // value
        let mut event = Vec::new();
        double(&mut event, 1, now()); // wall_time
        key(&mut event, 2, 0); // step, a varint
        varint(&mut event, step);
        bytes(&mut event, 5, &summary); // summary
        self.record(&event)
    }

    fn record(&mut self, event: &[u8]) -> io::Result<()> {
        let length = (event.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(event);
        record.extend(masked_crc(event).to_le_bytes());
        self.file.write_all(&record)
    }
}

/// The event file of a run. If it cannot be written, the run continues without it.
#[derive(Debug)]
pub(crate) struct EventFile {
    dir: PathBuf,
    writer: Option<EventWriter>,
}

impl EventFile {
    /// Creates a new file in `dir`.
    pub(crate) fn create(dir: &Path) -> Self {
        let mut file = Self { dir: dir.to_owned(), writer: None };
        match EventWriter::create(dir) {
            Ok(writer) => file.writer = Some(writer),
            Err(error) => file.close_after(&error),
        }
        file
    }

    /// Stops writing: readers cannot find a record after one that was written in part.
    fn close_after(&mut self, error: &io::Error) {
        tracing::warn!("`{}` cannot be written: {error}; the run continues without TensorBoard", self.dir.display());
        self.writer = None;
    }
}

impl Reporter for EventFile {
    fn report(&mut self, metrics: &Metrics) -> Result<(), TrainError> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let written = metrics.scalars().try_for_each(|(tag, value)| writer.scalar(&tag, metrics.step, value));
        if let Err(error) = written {
            self.close_after(&error);
        }
        Ok(())
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

fn key(message: &mut Vec<u8>, field: u64, wire_type: u64) {
    varint(message, field << 3 | wire_type);
}

fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

fn double(message: &mut Vec<u8>, field: u64, value: f64) {
    key(message, field, 1);
    message.extend(value.to_le_bytes());
}

fn bytes(message: &mut Vec<u8>, field: u64, value: &[u8]) {
    key(message, field, 2);
    varint(message, value.len() as u64);
    message.extend(value);
}

/// TFRecord's CRC-32C, rotated and offset: the CRC of data that contains its own CRC would be a constant otherwise.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The Castagnoli polynomial, bit by bit: events are short.
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in data {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn an_event_file_that_cannot_be_written_does_not_end_the_run() {
        let home = tempfile::tempdir().unwrap();
        let taken = home.path().join("tensorboard");
        fs::write(&taken, "a file").unwrap();
        let mut file = EventFile::create(&taken);
        file.report(&Metrics { loss: Some(1.0), ..Metrics::default() }).unwrap();
        assert!(file.writer.is_none());
        // Two writers that start in the same second have different files.
        let both = [EventFile::create(home.path()), EventFile::create(home.path())];
        assert!(both.iter().all(|file| file.writer.is_some()));
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 3);
    }

    #[test]
    fn records_are_framed_and_contain_their_tag() {
        let home = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(home.path()).unwrap();
        writer.scalar("train/loss", 300, 1.5).unwrap();
        let path = fs::read_dir(home.path()).unwrap().next().unwrap().unwrap().path();
        let mut rest = fs::read(path).unwrap();
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(u32::from_le_bytes(rest[8..12].try_into().unwrap()), masked_crc(&rest[..8]));
            let event = rest[12..12 + length].to_vec();
            assert_eq!(u32::from_le_bytes(rest[12 + length..16 + length].try_into().unwrap()), masked_crc(&event));
            events.push(event);
            rest.drain(..16 + length);
        }
        assert_eq!(events.len(), 2);
        // wall_time, then field 2 = 300 as a varint, then the summary.
        assert_eq!(events[1][9..12], [0x10, 0xac, 0x02]);
        assert!(events[1].windows(10).any(|window| window == b"train/loss"));
        assert!(events[1].ends_with(&1.5f32.to_le_bytes()));
    }
}

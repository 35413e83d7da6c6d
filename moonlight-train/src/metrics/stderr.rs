//! Standard error while the dashboard has the terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::thread::{JoinHandle, spawn};

use rustix::io::dup;
use rustix::pipe::pipe;
use rustix::stdio::{dup2_stderr, stderr};

/// Bytes that are kept: of a longer text its end, which has the newest lines.
const MAX_BYTES: usize = 64 << 10;

/// Collects what this process writes to stderr, and writes it to the real stderr when dropped.
pub(super) struct HeldStderr {
    /// A duplicate of the real stderr.
    original: OwnedFd,
    reader: Option<JoinHandle<Vec<u8>>>,
}

impl HeldStderr {
    /// `None` if stderr is closed.
    pub(super) fn hold() -> Option<Self> {
        let original = dup(stderr()).ok()?;
        let (read, write) = pipe().ok()?;
        dup2_stderr(&write).ok()?;
        // The thread reads until `drop` restores the real stderr, which closes the last writing end of the pipe.
        let reader = spawn(move || read_tail(File::from(read)));
        Some(Self { original, reader: Some(reader) })
    }
}

impl Drop for HeldStderr {
    fn drop(&mut self) {
        let restored = dup2_stderr(&self.original).is_ok();
        if restored
            && let Some(reader) = self.reader.take()
            && let Ok(text) = reader.join()
        {
            // The terminal may be gone, and nothing is left to report that to.
            let _ = std::io::stderr().write_all(&text);
        }
    }
}

fn read_tail(mut file: File) -> Vec<u8> {
    let (mut text, mut chunk) = (Vec::new(), [0; 4096]);
    while let Ok(read @ 1..) = file.read(&mut chunk) {
        text.extend_from_slice(&chunk[..read]);
        if text.len() > 2 * MAX_BYTES {
            text.drain(..text.len() - MAX_BYTES);
        }
    }
    text.drain(..text.len().saturating_sub(MAX_BYTES));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_long_text_is_kept() {
        let (read, write) = pipe().unwrap();
        let writer = spawn(move || {
            let mut write = File::from(write);
            for line in 0..20_000 {
                writeln!(write, "line {line:06}").unwrap();
            }
        });
        let text = read_tail(File::from(read));
        writer.join().unwrap();
        assert_eq!(text.len(), MAX_BYTES);
        assert!(text.ends_with(b"line 019999\n"));
    }
}

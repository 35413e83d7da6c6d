//! Downloading one file into the cache: a partial file is resumed, and the complete one is checked before it gets its
//! name.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::client::{Client, FetchError};
use super::digest::Hasher;
use super::error::DownloadError;
use super::event::DownloadEvent;
use super::listing::RemoteFile;
use crate::io::confined_dir::open_plain;

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;
/// The download fails after this many attempts in a row that each receive less than [`MIN_PROGRESS`] of the file. A bad
/// connection may break often in a file of gigabytes; as long as data arrives, resuming is worthwhile.
const MAX_FRUITLESS_ATTEMPTS: u32 = 6;
/// A fraction of the file.
const MIN_PROGRESS: f64 = 0.01;
/// The wait before the second attempt; it doubles before each further one.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// Transfers below this rate are aborted: the server has stalled, because no connection is that slow.
const MIN_BYTES_PER_SECOND: f64 = 1_000.0;

/// A file to download.
pub(super) struct FileDownload<'a> {
    pub(super) client: &'a Client,
    pub(super) file: &'a RemoteFile,
    pub(super) commit: &'a str,
    /// Its path in the cache: `blobs/DIGEST`.
    pub(super) blob: PathBuf,
    /// The lock file that is held while the blob is written; the same that `huggingface_hub` uses.
    pub(super) lock: PathBuf,
    pub(super) watch: &'a (dyn Fn(DownloadEvent<'_>) + Sync),
    /// Set when another file has failed.
    pub(super) stop: &'a AtomicBool,
}

/// The result of one attempt.
enum Attempt {
    Complete(Hasher),
    Broken(String),
}

impl FileDownload<'_> {
    /// Downloads the file if needed; returns whether any part had to be downloaded.
    pub(super) fn run(&self) -> Result<bool, DownloadError> {
        for folder in [&self.blob, &self.lock].into_iter().filter_map(|path| path.parent()) {
            fs::create_dir_all(folder).map_err(DownloadError::write(folder))?;
        }
        let lock = open_own(&self.lock).map_err(DownloadError::write(&self.lock))?;
        // Held by another process, or for another file with the same contents. Released when the file is closed.
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            (self.watch)(DownloadEvent::Waiting { file: &self.file.name });
        }
        lock.lock().map_err(DownloadError::write(&self.lock))?;
        // Checked under the lock: the process that held it may have downloaded the file.
        if self.is_cached()? {
            return Ok(false);
        }
        self.fetch().map(|()| true)
    }

    /// Whether the blob is in the cache with the digest in its name. A damaged one is removed.
    fn is_cached(&self) -> Result<bool, DownloadError> {
        let read = |source| DownloadError::read(&self.blob)(source);
        let mut file = match open_plain(&self.blob) {
            Ok((file, _)) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(read(error)),
        };
        if file.metadata().map_err(read)?.len() == self.file.size {
            let hasher = self.digest(&mut file, self.file.size).map_err(read)?;
            if hasher.finish() == self.file.digest.text() {
                (self.watch)(DownloadEvent::Cached { bytes: self.file.size });
                return Ok(true);
            }
        }
        fs::remove_file(&self.blob).map_err(DownloadError::write(&self.blob))?;
        Ok(false)
    }

    fn fetch(&self) -> Result<(), DownloadError> {
        let partial = partial(&self.blob);
        let mut output = open_own(&partial).map_err(DownloadError::write(&partial))?;
        let start = output.metadata().map_err(DownloadError::read(&partial))?.len();
        // A wrong digest after resuming is retried from the beginning; after a fresh download it is final.
        let mut resumed = start > 0;
        if start > self.file.size {
            // It cannot be the beginning of this file.
            output.set_len(0).map_err(DownloadError::write(&partial))?;
        } else {
            (self.watch)(DownloadEvent::Cached { bytes: start });
        }
        loop {
            let hasher = self.receive(&mut output, &partial)?;
            let found = hasher.finish();
            if found == self.file.digest.text() {
                break;
            }
            self.discard(&mut output, &partial, self.file.size)?;
            if !std::mem::take(&mut resumed) {
                drop(output);
                // A failure leaves an empty file, which is harmless.
                let _ = fs::remove_file(&partial);
                let (file, expected) = (self.file.name.clone(), self.file.digest.text().to_owned());
                return Err(DownloadError::Digest { file, expected, found });
            }
            // The part from an earlier run may have been the damaged one: download everything, once.
            (self.watch)(DownloadEvent::Retrying { file: &self.file.name, problem: "the partial file was damaged" });
        }
        output.sync_all().map_err(DownloadError::write(&partial))?;
        fs::rename(&partial, &self.blob).map_err(DownloadError::write(&self.blob))
    }

    /// Downloads until the file is complete, retrying as long as there is progress.
    fn receive(&self, output: &mut File, partial: &Path) -> Result<Hasher, DownloadError> {
        let length = |output: &File| output.metadata().map_err(DownloadError::read(partial)).map(|file| file.len());
        let (mut tries, mut fruitless, mut wait) = (0, 0, FIRST_WAIT);
        loop {
            let before = length(output)?;
            let problem = match self.try_once(output, partial)? {
                Attempt::Complete(hasher) => return Ok(hasher),
                Attempt::Broken(problem) => problem,
            };
            let got = length(output)?;
            tries += 1;
            if got > before && (got - before) as f64 >= MIN_PROGRESS * self.file.size as f64 {
                (fruitless, wait) = (0, FIRST_WAIT);
            } else {
                fruitless += 1;
            }
            if fruitless == MAX_FRUITLESS_ATTEMPTS {
                let (file, size) = (self.file.name.clone(), self.file.size);
                return Err(DownloadError::Incomplete { file, got, size, tries, problem });
            }
            (self.watch)(DownloadEvent::Retrying { file: &self.file.name, problem: &problem });
            std::thread::sleep(wait);
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    /// Requests the rest of the file once. Every received byte is kept. The digest is that of the whole file.
    fn try_once(&self, output: &mut File, partial: &Path) -> Result<Attempt, DownloadError> {
        let written = |error| DownloadError::write(partial)(error);
        let mut start = output.seek(SeekFrom::End(0)).map_err(written)?;
        if start == self.file.size {
            return Ok(Attempt::Complete(self.hash_of(output, partial, start)?));
        }
        let answer = match self.client.file(self.commit, &self.file.name, start) {
            Ok(answer) => answer,
            Err(FetchError::Permanent(error)) => return Err(error),
            Err(FetchError::Transient(problem)) => return Ok(Attempt::Broken(problem)),
            Err(FetchError::Range) => {
                // The partial file is longer than the file on the server.
                self.discard(output, partial, start)?;
                return Ok(Attempt::Broken("the server does not have the requested range".into()));
            }
        };
        if answer.start != start {
            // The server ignored the range and sends the whole file.
            self.discard(output, partial, start)?;
            start = 0;
        }
        let mut hasher = self.hash_of(output, partial, start)?;
        let mut body = answer.body;
        let mut chunk = vec![0; CHUNK];
        let mut at = start;
        // The rate is measured over windows, so that a pause after a fast start is noticed.
        let mut pace = (Instant::now(), at);
        loop {
            let (since, before) = pace;
            if since.elapsed() > self.client.stall_timeout() {
                if ((at - before) as f64) < MIN_BYTES_PER_SECOND * since.elapsed().as_secs_f64() {
                    return Ok(Attempt::Broken("the transfer has stalled".into()));
                }
                pace = (Instant::now(), at);
            }
            if self.stop.load(Ordering::Relaxed) {
                return Err(DownloadError::Aborted);
            }
            // Reads one byte more than expected, which reveals a longer file.
            let most = (self.file.size - at).saturating_add(1).min(CHUNK as u64) as usize;
            let read = match body.read(&mut chunk[..most]) {
                Ok(0) if at == self.file.size => return Ok(Attempt::Complete(hasher)),
                Ok(0) => return Ok(Attempt::Broken("the connection was closed".into())),
                Ok(read) => read,
                Err(error) => return Ok(Attempt::Broken(error.to_string())),
            };
            if at + read as u64 > self.file.size {
                self.discard(output, partial, at)?;
                return Ok(Attempt::Broken("the server sent more bytes than listed".into()));
            }
            output.write_all(&chunk[..read]).map_err(written)?;
            hasher.update(&chunk[..read]);
            at += read as u64;
            (self.watch)(DownloadEvent::Fetched { bytes: read as u64 });
        }
    }

    /// Discards the partial file.
    fn discard(&self, output: &mut File, partial: &Path, bytes: u64) -> Result<(), DownloadError> {
        (self.watch)(DownloadEvent::Discarded { bytes });
        output.set_len(0).map_err(DownloadError::write(partial))
    }

    /// The digest of the first bytes; leaves the file's position after them.
    fn hash_of(&self, output: &mut File, partial: &Path, bytes: u64) -> Result<Hasher, DownloadError> {
        output.rewind().map_err(DownloadError::read(partial))?;
        self.digest(output, bytes).map_err(DownloadError::read(partial))
    }

    fn digest(&self, file: &mut File, bytes: u64) -> io::Result<Hasher> {
        let mut hasher = self.file.digest.begin(self.file.size);
        let mut chunk = vec![0; CHUNK];
        let mut rest = file.take(bytes);
        loop {
            match rest.read(&mut chunk)? {
                0 => return Ok(hasher),
                read => hasher.update(&chunk[..read]),
            }
        }
    }
}

/// Opens a file of the cache for reading and writing, and creates it if it does not exist. In a shared cache, another
/// user may have put a link in its place; links are not followed, so that no other file is written to.
fn open_own(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true);
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
    }
    let file = options.open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a plain file")) }
}

/// The path of the partial file, the same as in `huggingface_hub`.
pub(super) fn partial(blob: &Path) -> PathBuf {
    let mut name = blob.as_os_str().to_owned();
    name.push(".incomplete");
    name.into()
}

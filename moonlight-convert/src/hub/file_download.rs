//! One file into the cache: what is there of it is kept, the rest is fetched, the whole is checked before it gets its
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

/// Bytes that are read at a time.
const CHUNK: usize = 1 << 20;
/// Tries on end that bring next to nothing: less than [`MIN_PROGRESS`] of the file. A bad line may break often in a file of
/// gigabytes, and what comes is worth going on for.
const MAX_FRUITLESS_ATTEMPTS: u32 = 6;
const MIN_PROGRESS: f64 = 0.01;
/// Before the second try; doubled before each further one.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// What comes more slowly, in bytes a second, is given up: it is no line but somebody who holds one.
const MIN_BYTES_PER_SECOND: f64 = 1_000.0;

/// One file to be had.
pub(super) struct FileDownload<'a> {
    pub(super) client: &'a Client,
    pub(super) file: &'a RemoteFile,
    pub(super) commit: &'a str,
    /// Where its bytes belong: `blobs/DIGEST`.
    pub(super) blob: PathBuf,
    /// Held while the blob is written, by `huggingface_hub`, too.
    pub(super) lock: PathBuf,
    pub(super) watch: &'a (dyn Fn(DownloadEvent<'_>) + Sync),
    /// Set where another file has failed.
    pub(super) stop: &'a AtomicBool,
}

/// What became of one try.
enum Attempt {
    Complete(Hasher),
    Broken(String),
}

impl FileDownload<'_> {
    /// Whether anything had to be fetched.
    pub(super) fn run(&self) -> Result<bool, DownloadError> {
        for folder in [&self.blob, &self.lock].into_iter().filter_map(|path| path.parent()) {
            fs::create_dir_all(folder).map_err(DownloadError::write(folder))?;
        }
        let lock = open_own(&self.lock).map_err(DownloadError::write(&self.lock))?;
        // Another process, or another file of the same contents. Given back when the file is closed.
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            (self.watch)(DownloadEvent::Waiting { file: &self.file.name });
        }
        lock.lock().map_err(DownloadError::write(&self.lock))?;
        if self.is_cached()? {
            return Ok(false);
        }
        self.fetch().map(|()| true)
    }

    /// Whether the blob is there and is what it is called. One that is not is removed.
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
        let mut resumed = start > 0;
        if start > self.file.size {
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
                // An empty file is no harm; the error is what matters.
                let _ = fs::remove_file(&partial);
                let (file, expected) = (self.file.name.clone(), self.file.digest.text().to_owned());
                return Err(DownloadError::Digest { file, expected, found });
            }
            // What was there from before may have been the bad part.
            (self.watch)(DownloadEvent::Retrying { file: &self.file.name, problem: "what was there of it is damaged" });
        }
        output.sync_all().map_err(DownloadError::write(&partial))?;
        fs::rename(&partial, &self.blob).map_err(DownloadError::write(&self.blob))
    }

    /// Receives until all bytes are there, in as many tries as that is worth.
    fn receive(&self, output: &mut File, partial: &Path) -> Result<Hasher, DownloadError> {
        let length = |output: &File| output.metadata().map_err(DownloadError::read(partial)).map(|file| file.len());
        let (mut tries, mut in_vain, mut wait) = (0, 0, FIRST_WAIT);
        loop {
            let before = length(output)?;
            let problem = match self.try_once(output, partial)? {
                Attempt::Complete(hasher) => return Ok(hasher),
                Attempt::Broken(problem) => problem,
            };
            let got = length(output)?;
            tries += 1;
            if got > before && (got - before) as f64 >= MIN_PROGRESS * self.file.size as f64 {
                (in_vain, wait) = (0, FIRST_WAIT);
            } else {
                in_vain += 1;
            }
            if in_vain == MAX_FRUITLESS_ATTEMPTS {
                let (file, size) = (self.file.name.clone(), self.file.size);
                return Err(DownloadError::Incomplete { file, got, size, tries, problem });
            }
            (self.watch)(DownloadEvent::Retrying { file: &self.file.name, problem: &problem });
            std::thread::sleep(wait);
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    /// One request from where the file ends. Every byte that comes is kept; the digest is of the whole file.
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
                // What is there cannot be gone on from.
                self.discard(output, partial, start)?;
                return Ok(Attempt::Broken("the server has no such range".into()));
            }
        };
        if answer.start != start {
            // The whole file, where a part was asked for.
            self.discard(output, partial, start)?;
            start = 0;
        }
        let mut hasher = self.hash_of(output, partial, start)?;
        let mut body = answer.body;
        let mut chunk = vec![0; CHUNK];
        let mut at = start;
        let mut pace = (Instant::now(), at);
        loop {
            let (since, before) = pace;
            if since.elapsed() > self.client.stall_timeout() {
                if ((at - before) as f64) < MIN_BYTES_PER_SECOND * since.elapsed().as_secs_f64() {
                    return Ok(Attempt::Broken("hardly anything comes".into()));
                }
                pace = (Instant::now(), at);
            }
            if self.stop.load(Ordering::Relaxed) {
                return Err(DownloadError::Aborted);
            }
            // One byte more than belongs there would show that it is another file.
            let most = (self.file.size - at).saturating_add(1).min(CHUNK as u64) as usize;
            let read = match body.read(&mut chunk[..most]) {
                Ok(0) if at == self.file.size => return Ok(Attempt::Complete(hasher)),
                Ok(0) => return Ok(Attempt::Broken("the connection ended".into())),
                Ok(read) => read,
                Err(error) => return Ok(Attempt::Broken(error.to_string())),
            };
            if at + read as u64 > self.file.size {
                self.discard(output, partial, at)?;
                return Ok(Attempt::Broken("the server sends more than the file has".into()));
            }
            output.write_all(&chunk[..read]).map_err(written)?;
            hasher.update(&chunk[..read]);
            at += read as u64;
            (self.watch)(DownloadEvent::Fetched { bytes: read as u64 });
        }
    }

    /// Throws away what is there of the file.
    fn discard(&self, output: &mut File, partial: &Path, bytes: u64) -> Result<(), DownloadError> {
        (self.watch)(DownloadEvent::Discarded { bytes });
        output.set_len(0).map_err(DownloadError::write(partial))
    }

    /// The digest of the first bytes, with the file's position behind them.
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

/// Opens a file of the cache to read and write it, and makes it where it is not there. In a cache that others share, a link
/// may stand there, and it is not their files that are written.
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

/// Where bytes wait until they are all there; `huggingface_hub` calls it the same.
pub(super) fn partial(blob: &Path) -> PathBuf {
    let mut name = blob.as_os_str().to_owned();
    name.push(".incomplete");
    name.into()
}

//! The contents of a file: decompressed, and without a byte order mark.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Chain, Cursor, Read, Take};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

use super::RecordError;
use super::file_kind::{self, FileKind};

/// The number of first bytes from which the kind of a file is detected.
const HEAD_BYTES: usize = 64 << 10;
/// The UTF-8 byte order mark.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads the first [`HEAD_BYTES`] bytes. From a pipe it does not wait for more than the first line, because the writer may
/// wait for the answer to each record before it writes the next.
fn read_head(reader: &mut impl Read, is_pipe: bool) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    if !is_pipe {
        reader.take(HEAD_BYTES as u64).read_to_end(&mut head)?;
        return Ok(head);
    }
    let mut piece = [0; 4096];
    while head.len() < HEAD_BYTES && !head.trim_ascii_start().contains(&b'\n') {
        match reader.read(&mut piece) {
            Ok(0) => break,
            Ok(read) => head.extend_from_slice(&piece[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(head)
}

/// An opened file of records, compressed or not.
pub struct Source {
    path: PathBuf,
    head: Vec<u8>,
    /// The contents after `head`.
    rest: Box<dyn Read + Send>,
    /// The length in bytes of the byte order mark that was removed; 0 if there was none.
    mark_bytes: usize,
    is_compressed: bool,
}

impl Source {
    /// Opens a file. Compression with gzip or zstd is detected from the first bytes. A file whose name ends in `.gz` or `.zst`
    /// and that is not compressed is an error.
    ///
    /// # Errors
    ///
    /// [`RecordError::File`].
    pub fn open(path: &Path) -> Result<Self, RecordError> {
        let io = |error: io::Error| RecordError::io(path, &error);
        let mut file = File::open(path).map_err(io)?;
        let is_pipe = !file.metadata().map_err(io)?.is_file();
        let mut start = Vec::new();
        file.by_ref().take(4).read_to_end(&mut start).map_err(io)?;
        let compression = detect_compression(&start);
        let named = path.extension().and_then(|ending| ending.to_str()).and_then(Compression::from_extension);
        if let (None, Some(named), false) = (compression, named, start.is_empty()) {
            let hint = "remove the ending of its name if it is decompressed already, or download it again";
            return Err(RecordError::file(path, format!("its name says {named}, its bytes do not"), hint));
        }
        // The bytes are chained rather than read again, because a pipe cannot seek.
        let file = Cursor::new(start).chain(file);
        let mut rest: Box<dyn Read + Send> = match compression {
            None => Box::new(file),
            // A gzip file may have several members, for example if files were concatenated.
            Some(Compression::Gzip) => Box::new(MultiGzDecoder::new(file)),
            Some(Compression::Zstandard) => Box::new(ZstdFrames::new(file)),
        };
        let mut head = read_head(&mut rest, is_pipe).map_err(io)?;
        let mark_bytes = if head.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
        head.drain(..mark_bytes);
        Ok(Self { path: path.to_owned(), head, rest, mark_bytes, is_compressed: compression.is_some() })
    }

    /// Whether the file is compressed, so that its size is not that of its contents.
    pub fn is_compressed(&self) -> bool {
        self.is_compressed
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The first bytes of the contents. For a regular file these are 64 KiB, or all of a shorter file.
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// Refuses a file that is not UTF-8 text: archives, images, git-lfs pointers, UTF-16.
    ///
    /// # Errors
    ///
    /// [`RecordError::File`], which names what the file is.
    pub fn refuse_binary(&self) -> Result<(), RecordError> {
        match file_kind::detect_binary(&self.head) {
            Some(foreign) => Err(RecordError::file(&self.path, format!("it is {}", foreign.what), foreign.hint)),
            None => Ok(()),
        }
    }

    /// How the file stores its records.
    ///
    /// # Errors
    ///
    /// [`RecordError::File`] for a file that has no records, which names what the file is.
    pub fn kind(&self) -> Result<FileKind, RecordError> {
        file_kind::detect_kind(&self.path, &self.head)
    }

    /// The contents up to `limit` bytes. A byte order mark counts toward the limit, although it was removed.
    pub fn into_reader(self, limit: Option<u64>) -> Limited {
        let bytes = limit.map_or(u64::MAX, |limit| limit.saturating_sub(self.mark_bytes as u64));
        let contents: Box<dyn Read + Send> = Box::new(Cursor::new(self.head).chain(self.rest));
        Limited(BufReader::with_capacity(1 << 18, contents.take(bytes)))
    }
}

/// The contents of a [`Source`] up to a limit.
pub struct Limited(BufReader<Take<Box<dyn Read + Send>>>);

impl Limited {
    /// Whether the limit was reached, so that the file may have more bytes.
    pub fn reached_limit(&self) -> bool {
        self.0.get_ref().limit() == 0
    }
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl BufRead for Limited {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.0.fill_buf()
    }

    fn consume(&mut self, bytes: usize) {
        self.0.consume(bytes);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    Gzip,
    Zstandard,
}

impl Compression {
    fn from_extension(ending: &str) -> Option<Self> {
        match ending.to_ascii_lowercase().as_str() {
            "gz" => Some(Self::Gzip),
            "zst" | "zstd" => Some(Self::Zstandard),
            _ => None,
        }
    }
}

impl std::fmt::Display for Compression {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Gzip => "gzip",
            Self::Zstandard => "zstd",
        })
    }
}

fn detect_compression(start: &[u8]) -> Option<Compression> {
    match start {
        [0x1f, 0x8b, ..] => Some(Compression::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Some(Compression::Zstandard),
        _ => None,
    }
}

/// A zstd frame whose magic number has already been read.
type Frame<R> = StreamingDecoder<Chain<Cursor<[u8; 4]>, BufReader<R>>, FrameDecoder>;

/// Decompresses a sequence of zstd frames, as programs that compress in parallel write them. Skippable frames, which `pzstd`
/// puts between them, are ignored.
struct ZstdFrames<R: Read> {
    /// The file between frames; `None` while `frame` owns it.
    file: Option<BufReader<R>>,
    frame: Option<Frame<R>>,
}

impl<R: Read> ZstdFrames<R> {
    fn new(file: R) -> Self {
        Self { file: Some(BufReader::with_capacity(1 << 20, file)), frame: None }
    }
}

impl<R: Read> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(mut frame) = self.frame.take() {
                let read = frame.read(buffer)?;
                if read > 0 || buffer.is_empty() {
                    self.frame = Some(frame);
                    return Ok(read);
                }
                self.file = Some(frame.into_inner().into_inner().1);
            }
            let Some(mut file) = self.file.take() else { return Ok(0) };
            if file.fill_buf()?.is_empty() {
                return Ok(0);
            }
            let mut magic = [0; 4];
            file.read_exact(&mut magic)?;
            if matches!(magic, [0x50..=0x5f, 0x2a, 0x4d, 0x18]) {
                // A skippable frame: its length, then that many bytes.
                let mut length = [0; 4];
                file.read_exact(&mut length)?;
                io::copy(&mut file.by_ref().take(u32::from_le_bytes(length).into()), &mut io::sink())?;
                self.file = Some(file);
                continue;
            }
            let invalid = |problem: String| io::Error::new(io::ErrorKind::InvalidData, problem);
            let file = Cursor::new(magic).chain(file);
            self.frame = Some(StreamingDecoder::new(file).map_err(|error| invalid(error.to_string()))?);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn text(path: &Path) -> Result<String, String> {
        let source = Source::open(path).map_err(|error| error.to_string())?;
        let mut text = String::new();
        source.into_reader(None).read_to_string(&mut text).map_err(|error| error.to_string())?;
        Ok(text)
    }

    #[test]
    fn compressed_files_are_decompressed_whatever_their_name() {
        let dir = tempfile::tempdir().unwrap();
        let words: String = (0..50_000).map(|n| format!("line {n}\n")).collect();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(words.as_bytes()).unwrap();
        let gzip = gzip.finish().unwrap();
        for name in ["a.jsonl.gz", "a.jsonl"] {
            std::fs::write(dir.path().join(name), &gzip).unwrap();
            assert_eq!(text(&dir.path().join(name)).unwrap(), words);
        }
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let frame = |text: &str| ruzstd::encoding::compress_to_vec(text.as_bytes(), level);
        let path = dir.path().join("a.jsonl.zst");
        std::fs::write(&path, [frame(&words), frame("more")].concat()).unwrap();
        assert_eq!(text(&path).unwrap(), format!("{words}more"));
        let skipped = b"\x50\x2a\x4d\x18\x03\0\0\0abc";
        std::fs::write(&path, [skipped, &frame(&words)[..], skipped, &frame("more"), skipped].concat()).unwrap();
        assert_eq!(text(&path).unwrap(), format!("{words}more"));
        let half = frame(&words);
        std::fs::write(&path, &half[..half.len() / 2]).unwrap();
        assert!(text(&path).is_err());
        std::fs::write(&path, "not zstd").unwrap();
        assert!(text(&path).unwrap_err().ends_with("a.jsonl.zst`: its name says zstd, its bytes do not"));
    }

    #[test]
    fn a_byte_order_mark_is_removed_and_counts_towards_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        std::fs::write(&path, b"\xef\xbb\xbfwords").unwrap();
        assert_eq!(text(&path).unwrap(), "words");
        for (limit, expected, cut) in [(Some(5), "wo", true), (Some(100), "words", false), (None, "words", false)] {
            let mut reader = Source::open(&path).unwrap().into_reader(limit);
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            assert_eq!((text.as_str(), reader.reached_limit()), (expected, cut));
        }
    }
}

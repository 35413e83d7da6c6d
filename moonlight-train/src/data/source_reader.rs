//! Files as they are and compressed ones (`.gz`, `.zst`), read alike.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;

use super::DataError;
use super::files::SourceFile;

/// The bytes of a file, unpacked.
pub(super) struct SourceReader {
    pub(super) reader: Box<dyn Read>,
    /// How many of them to read.
    pub(super) limit: u64,
    /// Whether the file has more than the limit.
    pub(super) cut: bool,
}

/// Opens a file; the ending of its name says how it is compressed. A limit of less than the file is one of its bytes, or of
/// the unpacked bytes where it is compressed.
pub(super) fn open(file: &SourceFile) -> Result<SourceReader, DataError> {
    let opened = File::open(&file.path).map_err(|error| DataError::io("read", &file.path, &error))?;
    let cut = file.read < file.size;
    let unpacked: Box<dyn Read> = match compression(&file.path) {
        None => return Ok(SourceReader { reader: Box::new(opened), limit: file.read, cut }),
        Some(Compression::Gzip) => Box::new(MultiGzDecoder::new(opened)),
        Some(Compression::Zstandard) => Box::new(Frames::new(opened)),
    };
    Ok(SourceReader { reader: unpacked, limit: if cut { file.read } else { u64::MAX }, cut })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    Gzip,
    Zstandard,
}

fn compression(path: &Path) -> Option<Compression> {
    match path.extension()?.to_str()? {
        "gz" => Some(Compression::Gzip),
        "zst" | "zstd" => Some(Compression::Zstandard),
        _ => None,
    }
}

/// One zstd frame after the other, as the programs that compress in parallel write them.
struct Frames {
    /// The file, while no frame is open.
    file: Option<BufReader<File>>,
    frame: Option<StreamingDecoder<BufReader<File>, ruzstd::decoding::FrameDecoder>>,
}

impl Frames {
    fn new(file: File) -> Self {
        Self { file: Some(BufReader::with_capacity(1 << 20, file)), frame: None }
    }
}

impl Read for Frames {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(mut frame) = self.frame.take() {
                let read = frame.read(buffer)?;
                if read > 0 || buffer.is_empty() {
                    self.frame = Some(frame);
                    return Ok(read);
                }
                self.file = Some(frame.into_inner());
            }
            let Some(mut file) = self.file.take() else { return Ok(0) };
            if file.fill_buf()?.is_empty() {
                return Ok(0);
            }
            let broken = |problem: String| io::Error::new(io::ErrorKind::InvalidData, problem);
            self.frame = Some(StreamingDecoder::new(file).map_err(|error| broken(error.to_string()))?);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn source(path: &Path) -> SourceFile {
        let (id, metadata) = crate::file_id::FileId::of(path).unwrap();
        SourceFile { path: path.to_owned(), id, size: metadata.len(), changed: 0, read: metadata.len() }
    }

    fn text(path: &Path) -> io::Result<String> {
        let SourceReader { reader, limit, .. } = open(&source(path)).unwrap();
        let mut text = String::new();
        reader.take(limit).read_to_string(&mut text).map(|_| text)
    }

    #[test]
    fn compressed_files_read_as_their_contents() {
        let dir = tempfile::tempdir().unwrap();
        let words: String = (0..5000).map(|n| format!("line {n}\n")).collect();
        let path = dir.path().join("a.jsonl.gz");
        let mut gzip = flate2::write::GzEncoder::new(File::create(&path).unwrap(), flate2::Compression::default());
        gzip.write_all(words.as_bytes()).unwrap();
        gzip.finish().unwrap();
        assert_eq!(text(&path).unwrap(), words);

        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let frame = |text: &str| ruzstd::encoding::compress_to_vec(text.as_bytes(), level);
        let path = dir.path().join("a.jsonl.zst");
        std::fs::write(&path, [frame(&words), frame("more")].concat()).unwrap();
        assert_eq!(text(&path).unwrap(), format!("{words}more"));
        let half = frame(&words);
        std::fs::write(&path, &half[..half.len() / 2]).unwrap();
        assert!(text(&path).is_err());
        std::fs::write(&path, "not zstd").unwrap();
        assert!(text(&path).is_err());
    }
}

//! Documents of tokens on disk.
//!
//! A file is written once, under a temporary name in the same folder, and renamed. It is checked completely when it is opened,
//! and then read in pieces. It is not mapped into memory: if another process truncated a mapped file, this one would end with
//! a signal (SIGBUS) instead of an error.
//!
//! Layout, little-endian:
//!
//! | part | bytes |
//! |---|---|
//! | tokens | 2 each if the vocabulary allows, otherwise 4; 8 if they have weights: a u32 and an f32 |
//! | zeros | up to a multiple of 8 |
//! | documents | 24 each: end in tokens (u64), file, line, column (u32), 0 (u32) |
//! | the [report](Report) as JSON | any number |
//! | zeros | up to a multiple of 8 |
//! | the [footer](Footer) | 72 |

use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use moonlight_convert::new_file;
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::Xxh3Default;

use super::DataError;
use super::hash::Hash;
use super::report::Report;
use crate::output_file::Unfinished;

const MAGIC: u64 = u64::from_le_bytes(*b"moontok4");
/// Magic numbers of earlier formats, without a checksum or without columns. Such files are written again.
const EARLIER_MAGICS: [u64; 2] = [u64::from_le_bytes(*b"moontok2"), u64::from_le_bytes(*b"moontok3")];
const FOOTER_WORDS: usize = 9;
const FOOTER_BYTES: usize = 8 * FOOTER_WORDS;
const DOCUMENT_BYTES: usize = 24;
/// Bytes of a token with a weight.
const WEIGHTED: u64 = 8;
/// Bytes that are read at once when a whole file is read: a multiple of the size of every kind of entry.
const CHUNK_BYTES: usize = 3 << 19;
/// Lengths of the random part of a temporary file's name: today's, and that of earlier versions.
const RANDOM_CHARACTERS: [usize; 2] = [6, 12];

/// The end of the file, which describes the rest. These seven words are followed by an xxh3 of everything before it, and by
/// [`MAGIC`].
#[derive(Debug)]
struct Footer {
    /// Hashes of everything that the tokens depend on.
    key: [u64; 2],
    documents: u64,
    tokens: u64,
    /// Bytes of a token: 2, 4, or 8 with weights.
    width: u64,
    /// Bytes of the report.
    report: u64,
    /// A hash of tokens, weights and ends of documents.
    content: u64,
}

impl Footer {
    /// The offsets of the documents, the report and the footer in a file of this size; `None` if the numbers do not match it.
    fn offsets(&self, size: u64) -> Option<[u64; 3]> {
        let table = self.tokens.checked_mul(self.width)?.checked_next_multiple_of(8)?;
        let report = table.checked_add(self.documents.checked_mul(DOCUMENT_BYTES as u64)?)?;
        let end = report.checked_add(self.report)?.checked_next_multiple_of(8)?;
        (end.checked_add(FOOTER_BYTES as u64)? == size).then_some([table, report, end])
    }
}

/// Documents of tokens in a file.
#[derive(Debug)]
pub(super) struct TokenStore {
    file: File,
    path: PathBuf,
    footer: Footer,
    /// The offset of the documents in the file.
    table: u64,
    vocab_size: usize,
    report: Box<Report>,
}

/// The result of opening a path.
#[derive(Debug)]
pub(super) enum OpenedStore {
    Complete(TokenStore),
    /// There is no file, or one of an earlier format.
    None,
    /// The file differs from what was written; the text says how.
    Damaged(String),
}

/// The source of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin {
    /// The index of the file among those that were read.
    pub(super) file: u32,
    /// The line of the record, from 1; 0 if the document is the whole file.
    pub(super) line: u32,
    /// The column of the record, from 1; 0 if the line is enough.
    pub(super) column: u32,
}

impl TokenStore {
    /// Opens the file at `path` and reads all of it once: it must be unchanged since it was written, have the key `key`, and
    /// contain only tokens below `vocab_size`.
    pub(super) fn open(path: &Path, key: [u64; 2], vocab_size: usize) -> Result<OpenedStore, DataError> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(OpenedStore::None),
            Err(error) => return Err(DataError::io("read", path, &error)),
        };
        match Self::checked(file, path, key, vocab_size) {
            Ok(Ok(store)) => Ok(OpenedStore::Complete(store)),
            Ok(Err(Unusable::Earlier)) => Ok(OpenedStore::None),
            Ok(Err(Unusable::Damaged(problem))) => Ok(OpenedStore::Damaged(problem)),
            // Another process truncated the file after its size was read.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                Ok(OpenedStore::Damaged("it ends too early".into()))
            }
            Err(error) => Err(DataError::io("read", path, &error)),
        }
    }

    fn checked(file: File, path: &Path, key: [u64; 2], vocab_size: usize) -> io::Result<Result<Self, Unusable>> {
        let damaged = |problem: &str| Ok(Err(Unusable::Damaged(problem.into())));
        let size = file.metadata()?.len();
        let Some(start) = size.checked_sub(FOOTER_BYTES as u64) else { return damaged("it ends too early") };
        let mut end = [0; FOOTER_BYTES];
        read_exact_at(&file, &mut end, start)?;
        let words: [u64; FOOTER_WORDS] = std::array::from_fn(|index| u64_at(&end, 8 * index));
        let [key_0, key_1, documents, tokens, width, report, content, checksum, magic] = words;
        match magic {
            MAGIC => {}
            earlier if EARLIER_MAGICS.contains(&earlier) => return Ok(Err(Unusable::Earlier)),
            _ => return damaged("it does not end like a token cache"),
        }
        let footer = Footer { key: [key_0, key_1], documents, tokens, width, report, content };
        let Some([table, report_start, _]) = footer.offsets(size).filter(|_| [2, 4, WEIGHTED].contains(&width)) else {
            return damaged("its footer does not match its size");
        };
        if footer.key != key {
            return damaged("it was written for other data");
        }
        let store = Self { file, path: path.to_owned(), footer, table, vocab_size, report: Box::default() };
        let mut hash = Xxh3Default::new();
        let mut invalid = None;
        store.each_chunk(0..tokens * width, |bytes| {
            hash.update(bytes);
            // Reading continues after an invalid token: a wrong checksum explains more, and needs all bytes.
            invalid = invalid.take().or_else(|| store.find_invalid(bytes));
            true
        })?;
        store.each_chunk(tokens * width..table, |bytes| {
            hash.update(bytes);
            true
        })?;
        let (mut before, mut ordered) = (0, true);
        store.each_chunk(table..report_start, |bytes| {
            hash.update(bytes);
            for document in bytes.chunks_exact(DOCUMENT_BYTES) {
                let end = u64_at(document, 0);
                ordered &= before <= end && end <= tokens;
                before = end;
            }
            true
        })?;
        let mut report_bytes = Vec::new();
        // The report, and the footer up to its checksum.
        store.each_chunk(report_start..start + 7 * 8, |bytes| {
            hash.update(bytes);
            report_bytes.extend_from_slice(bytes);
            true
        })?;
        if hash.digest() != checksum {
            return damaged("its checksum differs");
        }
        // The writer never writes such a file, but anyone can compute a checksum.
        if let Some(problem) = invalid {
            return Ok(Err(Unusable::Damaged(problem)));
        }
        if !ordered {
            return damaged("its documents are not in order");
        }
        match serde_json::from_slice(&report_bytes[..report as usize]) {
            Ok(report) => Ok(Ok(Self { report, ..store })),
            Err(_) => damaged("its report cannot be parsed"),
        }
    }

    /// The number of documents.
    pub(super) fn documents(&self) -> usize {
        self.footer.documents as usize
    }

    /// What was found when the files were tokenized.
    pub(super) fn report(&self) -> &Report {
        &self.report
    }

    /// Whether the tokens have weights; without them all weights are 1.
    pub(super) fn is_weighted(&self) -> bool {
        self.footer.width == WEIGHTED
    }

    /// A hash of all tokens, weights and ends of documents.
    pub(super) fn content_hash(&self) -> u64 {
        self.footer.content
    }

    /// Calls `each` with the index of each document and the positions of its tokens.
    pub(super) fn each_document(
        &self,
        mut each: impl FnMut(usize, Range<u64>) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let (mut document, mut start) = (0, 0);
        let mut result = Ok(());
        let read = self.each_chunk(self.table..self.table + self.footer.documents * DOCUMENT_BYTES as u64, |bytes| {
            for entry in bytes.chunks_exact(DOCUMENT_BYTES) {
                let end = u64_at(entry, 0);
                result = match start <= end && end <= self.footer.tokens {
                    true => each(document, start..end),
                    false => Err(self.changed()),
                };
                if result.is_err() {
                    return false;
                }
                (document, start) = (document + 1, end);
            }
            true
        });
        read.map_err(|error| self.fault(&error))?;
        result
    }

    /// The source of a document.
    pub(super) fn origin(&self, document: usize) -> Result<Origin, DataError> {
        Ok(self.entry(document)?.1)
    }

    /// The source of the document that contains the token at a position.
    pub(super) fn origin_at(&self, position: u64) -> Result<Origin, DataError> {
        let (mut low, mut high) = (0, self.documents().saturating_sub(1));
        while low < high {
            let middle = low + (high - low) / 2;
            if self.entry(middle)?.0 <= position { low = middle + 1 } else { high = middle }
        }
        self.origin(low)
    }

    /// The end of a document in tokens, and its source.
    fn entry(&self, document: usize) -> Result<(u64, Origin), DataError> {
        let mut entry = [0; DOCUMENT_BYTES];
        let at = self.table + (DOCUMENT_BYTES * document) as u64;
        read_exact_at(&self.file, &mut entry, at).map_err(|error| self.fault(&error))?;
        let file_and_line = u64_at(&entry, 8);
        let (file, line) = (file_and_line as u32, (file_and_line >> 32) as u32);
        let origin = Origin { file, line, column: u64_at(&entry, 16) as u32 };
        Ok((u64_at(&entry, 0), origin))
    }

    /// A reader of token spans. It reads at least `prefetch` tokens at a time, which saves system calls if spans follow each
    /// other; with 0 it reads no more than each span.
    pub(super) fn reader(&self, prefetch: usize) -> SpanReader<'_> {
        SpanReader { store: self, prefetch: prefetch as u64, start: 0, bytes: Vec::new() }
    }

    /// Calls `each` with the bytes of a part of the file in order, until it returns false.
    fn each_chunk(&self, part: Range<u64>, mut each: impl FnMut(&[u8]) -> bool) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK_BYTES.min((part.end - part.start) as usize)];
        let mut at = part.start;
        while at < part.end {
            let length = buffer.len().min((part.end - at) as usize);
            read_exact_at(&self.file, &mut buffer[..length], at)?;
            if !each(&buffer[..length]) {
                break;
            }
            at += length as u64;
        }
        Ok(())
    }

    /// The problem with tokens outside the vocabulary or with weights that are negative or not finite, if there is one.
    fn find_invalid(&self, bytes: &[u8]) -> Option<String> {
        let vocab_size = self.vocab_size;
        let outside = |token: u32| format!("it contains the token {token}, outside the vocabulary of {vocab_size}");
        let wrong = |weight: f32| !(weight >= 0.0 && weight.is_finite());
        let tokens = || self.decode(bytes);
        // The maximum of all tokens, because a loop without an early exit is vectorized and several times as fast.
        let largest = match self.footer.width {
            2 => bytes.chunks_exact(2).map(|token| u32::from(u16::from_le_bytes([token[0], token[1]]))).max(),
            _ => tokens().map(|(token, _)| token).max(),
        };
        if let Some(token) = largest.filter(|&token| token as usize >= vocab_size) {
            return Some(outside(token));
        }
        match self.is_weighted() && tokens().any(|(_, weight)| wrong(weight)) {
            true => Some("it contains a weight that is negative or not finite".into()),
            false => None,
        }
    }

    fn decode<'a>(&self, bytes: &'a [u8]) -> impl ExactSizeIterator<Item = (u32, f32)> + use<'a> {
        bytes.chunks_exact(self.footer.width as usize).map(|token| match *token {
            [a, b] => (u32::from(u16::from_le_bytes([a, b])), 1.0),
            [a, b, c, d] => (u32::from_le_bytes([a, b, c, d]), 1.0),
            [a, b, c, d, e, f, g, h] => (u32::from_le_bytes([a, b, c, d]), f32::from_le_bytes([e, f, g, h])),
            _ => (0, 0.0),
        })
    }

    fn fault(&self, error: &io::Error) -> DataError {
        match error.kind() {
            ErrorKind::UnexpectedEof => self.changed(),
            _ => DataError::io("read", &self.path, error),
        }
    }

    fn changed(&self) -> DataError {
        DataError::CacheChanged { path: self.path.clone() }
    }
}

/// Why a file is not used.
enum Unusable {
    Earlier,
    Damaged(String),
}

/// Reads spans of tokens through a buffer.
pub(super) struct SpanReader<'a> {
    store: &'a TokenStore,
    prefetch: u64,
    /// Position of the first token in `bytes`.
    start: u64,
    bytes: Vec<u8>,
}

impl SpanReader<'_> {
    /// The tokens at the positions `span`, each with its weight in the loss.
    pub(super) fn read(
        &mut self,
        span: Range<u64>,
    ) -> Result<impl ExactSizeIterator<Item = (u32, f32)> + '_, DataError> {
        let (store, width) = (self.store, self.store.footer.width);
        let end = self.start + self.bytes.len() as u64 / width;
        if span.start < self.start || span.end > end {
            let end = span.end.max((span.start + self.prefetch).min(store.footer.tokens));
            self.bytes.resize(((end - span.start) * width) as usize, 0);
            self.start = span.start;
            let read = read_exact_at(&store.file, &mut self.bytes, span.start * width);
            // The file was checked when it was opened, but another process may have written to it since.
            let result = match read {
                Ok(()) if store.find_invalid(&self.bytes).is_some() => Err(store.changed()),
                read => read.map_err(|error| store.fault(&error)),
            };
            if result.is_err() {
                self.bytes.clear();
            }
            result?;
        }
        let at = |position: u64| ((position - self.start) * width) as usize;
        Ok(store.decode(&self.bytes[at(span.start)..at(span.end)]))
    }
}

/// Reads at an offset without moving the file's position, so that threads can share the file.
#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, at) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(read) => (bytes, at) = (&mut bytes[read..], at + read as u64),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// The file name without its extension, with which the names of temporary files start.
fn stem(path: &Path) -> String {
    path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Whether the name is that of a temporary file: `train-0123456789abcdef.Xf3aP9.tmp`.
fn is_temporary(name: &str) -> bool {
    let is_random_part =
        |text: &str| RANDOM_CHARACTERS.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let hash = |text: &str| text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    name.strip_suffix(".tmp").and_then(|name| name.split_once('.')).is_some_and(|(stem, rest)| {
        is_random_part(rest) && stem.rsplit_once('-').is_some_and(|(_, digits)| hash(digits))
    })
}

/// Removes the temporary files of processes that were killed. A writer holds a lock on its file, which ends with its process.
/// On file systems without locks nothing is removed.
pub(super) fn remove_abandoned(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if !entry.file_name().to_str().is_some_and(is_temporary) || !entry.file_type().is_ok_and(|kind| kind.is_file())
        {
            continue;
        }
        // Some file systems lock only files that are open for writing.
        let Ok(file) = File::options().write(true).open(entry.path()) else { continue };
        if file.try_lock().is_ok() {
            // A writer that has created the file but not locked it yet notices that it is gone, and creates another.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// A temporary file for the store at `path`, locked to show that it is being written.
fn locked(folder: &Path, path: &Path) -> io::Result<NamedTempFile> {
    loop {
        let file = new_file(folder, &format!("{}.", stem(path)), ".tmp")?;
        match file.as_file().try_lock() {
            // Without locks no other process removes it, either.
            Ok(()) | Err(TryLockError::Error(_)) if file.path().exists() => return Ok(file),
            _ => {}
        }
    }
}

/// Writes a store, document by document.
pub(super) struct TokenStoreWriter {
    path: PathBuf,
    /// The file is removed if it is dropped before `finish`.
    out: BufWriter<NamedTempFile>,
    unfinished: Unfinished,
    checksum: Xxh3Default,
    width: u64,
    tokens: u64,
    documents: Vec<(u64, Origin)>,
    content: Hash,
}

impl TokenStoreWriter {
    /// Creates a temporary file that [`finish`](TokenStoreWriter::finish) renames to `path`. `vocab_size` and `weighted` decide
    /// the bytes of a token.
    pub(super) fn create(path: &Path, vocab_size: usize, weighted: bool) -> Result<Self, DataError> {
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(|error| DataError::io("write", folder, &error))?;
        // Two runs may write the same cache at once. Each renames its own file to `path`, and the two have the same contents.
        let file = locked(folder, path).map_err(|error| DataError::io("write", folder, &error))?;
        Ok(Self {
            path: path.to_owned(),
            unfinished: Unfinished::new(file.path()),
            out: BufWriter::with_capacity(1 << 20, file),
            checksum: Xxh3Default::new(),
            width: match weighted {
                true => WEIGHTED,
                false if vocab_size > 1 << 16 => 4,
                false => 2,
            },
            tokens: 0,
            documents: Vec::new(),
            content: Hash::new(1),
        })
    }

    /// Tokens written so far.
    pub(super) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Tokens of the unfinished document.
    pub(super) fn open_tokens(&self) -> u64 {
        self.tokens - self.documents.last().map_or(0, |(end, _)| *end)
    }

    /// Adds tokens to the unfinished document, with a weight for each if the store has weights.
    pub(super) fn extend(&mut self, tokens: &[u32], weights: &[f32]) -> Result<(), DataError> {
        let mut bytes = Vec::with_capacity(self.width as usize * tokens.len());
        for &token in tokens {
            self.content.number(u64::from(token));
            match u16::try_from(token) {
                Ok(narrow) if self.width == 2 => bytes.extend_from_slice(&narrow.to_le_bytes()),
                _ => bytes.extend_from_slice(&token.to_le_bytes()),
            }
            if self.width == WEIGHTED {
                let weight = weights[bytes.len() / WEIGHTED as usize];
                self.content.number(u64::from(weight.to_bits()));
                bytes.extend_from_slice(&weight.to_le_bytes());
            }
        }
        self.tokens += tokens.len() as u64;
        self.write(&bytes)
    }

    /// Ends the unfinished document.
    pub(super) fn end_document(&mut self, origin: Origin) {
        self.content.number(u64::MAX);
        self.documents.push((self.tokens, origin));
    }

    /// Writes the rest, and renames the file.
    pub(super) fn finish(mut self, key: [u64; 2], report: &Report) -> Result<(), DataError> {
        let width = self.width;
        let padding = (self.tokens * width).next_multiple_of(8) - self.tokens * width;
        self.write(&vec![0; padding as usize])?;
        let documents = std::mem::take(&mut self.documents);
        for (end, origin) in &documents {
            let file_and_line = u64::from(origin.file) | u64::from(origin.line) << 32;
            self.write(&[*end, file_and_line, origin.column.into()].map(u64::to_le_bytes).concat())?;
        }
        // The report consists of numbers and texts, which JSON can always hold.
        let mut report = serde_json::to_vec(report).unwrap_or_default();
        let length = report.len() as u64;
        report.resize(report.len().next_multiple_of(8), 0);
        self.write(&report)?;
        let words = [key[0], key[1], documents.len() as u64, self.tokens, width, length, self.content.finish()];
        self.write(&words.map(u64::to_le_bytes).concat())?;
        let words = [self.checksum.digest(), MAGIC];
        self.write(&words.map(u64::to_le_bytes).concat())?;
        let Self { path, out, unfinished, .. } = self;
        let temporary = out.get_ref().path().to_owned();
        let write = |error: &io::Error| DataError::io("write", &temporary, error);
        let file = out.into_inner().map_err(|error| write(error.error()))?;
        // Before the rename: after a power failure a file with the final name must not be empty.
        file.as_file().sync_all().map_err(|error| write(&error))?;
        file.persist(&path).map_err(|error| DataError::io("write", &path, &error.error))?;
        drop(unfinished); // an interrupt until here removes the temporary file
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.checksum.update(bytes);
        self.out.write_all(bytes).map_err(|error| DataError::io("write", self.out.get_ref().path(), &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u64; 2] = [1, 2];

    fn write(path: &Path, vocab_size: usize, documents: &[&[u32]]) {
        let mut writer = TokenStoreWriter::create(path, vocab_size, false).unwrap();
        for (index, tokens) in documents.iter().enumerate() {
            let (left, right) = tokens.split_at(tokens.len() / 2);
            writer.extend(left, &[]).unwrap();
            writer.extend(right, &[]).unwrap();
            assert_eq!(writer.open_tokens(), tokens.len() as u64);
            writer.end_document(Origin { file: 7, line: index as u32, column: 9 });
        }
        writer.finish(KEY, &Report { replaced: 5, ..Report::default() }).unwrap();
    }

    fn opened(path: &Path, vocab_size: usize) -> TokenStore {
        match TokenStore::open(path, KEY, vocab_size).unwrap() {
            OpenedStore::Complete(store) => store,
            other => panic!("{other:?}"),
        }
    }

    fn damage(path: &Path, key: [u64; 2], vocab_size: usize) -> String {
        match TokenStore::open(path, key, vocab_size).unwrap() {
            OpenedStore::Damaged(problem) => problem,
            other => panic!("{other:?}"),
        }
    }

    fn spans(store: &TokenStore) -> Vec<Range<u64>> {
        let mut spans = Vec::new();
        let each = |document: usize, span| {
            assert_eq!(document, spans.len());
            spans.push(span);
            Ok(())
        };
        store.each_document(each).unwrap();
        spans
    }

    fn tokens(store: &TokenStore, span: Range<u64>) -> Vec<u32> {
        store.reader(0).read(span).unwrap().map(|(token, _)| token).collect()
    }

    /// Changes a store and gives it the checksum of its new contents.
    fn forge(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(path).unwrap();
        change(&mut bytes);
        let end = bytes.len() - 16;
        let checksum = xxhash_rust::xxh3::xxh3_64(&bytes[..end]);
        bytes[end..end + 8].copy_from_slice(&checksum.to_le_bytes());
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn documents_read_back() {
        let dir = tempfile::tempdir().unwrap();
        for (vocab_size, documents) in
            [(300, [&[1u32, 2, 299][..], &[], &[4]]), (1 << 20, [&[1u32, 2, 70_000][..], &[], &[4]])]
        {
            let path = dir.path().join(format!("folder/{vocab_size}.tokens"));
            write(&path, vocab_size, &documents);
            let store = opened(&path, vocab_size);
            assert_eq!((store.documents(), store.report().replaced, store.is_weighted()), (3, 5, false));
            for (index, (span, expected)) in spans(&store).into_iter().zip(documents).enumerate() {
                assert_eq!(tokens(&store, span), expected);
                assert_eq!(store.origin(index).unwrap(), Origin { file: 7, line: index as u32, column: 9 });
            }
            assert_eq!(store.origin_at(2).unwrap().line, 0);
            assert_eq!(store.origin_at(3).unwrap().line, 2);
        }
        assert_eq!(fs::read_dir(dir.path().join("folder")).unwrap().count(), 2, "no temporary file is left");
    }

    #[test]
    fn prefetching_does_not_change_what_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let document: Vec<u32> = (0..200).collect();
        write(&path, 300, &[&document]);
        let store = opened(&path, 300);
        for prefetch in [0, 1, 7, 1000] {
            let mut reader = store.reader(prefetch);
            for span in [0..3, 3..9, 2..5, 190..200, 0..0, 200..200, 5..180] {
                let read: Vec<u32> = reader.read(span.clone()).unwrap().map(|(token, _)| token).collect();
                assert_eq!(read, document[span.start as usize..span.end as usize], "{prefetch}, {span:?}");
            }
        }
    }

    #[test]
    fn weights_read_back_and_change_the_hash() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let content = |weights: &[f32]| {
            let mut writer = TokenStoreWriter::create(&path, 300, true).unwrap();
            writer.extend(&[7, 8], &weights[..2]).unwrap();
            writer.extend(&[9], &weights[2..]).unwrap();
            writer.end_document(Origin { file: 0, line: 1, column: 0 });
            writer.finish(KEY, &Report::default()).unwrap();
            let store = opened(&path, 300);
            assert!(store.is_weighted());
            let read: Vec<(u32, f32)> = store.reader(0).read(0..3).unwrap().collect();
            assert_eq!(read, [(7, weights[0]), (8, weights[1]), (9, weights[2])]);
            store.content_hash()
        };
        assert_ne!(content(&[0.0, 1.0, 0.5]), content(&[0.0, 1.0, 1.0]));
        forge(&path, |bytes| bytes[4..8].copy_from_slice(&f32::NAN.to_le_bytes()));
        assert!(damage(&path, KEY, 300).contains("weight"));
    }

    #[test]
    fn the_hash_depends_on_where_documents_end() {
        let dir = tempfile::tempdir().unwrap();
        let content = |documents: &[&[u32]]| {
            let path = dir.path().join("x");
            write(&path, 300, documents);
            opened(&path, 300).content_hash()
        };
        assert_eq!(content(&[&[1, 2], &[3]]), content(&[&[1, 2], &[3]]));
        assert_ne!(content(&[&[1, 2], &[3]]), content(&[&[1], &[2, 3]]));
        assert_ne!(content(&[&[1, 2], &[3]]), content(&[&[2, 1], &[3]]));
    }

    /// A change of any byte is noticed, in tokens, documents, report and footer.
    #[test]
    fn a_file_that_differs_from_what_was_written_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        assert!(matches!(TokenStore::open(&path, KEY, 300).unwrap(), OpenedStore::None));
        write(&path, 300, &[&[1, 2, 3], &[4]]);
        assert!(damage(&path, [1, 3], 300).contains("other data"));
        let bytes = fs::read(&path).unwrap();
        for bad in [&bytes[..bytes.len() - 1], &bytes[1..], &bytes[8..], &[], &bytes[..40]] {
            fs::write(&path, bad).unwrap();
            damage(&path, KEY, 300);
        }
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            fs::write(&path, &flipped).unwrap();
            damage(&path, KEY, 300);
        }
        // If another process replaced the file while it was written: zeros, and then a valid end.
        let mut zeros = bytes.clone();
        zeros[..8].fill(0);
        fs::write(&path, zeros).unwrap();
        assert!(damage(&path, KEY, 300).contains("checksum"));
        let mut earlier = bytes;
        let end = earlier.len() - 8;
        earlier[end..].copy_from_slice(b"moontok2");
        fs::write(&path, earlier).unwrap();
        assert!(matches!(TokenStore::open(&path, KEY, 300).unwrap(), OpenedStore::None));
    }

    #[test]
    fn tokens_and_documents_out_of_range_are_damage_whatever_the_checksum() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        write(&path, 300, &[&[1, 2, 3], &[4]]);
        assert!(damage(&path, KEY, 4).contains("token 4, outside the vocabulary of 4"));
        forge(&path, |bytes| bytes[2..4].fill(0xff));
        assert!(damage(&path, KEY, 300).contains("token 65535"));
        for end in [1u64 << 60, u64::MAX, 1] {
            write(&path, 300, &[&[1, 2, 3], &[4]]);
            forge(&path, |bytes| bytes[8 + DOCUMENT_BYTES..16 + DOCUMENT_BYTES].copy_from_slice(&end.to_le_bytes()));
            assert!(damage(&path, KEY, 300).contains("documents"));
        }
    }

    #[test]
    fn a_file_that_is_cut_or_changed_while_it_is_read_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let document: Vec<u32> = (0..250).collect();
        let rewrite = |at: u64, bytes: &[u8]| {
            let file = File::options().write(true).open(&path).unwrap();
            #[cfg(unix)]
            std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).unwrap();
            #[cfg(windows)]
            std::os::windows::fs::FileExt::seek_write(&file, bytes, at).unwrap();
        };
        write(&path, 300, &[&document]);
        let store = opened(&path, 300);
        rewrite(20, &[0xff, 0xff]);
        let changed = |result: Result<(), DataError>| {
            let error = result.unwrap_err();
            assert_eq!(error, DataError::CacheChanged { path: path.clone() });
            assert!(error.hint().is_some());
        };
        changed(store.reader(0).read(0..250).map(drop));
        assert_eq!(tokens(&store, 11..13), [11, 12]);
        File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        changed(store.reader(0).read(0..250).map(drop));
        changed(store.each_document(|_, _| Ok(())));
        changed(store.origin_at(3).map(drop));
    }

    #[test]
    fn an_unfinished_store_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = TokenStoreWriter::create(&dir.path().join("x"), 300, false).unwrap();
        writer.extend(&[1, 2], &[]).unwrap();
        drop(writer);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    /// Two writers of the same file, such as two containers with a shared disk, take turns step by step. Both succeed, and the
    /// file is complete at every moment.
    #[test]
    fn writers_of_the_same_file_do_not_disturb_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train-0123456789abcdef.tokens");
        let begin = || TokenStoreWriter::create(&path, 300, false).unwrap();
        let end = |mut writer: TokenStoreWriter| {
            writer.end_document(Origin { file: 0, line: 1, column: 0 });
            writer.finish(KEY, &Report::default()).unwrap();
            assert_eq!(tokens(&opened(&path, 300), 0..4), [1, 2, 3, 4]);
        };
        let mut first = begin();
        first.extend(&[1, 2], &[]).unwrap();
        remove_abandoned(dir.path()); // by a third writer that starts
        let mut second = begin();
        second.extend(&[1, 2, 3], &[]).unwrap();
        first.extend(&[3, 4], &[]).unwrap();
        end(first);
        let store = opened(&path, 300);
        let mut third = begin();
        third.extend(&[1], &[]).unwrap();
        drop(third); // and is interrupted
        second.extend(&[4], &[]).unwrap();
        end(second);
        assert_eq!(tokens(&store, 0..4), [1, 2, 3, 4], "the first writer's file stays open and unchanged");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        remove_abandoned(dir.path());
                        let mut writer = begin();
                        writer.extend(&[1, 2, 3, 4], &[]).unwrap();
                        end(writer);
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn files_of_killed_writers_are_removed_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let abandoned =
            ["0aB3kd", "0aB3kd92Lq1Z"].map(|random| dir.path().join(format!("train-0123456789abcdef.{random}.tmp")));
        let others = ["train-0123456789abcdef.tokens", "notes.tmp", "train-0123456789abcdef.mine.tmp"];
        abandoned.iter().for_each(|path| fs::write(path, "half").unwrap());
        others.iter().for_each(|name| fs::write(dir.path().join(name), "").unwrap());
        let writer = TokenStoreWriter::create(&dir.path().join("valid-00000000000000ff.tokens"), 300, false).unwrap();
        remove_abandoned(dir.path());
        assert!(abandoned.iter().all(|path| !path.exists()));
        assert!(others.iter().all(|name| dir.path().join(name).exists()));
        assert!(writer.out.get_ref().path().exists(), "it is being written");
    }
}

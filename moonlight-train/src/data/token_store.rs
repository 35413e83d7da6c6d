//! Documents of tokens on disk.
//!
//! A file is written once, beside its place, and renamed into it; readers map it. Layout, little-endian: the tokens (16
//! bits each where the vocabulary allows, else 32; where they have weights, 32 bits and the weight as an f32), zeros up to
//! 8 bytes, 16 bytes for each document (end in tokens u64, file u32, line u32), the [report](Report) as JSON, zeros up to 8
//! bytes, then the [footer](Footer).

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::DataError;
use super::hash::Hash;
use super::report::Report;

const MAGIC: u64 = u64::from_le_bytes(*b"moontok2");
const FOOTER_BYTES: usize = 8 * 8;
const DOCUMENT_BYTES: usize = 16;
/// Bytes of a token with a weight.
const WEIGHTED: u64 = 8;

/// The end of the file, which says what the rest is.
struct Footer {
    key: [u64; 2],
    documents: u64,
    tokens: u64,
    width: u64,
    report: u64,
    content: u64,
}

/// Documents of tokens, mapped into memory.
pub(super) struct TokenStore {
    map: Mmap,
    footer: Footer,
    table: usize,
    report: Report,
}

/// Where a document came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin {
    /// Index of the file among those that were read.
    pub(super) file: u32,
    /// Line of the record, from 1; 0 where the document is the whole file.
    pub(super) line: u32,
}

impl TokenStore {
    /// Opens the file at `path`; `None` where there is none, or one that is not whole or that was made from other
    /// things than `key`.
    pub(super) fn open(path: &Path, key: [u64; 2]) -> Result<Option<Self>, DataError> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(DataError::io("read", path, &error)),
        };
        if file.metadata().map_err(|error| DataError::io("read", path, &error))?.len() == 0 {
            return Ok(None); // some systems refuse to map nothing
        }
        // SAFETY: the map is only read. Another process that changed the file would change what is read, but ours only
        // ever rename whole files into place.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| DataError::io("read", path, &error))?;
        let Some(start) = map.len().checked_sub(FOOTER_BYTES) else { return Ok(None) };
        let word = |index: usize| u64_at(&map, start + 8 * index);
        if word(7) != MAGIC {
            return Ok(None);
        }
        let footer = Footer {
            key: [word(0), word(1)],
            documents: word(2),
            tokens: word(3),
            width: word(4),
            report: word(5),
            content: word(6),
        };
        let table = footer.tokens.checked_mul(footer.width).and_then(|bytes| bytes.checked_next_multiple_of(8));
        let reported = table
            .zip(footer.documents.checked_mul(DOCUMENT_BYTES as u64))
            .and_then(|(table, documents)| table.checked_add(documents));
        let whole = reported.and_then(|reported| reported.checked_add(footer.report)?.checked_next_multiple_of(8));
        let (Some(table), Some(reported), true) = (table, reported, footer.key == key && whole == Some(start as u64))
        else {
            return Ok(None);
        };
        let report = &map[reported as usize..(reported + footer.report) as usize];
        let Ok(report) = serde_json::from_slice(report) else { return Ok(None) };
        Ok(Some(Self { footer, table: table as usize, report, map }))
    }

    /// Number of documents.
    pub(super) fn documents(&self) -> usize {
        self.footer.documents as usize
    }

    /// What was found when the files were read.
    pub(super) fn report(&self) -> &Report {
        &self.report
    }

    /// Whether the tokens have weights of their own.
    pub(super) fn is_weighted(&self) -> bool {
        self.footer.width == WEIGHTED
    }

    /// A hash of all tokens and weights and of where documents end.
    pub(super) fn content(&self) -> u64 {
        self.footer.content
    }

    /// The tokens of a document, as positions in the store.
    pub(super) fn span(&self, document: usize) -> Range<u64> {
        let end = |document: usize| u64_at(&self.map, self.table + DOCUMENT_BYTES * document);
        let start = if document == 0 { 0 } else { end(document - 1) };
        start..end(document)
    }

    /// Where a document came from.
    pub(super) fn origin(&self, document: usize) -> Origin {
        let packed = u64_at(&self.map, self.table + DOCUMENT_BYTES * document + 8);
        Origin { file: packed as u32, line: (packed >> 32) as u32 }
    }

    /// Where the document came from that holds the token at a position.
    pub(super) fn origin_at(&self, position: u64) -> Origin {
        let (mut low, mut high) = (0, self.documents().saturating_sub(1));
        while low < high {
            let middle = low + (high - low) / 2;
            if self.span(middle).end <= position { low = middle + 1 } else { high = middle }
        }
        self.origin(low)
    }

    /// The tokens at positions `span`.
    pub(super) fn tokens(&self, span: Range<u64>) -> impl ExactSizeIterator<Item = u32> + '_ {
        let width = self.footer.width as usize;
        let bytes = &self.map[span.start as usize * width..span.end as usize * width];
        bytes.chunks_exact(width).map(|token| match *token {
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d, ..] => u32::from_le_bytes([a, b, c, d]),
            _ => 0,
        })
    }

    /// The weights of the tokens at positions `span`: how much each counts in the loss when it is predicted.
    pub(super) fn weights(&self, span: Range<u64>) -> impl ExactSizeIterator<Item = f32> + '_ {
        let width = self.footer.width as usize;
        let bytes = &self.map[span.start as usize * width..span.end as usize * width];
        bytes.chunks_exact(width).map(|token| match *token {
            [_, _, _, _, a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
            _ => 1.0,
        })
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Writes a store, document by document.
pub(super) struct TokenStoreWriter {
    path: PathBuf,
    temporary: PathBuf,
    out: BufWriter<File>,
    width: u64,
    tokens: u64,
    documents: Vec<(u64, Origin)>,
    content: Hash,
    finished: bool,
}

impl TokenStoreWriter {
    /// Begins the file that [`finish`](TokenStoreWriter::finish) will put at `path`; `vocab_size` decides its width,
    /// and whether the tokens have weights.
    pub(super) fn create(path: &Path, vocab_size: usize, weighted: bool) -> Result<Self, DataError> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|error| DataError::io("write", folder, &error))?;
        }
        // Two runs may make the same file at once; each renames its own into place, and they are equal.
        let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
        let file = File::create(&temporary).map_err(|error| DataError::io("write", &temporary, &error))?;
        Ok(Self {
            path: path.to_owned(),
            temporary,
            out: BufWriter::with_capacity(1 << 20, file),
            width: match weighted {
                true => WEIGHTED,
                false if vocab_size > 1 << 16 => 4,
                false => 2,
            },
            tokens: 0,
            documents: Vec::new(),
            content: Hash::new(1),
            finished: false,
        })
    }

    /// Tokens written so far.
    pub(super) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Tokens of the document that is being written.
    pub(super) fn open_tokens(&self) -> u64 {
        self.tokens - self.documents.last().map_or(0, |(end, _)| *end)
    }

    /// Adds tokens to the document that is being written, with a weight for each where the store has weights.
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

    /// Ends the document that is being written.
    pub(super) fn end_document(&mut self, origin: Origin) {
        self.content.number(u64::MAX);
        self.documents.push((self.tokens, origin));
    }

    /// Writes the rest, and puts the file into its place.
    pub(super) fn finish(mut self, key: [u64; 2], report: &Report) -> Result<(), DataError> {
        let width = self.width;
        let padding = (self.tokens * width).next_multiple_of(8) - self.tokens * width;
        self.write(&vec![0; padding as usize])?;
        let documents = std::mem::take(&mut self.documents);
        for (end, origin) in &documents {
            let origin = u64::from(origin.file) | u64::from(origin.line) << 32;
            self.write(&[end.to_le_bytes(), origin.to_le_bytes()].concat())?;
        }
        // Numbers and names: nothing in it that JSON has not.
        let mut report = serde_json::to_vec(report).unwrap_or_default();
        let length = report.len() as u64;
        report.resize(report.len().next_multiple_of(8), 0);
        self.write(&report)?;
        let words = [key[0], key[1], documents.len() as u64, self.tokens, width, length, self.content.finish(), MAGIC];
        self.write(&words.map(u64::to_le_bytes).concat())?;
        let write = |error: &std::io::Error| DataError::io("write", &self.temporary, error);
        self.out.flush().map_err(|error| write(&error))?;
        self.out.get_ref().sync_all().map_err(|error| write(&error))?;
        std::fs::rename(&self.temporary, &self.path).map_err(|error| DataError::io("write", &self.path, &error))?;
        self.finished = true;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.out.write_all(bytes).map_err(|error| DataError::io("write", &self.temporary, &error))
    }
}

impl Drop for TokenStoreWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Nobody is left to tell if this fails, and the next run does not look at the file.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, vocab_size: usize, documents: &[&[u32]]) {
        let mut writer = TokenStoreWriter::create(path, vocab_size, false).unwrap();
        for (index, tokens) in documents.iter().enumerate() {
            let (left, right) = tokens.split_at(tokens.len() / 2);
            writer.extend(left, &[]).unwrap();
            writer.extend(right, &[]).unwrap();
            assert_eq!(writer.open_tokens(), tokens.len() as u64);
            writer.end_document(Origin { file: 7, line: index as u32 });
        }
        writer.finish([1, 2], &Report { replaced: 5, ..Report::default() }).unwrap();
    }

    #[test]
    fn documents_read_back() {
        let dir = tempfile::tempdir().unwrap();
        for (vocab_size, documents) in
            [(300, [&[1u32, 2, 299][..], &[], &[4]]), (1 << 20, [&[1u32, 2, 70_000][..], &[], &[4]])]
        {
            let path = dir.path().join(format!("folder/{vocab_size}.tokens"));
            write(&path, vocab_size, &documents);
            let store = TokenStore::open(&path, [1, 2]).unwrap().unwrap();
            assert_eq!((store.documents(), store.report().replaced, store.is_weighted()), (3, 5, false));
            for (index, tokens) in documents.iter().enumerate() {
                assert_eq!(store.tokens(store.span(index)).collect::<Vec<_>>(), *tokens);
                assert_eq!(store.origin(index), Origin { file: 7, line: index as u32 });
            }
        }
        assert_eq!(std::fs::read_dir(dir.path().join("folder")).unwrap().count(), 2, "no temporary file is left");
    }

    #[test]
    fn weights_read_back_and_change_the_hash() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let content = |weights: &[f32]| {
            let mut writer = TokenStoreWriter::create(&path, 300, true).unwrap();
            writer.extend(&[7, 8], &weights[..2]).unwrap();
            writer.extend(&[9], &weights[2..]).unwrap();
            writer.end_document(Origin { file: 0, line: 1 });
            writer.finish([1, 2], &Report::default()).unwrap();
            let store = TokenStore::open(&path, [1, 2]).unwrap().unwrap();
            assert!(store.is_weighted());
            assert_eq!(store.tokens(0..3).collect::<Vec<_>>(), [7, 8, 9]);
            assert_eq!(store.weights(1..3).collect::<Vec<_>>(), weights[1..]);
            store.content()
        };
        assert_ne!(content(&[0.0, 1.0, 0.5]), content(&[0.0, 1.0, 1.0]));
    }

    #[test]
    fn the_hash_knows_where_documents_end() {
        let dir = tempfile::tempdir().unwrap();
        let content = |documents: &[&[u32]]| {
            let path = dir.path().join("x");
            write(&path, 300, documents);
            TokenStore::open(&path, [1, 2]).unwrap().unwrap().content()
        };
        assert_eq!(content(&[&[1, 2], &[3]]), content(&[&[1, 2], &[3]]));
        assert_ne!(content(&[&[1, 2], &[3]]), content(&[&[1], &[2, 3]]));
        assert_ne!(content(&[&[1, 2], &[3]]), content(&[&[2, 1], &[3]]));
    }

    #[test]
    fn what_is_not_whole_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        assert!(TokenStore::open(&path, [1, 2]).unwrap().is_none());
        write(&path, 300, &[&[1, 2, 3]]);
        assert!(TokenStore::open(&path, [1, 3]).unwrap().is_none());
        let bytes = std::fs::read(&path).unwrap();
        for bad in [&bytes[..bytes.len() - 1], &bytes[1..], &bytes[8..], &[], &bytes[..40]] {
            std::fs::write(&path, bad).unwrap();
            assert!(TokenStore::open(&path, [1, 2]).unwrap().is_none());
        }
    }

    #[test]
    fn what_is_not_finished_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = TokenStoreWriter::create(&dir.path().join("x"), 300, false).unwrap();
        writer.extend(&[1, 2], &[]).unwrap();
        drop(writer);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

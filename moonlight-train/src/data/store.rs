//! Documents of tokens on disk.
//!
//! A file is written once, beside its place, and renamed into it; readers map it. Layout, little-endian: the tokens (16
//! bits each where the vocabulary allows, else 32), zeros up to 8 bytes, 16 bytes for each document (end in tokens u64,
//! file u32, line u32), then the [footer](Footer).

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::DataError;
use super::hash::Hash;

const MAGIC: u64 = u64::from_le_bytes(*b"moontok1");
const FOOTER_BYTES: usize = 8 * 8;
const DOCUMENT_BYTES: usize = 16;

/// The end of the file, which says what the rest is.
struct Footer {
    key: [u64; 2],
    documents: u64,
    tokens: u64,
    width: u64,
    replaced: u64,
    content: u64,
}

/// Documents of tokens, mapped into memory.
pub(super) struct Store {
    map: Mmap,
    footer: Footer,
    table: usize,
}

/// Where a document came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin {
    /// Index of the file among those that were read.
    pub(super) file: u32,
    /// Line of the record, from 1; 0 where the document is the whole file.
    pub(super) line: u32,
}

impl Store {
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
            replaced: word(5),
            content: word(6),
        };
        let table = footer.tokens.checked_mul(footer.width).and_then(|bytes| bytes.checked_next_multiple_of(8));
        let whole = table
            .zip(footer.documents.checked_mul(DOCUMENT_BYTES as u64))
            .and_then(|(table, documents)| table.checked_add(documents));
        let (Some(table), true) = (table, footer.key == key && whole == Some(start as u64)) else { return Ok(None) };
        Ok(Some(Self { footer, table: table as usize, map }))
    }

    /// Number of documents.
    pub(super) fn documents(&self) -> usize {
        self.footer.documents as usize
    }

    /// Number of files whose bytes were not all UTF-8.
    pub(super) fn replaced(&self) -> u64 {
        self.footer.replaced
    }

    /// A hash of all tokens and of where documents end.
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

    /// The tokens at positions `span`.
    pub(super) fn tokens(&self, span: Range<u64>) -> impl ExactSizeIterator<Item = u32> + '_ {
        let width = self.footer.width as usize;
        let bytes = &self.map[span.start as usize * width..span.end as usize * width];
        bytes.chunks_exact(width).map(|token| match *token {
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => 0,
        })
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Writes a store, document by document.
pub(super) struct StoreWriter {
    path: PathBuf,
    temporary: PathBuf,
    out: BufWriter<File>,
    wide: bool,
    tokens: u64,
    documents: Vec<(u64, Origin)>,
    content: Hash,
    finished: bool,
}

impl StoreWriter {
    /// Begins the file that [`finish`](StoreWriter::finish) will put at `path`; `vocab_size` decides its width.
    pub(super) fn create(path: &Path, vocab_size: usize) -> Result<Self, DataError> {
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
            wide: vocab_size > 1 << 16,
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

    /// Adds tokens to the document that is being written.
    pub(super) fn extend(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        let mut bytes = Vec::with_capacity(4 * tokens.len());
        for &token in tokens {
            self.content.number(u64::from(token));
            match u16::try_from(token) {
                Ok(narrow) if !self.wide => bytes.extend_from_slice(&narrow.to_le_bytes()),
                _ => bytes.extend_from_slice(&token.to_le_bytes()),
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

    /// Writes the rest, and puts the file into its place; `replaced` files were not all UTF-8.
    pub(super) fn finish(mut self, key: [u64; 2], replaced: u64) -> Result<(), DataError> {
        let width = if self.wide { 4 } else { 2 };
        let padding = (self.tokens * width).next_multiple_of(8) - self.tokens * width;
        self.write(&vec![0; padding as usize])?;
        let documents = std::mem::take(&mut self.documents);
        for (end, origin) in &documents {
            let origin = u64::from(origin.file) | u64::from(origin.line) << 32;
            self.write(&[end.to_le_bytes(), origin.to_le_bytes()].concat())?;
        }
        let words =
            [key[0], key[1], documents.len() as u64, self.tokens, width, replaced, self.content.finish(), MAGIC];
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

impl Drop for StoreWriter {
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
        let mut writer = StoreWriter::create(path, vocab_size).unwrap();
        for (index, tokens) in documents.iter().enumerate() {
            let (left, right) = tokens.split_at(tokens.len() / 2);
            writer.extend(left).unwrap();
            writer.extend(right).unwrap();
            assert_eq!(writer.open_tokens(), tokens.len() as u64);
            writer.end_document(Origin { file: 7, line: index as u32 });
        }
        writer.finish([1, 2], 5).unwrap();
    }

    #[test]
    fn documents_read_back() {
        let dir = tempfile::tempdir().unwrap();
        for (vocab_size, documents) in
            [(300, [&[1u32, 2, 299][..], &[], &[4]]), (1 << 20, [&[1u32, 2, 70_000][..], &[], &[4]])]
        {
            let path = dir.path().join(format!("folder/{vocab_size}.tokens"));
            write(&path, vocab_size, &documents);
            let store = Store::open(&path, [1, 2]).unwrap().unwrap();
            assert_eq!((store.documents(), store.replaced()), (3, 5));
            for (index, tokens) in documents.iter().enumerate() {
                assert_eq!(store.tokens(store.span(index)).collect::<Vec<_>>(), *tokens);
                assert_eq!(store.origin(index), Origin { file: 7, line: index as u32 });
            }
        }
        assert_eq!(std::fs::read_dir(dir.path().join("folder")).unwrap().count(), 2, "no temporary file is left");
    }

    #[test]
    fn the_hash_knows_where_documents_end() {
        let dir = tempfile::tempdir().unwrap();
        let content = |documents: &[&[u32]]| {
            let path = dir.path().join("x");
            write(&path, 300, documents);
            Store::open(&path, [1, 2]).unwrap().unwrap().content()
        };
        assert_eq!(content(&[&[1, 2], &[3]]), content(&[&[1, 2], &[3]]));
        assert_ne!(content(&[&[1, 2], &[3]]), content(&[&[1], &[2, 3]]));
        assert_ne!(content(&[&[1, 2], &[3]]), content(&[&[2, 1], &[3]]));
    }

    #[test]
    fn what_is_not_whole_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        assert!(Store::open(&path, [1, 2]).unwrap().is_none());
        write(&path, 300, &[&[1, 2, 3]]);
        assert!(Store::open(&path, [1, 3]).unwrap().is_none());
        let bytes = std::fs::read(&path).unwrap();
        for bad in [&bytes[..bytes.len() - 1], &bytes[1..], &bytes[8..], &[], &bytes[..40]] {
            std::fs::write(&path, bad).unwrap();
            assert!(Store::open(&path, [1, 2]).unwrap().is_none());
        }
    }

    #[test]
    fn what_is_not_finished_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = StoreWriter::create(&dir.path().join("x"), 300).unwrap();
        writer.extend(&[1, 2]).unwrap();
        drop(writer);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

//! Documents to sequences, in one of three ways.
//!
//! End to end: the documents follow each other and are cut every `length` tokens. A token's target is the next one of its
//! document, even across a cut. Whole: documents share a sequence and are never cut. One by one: every document is a sequence.

use std::sync::Arc;

use super::packing::Bins;
use super::token_store::{SpanReader, TokenStore};
use super::{DataError, HostBatch};

/// Tokens to prefetch where all of them are read in order.
pub(super) const PREFETCH_TOKENS: usize = 1 << 16;

/// Rows that are not packed are padded to a multiple of this many tokens (or to the sequence length), so that batches have few
/// different shapes.
const PADDING_STEP: usize = 64;

/// How documents become sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    /// Concatenated, and cut at the sequence length.
    EndToEnd,
    /// Several in a sequence if they fit, never cut.
    Whole,
    /// One in each sequence.
    OneByOne,
}

/// The sequences of some documents of a store.
#[derive(Clone)]
pub(super) struct Sequences {
    store: Arc<TokenStore>,
    documents: Arc<Vec<DocumentSpan>>,
    tokens: u64,
    length: usize,
    rows: RowLayout,
}

#[derive(Clone)]
enum RowLayout {
    EndToEnd,
    Whole(Arc<Bins>),
    OneByOne,
}

/// A document or a part of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DocumentSpan {
    /// The positions of its tokens in the store.
    pub(super) start: u64,
    pub(super) end: u64,
    /// Tokens of all spans before it.
    pub(super) before: u64,
}

impl DocumentSpan {
    pub(super) fn len(&self) -> u64 {
        self.end - self.start
    }
}

impl Sequences {
    /// Sequences of `length` tokens over the token spans `parts`. With [`Packing::Whole`] no span may be longer than that.
    pub(super) fn new(
        store: Arc<TokenStore>,
        parts: impl IntoIterator<Item = (u64, u64)>,
        length: usize,
        packing: Packing,
    ) -> Self {
        let mut tokens = 0;
        let mut documents = Vec::new();
        for (start, end) in parts {
            documents.push(DocumentSpan { start, end, before: tokens });
            tokens += end - start;
        }
        let rows = match packing {
            Packing::EndToEnd => RowLayout::EndToEnd,
            Packing::OneByOne => RowLayout::OneByOne,
            Packing::Whole => {
                let lengths: Vec<u64> = documents.iter().map(DocumentSpan::len).collect();
                RowLayout::Whole(Arc::new(Bins::best_fit(&lengths, length as u64)))
            }
        };
        Self { store, documents: Arc::new(documents), tokens, length, rows }
    }

    /// The number of sequences.
    pub(super) fn count(&self) -> u64 {
        match &self.rows {
            RowLayout::EndToEnd => self.tokens.div_ceil(self.length as u64),
            RowLayout::Whole(bins) => bins.count(),
            RowLayout::OneByOne => self.documents.len() as u64,
        }
    }

    /// Tokens of a sequence, padding included.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Tokens of all sequences, without padding.
    pub(super) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The number of predicted tokens: those with a predecessor in their document and a weight above 0.
    pub(super) fn predicted(&self) -> Result<u64, DataError> {
        if !self.store.is_weighted() {
            return Ok(self.documents.iter().map(|part| part.len().saturating_sub(1)).sum());
        }
        let mut reader = self.store.reader(PREFETCH_TOKENS);
        let mut predicted = 0;
        for part in self.documents.iter() {
            let tokens = reader.read(part.start..part.end)?;
            predicted += tokens.skip(1).filter(|&(_, weight)| weight > 0.0).count() as u64;
        }
        Ok(predicted)
    }

    /// The share of the sequences that is not padding; `None` if rows are padded to the longest of their batch.
    pub(super) fn fill(&self) -> Option<f64> {
        let capacity = self.count() * self.length as u64;
        (!matches!(self.rows, RowLayout::OneByOne) && capacity > 0).then(|| self.tokens as f64 / capacity as f64)
    }

    /// The documents, or the parts of them that are used.
    pub(super) fn parts(&self) -> &[DocumentSpan] {
        &self.documents
    }

    /// The store that contains the tokens.
    pub(super) fn store(&self) -> &TokenStore {
        &self.store
    }

    /// The tokens of each document, with their weights.
    pub(super) fn documents(&self) -> impl Iterator<Item = Result<std::vec::IntoIter<(u32, f32)>, DataError>> + '_ {
        let mut reader = self.store.reader(PREFETCH_TOKENS);
        self.documents
            .iter()
            .map(move |part| reader.read(part.start..part.end).map(|tokens| tokens.collect::<Vec<_>>().into_iter()))
    }

    /// The batch with these sequences.
    pub(super) fn batch(&self, indices: &[u64]) -> Result<HostBatch, DataError> {
        let sequence = if matches!(self.rows, RowLayout::OneByOne) { self.padded_length(indices) } else { self.length };
        let mut rows = Rows { sequence, one_document_each: true, ..Rows::default() };
        // Only with `EndToEnd` are the documents of a row adjacent in the store, so that one read gets all of them.
        let prefetch = if matches!(self.rows, RowLayout::EndToEnd) { self.length + 1 } else { 0 };
        let mut reader = self.store.reader(prefetch);
        for &index in indices {
            match &self.rows {
                RowLayout::EndToEnd => self.pack_row(index, &mut reader, &mut rows)?,
                RowLayout::Whole(bins) => {
                    for &document in bins.documents(index) {
                        rows.add(&mut reader, self.documents[document as usize], 0, sequence)?;
                    }
                }
                RowLayout::OneByOne => rows.add(&mut reader, self.documents[index as usize], 0, sequence)?,
            }
            rows.end();
        }
        Ok(HostBatch {
            tokens: rows.tokens,
            targets: rows.targets,
            loss_mask: rows.mask,
            documents: (!rows.one_document_each).then_some(rows.documents),
            batch: indices.len(),
            sequence,
        })
    }

    /// The length of rows that are as long as the longest of these sequences, rounded up to `PADDING_STEP`.
    fn padded_length(&self, indices: &[u64]) -> usize {
        let longest = indices.iter().map(|&index| self.documents[index as usize].len()).max().unwrap_or(1);
        (longest as usize).next_multiple_of(PADDING_STEP).min(self.length)
    }

    fn pack_row(&self, index: u64, reader: &mut SpanReader<'_>, rows: &mut Rows) -> Result<(), DataError> {
        let mut at = index * self.length as u64;
        let mut left = self.length.min((self.tokens - at) as usize);
        let mut document = self.documents.partition_point(|part| part.before + part.len() <= at);
        while left > 0 {
            let part = self.documents[document];
            let taken = left.min((part.before + part.len() - at) as usize);
            rows.add(reader, part, at - part.before, taken)?;
            at += taken as u64;
            left -= taken;
            document += 1;
        }
        Ok(())
    }
}

/// The rows of a batch while they are filled.
#[derive(Default)]
struct Rows {
    sequence: usize,
    tokens: Vec<i32>,
    targets: Vec<i32>,
    mask: Vec<f32>,
    documents: Vec<i32>,
    /// The number of the next document in the row.
    document: i32,
    /// Whether every row so far is one document without padding: such a batch needs no mask between documents.
    one_document_each: bool,
}

impl Rows {
    /// Adds up to `limit` tokens of a document, starting with its token `from`.
    fn add(
        &mut self,
        reader: &mut SpanReader<'_>,
        part: DocumentSpan,
        from: u64,
        limit: usize,
    ) -> Result<(), DataError> {
        let start = part.start + from;
        let end = part.end.min(start + limit as u64);
        // One token more, if the document has it: the target of the last one.
        let mut tokens =
            reader.read(start..part.end.min(end + 1))?.map(|(token, weight)| (token as i32, weight)).peekable();
        for _ in start..end {
            let Some((token, _)) = tokens.next() else { break };
            let (target, weight) = tokens.peek().copied().unwrap_or((0, 0.0));
            self.tokens.push(token);
            self.targets.push(target);
            self.mask.push(weight);
            self.documents.push(self.document);
        }
        self.document += 1;
        Ok(())
    }

    /// Pads the row to its length.
    fn end(&mut self) {
        let full = self.tokens.len().next_multiple_of(self.sequence.max(1));
        self.one_document_each &= self.document == 1 && full == self.tokens.len();
        self.tokens.resize(full, 0);
        self.targets.resize(full, 0);
        self.mask.resize(full, 0.0);
        self.documents.resize(full, -1);
        self.document = 0;
    }
}

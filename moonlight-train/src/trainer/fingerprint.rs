//! A fingerprint of a base model's weights, to check on resuming that it is the one that the adapters were trained on.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use moonlight_convert::Checkpoint;
use xxhash_rust::xxh3::Xxh3;

use crate::error::TrainError;

/// A file of at most this many bytes is hashed completely.
const MAX_FULLY_HASHED_BYTES: u64 = 64 << 20;
/// Blocks of a longer file that are hashed, spread evenly over it.
const SAMPLED_BLOCKS: u64 = 1024;
const BLOCK_BYTES: u64 = 16 << 10;

/// A hash of the names, sizes and contents of the weight files in a folder. Small files are hashed completely, and 16 MiB of
/// each large one, since reading a base model of many gigabytes a second time takes as long as loading it. A training step
/// changes almost every weight, so models with different training differ; an edit of a few weights may be missed.
///
/// # Errors
///
/// A checkpoint that cannot be opened or read.
pub(super) fn fingerprint(dir: &Path) -> Result<String, TrainError> {
    let checkpoint = Checkpoint::open(dir)?;
    let mut names: Vec<&str> = checkpoint.files().iter().map(|file| file.name.as_str()).collect();
    names.sort_unstable();
    let mut hash = Xxh3::new();
    for name in names {
        hash.update(name.as_bytes());
        let path = checkpoint.file_path(name);
        add(&path, &mut hash).map_err(TrainError::read(&path))?;
    }
    Ok(format!("{:032x}", hash.digest128()))
}

fn add(path: &Path, hash: &mut Xxh3) -> io::Result<()> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    // With the length, the end of one file cannot pass for the start of the next.
    hash.update(&length.to_le_bytes());
    let (count, stride) = if length <= MAX_FULLY_HASHED_BYTES {
        (length.div_ceil(BLOCK_BYTES), BLOCK_BYTES)
    } else {
        (SAMPLED_BLOCKS, (length - BLOCK_BYTES) / (SAMPLED_BLOCKS - 1))
    };
    let mut bytes = Vec::new();
    for index in 0..count {
        file.seek(SeekFrom::Start(index * stride))?;
        bytes.clear();
        file.by_ref().take(BLOCK_BYTES).read_to_end(&mut bytes)?;
        hash.update(&bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(bytes: &[u8]) -> u128 {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let mut hash = Xxh3::new();
        add(file.path(), &mut hash).unwrap();
        hash.digest128()
    }

    #[test]
    fn every_byte_and_the_length_of_a_small_file_change_the_hash() {
        let bytes: Vec<u8> = (0..50_000u32).map(|at| at as u8).collect();
        let whole = hash(&bytes);
        for at in [0, 16_383, 16_384, 49_999] {
            let mut other = bytes.clone();
            other[at] ^= 1;
            assert_ne!(hash(&other), whole, "byte {at}");
        }
        assert_ne!(hash(&bytes[..49_999]), whole);
        assert_eq!(hash(&bytes), whole);
    }

    #[test]
    fn a_large_file_is_sampled_from_end_to_end() {
        let bytes = vec![7; (MAX_FULLY_HASHED_BYTES + 5) as usize];
        let whole = hash(&bytes);
        let last = (bytes.len() as u64 - BLOCK_BYTES) / (SAMPLED_BLOCKS - 1) * (SAMPLED_BLOCKS - 1);
        for at in [0, last as usize] {
            let mut other = bytes.clone();
            other[at] = 8;
            assert_ne!(hash(&other), whole, "byte {at}");
        }
    }
}

//! A hash of the text of a recipe, which distinguishes the results of different texts.

use std::fs::File;
use std::io::Read;

use xxhash_rust::xxh3::Xxh3;

use super::files::find;
use crate::error::TrainError;
use crate::recipe::DataConfig;

/// Hexadecimal digits that follow from the contents of the files of `data.train` and `data.valid`, whatever their paths.
///
/// # Errors
///
/// Globs that match nothing, and files that cannot be read.
pub(crate) fn text_digest(data: &DataConfig) -> Result<String, TrainError> {
    let mut hash = Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    for (key, globs) in [("data.train", &data.train), ("data.valid", &data.valid)] {
        for source in find(key, globs)? {
            let mut file = File::open(&source.path).map_err(TrainError::read(&source.path))?;
            loop {
                let count = file.read(&mut buffer).map_err(TrainError::read(&source.path))?;
                if count == 0 {
                    break;
                }
                hash.update(&buffer[..count]);
            }
            // So that a text that moves from one file to the next is another.
            hash.update(&source.size.to_le_bytes());
        }
    }
    Ok(format!("{:016x}", hash.digest()))
}

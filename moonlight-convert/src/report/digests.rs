//! Checking files against a list of SHA-256 digests.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::ops::ControlFlow;
use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::error::CheckpointError;
use crate::format::index::is_inside;
use crate::io::confined_dir::ConfinedDir;
use crate::progress::Progress;

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;
/// Size limit of a list in bytes, enough for a few hundred thousand files.
const LONGEST_LIST: u64 = 20_000_000;

/// The result for one line of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckedFile {
    /// The file's name in the directory.
    pub name: String,
    /// What is wrong, as the rest of a sentence; `None` if the file is as listed.
    pub problem: Option<String>,
}

/// A parsed line of the list.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    file: Name,
    bytes: Option<u64>,
    digest: String,
}

/// How a line names its file.
#[derive(Debug, PartialEq, Eq)]
enum Name {
    File(String),
    /// The shard with this number, whether or not its name pads the number with zeros.
    Shard(u64),
}

/// Checks the files of a directory against a list of SHA-256 digests. A line is `DIGEST  NAME`, as `sha256sum` writes
/// it, or `NUMBER BYTES DIGEST` for `model-NUMBER-of-N.safetensors`. Empty lines and lines that begin with `#` are
/// ignored.
///
/// # Errors
///
/// [`CheckpointError::Digests`] if the list is invalid or names a file outside the directory; [`CheckpointError::File`]
/// if a file cannot be read; [`CheckpointError::Interrupted`] if `progress` stops the work. A file that is missing, is
/// not a plain file of the directory or differs is not an error, but a [`CheckedFile::problem`].
pub fn check_digests(dir: &Path, list: &Path, progress: &dyn Progress) -> Result<Vec<CheckedFile>, CheckpointError> {
    if !dir.is_dir() {
        return Err(CheckpointError::not_a_directory(dir));
    }
    let text = read_list(list)?;
    let broken = |problem: String| CheckpointError::Digests { path: list.to_path_buf(), problem };
    let listed = parse(&text).map_err(broken)?;
    let shards = shards(dir)?;
    let resolved: Vec<(String, &Listed)> = listed
        .iter()
        .map(|line| match &line.file {
            Name::File(name) => (name.clone(), line),
            Name::Shard(number) => {
                let unknown = || format!("model-{number}-of-{}.safetensors", listed.len());
                (shards.get(number).cloned().unwrap_or_else(unknown), line)
            }
        })
        .collect();
    let confined = ConfinedDir::new(dir).map_err(CheckpointError::read(dir))?;
    // A file that cannot be opened is reported below.
    let length = |name: &str| Some(fs::metadata(confined.file(name).ok()??).ok()?.len());
    progress.begin(resolved.iter().filter_map(|(name, _)| length(name)).fold(0, u64::saturating_add));
    resolved
        .into_par_iter()
        .with_max_len(1) // each file is a task, because files are large and few
        .map(|(name, line)| {
            let problem = match (confined.open(&name, u64::MAX), line.bytes, length(&name)) {
                (Ok(None), ..) => Some("does not exist".to_owned()),
                (Err(error), ..) => Some(format!("cannot be checked: {error}")),
                (Ok(Some(_)), Some(bytes), Some(length)) if length != bytes => {
                    Some(format!("has {length} bytes; the list has {bytes}"))
                }
                (Ok(Some((file, path))), ..) => {
                    let digest = sha256(file, &path, progress)?;
                    (digest != line.digest).then(|| format!("has the digest {digest}; the list has {}", line.digest))
                }
            };
            Ok(CheckedFile { name, problem })
        })
        .collect()
}

/// Reads the list. It may be a pipe, so that its length is not known in advance.
fn read_list(path: &Path) -> Result<String, CheckpointError> {
    let mut text = String::new();
    let file = File::open(path).map_err(CheckpointError::read(path))?;
    let read = file.take(LONGEST_LIST + 1).read_to_string(&mut text).map_err(CheckpointError::read(path))? as u64;
    if read > LONGEST_LIST {
        return Err(CheckpointError::TooLong { path: path.to_path_buf(), bytes: read, most: LONGEST_LIST });
    }
    Ok(text)
}

fn sha256(mut file: File, path: &Path, progress: &dyn Progress) -> Result<String, CheckpointError> {
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0u8; CHUNK]);
    loop {
        match file.read(&mut buffer).map_err(CheckpointError::read(path))? {
            0 => return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            count => {
                hasher.update(&buffer[..count]);
                if progress.advance(count as u64) == ControlFlow::Break(()) {
                    return Err(CheckpointError::Interrupted);
                }
            }
        }
    }
}

fn parse(text: &str) -> Result<Vec<Listed>, String> {
    let mut listed = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        listed.push(parse_line(line).ok_or_else(|| {
            format!(
                "is neither `DIGEST  NAME` nor `NUMBER BYTES DIGEST` in line {number}, or names a file outside the directory"
            )
        })?);
    }
    if listed.is_empty() { Err("lists no files".into()) } else { Ok(listed) }
}

fn parse_line(line: &str) -> Option<Listed> {
    let (first, rest) = line.split_once(char::is_whitespace)?;
    if let Some(digest) = digest(first) {
        // `sha256sum` writes `*` before names of files read in binary mode.
        let name = rest.trim_start();
        let name = name.strip_prefix('*').unwrap_or(name);
        let name = name.strip_prefix("./").unwrap_or(name);
        return is_inside(name).then(|| Listed { file: Name::File(name.to_owned()), bytes: None, digest });
    }
    let (bytes, last) = rest.trim_start().split_once(char::is_whitespace)?;
    let (number, bytes) = (first.parse().ok()?, bytes.parse().ok()?);
    Some(Listed { file: Name::Shard(number), bytes: Some(bytes), digest: digest(last.trim())? })
}

fn digest(text: &str) -> Option<String> {
    (text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| text.to_ascii_lowercase())
}

/// The numbered shards of a directory.
fn shards(dir: &Path) -> Result<HashMap<u64, String>, CheckpointError> {
    let entries = fs::read_dir(dir).map_err(CheckpointError::read(dir))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names
        .filter_map(|name| {
            let number = name.strip_prefix("model-")?.strip_suffix(".safetensors")?.split_once("-of-")?.0;
            Some((number.parse().ok()?, name))
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SHA-256 of "abc" (FIPS 180-4).
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn both_kinds_of_lines_are_read() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path();
        fs::write(dir.join("model-00002-of-00003.safetensors"), "abc").unwrap();
        fs::write(dir.join("config.json"), "abc").unwrap();
        let check = |text: &str| {
            let list = dir.join("list");
            fs::write(&list, text).unwrap();
            check_digests(dir, &list, &())
        };
        let other = ABC.replace('b', "c");
        let files = check(&format!(
            "# digests\n{ABC}  config.json\n{}  *config.json\n2 3 {ABC}\n2 4 {ABC}\n3 3 {ABC}\n",
            other.to_uppercase()
        ))
        .unwrap();
        let problems: Vec<Option<&str>> = files.iter().map(|file| file.problem.as_deref()).collect();
        assert_eq!(problems[0], None);
        assert_eq!(problems[1], Some(format!("has the digest {ABC}; the list has {other}").as_str()));
        assert_eq!((problems[2], files[2].name.as_str()), (None, "model-00002-of-00003.safetensors"));
        assert_eq!(problems[3], Some("has 3 bytes; the list has 4"));
        assert_eq!(problems[4], Some("does not exist"));
        for wrong in
            ["", "abc  config.json", &format!("{ABC}  ../config.json"), &format!("{ABC}  /etc/passwd"), "1 2 3"]
        {
            assert!(matches!(check(wrong), Err(CheckpointError::Digests { .. })), "{wrong}");
        }
    }
}

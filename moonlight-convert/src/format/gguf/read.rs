//! Opening a GGUF file, or all files of one that was split.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use moonlight_model::ModelConfig;

use super::header::{GgufHeader, TensorInfo};
use super::metadata;
use super::names::ROPE_FACTORS;
use super::tokenizer::{TokenizerTexts, tokenizer_texts};
use super::value::{Metadata, Value};
use super::{BlockType, dequantize::dequantize};
use crate::error::CheckpointError;
use crate::format::shard::Shard;
use crate::io::confined_dir::{ConfinedDir, open_plain};
use crate::printable::printable;
use crate::tokenizer::TOKENIZER_JSON;

/// The extension of such files.
const EXTENSION: &str = "gguf";
/// The first bytes of a file.
const MAGIC: &[u8] = b"GGUF";
/// Keys of a file that was split.
const SPLIT_COUNT: &str = "split.count";
const SPLIT_NUMBER: &str = "split.no";
/// The most values of [`ROPE_FACTORS`]; a model has half as many as a head has values.
const MOST_FACTORS: u64 = 1 << 16;

/// An opened file, with the other parts if it was split.
pub(crate) struct OpenedGguf {
    pub(crate) metadata: Metadata,
    pub(crate) config: ModelConfig,
    /// Names and files. A part that cannot be opened is an error: `None` if it does not exist, or what is wrong with it as
    /// the rest of a sentence.
    pub(crate) parts: Vec<(String, Result<Shard, Option<String>>)>,
}

/// Whether a path is a GGUF file: by its extension, or by its first bytes for files without one.
pub fn is_gguf(path: &Path) -> bool {
    if !path.is_file() {
        return false;
    }
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(EXTENSION)) {
        return true;
    }
    let mut magic = [0; MAGIC.len()];
    let read = open_plain(path).and_then(|(mut file, _)| file.read_exact(&mut magic));
    read.is_ok() && magic == MAGIC
}

/// The GGUF file that a path stands for: the file itself, or the only one in a directory without other weights. Of a file
/// that was split, the first part.
pub fn gguf_file(path: &Path) -> Option<PathBuf> {
    if is_gguf(path) {
        return Some(path.to_owned());
    }
    if !path.is_dir() {
        return None;
    }
    let mut found = None;
    for entry in fs::read_dir(path).ok()?.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let extension = Path::new(&name).extension().and_then(OsStr::to_str).unwrap_or_default();
        match extension {
            "safetensors" | "bpk" | "bin" | "pt" | "pth" => return None,
            EXTENSION if SplitName::parse(&name).is_some_and(|split| split.number > 1) => {}
            // A second file: the user has to choose one.
            EXTENSION if found.is_some() => return None,
            EXTENSION => found = Some(path.join(name)),
            _ => {}
        }
    }
    found.filter(|file| file.is_file())
}

/// The name of a part: `NAME-00001-of-00003.gguf`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SplitName {
    stem: String,
    number: u64,
    count: u64,
}

impl SplitName {
    fn parse(name: &str) -> Option<Self> {
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let number_of = |text: &str| {
            (text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok()).flatten()
        };
        Some(Self { stem: stem.to_owned(), number: number_of(number)?, count: number_of(count)? })
    }

    /// The name of another part.
    fn part(&self, number: u64) -> String {
        format!("{}-{number:05}-of-{:05}.gguf", self.stem, self.count)
    }
}

/// Opens a file and validates its header; for a file that was split, all parts.
pub(crate) fn open(path: &Path) -> Result<OpenedGguf, CheckpointError> {
    let invalid = |problem: String| CheckpointError::Gguf { path: path.to_owned(), problem };
    let (shard, header) = Shard::open_gguf(path).map_err(invalid)?;
    check_kind(&header.metadata).map_err(invalid)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let count = header.metadata.u64(SPLIT_COUNT).map_err(invalid)?.unwrap_or(1);
    let GgufHeader { metadata, mut tensors, .. } = header;
    let mut parts = vec![(name.clone(), Ok(shard))];
    if count > 1 {
        let split = split_name(&metadata, &name, count).map_err(invalid)?;
        for number in 2..=count {
            let name = split.part(number);
            let part = path.with_file_name(&name);
            let opened = match part.exists() {
                false => Err(None),
                true => open_part(&part, number, count).map_err(Some),
            };
            parts.push((
                name,
                opened.map(|(shard, header)| {
                    tensors.extend(header.tensors);
                    shard
                }),
            ));
        }
    }
    let factors = rope_factors(&parts, &tensors).map_err(invalid)?;
    let config = metadata::config(&metadata, &tensors, factors.as_deref()).map_err(invalid)?;
    Ok(OpenedGguf { metadata, config, parts })
}

/// The files of the tokenizer in the metadata of a GGUF file, as in a directory in the Hugging Face layout:
/// `tokenizer.json`, `tokenizer_config.json` with the chat template, `generation_config.json`. None if the file has no
/// tokenizer.
///
/// A tokenizer that is not known is replaced by the `tokenizer.json` next to the file, if there is one, with its settings.
///
/// # Errors
///
/// [`CheckpointError`], if the file cannot be read, or has a tokenizer that is not supported.
pub fn sidecar_files(path: &Path) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
    sidecars_of(path, &read_header(path)?.metadata).map(|texts| texts.files)
}

/// [`sidecar_files`] for metadata that has been read, with notes.
pub(crate) fn sidecars_of(path: &Path, metadata: &Metadata) -> Result<TokenizerTexts, CheckpointError> {
    match tokenizer_texts(path, metadata) {
        Ok(texts) => Ok(texts.unwrap_or_default()),
        Err(error @ CheckpointError::GgufTokenizer { hint: Some(_), .. }) => {
            let files = files_next_to(path)?;
            if files.is_empty() {
                return Err(error);
            }
            let note = format!("{error}: the `{TOKENIZER_JSON}` next to the file is used");
            Ok(TokenizerTexts { files, notes: vec![note] })
        }
        Err(error) => Err(error),
    }
}

/// The tokenizer and its settings in the directory of a file; none without `tokenizer.json`.
fn files_next_to(path: &Path) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
    const NAMES: [&str; 5] = [
        TOKENIZER_JSON,
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
    ];
    /// Size limit of such a file in bytes, as of a header with the same contents.
    const LONGEST: u64 = 100_000_000;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let confined = ConfinedDir::new(folder).map_err(CheckpointError::read(folder))?;
    let mut files = Vec::new();
    for name in NAMES {
        match confined.read(name, LONGEST)? {
            Some(contents) => files.push((name.to_owned(), contents)),
            None if name == TOKENIZER_JSON => return Ok(files),
            None => {}
        }
    }
    Ok(files)
}

/// The keys that have no effect on what the model computes: descriptions of the model and of how the file was made.
pub(crate) fn ignored_keys(metadata: &Metadata) -> Vec<String> {
    const READ: [&str; 4] = ["general.architecture", "general.alignment", "general.type", metadata::OWN];
    let architecture = metadata.get("general.architecture").and_then(Value::as_str).unwrap_or_default();
    let ignored = |key: &&str| match key.strip_prefix(architecture).and_then(|key| key.strip_prefix('.')) {
        Some(key) => metadata::IGNORED.contains(&key),
        // The keys of the tokenizer are checked when its files are made.
        None => !READ.contains(key) && !key.starts_with("tokenizer.") && !key.starts_with("split."),
    };
    metadata.iter().map(|(key, _)| key).filter(ignored).map(str::to_owned).collect()
}

/// Remarks on what the metadata lacks.
pub(crate) fn notes(metadata: &Metadata, config: &ModelConfig) -> Vec<String> {
    let is_present = |key: &str| {
        let architecture = metadata.get("general.architecture").and_then(Value::as_str).unwrap_or_default();
        metadata.get(&format!("{architecture}.{key}")).and_then(Value::as_u64).is_some_and(|value| value != 0)
    };
    let mut notes = Vec::new();
    if config.moe.is_some() && !is_present("expert_gating_func") {
        notes.push(
            "the metadata has no `expert_gating_func`: experts are chosen by softmax, as in llama.cpp (a converter that did \
             not know the model may have omitted it)"
                .to_owned(),
        );
    }
    notes
}

/// Reads and validates the header of a file.
///
/// # Errors
///
/// [`CheckpointError`], if the file cannot be read or is invalid.
pub fn read_header(path: &Path) -> Result<GgufHeader, CheckpointError> {
    Shard::open_gguf(path)
        .map(|(_, header)| header)
        .map_err(|problem| CheckpointError::Gguf { path: path.to_owned(), problem })
}

/// Parses the header of an open file.
pub(crate) fn parse_file(file: &File, length: u64) -> Result<GgufHeader, String> {
    GgufHeader::parse(BufReader::with_capacity(1 << 16, file), length)
}

/// Refuses a file that is not a model: an adapter, a vision encoder, an importance matrix.
fn check_kind(metadata: &Metadata) -> Result<(), String> {
    match metadata.get("general.type") {
        None => Ok(()),
        Some(Value::String(kind)) if kind == "model" => Ok(()),
        Some(Value::String(kind)) if kind == "adapter" => {
            Err("is an adapter, and not a model (`general.type` is `adapter`)".into())
        }
        Some(Value::String(kind)) => {
            Err(format!("has the `general.type` `{}`, which is not supported", printable(kind)))
        }
        Some(other) => Err(format!("has invalid metadata: `general.type` is of type {}, not string", other.kind())),
    }
}

/// The name of the first of `count` parts.
fn split_name(metadata: &Metadata, name: &str, count: u64) -> Result<SplitName, String> {
    let split = SplitName::parse(name)
        .filter(|split| split.count == count)
        .ok_or_else(|| format!("is one of {count} parts, and its name does not end in `-00001-of-{count:05}.gguf`"))?;
    let number = metadata.u64(SPLIT_NUMBER)?.unwrap_or(0);
    match (number, split.number) {
        (0, 1) => Ok(split),
        _ => Err(format!("is part {} of {count}; the model is opened by the first, `{}`", number + 1, split.part(1))),
    }
}

fn open_part(path: &Path, number: u64, count: u64) -> Result<(Shard, GgufHeader), String> {
    let (shard, header) = Shard::open_gguf(path)?;
    let found = (header.metadata.u64(SPLIT_NUMBER)?, header.metadata.u64(SPLIT_COUNT)?);
    if found != (Some(number - 1), Some(count)) {
        return Err(format!("does not say in its metadata that it is part {number} of {count}"));
    }
    Ok((shard, header))
}

/// The values of the tensor with the factors of frequencies, if there is one.
fn rope_factors(
    parts: &[(String, Result<Shard, Option<String>>)],
    tensors: &[TensorInfo],
) -> Result<Option<Vec<f32>>, String> {
    let Some(info) = tensors.iter().find(|tensor| tensor.name == ROPE_FACTORS) else { return Ok(None) };
    let (&[count], BlockType::F32) = (info.shape.as_slice(), info.block_type) else {
        return Err(format!("has a tensor `{ROPE_FACTORS}` that is not a vector in F32"));
    };
    if count > MOST_FACTORS {
        return Err(format!("has {count} values in `{ROPE_FACTORS}`"));
    }
    for shard in parts.iter().filter_map(|(_, shard)| shard.as_ref().ok()) {
        if let Some(entry) = shard.tensors.iter().find(|tensor| tensor.name == ROPE_FACTORS) {
            let mut bytes = vec![0; entry.range.len()];
            shard.read(entry.range.start, &mut bytes).map_err(|error| format!("cannot be read: {error}"))?;
            let mut values = vec![0.0f32; count as usize];
            if !dequantize(BlockType::F32, &bytes, 0, &mut values) {
                return Err(format!("has a non-finite value in `{ROPE_FACTORS}`"));
            }
            return Ok(Some(values));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts_are_parsed() {
        let name = "model-q8_0-00001-of-00003.gguf";
        let split = SplitName::parse(name).unwrap();
        assert_eq!((split.stem.as_str(), split.number, split.count), ("model-q8_0", 1, 3));
        assert_eq!((split.part(1).as_str(), split.part(3).as_str()), (name, "model-q8_0-00003-of-00003.gguf"));
        for other in ["model.gguf", "model-1-of-3.gguf", "model-00001-of-3.gguf", "model-0000+-of-00003.gguf"] {
            assert_eq!(SplitName::parse(other), None, "{other}");
        }
    }
}

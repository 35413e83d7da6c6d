//! The sidecars: files of a checkpoint other than its weights.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use moonlight_model::ModelConfig;
use moonlight_model::config::ModelType;
use serde_json::{Map, Value, json};

use crate::checkpoint::CONFIG;
use crate::dtype::conversion::WeightDtype;
use crate::dtype::quant::QUANTIZATION;
use crate::error::CheckpointError;
use crate::format::burnpack::BURNPACK;
use crate::format::gguf;
use crate::format::index::INDEX;
use crate::io::confined_dir::ConfinedDir;
use crate::io::temporary::create_anew;
use crate::io::writer::{write_failure, write_file};
use crate::mapping::names::MTP_LAYER_KEYS;

/// Defaults for generation in transformers, such as the end-of-sequence tokens.
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";

/// Files that are copied unchanged from one checkpoint to the next.
const SIDECARS: [&str; 12] = [
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
];

/// Size limit of a copied file in bytes. The tokenizers of the largest vocabularies have about 40 MB.
const LONGEST: u64 = 500_000_000;

/// Prefixes of the Python files that `auto_map` names: the remote code of tokenizer, config and model.
const REMOTE_CODE: [&str; 3] = ["tokenization_", "configuration_", "modeling_"];

/// Whether a file is copied along with the weights.
pub(crate) fn is_sidecar(name: &str) -> bool {
    SIDECARS.contains(&name) || (name.ends_with(".py") && REMOTE_CODE.iter().any(|prefix| name.starts_with(prefix)))
}

/// Whether a file with this name is part of a checkpoint, so that replacing the checkpoint may delete it.
pub(crate) fn belongs_to_checkpoint(name: &str) -> bool {
    name == CONFIG || name == INDEX || name == BURNPACK || name.ends_with(".safetensors") || is_sidecar(name)
}

/// The sorted names of the sidecars in a directory, or of those that the metadata of a GGUF file contains.
///
/// # Errors
///
/// [`CheckpointError`], if the directory or file cannot be read, or a sidecar is a link out of it.
pub fn sidecars_in(dir: &Path) -> Result<Vec<String>, CheckpointError> {
    if gguf::is_gguf(dir) {
        let mut names: Vec<String> = gguf::sidecar_files(dir)?.into_iter().map(|(name, _)| name).collect();
        names.sort();
        return Ok(names);
    }
    if !dir.is_dir() {
        return Err(CheckpointError::not_a_directory(dir));
    }
    let entries = fs::read_dir(dir).map_err(CheckpointError::read(dir))?;
    let confined = ConfinedDir::new(dir).map_err(CheckpointError::read(dir))?;
    let mut names = Vec::new();
    for entry in entries.flatten() {
        if let Some(name) = entry.file_name().into_string().ok().filter(|name| is_sidecar(name))
            && dir.join(&name).is_file()
            && confined.file(&name)?.is_some()
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Copies the sidecars from one directory to another, or from the metadata of a GGUF file.
pub(crate) fn copy(from: &Path, dir: &Path) -> Result<(), CheckpointError> {
    if gguf::is_gguf(from) {
        for (name, contents) in gguf::sidecar_files(from)? {
            let path = dir.join(&name);
            let written = create_anew(&path).and_then(|mut file| file.write_all(&contents));
            written.map_err(CheckpointError::write(&path))?;
        }
        return Ok(());
    }
    for name in sidecars_in(from)? {
        copy_one(from, &name, dir, |error| CheckpointError::write(&dir.join(&name))(error))?;
    }
    Ok(())
}

/// Copies the contents of a sidecar, but not its permissions: a copy of a read-only file would be read-only, and the
/// next save could not replace it. `failure` maps errors of writing.
fn copy_one(
    from: &Path,
    name: &str,
    dir: &Path,
    failure: impl Fn(io::Error) -> CheckpointError,
) -> Result<(), CheckpointError> {
    let confined = ConfinedDir::new(from).map_err(CheckpointError::read(from))?;
    let Some((source, path)) = confined.open(name, LONGEST)? else { return Ok(()) };
    let mut copied = create_anew(&dir.join(name)).map_err(&failure)?;
    let mut source = source.take(LONGEST);
    let mut chunk = vec![0; 1 << 16];
    loop {
        match source.read(&mut chunk).map_err(CheckpointError::read(&path))? {
            0 => return Ok(()),
            read => io::Write::write_all(&mut copied, &chunk[..read]).map_err(&failure)?,
        }
    }
}

/// Copies the sidecars, and writes `config.json` and, unless it was copied, `generation_config.json`.
pub(crate) fn write(
    config: &SavedConfig<'_>,
    from: Option<&Path>,
    dir: &Path,
    shown: &Path,
    needed: u64,
) -> Result<(), CheckpointError> {
    let mut sidecars = Vec::new();
    if let Some(from) = from.filter(|from| gguf::is_gguf(from)) {
        for (name, contents) in gguf::sidecar_files(from)? {
            write_file(dir, &name, &contents, shown, needed)?;
            sidecars.push(name);
        }
    } else if let Some(from) = from {
        sidecars = sidecars_in(from)?;
        for name in &sidecars {
            // Copied, not linked: in the Hub's cache they are links to blobs, which a cleanup may delete.
            copy_one(from, name, dir, |error| write_failure(shown, name, needed, error))?;
        }
    }
    write_file(dir, CONFIG, config.with_sidecars(&sidecars).to_json().as_bytes(), shown, needed)?;
    if !sidecars.iter().any(|name| name == GENERATION_CONFIG) {
        write_file(dir, GENERATION_CONFIG, generation_config(config.model).as_bytes(), shown, needed)?;
    }
    Ok(())
}

/// The config of a checkpoint to be written.
#[derive(Debug)]
pub(crate) struct SavedConfig<'a> {
    pub(crate) model: &'a ModelConfig,
    /// The dtype of the weights that are not quantized.
    pub(crate) dtype: WeightDtype,
    /// The `quantization_config`, if weights are written quantized.
    pub(crate) quantization: Option<Value>,
}

impl<'a> SavedConfig<'a> {
    /// The config of unquantized weights.
    pub(crate) fn plain(model: &'a ModelConfig, dtype: WeightDtype) -> Self {
        Self { model, dtype, quantization: None }
    }

    /// The config with the dtype and quantization of the written weights, and without what the files no longer contain (MTP
    /// layers, remote code).
    fn with_sidecars(&self, sidecars: &[String]) -> ModelConfig {
        let mut config = saved_config(self.model, self.dtype, sidecars);
        if let Some(quantization) = &self.quantization {
            config.extra.insert(QUANTIZATION[0].into(), quantization.clone());
        }
        config
    }
}

fn saved_config(config: &ModelConfig, dtype: WeightDtype, sidecars: &[String]) -> ModelConfig {
    let mut config = config.clone();
    config.dtype = Some(dtype.torch_name().to_owned());
    // That of the source.
    for key in QUANTIZATION {
        config.extra.remove(key);
    }
    for key in MTP_LAYER_KEYS {
        if let Some(layers) = config.extra.get_mut(key) {
            // The files contain no MTP layers.
            *layers = json!(0);
        }
    }
    let is_available = |class: &str| {
        let module = class.split('.').next().unwrap_or(class);
        // `owner/repo--module.Class` names code in another repository.
        class.contains("--") || sidecars.iter().any(|name| name.strip_suffix(".py") == Some(module))
    };
    if let Some(Value::Object(classes)) = config.extra.get("auto_map")
        && !classes.values().all(|class| class.as_str().is_some_and(is_available))
    {
        config.extra.remove("auto_map");
    }
    if config.model_type == ModelType::KimiK2 && !config.extra.contains_key("auto_map") {
        // Kimi-K2 is DeepSeek-V3 under another `model_type`, which transformers knows only from remote code. Without
        // that code, the checkpoint must be a `deepseek_v3` for transformers to open it.
        config.model_type = ModelType::DeepseekV3;
    }
    config
}

/// The `generation_config.json` that transformers would derive from `config.json`.
fn generation_config(config: &ModelConfig) -> String {
    let mut map = Map::new();
    map.insert("_from_model_config".into(), json!(true));
    if let Some(bos) = config.bos_token_id {
        map.insert("bos_token_id".into(), json!(bos));
    }
    if !config.eos_token_id.is_empty() {
        map.insert("eos_token_id".into(), json!(config.eos_token_id));
    }
    let mut text = serde_json::to_string_pretty(&map).expect("a map of numbers is JSON");
    text.push('\n');
    text
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Models on shared disks are often read-only. Their copies must not be.
    #[test]
    fn contents_are_copied_and_permissions_are_not() {
        let home = tempfile::tempdir().unwrap();
        let (from, to) = (home.path().join("from"), home.path().join("to"));
        fs::create_dir(&from).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("tokenizer.json"), "{}").unwrap();
        fs::set_permissions(from.join("tokenizer.json"), fs::Permissions::from_mode(0o444)).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        for _ in 0..2 {
            copy(&from, &to).unwrap();
            let copied = to.join("tokenizer.json");
            assert_eq!(fs::read(&copied).unwrap(), b"{}");
            assert_eq!(mode(&copied) & 0o600, 0o600, "its owner can write to it");
            // The next copy replaces a read-only one.
            fs::set_permissions(&copied, fs::Permissions::from_mode(0o444)).unwrap();
        }
        // A link is replaced, and its target is not written to.
        fs::write(home.path().join("mine"), "mine").unwrap();
        fs::remove_file(to.join("tokenizer.json")).unwrap();
        std::os::unix::fs::symlink("../mine", to.join("tokenizer.json")).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read(home.path().join("mine")).unwrap(), b"mine");
        assert_eq!(fs::read(to.join("tokenizer.json")).unwrap(), b"{}");
    }

    #[test]
    fn an_oversized_sidecar_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let (from, to) = (home.path().join("from"), home.path().join("to"));
        fs::create_dir(&from).unwrap();
        fs::create_dir(&to).unwrap();
        fs::File::create(from.join("tokenizer.json")).unwrap().set_len(1 << 40).unwrap();
        assert!(matches!(copy(&from, &to), Err(CheckpointError::TooLong { .. })));
    }
}

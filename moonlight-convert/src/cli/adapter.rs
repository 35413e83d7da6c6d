//! `moonlight-convert convert` for LoRA adapters: peft's layout to GGUF, and back.

use std::path::Path;
use std::process::ExitCode;

use crate::adapter::{AdapterError, base_of, is_adapter};
use crate::gguf::adapter::{is_gguf_adapter, write_gguf_adapter, write_peft_adapter};
use crate::gguf::{is_gguf, read_header};
use crate::{Checkpoint, CheckpointError};

use super::Failure;
use super::output::note;

/// The layout of an adapter to convert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AdapterLayout {
    /// A directory with `adapter_config.json`.
    Peft,
    /// A GGUF file of the type `adapter`.
    Gguf,
}

impl AdapterLayout {
    /// That of a path; `None` if it is not an adapter.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        if is_adapter(path) {
            return Some(Self::Peft);
        }
        // An unreadable file is reported when it is opened as a model.
        let header = is_gguf(path).then(|| read_header(path).ok()).flatten();
        header.filter(is_gguf_adapter).map(|_| Self::Gguf)
    }
}

/// Converts an adapter to the other layout. `base` is its base model, by default the one that its config names.
pub(crate) fn convert(
    layout: AdapterLayout,
    src: &Path,
    dst: &Path,
    base: Option<&Path>,
    force: bool,
) -> Result<ExitCode, Failure> {
    let base = match (base, layout) {
        (Some(base), _) => base.to_path_buf(),
        (None, AdapterLayout::Peft) => base_of(src)?,
        // A GGUF file has no place for it.
        (None, AdapterLayout::Gguf) => return Err(AdapterError::NoBase { dir: src.to_path_buf(), base: None }.into()),
    };
    let model = Checkpoint::open(&base)?;
    match layout {
        AdapterLayout::Peft => write_gguf_adapter(model.config(), src, dst, force)?,
        AdapterLayout::Gguf => {
            if !force && dst.exists() {
                return Err(CheckpointError::Exists { dir: dst.to_path_buf() }.into());
            }
            write_peft_adapter(model.config(), src, &base, dst)?;
        }
    }
    note(format_args!("wrote the adapter to `{}`", dst.display()));
    Ok(ExitCode::SUCCESS)
}

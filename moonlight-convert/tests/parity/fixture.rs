//! Reading the fixtures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device};
use moonlight_convert::{SaveOptions, load, save};
use moonlight_model::CausalLm;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

pub(crate) const FAMILIES: [&str; 6] =
    ["moonlight-like", "deepseek-v3-like", "deepseek-v2-lite-like", "deepseek-v2-like", "llama", "qwen2"];

/// Tensors in f32 by their name in the file.
pub(crate) type Tensors = BTreeMap<String, HostTensor>;

pub(crate) struct HostTensor {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

#[derive(Deserialize)]
pub(crate) struct Fixture {
    #[serde(skip)]
    pub(crate) directory: PathBuf,
    #[serde(skip)]
    pub(crate) vocab: usize,
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) greedy: Greedy,
    pub(crate) batch: Batch,
}

#[derive(Deserialize)]
pub(crate) struct Sequence {
    pub(crate) tokens: Vec<i32>,
    /// Null for the first token.
    pub(crate) logprobs: Vec<Option<f64>>,
}

#[derive(Deserialize)]
pub(crate) struct Greedy {
    pub(crate) prompt: Vec<i32>,
    pub(crate) continuation: Vec<i32>,
}

#[derive(Deserialize)]
pub(crate) struct Batch {
    pub(crate) sequences: Vec<Vec<i32>>,
    /// Mean over predicted tokens.
    pub(crate) loss: f64,
    /// With weight 1; missing for dense models.
    pub balance_loss: Option<f64>,
}

impl Fixture {
    /// Opens the fixture of a family, with its model in f32.
    pub(crate) fn open(family: &str, device: &Device) -> (Self, CausalLm) {
        Self::open_in(DType::F32, family, device)
    }

    /// Opens a fixture with its model in a given dtype.
    pub(crate) fn open_in(dtype: DType, family: &str, device: &Device) -> (Self, CausalLm) {
        let directory = directory(family);
        let text = std::fs::read_to_string(directory.join("expected.json")).unwrap();
        let mut fixture: Self = serde_json::from_str(&text).unwrap();
        let model = load(&directory, device, Some(dtype)).unwrap().model;
        fixture.vocab = model.config().vocab_size;
        fixture.directory = directory;
        (fixture, model)
    }

    pub(crate) fn tensors(&self, file: &str) -> Tensors {
        read(&self.directory.join(file))
    }
}

pub(crate) fn directory(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(family)
}

/// The parameters of a model by their names in a checkpoint.
pub(crate) fn under_published_names(model: CausalLm) -> Tensors {
    let directory = tempfile::tempdir().unwrap();
    let saved = directory.path().join("saved");
    save(&model, &saved, &SaveOptions { dtype: Some(DType::F32), ..SaveOptions::default() }).unwrap();
    read(&saved.join("model.safetensors"))
}

/// Reads a safetensors file in f32.
pub(crate) fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let convert = |dtype, data: &[u8]| match dtype {
        Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::BF16 => data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        other => panic!("no fixture has {other:?}"),
    };
    file.iter()
        .map(|(name, view)| {
            let values = convert(view.dtype(), view.data());
            (name.to_owned(), HostTensor { shape: view.shape().to_vec(), values })
        })
        .collect()
}

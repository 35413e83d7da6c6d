//! The layout of the published Moonlight files, to the byte.

use std::io;

use moonlight_convert::{HfTensor, hugging_face_tensors};
use moonlight_model::ModelConfig;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

/// A file in the published layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PublishedFile {
    /// `model-1-of-27.safetensors`: the numbers are not padded.
    pub(crate) name: String,
    /// Its tensors, sorted by name, which is also the order of their bytes.
    pub(crate) tensors: Vec<HfTensor>,
    /// Everything before the first tensor: compact JSON without metadata, padded to eight bytes.
    pub(crate) header: Vec<u8>,
}

impl PublishedFile {
    /// Size of the file in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        let values = |tensor: &HfTensor| tensor.shape.iter().map(|&size| size as u64).product::<u64>();
        self.header.len() as u64 + 2 * self.tensors.iter().map(values).sum::<u64>()
    }
}

/// The files of a model, one for each layer and all in bf16, as published by moonshotai: the embedding with the first
/// layer, the last norm and the head with the last, and an `inv_freq` buffer in each layer.
///
/// # Errors
///
/// If the sizes are too large for a safetensors header.
pub(crate) fn published_files(config: &ModelConfig) -> io::Result<Vec<PublishedFile>> {
    let layers = config.num_hidden_layers.max(1);
    let mut groups: Vec<Vec<HfTensor>> = vec![Vec::new(); layers];
    let mut layer = 0;
    for tensor in config.parameter_shapes().iter().flat_map(hugging_face_tensors) {
        layer = layer_of(&tensor.name).unwrap_or(layer);
        groups[layer].push(tensor);
    }
    for (layer, group) in groups.iter_mut().enumerate() {
        group.push(HfTensor {
            name: format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq"),
            shape: vec![config.rope_dim()],
        });
        group.sort_by(|a, b| a.name.cmp(&b.name));
    }
    let file = |(number, tensors): (usize, Vec<HfTensor>)| {
        let header = header(&tensors)?;
        Ok(PublishedFile { name: format!("model-{}-of-{layers}.safetensors", number + 1), tensors, header })
    };
    groups.into_iter().enumerate().map(file).collect()
}

/// The layer of a tensor, `None` if it belongs to none.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split_once('.')?.0.parse().ok()
}

fn header(tensors: &[HfTensor]) -> io::Result<Vec<u8>> {
    let mut end = 0;
    let info = |tensor: &HfTensor| {
        let start = end;
        end += 2 * tensor.shape.iter().product::<usize>();
        let info = TensorInfo { dtype: Dtype::BF16, shape: tensor.shape.clone(), data_offsets: (start, end) };
        (tensor.name.clone(), info)
    };
    let infos = tensors.iter().map(info).collect();
    let mut json = serde_json::to_vec(&Metadata::new(None, infos).map_err(io::Error::other)?)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(&json);
    Ok(header)
}

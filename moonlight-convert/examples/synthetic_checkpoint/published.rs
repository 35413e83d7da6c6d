//! The layout of the published Moonlight files, to the byte; and that of a quantized checkpoint of this project.

use std::io;

use moonlight_convert::{HfTensor, WrittenTensor, hugging_face_tensors, written_tensors};
use moonlight_model::{ModelConfig, QuantBits};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

/// A file in the published layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PublishedFile {
    /// `model-1-of-27.safetensors`: the numbers are not padded.
    pub(crate) name: String,
    /// Its tensors, in the order of their bytes: sorted by name, in a quantized checkpoint first by the size of a value.
    pub(crate) tensors: Vec<WrittenTensor>,
    /// Everything before the first tensor: compact JSON without metadata, padded to eight bytes.
    pub(crate) header: Vec<u8>,
}

impl PublishedFile {
    /// Size of the file in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.header.len() as u64 + self.tensors.iter().map(|tensor| bytes(tensor) as u64).sum::<u64>()
    }
}

/// Size of a tensor in bytes.
pub(crate) fn bytes(tensor: &WrittenTensor) -> usize {
    tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize() / 8
}

/// The files of a model, one for each layer and all in bf16, as published by moonshotai: the embedding with the first
/// layer, the last norm and the head with the last, and an `inv_freq` buffer in each layer.
///
/// # Errors
///
/// If the sizes are too large for a safetensors header.
pub(crate) fn published_files(config: &ModelConfig) -> io::Result<Vec<PublishedFile>> {
    let bf16 = |HfTensor { name, shape }| WrittenTensor { name, dtype: Dtype::BF16, shape };
    let tensors =
        config.parameter_shapes().into_iter().flat_map(|parameter| hugging_face_tensors(&parameter)).map(bf16);
    let mut groups = by_layer(config, tensors);
    for (layer, group) in groups.iter_mut().enumerate() {
        let name = format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq");
        group.push(bf16(HfTensor { name, shape: vec![config.rope_dim()] }));
        group.sort_by(|a, b| a.name.cmp(&b.name));
    }
    files(groups)
}

/// The files of a model whose projections are quantized, one for each layer, with the tensors that
/// `moonlight-convert convert --quantize` writes.
///
/// # Errors
///
/// If the sizes are too large for a safetensors header.
pub(crate) fn quantized_files(config: &ModelConfig, bits: QuantBits) -> io::Result<Vec<PublishedFile>> {
    let tensors = config.parameter_shapes().into_iter().flat_map(|parameter| written_tensors(&parameter, bits));
    let mut groups = by_layer(config, tensors);
    // The order of the safetensors library, in which every tensor is aligned.
    groups.iter_mut().for_each(|group| {
        group.sort_by(|a, b| (b.dtype.bitsize(), &a.name).cmp(&(a.dtype.bitsize(), &b.name)));
    });
    files(groups)
}

/// Tensors before the first layer are in its group, those after the last in that of the last.
fn by_layer(config: &ModelConfig, tensors: impl Iterator<Item = WrittenTensor>) -> Vec<Vec<WrittenTensor>> {
    let mut groups = vec![Vec::new(); config.num_hidden_layers.max(1)];
    let mut layer = 0;
    for tensor in tensors {
        layer = layer_of(&tensor.name).unwrap_or(layer);
        groups[layer].push(tensor);
    }
    groups
}

fn files(groups: Vec<Vec<WrittenTensor>>) -> io::Result<Vec<PublishedFile>> {
    let count = groups.len();
    let file = |(number, tensors): (usize, Vec<WrittenTensor>)| {
        let header = header(&tensors)?;
        Ok(PublishedFile { name: format!("model-{}-of-{count}.safetensors", number + 1), tensors, header })
    };
    groups.into_iter().enumerate().map(file).collect()
}

/// The layer of a tensor, `None` if it belongs to none.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split_once('.')?.0.parse().ok()
}

fn header(tensors: &[WrittenTensor]) -> io::Result<Vec<u8>> {
    let mut end = 0;
    let info = |tensor: &WrittenTensor| {
        let start = end;
        end += bytes(tensor);
        let info = TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (start, end) };
        (tensor.name.clone(), info)
    };
    let infos = tensors.iter().map(info).collect();
    let mut json = serde_json::to_vec(&Metadata::new(None, infos).map_err(io::Error::other)?)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(&json);
    Ok(header)
}

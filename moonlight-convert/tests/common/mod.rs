//! Shared code of this crate's tests: fixtures, and taking directories apart and assembling them.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor};
use moonlight_convert::Checkpoint;
use moonlight_model::CausalLm;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// The fixtures made with transformers, one per family.
pub const FAMILIES: [&str; 5] = ["moonlight-like", "deepseek-v3-like", "deepseek-v2-lite-like", "llama", "qwen2"];

pub fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(family)
}

/// A tensor taken out of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Raw {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

pub type Tensors = BTreeMap<String, Raw>;

/// All tensors of a directory, read with the safetensors library.
pub fn read_tensors(dir: &Path) -> Tensors {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let mut tensors = Tensors::new();
    for file in checkpoint.files() {
        let bytes = fs::read(dir.join(&file.name)).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            tensors.insert(name, Raw { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data().to_vec() });
        }
    }
    tensors
}

pub fn write_file(path: &Path, tensors: &Tensors) {
    let views =
        tensors.iter().map(|(name, raw)| (name, TensorView::new(raw.dtype, raw.shape.clone(), &raw.data).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A directory with one file of weights.
pub fn write_dir(dir: &Path, config: &serde_json::Value, tensors: &Tensors) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    write_file(&dir.join("model.safetensors"), tensors);
}

/// A directory with two shards and an index.
pub fn write_sharded(dir: &Path, config: &serde_json::Value, tensors: &Tensors) -> [String; 2] {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let files = ["model-1-of-2.safetensors".to_owned(), "model-2-of-2.safetensors".to_owned()];
    let half = tensors.len() / 2;
    let mut parts = [Tensors::new(), Tensors::new()];
    let mut map = BTreeMap::new();
    for (index, (name, raw)) in tensors.iter().enumerate() {
        let part = usize::from(index >= half);
        parts[part].insert(name.clone(), raw.clone());
        map.insert(name.clone(), files[part].clone());
    }
    for (file, part) in files.iter().zip(&parts) {
        write_file(&dir.join(file), part);
    }
    write_index(dir, &map);
    files
}

pub fn write_index(dir: &Path, map: &BTreeMap<String, String>) {
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

pub fn config_of(family: &str) -> serde_json::Value {
    serde_json::from_str(&fs::read_to_string(fixture(family).join("config.json")).unwrap()).unwrap()
}

/// Every parameter of a model: path, dtype, bytes.
pub fn parameters(model: &CausalLm) -> Vec<(String, DType, Vec<u8>)> {
    struct Collect {
        path: Vec<String>,
        parameters: Vec<(String, DType, Vec<u8>)>,
    }
    impl ModuleVisitor for Collect {
        fn enter_module(&mut self, name: &str, _container_type: &str) {
            self.path.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let data = param.val().into_data();
            let bytes: &[u8] = data.bytes();
            self.parameters.push((self.path.join("."), data.dtype(), bytes.to_vec()));
        }
    }
    let mut collect = Collect { path: Vec::new(), parameters: Vec::new() };
    model.visit(&mut collect);
    collect.parameters
}

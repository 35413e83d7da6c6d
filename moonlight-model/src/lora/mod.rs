//! Low-rank adaptation (LoRA, arXiv 2106.09685): the model is frozen, and two narrow matrices are trained for each adapted weight.
//!
//! `y = x W + s x A B`, with `A` `[in, rank]` initialized as in peft and `B` `[rank, out]` zero, so that training starts from
//! the base model. Only `A` and `B` have gradients. Each expert has its own pair, stacked like the experts' weights and
//! multiplied by the same grouped product.
//!
//! Burn's own `Module::apply_lora` is not used: it computes `W + s A B` in every forward pass, which copies the weight and needs a
//! gradient of the weight's size; it has no dropout; and it treats a stack of experts as one matrix with one pair.

pub(crate) mod low_rank;
mod target;

use std::collections::{HashMap, HashSet};

use burn::config::Config;
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

pub use low_rank::{LowRank, LowRankSettings};
pub use target::TARGET_GROUPS;

use crate::config::ModelConfig;
use crate::model::CausalLm;
use crate::parameter::{ParameterKind, ProjectionRole};
use crate::projection::{ProjectionMut, ProjectionRef};
use crate::projections::ModelProjection;
use low_rank::{DropoutSeed, split_mix64};
use target::Target;

/// Which adapters a model gets, and their rank, scale and dropout. The defaults are those of "LoRA Without Regret" (Schulman,
/// Thinking Machines 2025), on attention only.
///
/// In a file every key is optional, and an unknown key is an error.
///
/// ```
/// use burn::tensor::Device;
/// use moonlight_model::ModelConfig;
/// use moonlight_model::lora::LoraConfig;
///
/// let mut config = ModelConfig::preset("bench-small")?;
/// (config.vocab_size, config.hidden_size, config.num_hidden_layers) = (64, 32, 2);
/// let lora = LoraConfig::new().with_rank(4).with_alpha(8.0);
/// let model = config.init(&Device::default()).with_lora(&lora, 1)?;
/// assert_eq!(model.adapters().len(), 2 * 4); // q, kv_a, kv_b and o of two layers
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// The rank of each adapter: columns of `A` and rows of `B`.
    pub rank: usize,
    /// The update `A B` is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Probability that an input value of an adapter is dropped in training.
    pub dropout: f64,
    /// Which projections get an adapter: `attention`, `mlp` (of dense layers), `shared_experts`, `experts`, `all` of these,
    /// `router`, or the end of a path as a glob (`q_proj`, `shared_experts.*`, `layers.[0-9].**`).
    pub targets: Vec<String>,
    /// Whether the scale is `alpha / sqrt(rank)` instead (rsLoRA, arXiv 2312.03732).
    pub rslora: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, dropout: 0.0, targets: vec!["attention".into()], rslora: false }
    }
}

impl Config for LoraConfig {}

impl LoraConfig {
    /// Rank 16 and alpha 32 on attention, without dropout.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`rank`](LoraConfig::rank).
    pub fn with_rank(self, rank: usize) -> Self {
        Self { rank, ..self }
    }

    /// Sets [`alpha`](LoraConfig::alpha).
    pub fn with_alpha(self, alpha: f64) -> Self {
        Self { alpha, ..self }
    }

    /// Sets [`dropout`](LoraConfig::dropout).
    pub fn with_dropout(self, dropout: f64) -> Self {
        Self { dropout, ..self }
    }

    /// Sets [`targets`](LoraConfig::targets).
    pub fn with_targets(self, targets: Vec<String>) -> Self {
        Self { targets, ..self }
    }

    /// Sets [`rslora`](LoraConfig::rslora).
    pub fn with_rslora(self, rslora: bool) -> Self {
        Self { rslora, ..self }
    }

    /// Scale and dropout, which are the same for all adapters.
    pub fn settings(&self) -> LowRankSettings {
        LowRankSettings { alpha: self.alpha, rslora: self.rslora, dropout: self.dropout }
    }
}

/// A target or an adapter does not fit the model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoraError {
    /// A target is a malformed glob.
    #[error("the target `{target}` is malformed: {problem}")]
    Target {
        /// The target as written.
        target: String,
        /// What is wrong with the glob.
        problem: String,
    },
    /// A target matches no projection of the model.
    #[error("the target `{target}` matches no projection of the model")]
    NoSuchTarget {
        /// The target as written.
        target: String,
        /// The last names of the model's projections, e.g. `q_proj`.
        known: Vec<String>,
    },
    /// An adapter belongs to a projection that the model does not have.
    #[error("the adapter is for `{path}`, which is not a projection of the model")]
    NoSuchProjection {
        /// The path in the adapter.
        path: String,
    },
    /// The shapes of `A` and `B` do not match each other or the weight.
    #[error("the adapter of `{path}` has A {a:?} and B {b:?}, which do not fit a weight of {weight:?}")]
    Shape {
        /// The projection's path.
        path: String,
        /// Shape of `A`, `[.., in, rank]`.
        a: Vec<usize>,
        /// Shape of `B`, `[.., rank, out]`.
        b: Vec<usize>,
        /// Shape of the weight.
        weight: Vec<usize>,
    },
}

impl LoraError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Target { .. } => {
                Some("correct the glob: `*` matches within one name, `**` matches any number of names".into())
            }
            Self::NoSuchTarget { known, .. } => {
                Some(format!("use one of {}, or a name: {}", TARGET_GROUPS.join(", "), known.join(", ")))
            }
            Self::NoSuchProjection { .. } | Self::Shape { .. } => {
                Some("use the base model that the adapter was trained on; otherwise the adapter is damaged".into())
            }
        }
    }
}

/// The values of one adapter in host memory, for saving and loading.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// The path of the projection, e.g. `layers.3.self_attn.q_proj`, `layers.3.mlp.experts.gate_proj`.
    pub path: String,
    /// f32 `[.., in, rank]`.
    pub a: TensorData,
    /// f32 `[.., rank, out]`.
    pub b: TensorData,
    /// Scale and dropout.
    pub settings: LowRankSettings,
}

/// The shapes of one adapter, computed without a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterShape {
    /// The path of the projection.
    pub path: String,
    /// Which projection of its layer it is.
    pub role: ProjectionRole,
    /// The decoder layer of the projection, from 0.
    pub layer: usize,
    /// `[.., in, rank]`.
    pub a: Vec<usize>,
    /// `[.., rank, out]`.
    pub b: Vec<usize>,
}

impl LoraConfig {
    /// The adapters that a model with this config would get, in the order of its parameters. Malformed targets are ignored here;
    /// [`CausalLm::with_lora`] refuses them.
    pub fn adapter_shapes(&self, config: &ModelConfig) -> Vec<AdapterShape> {
        let targets: Vec<Target> = self.targets.iter().filter_map(|text| Target::new(text).ok()).collect();
        let shapes = config.parameter_shapes().into_iter().filter_map(|parameter| {
            let (role, layer) = (parameter.role?, parameter.layer?);
            let path = match parameter.kind {
                ParameterKind::Matrix | ParameterKind::Router => parameter.path.strip_suffix(".weight")?.to_owned(),
                ParameterKind::Experts => parameter.path,
                _ => return None,
            };
            let (mut a, mut b) = (parameter.shape.clone(), parameter.shape);
            let last = a.len() - 1;
            a[last] = self.rank;
            b[last - 1] = self.rank;
            let targeted = targets.iter().any(|target| target.matches(&path, role));
            targeted.then_some(AdapterShape { path, role, layer, a, b })
        });
        shapes.collect()
    }
}

impl CausalLm {
    /// Freezes the model and adds an adapter to each projection that a target matches. Existing adapters are merged first.
    ///
    /// `A` is uniform in `[-1 / sqrt(in), 1 / sqrt(in)]`, as by peft's `kaiming_uniform_(a=sqrt(5))`, and depends only on `seed`; `B`
    /// is zero.
    ///
    /// # Errors
    ///
    /// [`LoraError`] if a target is malformed or matches nothing.
    pub fn with_lora(self, config: &LoraConfig, seed: u64) -> Result<Self, LoraError> {
        let targets = config
            .targets
            .iter()
            .map(|text| match Target::new(text) {
                Ok(target) => Ok((text, target)),
                Err(error) => Err(LoraError::Target { target: text.clone(), problem: error.to_string() }),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut model = self.merge().frozen();
        let device = model.embed_tokens.weight.val().device();
        let mut projections = model.projections_mut();
        for (text, target) in &targets {
            if !projections.iter().any(|entry| target.matches(&entry.path(), entry.role)) {
                let mut known: Vec<String> = projections.iter().map(|entry| entry.name().to_owned()).collect();
                known.sort();
                known.dedup();
                return Err(LoraError::NoSuchTarget { target: (*text).clone(), known });
            }
        }
        let shared = DropoutSeed::default();
        projections.retain(|entry| targets.iter().any(|(_, target)| target.matches(&entry.path(), entry.role)));
        for (index, entry) in projections.into_iter().enumerate() {
            match entry.projection {
                ProjectionMut::Matrix(weight) => {
                    *weight.lora = Some(init_adapter(weight.dims(), config, (seed, index), &shared, &device));
                }
                ProjectionMut::Experts(weight) => {
                    *weight.lora = Some(init_adapter(weight.dims(), config, (seed, index), &shared, &device));
                }
            }
        }
        Ok(model)
    }

    /// Freezes the model and attaches these adapters. Existing adapters are merged first.
    ///
    /// # Errors
    ///
    /// [`LoraError`] if a path is not a projection of the model, or shapes do not match.
    pub fn with_adapters(self, adapters: Vec<Adapter>) -> Result<Self, LoraError> {
        let mut model = self.merge().frozen();
        let device = model.embed_tokens.weight.val().device();
        let shared = DropoutSeed::default();
        let mut projections = model.projections_mut();
        let known: HashSet<String> = projections.iter().map(ModelProjection::path).collect();
        let mut by_path: HashMap<String, Adapter> = HashMap::with_capacity(adapters.len());
        for adapter in adapters {
            if !known.contains(&adapter.path) {
                return Err(LoraError::NoSuchProjection { path: adapter.path });
            }
            by_path.insert(adapter.path.clone(), adapter);
        }
        // Adapters are numbered as in `with_lora`, so that a model that is saved and loaded draws the same dropout masks.
        projections.retain(|entry| by_path.contains_key(&entry.path()));
        for (index, entry) in projections.into_iter().enumerate() {
            let Some(adapter) = by_path.remove(&entry.path()) else { continue };
            match entry.projection {
                ProjectionMut::Matrix(weight) => {
                    *weight.lora = Some(from_adapter(weight.dims(), adapter, index, &shared, &device)?);
                }
                ProjectionMut::Experts(weight) => {
                    *weight.lora = Some(from_adapter(weight.dims(), adapter, index, &shared, &device)?);
                }
            }
        }
        Ok(model)
    }

    /// Whether any projection has an adapter.
    pub fn has_adapters(&self) -> bool {
        self.dropout_seed().is_some()
    }

    /// The values of all adapters, in the order of the model's parameters.
    pub fn adapters(&self) -> Vec<Adapter> {
        let of_projection = |entry: ModelProjection<ProjectionRef<'_>>| match &entry.projection {
            ProjectionRef::Matrix(weight) => weight.lora.as_ref().map(|lora| to_adapter(entry.path(), lora)),
            ProjectionRef::Experts(weight) => weight.lora.as_ref().map(|lora| to_adapter(entry.path(), lora)),
        };
        self.projections().into_iter().filter_map(of_projection).collect()
    }

    /// Turns dropout on in the adapters of this model and its clones, with masks that depend on `seed`; `None` turns it off.
    /// Call it before each micro-batch with a new seed. It has no effect without adapters.
    ///
    /// The masks are drawn from the device's random generator, which every adapter seeds, so other random tensors of the device then
    /// depend on this seed as well.
    pub fn set_dropout_seed(&self, seed: Option<u64>) {
        if let Some(shared) = self.dropout_seed() {
            shared.set(seed);
        }
    }

    /// The model in which no parameter requires a gradient.
    fn frozen(self) -> Self {
        struct Freeze;
        impl ModuleMapper for Freeze {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                param.set_require_grad(false)
            }
        }
        self.map(&mut Freeze)
    }

    /// The seed shared by all adapters; `None` without adapters.
    fn dropout_seed(&self) -> Option<DropoutSeed> {
        self.projections().into_iter().find_map(|entry| match entry.projection {
            ProjectionRef::Matrix(weight) => weight.lora.as_ref().map(|lora| lora.dropout_seed().clone()),
            ProjectionRef::Experts(weight) => weight.lora.as_ref().map(|lora| lora.dropout_seed().clone()),
        })
    }
}

/// An adapter for a weight of this shape, with random `A` and zero `B`.
fn init_adapter<const D: usize>(
    weight: [usize; D],
    config: &LoraConfig,
    (seed, index): (u64, usize),
    dropout: &DropoutSeed,
    device: &Device,
) -> LowRank<D> {
    let (mut shape_a, mut shape_b) = (weight, weight);
    shape_a[D - 1] = config.rank;
    shape_b[D - 2] = config.rank;
    let bound = (weight[D - 2] as f64).sqrt().recip();
    // Drawn on the host by a counter-based generator: the values are the same on every device, whatever was drawn before. The upper
    // 53 bits make a uniform f64 in [0, 1).
    let seed = split_mix64(seed ^ split_mix64(index as u64));
    let uniform = |number: usize| (split_mix64(seed ^ split_mix64(number as u64)) >> 11) as f64 / (1_u64 << 53) as f64;
    let count: usize = shape_a.iter().product();
    let values: Vec<f32> = (0..count).map(|number| ((2.0 * uniform(number) - 1.0) * bound) as f32).collect();
    let a = Tensor::from_data(TensorData::new(values, shape_a), (device, DType::F32));
    let b = Tensor::zeros(shape_b, (device, DType::F32));
    LowRank::new(Param::from_tensor(a), Param::from_tensor(b), config.settings(), index, dropout.clone())
}

/// Uploads an adapter after checking its shapes against the weight's.
fn from_adapter<const D: usize>(
    weight: [usize; D],
    adapter: Adapter,
    index: usize,
    seed: &DropoutSeed,
    device: &Device,
) -> Result<LowRank<D>, LoraError> {
    let Adapter { path, a, b, settings } = adapter;
    let (shape_a, shape_b) = (a.shape().to_vec(), b.shape().to_vec());
    let fits = shape_a.len() == D && shape_b.len() == D && {
        let rank = shape_a[D - 1];
        rank > 0
            && shape_b[D - 2] == rank
            && shape_a[..D - 1] == weight[..D - 1]
            && shape_b[..D - 2] == weight[..D - 2]
            && shape_b[D - 1] == weight[D - 1]
    };
    if !fits {
        return Err(LoraError::Shape { path, a: shape_a, b: shape_b, weight: weight.to_vec() });
    }
    let tensor = |data: TensorData| Param::from_tensor(Tensor::<D>::from_data(data, (device, DType::F32)));
    Ok(LowRank::new(tensor(a), tensor(b), settings, index, seed.clone()))
}

/// Reads an adapter back to the host, in f32.
fn to_adapter<const D: usize>(path: String, lora: &LowRank<D>) -> Adapter {
    let data = |param: &Param<Tensor<D>>| param.val().into_data().convert::<f32>();
    Adapter { path, a: data(&lora.a), b: data(&lora.b), settings: lora.settings() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages() {
        let path = || "layers.1.mlp.experts.gate_proj".to_owned();
        let examples = [
            LoraError::Target { target: "q[0".into(), problem: "invalid range pattern".into() },
            LoraError::NoSuchTarget { target: "qproj".into(), known: vec!["o_proj".into(), "q_proj".into()] },
            LoraError::NoSuchProjection { path: path() },
            LoraError::Shape { path: path(), a: vec![9, 40, 3], b: vec![9, 2, 12], weight: vec![9, 40, 12] },
        ];
        let lines = examples.map(|error| {
            // The compiler asks for an example of a new variant here.
            match error {
                LoraError::Target { .. }
                | LoraError::NoSuchTarget { .. }
                | LoraError::NoSuchProjection { .. }
                | LoraError::Shape { .. } => {}
            }
            let hint = error.hint().map_or(String::new(), |hint| format!("hint: {hint}\n"));
            format!("error: {error}\n{hint}")
        });
        insta::assert_snapshot!(lines.join("\n"));
    }
}

//! Singular values of a checkpoint's matrices (arXiv 2502.16982, section 3.4).
//!
//! Layers are loaded one at a time, so memory does not grow with the depth of the model. Embedding and head are left out: the report
//! has no group for them.

use std::collections::{BTreeMap, HashMap};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Tensor};
use faer::Mat;
use moonlight_convert::Checkpoint;
use moonlight_model::config::{AttentionRole, ParameterKind, ParameterShape, ProjectionRole};
use moonlight_optim::diagnostics::Spectrum;
use rand::SeedableRng;
use rand::seq::index::sample;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::error::TrainError;

/// The number of points of [`MatrixSpectrum::quantiles`].
pub const QUANTILES: usize = 17;

/// The groups of the report's figure 4, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum MatrixGroup {
    /// Query and output projections of attention.
    AttnQO,
    /// Key and value projections; of latent attention `kv_a_proj_with_mqa` and `kv_b_proj`.
    AttnKV,
    /// A sample of the routed experts.
    Experts,
    /// Shared experts, stored as one MLP.
    SharedExperts,
    /// The gate that chooses experts.
    Router,
    /// MLPs of dense layers.
    Dense,
}

impl MatrixGroup {
    /// `None` for norms, biases, embedding and head.
    fn of(parameter: &ParameterShape) -> Option<Self> {
        use AttentionRole::{Output, Query, QueryDown, QueryUp};
        match (parameter.kind, parameter.role) {
            (ParameterKind::Router, _) => Some(Self::Router),
            (ParameterKind::Matrix | ParameterKind::Experts, Some(role)) => Some(match role {
                ProjectionRole::Attention(Query | QueryDown | QueryUp | Output) => Self::AttnQO,
                ProjectionRole::Attention(_) => Self::AttnKV,
                ProjectionRole::Experts(_) => Self::Experts,
                ProjectionRole::SharedExperts(_) => Self::SharedExperts,
                ProjectionRole::Mlp(_) => Self::Dense,
                ProjectionRole::Router => Self::Router,
            }),
            _ => None,
        }
    }
}

/// Statistics of the singular values of one matrix.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MatrixSpectrum {
    /// The decoder layer, from 0.
    pub layer: usize,
    /// The path inside the layer, with the index of a routed expert in brackets.
    pub path: String,
    /// The group whose mean includes it.
    pub group: MatrixGroup,
    /// `[rows, columns]`.
    pub shape: [usize; 2],
    /// `-1 / log(n) sum_i p_i log p_i` with `p_i = sigma_i^2 / sum_j sigma_j^2`: 1 if all `n` singular values are equal.
    pub entropy: f64,
    /// `sum_i sigma_i^2 / max_i sigma_i^2`.
    pub stable_rank: f64,
    /// `exp(-sum_i p_i log p_i)` with `p_i = sigma_i / sum_j sigma_j` (Roy and Vetterli 2007): from 1 to the rank, and 0 for a
    /// matrix of zeros. Unlike the other two it weights singular values by themselves, not by their squares.
    pub effective_rank: f64,
    /// The largest singular value.
    pub largest: f64,
    /// The singular values divided by the largest, at [`QUANTILES`] equally spaced ranks from the largest to the smallest, linearly
    /// interpolated: curves of matrices of different size can be drawn over one axis. Zeros for a matrix of zeros.
    pub quantiles: Vec<f64>,
}

/// Means of a group: first over its matrices in each layer, then over the layers that have any.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GroupSpectrum {
    /// One of the report's six.
    pub group: MatrixGroup,
    /// The number of matrices measured.
    pub matrices: usize,
    /// Mean SVD entropy.
    pub entropy: f64,
    /// Mean stable rank.
    pub stable_rank: f64,
    /// Mean effective rank.
    pub effective_rank: f64,
    /// Means of the [`QUANTILES`] singular values relative to the largest.
    pub quantiles: Vec<f64>,
}

/// Which routed experts are measured.
#[derive(Debug, Clone, Copy)]
pub struct ExpertSelection {
    /// Experts of each layer; 0 for all. The report samples 3 of 64.
    pub experts: usize,
    /// The seed of the choice.
    pub seed: u64,
}

/// The spectra of one decoder layer's matrices.
///
/// # Errors
///
/// A layer that does not load; [`TrainError::NonFiniteMatrix`].
pub fn layer_spectra(
    checkpoint: &Checkpoint,
    layer: usize,
    selection: ExpertSelection,
) -> Result<Vec<MatrixSpectrum>, TrainError> {
    let device = Device::default();
    let fresh = checkpoint.config().init_layer(layer, &device);
    let (module, _) = checkpoint.load_part(fresh, &format!("layers.{layer}"), &device, None)?;
    let parameters = checkpoint.config().parameter_shapes().into_iter();
    let groups = parameters
        .filter(|parameter| parameter.layer == Some(layer))
        .filter_map(|parameter| Some((parameter.path_in_layer().to_owned(), MatrixGroup::of(&parameter)?)))
        .collect();
    let mut collector = Collector { path: Vec::new(), groups, layer, selection, matrices: Vec::new() };
    module.visit(&mut collector);
    collector
        .matrices
        .into_iter()
        .map(|(path, group, matrix)| {
            let shape = matrix.dims();
            let spectrum =
                singular_values(matrix).ok_or_else(|| TrainError::NonFiniteMatrix { layer, path: path.clone() })?;
            Ok(MatrixSpectrum {
                layer,
                path,
                group,
                shape,
                entropy: spectrum.entropy(),
                stable_rank: spectrum.stable_rank(),
                effective_rank: effective_rank(&spectrum.singular_values),
                largest: spectrum.singular_values.first().copied().unwrap_or(0.0),
                quantiles: quantiles(&spectrum.singular_values),
            })
        })
        .collect()
}

/// The means of each group that has a matrix, in the report's order.
pub fn by_group(matrices: &[MatrixSpectrum]) -> Vec<GroupSpectrum> {
    let mut layers: BTreeMap<MatrixGroup, BTreeMap<usize, Vec<&MatrixSpectrum>>> = BTreeMap::new();
    for matrix in matrices {
        layers.entry(matrix.group).or_default().entry(matrix.layer).or_default().push(matrix);
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    layers
        .into_iter()
        .map(|(group, layers)| {
            let mean_over_layers = |metric: &dyn Fn(&MatrixSpectrum) -> f64| {
                let of_layer = |matrices: &Vec<&MatrixSpectrum>| {
                    mean(&matrices.iter().map(|matrix| metric(matrix)).collect::<Vec<_>>())
                };
                mean(&layers.values().map(of_layer).collect::<Vec<_>>())
            };
            GroupSpectrum {
                group,
                matrices: layers.values().map(Vec::len).sum(),
                entropy: mean_over_layers(&|matrix| matrix.entropy),
                stable_rank: mean_over_layers(&|matrix| matrix.stable_rank),
                effective_rank: mean_over_layers(&|matrix| matrix.effective_rank),
                quantiles: (0..QUANTILES).map(|i| mean_over_layers(&|matrix| matrix.quantiles[i])).collect(),
            }
        })
        .collect()
}

/// [`MatrixSpectrum::effective_rank`] of singular values.
fn effective_rank(singular_values: &[f64]) -> f64 {
    let largest = singular_values.iter().copied().fold(0.0, f64::max);
    if largest == 0.0 {
        return 0.0;
    }
    // Relative to the largest, so that no sum overflows or vanishes.
    let sum: f64 = singular_values.iter().map(|value| value / largest).sum();
    let shares = singular_values.iter().map(|value| value / largest / sum);
    let entropy: f64 = shares.filter(|share| *share > 0.0).map(|share| -share * share.ln()).sum();
    entropy.exp()
}

/// [`MatrixSpectrum::quantiles`] of singular values in descending order.
fn quantiles(singular_values: &[f64]) -> Vec<f64> {
    let [largest, ..] = *singular_values else { return vec![0.0; QUANTILES] };
    if largest == 0.0 {
        return vec![0.0; QUANTILES];
    }
    let last = singular_values.len() - 1;
    let at = |i: usize| {
        // Integers, so that the two ends are the largest and the smallest value exactly.
        let (below, rest) = (i * last / (QUANTILES - 1), i * last % (QUANTILES - 1));
        let (left, right) = (singular_values[below] / largest, singular_values[(below + 1).min(last)] / largest);
        left + (right - left) * rest as f64 / (QUANTILES - 1) as f64
    };
    (0..QUANTILES).map(at).collect()
}

/// Singular values in f64; `None` for a non-finite matrix. For 2048 x 1408 faer's blocked SVD takes a second, Burn's takes minutes.
fn singular_values(matrix: Tensor<2>) -> Option<Spectrum> {
    let [rows, columns] = matrix.dims();
    let values: Vec<f64> = matrix.into_data().iter::<f64>().collect();
    if values.iter().any(|value| !value.is_finite()) {
        return None;
    }
    let matrix = Mat::from_fn(rows, columns, |row, column| values[row * columns + column]);
    let singular_values = matrix.singular_values().ok()?;
    Some(Spectrum { singular_values })
}

/// Collects the matrices of a layer to measure, with their paths.
struct Collector {
    path: Vec<String>,
    /// The group of each matrix of the layer, by path.
    groups: HashMap<String, MatrixGroup>,
    layer: usize,
    selection: ExpertSelection,
    matrices: Vec<(String, MatrixGroup, Tensor<2>)>,
}

impl ModuleVisitor for Collector {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        let Some(&group) = self.groups.get(&path) else { return };
        let value = param.val().cast(DType::F32);
        match *value.shape().as_slice() {
            [rows, columns] => self.matrices.push((path, group, value.reshape([rows, columns]))),
            [experts, rows, columns] => {
                let wanted = match self.selection.experts {
                    0 => experts,
                    wanted => wanted.min(experts),
                };
                // The seed depends only on the layer, so that gate, up and down are measured for the same experts.
                let mut random = ChaCha8Rng::seed_from_u64(self.selection.seed.wrapping_add(self.layer as u64));
                let mut chosen = sample(&mut random, experts, wanted).into_vec();
                chosen.sort_unstable();
                for expert in chosen {
                    let matrix = value.clone().slice_dim(0, expert..expert + 1).reshape([rows, columns]);
                    self.matrices.push((format!("{path}[{expert}]"), group, matrix));
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use moonlight_convert::{SaveOptions, save};
    use moonlight_model::ModelConfig;

    use super::*;

    fn checkpoint(dir: &std::path::Path, preset: &str) -> Checkpoint {
        let mut config = ModelConfig::preset(preset).unwrap();
        (config.vocab_size, config.num_hidden_layers, config.hidden_size) = (64, 3, 32);
        let device = Device::default();
        device.seed(1);
        save(&config.init(&device), &dir.join("model"), &SaveOptions::default()).unwrap();
        Checkpoint::open(dir.join("model")).unwrap()
    }

    fn all(checkpoint: &Checkpoint, selection: ExpertSelection) -> Vec<MatrixSpectrum> {
        (0..3).flat_map(|layer| layer_spectra(checkpoint, layer, selection).unwrap()).collect()
    }

    #[test]
    fn every_matrix_of_a_moonlight_model_has_a_group() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(dir.path(), "bench-small");
        let matrices = all(&checkpoint, ExpertSelection { experts: 3, seed: 0 });
        let groups = by_group(&matrices);
        let counts: Vec<_> = groups.iter().map(|group| (group.group, group.matrices)).collect();
        let expected = [
            (MatrixGroup::AttnQO, 3 * 2),
            (MatrixGroup::AttnKV, 3 * 2),
            (MatrixGroup::Experts, 2 * 3 * 3),
            (MatrixGroup::SharedExperts, 2 * 3),
            (MatrixGroup::Router, 2),
            (MatrixGroup::Dense, 3),
        ];
        assert_eq!(counts, expected);
        // Random normal matrices are close to full rank.
        assert!(groups.iter().all(|group| group.entropy > 0.8 && group.entropy < 1.0), "{groups:?}");
        // Singular values lie between their squares and a flat spectrum, and so does the rank that they give.
        for matrix in &matrices {
            let short = matrix.shape[0].min(matrix.shape[1]) as f64;
            assert!(matrix.stable_rank < matrix.effective_rank && matrix.effective_rank <= short, "{matrix:?}");
            assert!(matrix.quantiles[0] == 1.0 && matrix.quantiles.is_sorted_by(|a, b| a >= b), "{matrix:?}");
        }
        let everything = all(&checkpoint, ExpertSelection { experts: 0, seed: 0 });
        assert_eq!(everything.iter().filter(|matrix| matrix.group == MatrixGroup::Experts).count(), 2 * 3 * 32);
    }

    #[test]
    fn the_singular_values_agree_with_burns() {
        let device = Device::default();
        let matrix = Tensor::<2>::random([20, 33], burn::tensor::Distribution::Normal(0.0, 1.0), &device);
        let ours = singular_values(matrix.clone()).unwrap();
        let burns = Spectrum::of(matrix).unwrap();
        assert!((ours.entropy() - burns.entropy()).abs() < 1e-5);
        assert!((ours.stable_rank() / burns.stable_rank() - 1.0).abs() < 1e-4);
        assert!(singular_values(Tensor::full([3, 3], f32::NAN, &device)).is_none());
        assert_eq!(singular_values(Tensor::zeros([3, 5], &device)).unwrap().stable_rank(), 0.0);
    }

    #[test]
    fn means_are_taken_within_layers_first() {
        let one = |layer, entropy| MatrixSpectrum {
            layer,
            path: "self_attn.q_proj.weight".into(),
            group: MatrixGroup::AttnQO,
            shape: [2, 2],
            entropy,
            stable_rank: 1.0,
            effective_rank: 10.0 * entropy,
            largest: 1.0,
            quantiles: (0..QUANTILES).map(|i| entropy * i as f64).collect(),
        };
        let groups = by_group(&[one(0, 0.2), one(0, 0.4), one(0, 0.6), one(1, 0.8)]);
        assert!((groups[0].entropy - 0.6).abs() < 1e-12);
        assert!((groups[0].effective_rank - 6.0).abs() < 1e-12);
        let expected = (0..QUANTILES).map(|i| 0.6 * i as f64);
        assert_eq!(groups[0].quantiles.len(), QUANTILES);
        assert!(groups[0].quantiles.iter().zip(expected).all(|(ours, expected)| (ours - expected).abs() < 1e-12));
    }

    #[test]
    fn the_effective_rank_is_the_exponential_of_the_entropy_of_the_singular_values() {
        assert!((effective_rank(&[3.0; 5]) - 5.0).abs() < 1e-12, "equal values count fully");
        assert!((effective_rank(&[7.0, 0.0, 0.0]) - 1.0).abs() < 1e-12, "rank one");
        // Shares 3/4 and 1/4: their entropy is log 4 - 3/4 log 3.
        let expected = 4.0 / 3f64.powf(0.75);
        for scale in [1.0, 1e-200, 1e200] {
            assert!((effective_rank(&[3.0 * scale, scale]) / expected - 1.0).abs() < 1e-12, "scale {scale}");
        }
        assert_eq!(effective_rank(&[0.0, 0.0]), 0.0);
    }

    #[test]
    fn quantiles_are_interpolated_between_the_largest_and_the_smallest_value() {
        let linear: Vec<f64> = (0..41).map(|i| 4.0 - 0.1 * f64::from(i)).collect();
        let expected = |i: usize| 1.0 - i as f64 / 16.0;
        for (i, value) in quantiles(&linear).into_iter().enumerate() {
            assert!((value - expected(i)).abs() < 1e-12, "{i}: {value}");
        }
        let few = quantiles(&[2.0, 1.0, 0.5]);
        assert_eq!((few[0], few[4], few[8], few[12], few[16]), (1.0, 0.75, 0.5, 0.375, 0.25));
        assert_eq!(few.len(), QUANTILES);
        assert_eq!(quantiles(&[3.0]), [1.0; QUANTILES]);
        assert_eq!(quantiles(&[0.0, 0.0]), [0.0; QUANTILES]);
    }
}

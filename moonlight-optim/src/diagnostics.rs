//! Metrics of updates and weights: RMS, orthogonality error, spectrum.

use std::collections::HashMap;

use burn::linalg::svd;
use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::Assignment;

/// Metrics of one step for a parameter group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupMetrics {
    /// The name of the group.
    pub group: String,
    /// The RMS of the update, before the learning rate and without decay, over all elements of the group:
    /// `sqrt(mean(((before - after) / lr - decay)^2))`. With the report's scale Muon's is about 0.2 (less if updates are not of
    /// full rank); AdamW's is 0.2 to 0.4 in practice.
    pub update_rms: f64,
    /// The RMS of the parameters after the step, as in the report's Tables 1 and 8.
    pub weight_rms: f64,
    /// The learning rate of the group: that of the step times the group's factor.
    pub learning_rate: f64,
}

/// The metrics of each group for one step: `before` and `after` are the module around the step, `lr` is its learning rate, and
/// `step` its index from 0, which only decay schedules depend on.
///
/// Groups are in the order of their declaration. A group without parameters, or with a learning rate of 0, is left out.
///
/// A clone of the module that is kept over a step costs a copy of its parameters, since the step cannot reuse their memory. Do
/// this only on steps that are logged.
///
/// ```
/// # use burn::nn::{Linear, LinearConfig};
/// # use burn::optim::GradientsParams;
/// # use burn::tensor::{Device, Tensor};
/// # use moonlight_optim::{AdamWConfig, MuonConfig, OptimizerOptions, ParameterRules};
/// use moonlight_optim::group_metrics;
/// # let device = Device::default().autodiff();
/// # let model: Linear = LinearConfig::new(8, 16).init(&device);
/// # let rules = ParameterRules::muon_except(Vec::<String>::new(), MuonConfig::new(), AdamWConfig::new());
/// # let assignment = rules.assign(&model)?;
/// # let mut optimizer = assignment.build(OptimizerOptions::new())?;
/// # let loss = model.forward(Tensor::<2>::ones([2, 8], &device)).square().mean();
/// # let gradients = GradientsParams::from_grads(loss.backward(), &model);
/// let before = model.clone();
/// let after = optimizer.step(0.02, model, gradients)?;
/// for group in group_metrics(&before, &after, &assignment, 0.02, 0) {
///     println!("{}: update RMS {:.2}", group.group, group.update_rms);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn group_metrics<M: Module>(
    before: &M,
    after: &M,
    assignment: &Assignment,
    lr: f64,
    step: usize,
) -> Vec<GroupMetrics> {
    let before = flat_tensors(before);
    let after = flat_tensors(after);
    let mut metrics = Vec::new();
    for (name, group) in assignment.groups() {
        let learning_rate = lr * group.learning_rate_factor();
        if learning_rate == 0.0 {
            continue;
        }
        let decay = group.decay();
        let rate = decay.fraction(group.weight_decay(), learning_rate, step) / learning_rate;
        let mut sums: Option<Tensor<1>> = None; // [2]: of squared updates, of squared weights
        let mut count = 0;
        for row in assignment.parameters_of(name) {
            let (Some(old), Some(new)) = (before.get(&row.path), after.get(&row.path)) else { continue };
            // Cast one parameter at a time: an f32 copy of a bf16 model would be twice its size.
            let (old, new) = (old.clone().cast(DType::F32), new.clone().cast(DType::F32));
            let change = old.clone().sub(new.clone()).div_scalar(learning_rate);
            let decayed = change.clone().sub(old.clone().mul_scalar(rate));
            let update = if decay.cautious {
                // Cautious decay was applied where the update has the sign of the weight. There `change * weight` is at least
                // `rate * weight^2`, elsewhere it is negative. Half of that bound separates the two in spite of rounding.
                let along = change.clone().mul(old.clone());
                let without_decay = along.lower(old.clone().square().mul_scalar(0.5 * rate));
                decayed.mask_where(without_decay, change)
            } else {
                decayed
            };
            let squares = Tensor::cat(vec![update.square().sum(), new.square().sum()], 0);
            count += row.elements();
            // Summed on the device, so that the host reads once for a group instead of once for each parameter.
            sums = Some(match sums {
                Some(sums) => {
                    let device = sums.device();
                    sums.add(squares.to_device(&device))
                }
                None => squares,
            });
        }
        let Some(sums) = sums else { continue };
        let sums: Vec<f64> = sums.into_data().iter::<f64>().collect();
        let rms = |sum: f64| (sum / count as f64).sqrt();
        let (update_rms, weight_rms) = (rms(sums[0]), rms(sums[1]));
        metrics.push(GroupMetrics { group: name.to_string(), update_rms, weight_rms, learning_rate });
    }
    metrics
}

/// [`GroupMetrics::update_rms`] of each group, with its name. With a decay schedule, use [`group_metrics`].
pub fn update_rms<M: Module>(before: &M, after: &M, assignment: &Assignment, lr: f64) -> Vec<(String, f64)> {
    let metrics = group_metrics(before, after, assignment, lr, 0);
    metrics.into_iter().map(|metrics| (metrics.group, metrics.update_rms)).collect()
}

/// How far each matrix of a stack `[batch, rows, columns]` is from orthogonal, `[batch]`: `||X X^T - I|| / sqrt(n)` in the
/// Frobenius norm, with the Gram matrix on the shorter side `n`. 0 is orthogonal; singular values of 0.7 to 1.2 give about 0.3.
pub fn orthogonality_error(x: Tensor<3>) -> Vec<f64> {
    let [_, rows, columns] = x.dims();
    let x = x.cast(DType::F32);
    let transposed = x.clone().swap_dims(1, 2);
    let gram = if rows <= columns { x.matmul(transposed) } else { transposed.matmul(x) };
    let short = rows.min(columns);
    let identity = Tensor::<2>::eye(short, &gram.device()).cast(DType::F32).unsqueeze::<3>();
    let squares = gram.sub(identity).square().sum_dims(&[1, 2]); // [batch, 1, 1]
    squares.into_data().iter::<f64>().map(|square| (square / short as f64).sqrt()).collect()
}

/// The singular values of a matrix, with the metrics of the report (section 3.4).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spectrum {
    /// In descending order.
    pub singular_values: Vec<f64>,
}

impl Spectrum {
    /// The spectrum of a matrix `[rows, columns]`; `None` if it contains NaN or infinity.
    ///
    /// Burn's `svd` runs on the host and takes a few `m n^2` scalar operations: seconds for a matrix of a thousand rows.
    pub fn of(matrix: Tensor<2>) -> Option<Self> {
        /// The most QR sweeps for a singular value; two or three are usual.
        const SWEEPS: usize = 60;
        let matrix = matrix.cast(DType::F32);
        // Divided by the largest element, so that no square in the SVD overflows or vanishes.
        let largest = f64::from(matrix.clone().abs().max().into_scalar::<f32>());
        if !largest.is_finite() {
            return None;
        }
        let short = *matrix.dims().iter().min()?;
        if largest == 0.0 {
            return Some(Self { singular_values: vec![0.0; short] });
        }
        let (_, values, _) = svd::<2, 1>(matrix.div_scalar(largest), SWEEPS);
        let singular_values = values.into_data().iter::<f64>().map(|value| value * largest).collect();
        Some(Self { singular_values })
    }

    /// The report's SVD entropy: `H = -1 / log(n) sum_i p_i log p_i` with `p_i = sigma_i^2 / sum_j sigma_j^2`. It is 1 if all
    /// singular values are equal, and 0 for a matrix of rank one or of zeros.
    pub fn entropy(&self) -> f64 {
        let squares = self.squares();
        let sum: f64 = squares.iter().sum();
        if squares.len() < 2 || sum == 0.0 {
            return 0.0;
        }
        let terms = squares.iter().map(|square| square / sum).filter(|p| *p > 0.0).map(|p| p * p.ln());
        -terms.sum::<f64>() / (squares.len() as f64).ln()
    }

    /// The stable rank, `sum_i sigma_i^2 / max_i sigma_i^2`: from 1 to the rank. 0 for a matrix of zeros.
    pub fn stable_rank(&self) -> f64 {
        let squares = self.squares();
        let largest = squares.iter().copied().fold(0.0, f64::max);
        if largest == 0.0 { 0.0 } else { squares.iter().sum::<f64>() / largest }
    }

    /// The squares of the singular values relative to the largest.
    fn squares(&self) -> Vec<f64> {
        let largest = self.singular_values.iter().copied().fold(0.0, f64::max);
        if largest == 0.0 {
            return vec![0.0; self.singular_values.len()];
        }
        self.singular_values.iter().map(|value| (value / largest).powi(2)).collect()
    }
}

/// The float tensors of a module by path, flat and without autodiff graph.
fn flat_tensors<M: Module>(module: &M) -> HashMap<String, Tensor<1>> {
    let mut collector = FlatTensors::default();
    module.visit(&mut collector);
    collector.tensors
}

#[derive(Default)]
struct FlatTensors {
    path: Vec<String>,
    tensors: HashMap<String, Tensor<1>>,
}

impl ModuleVisitor for FlatTensors {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.base().inner();
        let elements = tensor.shape().num_elements();
        let tensor = tensor.reshape([elements]);
        self.tensors.insert(self.path.join("."), tensor);
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::GradientsParams;
    use burn::tensor::{Device, Distribution};

    use super::*;
    use crate::{
        AdamWConfig, Coefficients, Decay, DecaySchedule, GroupOptimizer, MuonConfig, NewtonSchulz, ParameterRules,
    };

    #[test]
    fn update_rms_is_that_of_the_update_rules() {
        let device = Device::default().autodiff();
        let layer: Linear = LinearConfig::new(24, 16).init(&device);
        let muon = MuonConfig::new().with_coefficients(Coefficients::PolarExpress).with_steps(12);
        let rules = ParameterRules::muon_except(Vec::<String>::new(), muon, AdamWConfig::new());
        let assignment = rules.assign(&layer).unwrap();
        let x = Tensor::<2>::random([200, 24], Distribution::Normal(0.0, 1.0), &device);
        let target = Tensor::<2>::random([200, 16], Distribution::Normal(0.0, 1.0), &device);
        let loss = layer.forward(x).sub(target).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &layer);
        let before = layer.clone();
        let lr = 0.01;
        let after = assignment.to_module_optimizer().step(lr, layer, grads);

        let metrics = update_rms(&before, &after, &assignment, lr);
        assert_eq!(metrics.len(), 2);
        // 0.2 at full rank with singular values of 1; in AdamW's first step every element has a magnitude of 1.
        assert!(metrics[0].0 == "muon" && (metrics[0].1 - 0.2).abs() < 1e-3, "{metrics:?}");
        assert!(metrics[1].0 == "adamw" && (metrics[1].1 - 1.0).abs() < 1e-3, "{metrics:?}");
        assert!(update_rms(&before, &after, &assignment, 0.0).is_empty());
    }

    #[test]
    fn update_rms_excludes_every_kind_of_decay() {
        let device = Device::default().autodiff();
        let schedule = DecaySchedule::InverseSquare { hold: 1 };
        let decays = [
            Decay::default(),
            Decay { cautious: true, ..Decay::default() },
            Decay { independent: true, cautious: true, schedule },
            Decay { schedule, ..Decay::default() },
        ];
        for decay in decays {
            // Weights far larger than updates, so that decay that is not excluded shows.
            let mut layer: Linear = LinearConfig::new(12, 20).with_bias(false).init(&device);
            layer.weight = layer.weight.map(|weight| weight.mul_scalar(20.0).detach().require_grad());
            let muon = MuonConfig::new()
                .with_coefficients(Coefficients::PolarExpress)
                .with_steps(12)
                .with_weight_decay(0.3)
                .with_decay(decay);
            let assignment = ParameterRules::new()
                .group("muon", GroupOptimizer::from(muon).with_learning_rate_factor(0.5))
                .rule(crate::Rule::to("muon"))
                .assign(&layer)
                .unwrap();
            let mut optimizer = assignment.to_module_optimizer();
            let x = Tensor::<2>::random([200, 12], Distribution::Normal(0.0, 1.0), &device);
            let target = Tensor::<2>::random([200, 20], Distribution::Normal(0.0, 1.0), &device);
            for step in 0..3 {
                let loss = layer.forward(x.clone()).sub(target.clone()).square().mean();
                let grads = GradientsParams::from_grads(loss.backward(), &layer);
                let before = layer.clone();
                layer = optimizer.step(0.02, layer, grads);
                let metrics = &group_metrics(&before, &layer, &assignment, 0.02, step)[0];
                assert!((metrics.update_rms - 0.2).abs() < 2e-3, "{decay:?} step {step}: {metrics:?}");
                assert_eq!(metrics.learning_rate, 0.01);
                let rms = layer.weight.val().square().mean().sqrt().into_scalar::<f32>();
                assert!((metrics.weight_rms - f64::from(rms)).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn orthogonal_matrices_have_no_error() {
        let device = Device::default();
        let x = Tensor::<3>::random([3, 10, 24], Distribution::Normal(0.0, 1.0), &device);
        let exact = NewtonSchulz::new(&Coefficients::PolarExpress, 12).apply(x.clone());
        assert!(orthogonality_error(exact.clone()).iter().all(|error| *error < 1e-5));
        assert!(orthogonality_error(exact.swap_dims(1, 2)).iter().all(|error| *error < 1e-5));
        let report = orthogonality_error(NewtonSchulz::new(&Coefficients::Report, 5).apply(x));
        assert!(report.iter().all(|error| (0.05..0.5).contains(error)), "{report:?}");
    }

    #[test]
    fn known_matrices_have_their_spectra() {
        let device = Device::default();
        let spectrum = |matrix: Tensor<2>| Spectrum::of(matrix).unwrap();
        let identity = spectrum(Tensor::eye(8, &device).mul_scalar(1e-25));
        assert!((identity.entropy() - 1.0).abs() < 1e-6 && (identity.stable_rank() - 8.0).abs() < 1e-4);
        let one = spectrum(Tensor::ones([4, 6], &device));
        assert!(one.entropy() < 1e-6 && (one.stable_rank() - 1.0).abs() < 1e-5);
        assert!((one.singular_values[0] - 24_f64.sqrt()).abs() < 1e-4);
        let diagonal = spectrum(Tensor::from_data([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]], &device));
        assert!((diagonal.stable_rank() - 25.0 / 16.0).abs() < 1e-6);
        // p is 9/25 and 16/25.
        let expected = -(0.36_f64 * 0.36_f64.ln() + 0.64 * 0.64_f64.ln()) / 2_f64.ln();
        assert!((diagonal.entropy() - expected).abs() < 1e-6);
        let zero = spectrum(Tensor::zeros([3, 3], &device));
        assert_eq!((zero.entropy(), zero.stable_rank()), (0.0, 0.0));
        assert!(Spectrum::of(Tensor::full([2, 2], f32::NAN, &device)).is_none());
    }

    /// Lemma 1 of the report: an `[A, B]` update of full rank has RMS `1 / sqrt(max(A, B))`.
    #[test]
    fn lemma_1_holds_over_shapes() {
        let device = Device::default();
        for [rows, columns] in [[16, 16], [16, 64], [64, 16], [24, 200], [128, 96], [1, 50]] {
            let x = Tensor::<3>::random([2, rows, columns], Distribution::Normal(0.0, 1.0), &device);
            // Enough steps to converge to singular values of 1, as in the lemma; a square matrix needs the most.
            let update = NewtonSchulz::new(&Coefficients::PolarExpress, 14).apply(x);
            let rms = update.square().mean().sqrt().into_scalar::<f32>();
            let expected = 1.0 / (rows.max(columns) as f32).sqrt();
            assert!((rms / expected - 1.0).abs() < 1e-3, "[{rows}, {columns}]: {rms}, not {expected}");
        }
        // Rank r: sqrt(r / (A B)).
        let low = Tensor::<2>::random([30, 3], Distribution::Normal(0.0, 1.0), &device).matmul(Tensor::random(
            [3, 40],
            Distribution::Normal(0.0, 1.0),
            &device,
        ));
        let update = NewtonSchulz::new(&Coefficients::PolarExpress, 8).apply(low.unsqueeze());
        let rms = update.square().mean().sqrt().into_scalar::<f32>();
        assert!((rms / (3.0_f32 / 1200.0).sqrt() - 1.0).abs() < 1e-2, "{rms}");
    }
}

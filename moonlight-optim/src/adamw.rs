//! AdamW beside Muon: Burn's, with the report's settings, in full precision.

use burn::optim::{AdamW, LearningRate, ModuleOptimizer, Optimizer};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::newton_schulz::full_precision;

/// Settings of the AdamW that takes what Muon does not: the report's, which are not Burn's defaults.
///
/// Decay applies to every parameter of the group, gains of norms included: the report found that crucial.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// Decay of the first moment. 0.9.
    pub beta_1: f32,
    /// Decay of the second moment. 0.95.
    pub beta_2: f32,
    /// Added to the root of the second moment. 1e-8.
    pub epsilon: f32,
    /// Decoupled weight decay. 0.1.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta_1: 0.9, beta_2: 0.95, epsilon: 1e-8, weight_decay: 0.1 }
    }
}

impl AdamWConfig {
    /// The report's settings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets both betas.
    pub fn with_betas(mut self, beta_1: f32, beta_2: f32) -> Self {
        (self.beta_1, self.beta_2) = (beta_1, beta_2);
        self
    }

    /// Sets [`AdamWConfig::epsilon`].
    pub fn with_epsilon(mut self, epsilon: f32) -> Self {
        self.epsilon = epsilon;
        self
    }

    /// Sets [`AdamWConfig::weight_decay`].
    pub fn with_weight_decay(mut self, weight_decay: f64) -> Self {
        self.weight_decay = weight_decay;
        self
    }

    /// Burn's AdamW with these settings, its moments kept in full precision.
    pub fn build(&self) -> FullPrecision<AdamW> {
        FullPrecision(
            burn::optim::AdamWConfig::new()
                .with_beta_1(self.beta_1)
                .with_beta_2(self.beta_2)
                .with_epsilon(self.epsilon)
                .with_weight_decay(self.weight_decay as f32)
                .build(),
        )
    }

    /// AdamW for every parameter of a module.
    pub fn init(&self) -> ModuleOptimizer {
        ModuleOptimizer::from(self.build())
    }
}

/// Any Burn optimizer, run in f32 on parameters that are stored in less: gradient and parameter are widened, the
/// parameter is rounded once at the end, the state stays wide. For f32 and f64 parameters it changes nothing.
///
/// Burn loads the saved state of its own optimizers in the device's default float type, f32 unless it was changed: with
/// this, that is the type that the state of half-precision parameters has.
#[derive(Clone, Debug)]
pub struct FullPrecision<O>(pub O);

impl<O: Optimizer> Optimizer for FullPrecision<O> {
    type State<const D: usize> = O::State<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let stored = tensor.dtype();
        let dtype = full_precision(stored);
        let (tensor, state) = self.0.step(lr, tensor.cast(dtype), grad.cast(dtype), state);
        (tensor.cast(stored), state)
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        O::to_device(state, device)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Distribution};

    use super::*;

    fn floats(tensor: Tensor<1>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    #[test]
    fn half_precision_parameters_are_stepped_in_full_precision() {
        let device = Device::default();
        let mut narrow = Tensor::<1>::random([64], Distribution::Default, &device).cast(DType::BF16);
        let optimizer = AdamWConfig::new().build();
        let (mut narrow_state, mut wide_state) = (None, None);
        for _ in 0..3 {
            let grad = Tensor::<1>::random([64], Distribution::Default, &device).cast(DType::BF16);
            let wide;
            (wide, wide_state) =
                optimizer.0.step(0.01, narrow.clone().cast(DType::F32), grad.clone().cast(DType::F32), wide_state);
            (narrow, narrow_state) = optimizer.step(0.01, narrow, grad, narrow_state);
            assert_eq!(narrow.dtype(), DType::BF16);
            assert_eq!(floats(narrow.clone()), floats(wide.cast(DType::BF16)));
        }
        assert_eq!(narrow_state.map(|state| state.momentum.moment_2.dtype()), Some(DType::F32));
    }

    #[test]
    fn decay_reaches_a_gain_without_gradient() {
        let device = Device::default();
        let gain = Tensor::<1>::ones([4], &device);
        let (after, _) = AdamWConfig::new().build().step(0.5, gain.clone(), gain.zeros_like(), None);
        assert!(floats(after).iter().all(|value| (value - 0.95).abs() < 1e-6));
    }
}

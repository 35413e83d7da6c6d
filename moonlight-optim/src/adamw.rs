//! AdamW beside Muon: Burn's, with the report's settings, in full precision.

use burn::optim::{AdamW, ModuleOptimizer};
use serde::{Deserialize, Serialize};

use crate::{MixedPrecision, Rounding};

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
    /// How parameters in half precision are stored. To nearest.
    pub rounding: Rounding,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta_1: 0.9, beta_2: 0.95, epsilon: 1e-8, weight_decay: 0.1, rounding: Rounding::default() }
    }
}

impl AdamWConfig {
    /// The report's settings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keller Jordan's settings beside his Muon (`SingleDeviceMuonWithAuxAdam`): epsilon 1e-10, no decay.
    pub fn keller_jordan() -> Self {
        Self::default().with_epsilon(1e-10).with_weight_decay(0.0)
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

    /// Sets [`AdamWConfig::rounding`].
    pub fn with_rounding(mut self, rounding: Rounding) -> Self {
        self.rounding = rounding;
        self
    }

    /// Burn's AdamW with these settings, its moments kept in full precision.
    pub fn build(&self) -> MixedPrecision<AdamW> {
        let optimizer = burn::optim::AdamWConfig::new()
            .with_beta_1(self.beta_1)
            .with_beta_2(self.beta_2)
            .with_epsilon(self.epsilon)
            .with_weight_decay(self.weight_decay as f32)
            .build();
        MixedPrecision { optimizer, rounding: self.rounding }
    }

    /// AdamW for every parameter of a module.
    pub fn init(&self) -> ModuleOptimizer {
        ModuleOptimizer::from(self.build())
    }
}

#[cfg(test)]
mod tests {
    use burn::optim::Optimizer;
    use burn::tensor::{DType, Device, Distribution, Tensor};

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
            (wide, wide_state) = optimizer.optimizer.step(
                0.01,
                narrow.clone().cast(DType::F32),
                grad.clone().cast(DType::F32),
                wide_state,
            );
            (narrow, narrow_state) = optimizer.step(0.01, narrow, grad, narrow_state);
            assert_eq!(narrow.dtype(), DType::BF16);
            assert_eq!(floats(narrow.clone()), floats(wide.cast(DType::BF16)));
        }
        assert_eq!(
            narrow_state.and_then(|state| state.inner).map(|state| state.momentum.moment_2.dtype()),
            Some(DType::F32)
        );
    }

    #[test]
    fn decay_reaches_a_gain_without_gradient() {
        let device = Device::default();
        let gain = Tensor::<1>::ones([4], &device);
        let (after, _) = AdamWConfig::new().build().step(0.5, gain.clone(), gain.zeros_like(), None);
        assert!(floats(after).iter().all(|value| (value - 0.95).abs() < 1e-6));
    }
}

//! AdamW for the parameters that Muon does not take: Burn's, in f32, with the report's defaults.

use burn::config::{Config, config_to_json};
use burn::optim::{AdamW, ModuleOptimizer};
use serde::{Deserialize, Serialize};

use crate::{MixedPrecision, Rounding};

/// Configuration to create an AdamW optimizer, for the parameters that Muon does not take: Burn's AdamW, run in f32
/// ([`MixedPrecision`]).
///
/// The defaults are those of "Muon is Scalable for LLM Training" (arXiv 2502.16982), which differ from Burn's.
///
/// | field | default | source |
/// |---|---|---|
/// | `betas` | `[0.9, 0.95]` | the report |
/// | `epsilon` | 1e-8 | the report |
/// | `weight_decay` | 0.1, decoupled, on every parameter of the group | the report, which found decay of the norms' gains crucial |
/// | `rounding` | `nearest` | see [`Rounding`] |
///
/// ```
/// use moonlight_optim::AdamWConfig;
///
/// let adamw = AdamWConfig::new().with_weight_decay(0.0).build();
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// The decay rates of the first and the second moment. Default: `[0.9, 0.95]`.
    pub betas: [f64; 2],
    /// Added to the square root of the second moment. Default: 1e-8.
    pub epsilon: f64,
    /// Decoupled weight decay: `W <- W - lr * weight_decay * W`. Default: 0.1.
    pub weight_decay: f64,
    /// How the updates of bf16 and f16 parameters are rounded. Default: `nearest`.
    pub rounding: Rounding,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: [0.9, 0.95], epsilon: 1e-8, weight_decay: 0.1, rounding: Rounding::default() }
    }
}

/// [`Config::save`] and [`Config::load`]. Implemented by hand: Burn's derive requires every field in a file.
impl Config for AdamWConfig {}

impl std::fmt::Display for AdamWConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&config_to_json(self))
    }
}

impl AdamWConfig {
    /// The report's config.
    pub fn new() -> Self {
        Self::default()
    }

    /// The config that goes with Keller Jordan's Muon (`SingleDeviceMuonWithAuxAdam`): epsilon 1e-10, no decay.
    pub fn keller_jordan() -> Self {
        Self::default().with_epsilon(1e-10).with_weight_decay(0.0)
    }

    /// Sets [`betas`](Self::betas).
    pub fn with_betas(mut self, beta_1: f64, beta_2: f64) -> Self {
        self.betas = [beta_1, beta_2];
        self
    }

    crate::setters::setters! {
        with_epsilon(epsilon: f64);
        with_weight_decay(weight_decay: f64);
        with_rounding(rounding: Rounding);
    }

    /// The optimizer for single parameters. Its moments are in f32 whatever the parameter's dtype is (f64 for f64).
    pub fn build(&self) -> MixedPrecision<AdamW> {
        let optimizer = burn::optim::AdamWConfig::new()
            .with_beta_1(self.betas[0] as f32)
            .with_beta_2(self.betas[1] as f32)
            .with_epsilon(self.epsilon as f32)
            .with_weight_decay(self.weight_decay as f32)
            .build();
        MixedPrecision { optimizer, rounding: self.rounding }
    }

    /// Initialize AdamW for every parameter of a module, as Burn's own configs do.
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
    fn half_precision_parameters_are_stepped_in_f32() {
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
    fn decay_applies_without_a_gradient() {
        let device = Device::default();
        let gain = Tensor::<1>::ones([4], &device);
        let (after, _) = AdamWConfig::new().build().step(0.5, gain.clone(), gain.zeros_like(), None);
        assert!(floats(after).iter().all(|value| (value - 0.95).abs() < 1e-6));
    }
}

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

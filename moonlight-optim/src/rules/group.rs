//! The optimizer of a parameter group.

use std::sync::Arc;

use burn::optim::{DynOptimizer, DynState, LearningRate, Optimizer, StateSink, StateSource};
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{AdamWConfig, Blocks, Decay, MuonConfig};

/// What a parameter group is optimised by: [`MuonConfig`], [`AdamWConfig`], or any Burn optimizer.
///
/// ```
/// use moonlight_optim::{AdamWConfig, GroupOptimizer};
///
/// // Embeddings at a tenth of the learning rate, without decay.
/// let slow = GroupOptimizer::from(AdamWConfig::new().with_weight_decay(0.0)).with_learning_rate_factor(0.1);
/// ```
#[derive(Clone)]
pub struct GroupOptimizer {
    optimizer: Arc<dyn DynOptimizer>,
    settings: GroupSettings,
    learning_rate_factor: f64,
}

/// The settings of a group's optimizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupSettings {
    /// Muon.
    Muon(Box<MuonConfig>),
    /// AdamW.
    AdamW(AdamWConfig),
    /// Any other optimizer, of which no more is known.
    Other {
        /// Its decoupled weight decay.
        weight_decay: f64,
    },
}

impl GroupOptimizer {
    /// Any Burn optimizer. `weight_decay` is the decoupled decay that it applies, if it does; only
    /// [`update_rms`](crate::update_rms) needs to know it, to tell the update from the decay.
    pub fn new(optimizer: impl Optimizer, weight_decay: f64) -> Self {
        let settings = GroupSettings::Other { weight_decay };
        Self { optimizer: Arc::new(optimizer), settings, learning_rate_factor: 1.0 }
    }

    /// Sets what the learning rate of a step is multiplied with for this group.
    pub fn with_learning_rate_factor(mut self, factor: f64) -> Self {
        self.learning_rate_factor = factor;
        self
    }

    /// What the learning rate of a step is multiplied with for this group; 1 unless set.
    pub fn learning_rate_factor(&self) -> f64 {
        self.learning_rate_factor
    }

    /// The decoupled weight decay that the optimizer applies.
    pub fn weight_decay(&self) -> f64 {
        match &self.settings {
            GroupSettings::Muon(config) => config.weight_decay,
            GroupSettings::AdamW(config) => config.weight_decay,
            GroupSettings::Other { weight_decay } => *weight_decay,
        }
    }

    /// The optimizer's settings.
    pub fn settings(&self) -> &GroupSettings {
        &self.settings
    }

    /// The settings, if it is Muon.
    pub(crate) fn muon(&self) -> Option<&MuonConfig> {
        match &self.settings {
            GroupSettings::Muon(config) => Some(config),
            _ => None,
        }
    }

    /// The decay of a step that is taken with learning rate `lr` before the group's factor.
    pub(crate) fn decay(&self) -> Decay {
        self.muon().map(|config| config.decay).unwrap_or_default()
    }

    /// The same group for parameters that are cut into blocks.
    pub(crate) fn shared(&self, blocks: &Blocks) -> Shared {
        let optimizer = match (self.muon(), blocks) {
            (Some(config), blocks) if *blocks != Blocks::Whole => {
                Arc::new(config.clone().with_blocks(blocks.clone()).mixed())
            }
            _ => self.optimizer.clone(),
        };
        Shared { optimizer, learning_rate_factor: self.learning_rate_factor }
    }
}

impl std::fmt::Debug for GroupOptimizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GroupOptimizer")
            .field("settings", &self.settings)
            .field("learning_rate_factor", &self.learning_rate_factor)
            .finish_non_exhaustive()
    }
}

impl From<MuonConfig> for GroupOptimizer {
    fn from(config: MuonConfig) -> Self {
        let optimizer = Arc::new(config.mixed());
        Self { optimizer, settings: GroupSettings::Muon(Box::new(config)), learning_rate_factor: 1.0 }
    }
}

impl From<AdamWConfig> for GroupOptimizer {
    fn from(config: AdamWConfig) -> Self {
        let optimizer = Arc::new(config.build());
        Self { optimizer, settings: GroupSettings::AdamW(config), learning_rate_factor: 1.0 }
    }
}

/// A shared optimizer as `ModuleOptimizer::with_group` takes one.
pub(crate) struct Shared {
    optimizer: Arc<dyn DynOptimizer>,
    learning_rate_factor: f64,
}

impl DynOptimizer for Shared {
    fn step_dyn(
        &self,
        rank: usize,
        lr: LearningRate,
        tensor: BridgeTensor,
        grad: BridgeTensor,
        state: Option<DynState>,
    ) -> (BridgeTensor, Option<DynState>) {
        self.optimizer.step_dyn(rank, lr * self.learning_rate_factor, tensor, grad, state)
    }

    fn to_device_dyn(&self, state: DynState, device: &Device) -> DynState {
        self.optimizer.to_device_dyn(state, device)
    }

    fn state_flatten(&self, prefix: &str, state: &DynState, out: &mut StateSink) {
        self.optimizer.state_flatten(prefix, state, out);
    }

    fn state_unflatten(&self, rank: usize, prefix: &str, src: &mut StateSource, device: &Device) -> Option<DynState> {
        self.optimizer.state_unflatten(rank, prefix, src, device)
    }
}

/// The fallback that `ModuleOptimizer` asks for. Assignment covers every parameter of the module that it was made for,
/// so this one is reached only with another module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unassigned;

impl Optimizer for Unassigned {
    type State<const D: usize> = ();

    fn step<const D: usize>(
        &self,
        _lr: LearningRate,
        tensor: Tensor<D>,
        _grad: Tensor<D>,
        _state: Option<()>,
    ) -> (Tensor<D>, Option<()>) {
        panic!(
            "a parameter of shape {:?} has a gradient but no optimizer: this module is not the one that the parameter \
             rules were assigned to",
            tensor.shape().as_slice()
        );
    }

    fn to_device<const D: usize>(_state: (), _device: &Device) {}
}

//! The optimizer of a parameter group.

use std::sync::Arc;

use burn::optim::{DynOptimizer, DynState, LearningRate, Optimizer, StateSink, StateSource};
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{AdamWConfig, Blocks, Decay, MuonConfig};

/// The optimizer of a parameter group: Muon, AdamW, or any other Burn optimizer.
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
    /// Muon, with its config.
    Muon(Box<MuonConfig>),
    /// AdamW, with its config.
    AdamW(AdamWConfig),
    /// Any other optimizer, whose settings are unknown.
    Other {
        /// The decoupled weight decay that it applies.
        weight_decay: f64,
    },
}

impl GroupOptimizer {
    /// Any Burn optimizer. `weight_decay` is the decoupled decay that it applies, or 0. Only
    /// [`update_rms`](crate::update_rms) uses it, to separate the update from the decay.
    pub fn new(optimizer: impl Optimizer, weight_decay: f64) -> Self {
        let settings = GroupSettings::Other { weight_decay };
        Self { optimizer: Arc::new(optimizer), settings, learning_rate_factor: 1.0 }
    }

    /// Sets the factor on a step's learning rate for this group.
    pub fn with_learning_rate_factor(mut self, factor: f64) -> Self {
        self.learning_rate_factor = factor;
        self
    }

    /// The factor on a step's learning rate for this group; 1 unless set.
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

    /// The settings of the optimizer.
    pub fn settings(&self) -> &GroupSettings {
        &self.settings
    }

    /// The config, if the optimizer is Muon.
    pub(crate) fn muon(&self) -> Option<&MuonConfig> {
        match &self.settings {
            GroupSettings::Muon(config) => Some(config),
            _ => None,
        }
    }

    /// How decay is applied: Muon's setting; for other optimizers the default, which is plain decoupled decay.
    pub(crate) fn decay(&self) -> Decay {
        self.muon().map(|config| config.decay).unwrap_or_default()
    }

    /// The group's optimizer for parameters that are split into `blocks`.
    pub(crate) fn with_blocks(&self, blocks: &Blocks) -> GroupMember {
        let optimizer = match (self.muon(), blocks) {
            (Some(config), blocks) if *blocks != Blocks::Whole => {
                Arc::new(config.clone().with_blocks(blocks.clone()).mixed())
            }
            _ => self.optimizer.clone(),
        };
        GroupMember { optimizer, learning_rate_factor: self.learning_rate_factor }
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

/// A group's optimizer as `ModuleOptimizer::with_group` takes it. It also applies the group's learning rate factor, for which
/// Burn has no setting.
pub(crate) struct GroupMember {
    optimizer: Arc<dyn DynOptimizer>,
    learning_rate_factor: f64,
}

impl DynOptimizer for GroupMember {
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

/// The default group that `ModuleOptimizer` requires. An assignment covers every parameter of its module, so this group is
/// reached only with another module.
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

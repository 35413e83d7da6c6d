//! The optimizer of a parameter group.

use std::sync::Arc;

use burn::optim::{DynOptimizer, DynState, LearningRate, Optimizer, StateSink, StateSource};
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{Device, Tensor};

use crate::{AdamWConfig, MuonConfig};

/// What a parameter group is optimised by: [`MuonConfig`], [`AdamWConfig`], or any Burn optimizer.
#[derive(Clone)]
pub struct GroupOptimizer {
    optimizer: Arc<dyn DynOptimizer>,
    kind: Kind,
    weight_decay: f64,
}

/// What is known of an optimizer beyond Burn's trait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Muon,
    AdamW,
    Other,
}

impl Kind {
    /// The tensors in a parameter's state, where known: what a saved state must hold to be this optimizer's.
    pub(crate) fn state_tensors(self) -> Option<&'static [&'static str]> {
        match self {
            Kind::Muon => Some(&["momentum"]),
            Kind::AdamW => Some(&["momentum.moment_1", "momentum.moment_2"]),
            Kind::Other => None,
        }
    }
}

impl GroupOptimizer {
    /// Any Burn optimizer. `weight_decay` is the decoupled decay that it applies, if it does; only
    /// [`update_rms`](crate::update_rms) needs to know it, to tell the update from the decay.
    pub fn new(optimizer: impl Optimizer, weight_decay: f64) -> Self {
        Self { optimizer: Arc::new(optimizer), kind: Kind::Other, weight_decay }
    }

    /// The decoupled weight decay that the optimizer applies.
    pub fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    pub(crate) fn shared(&self) -> Shared {
        Shared(self.optimizer.clone())
    }
}

impl std::fmt::Debug for GroupOptimizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GroupOptimizer")
            .field("kind", &self.kind)
            .field("weight_decay", &self.weight_decay)
            .finish_non_exhaustive()
    }
}

impl From<MuonConfig> for GroupOptimizer {
    fn from(config: MuonConfig) -> Self {
        Self { optimizer: Arc::new(config.build()), kind: Kind::Muon, weight_decay: config.weight_decay }
    }
}

impl From<AdamWConfig> for GroupOptimizer {
    fn from(config: AdamWConfig) -> Self {
        Self { optimizer: Arc::new(config.build()), kind: Kind::AdamW, weight_decay: config.weight_decay }
    }
}

/// A shared optimizer as `ModuleOptimizer::with_group` takes one.
pub(crate) struct Shared(Arc<dyn DynOptimizer>);

impl DynOptimizer for Shared {
    fn step_dyn(
        &self,
        rank: usize,
        lr: LearningRate,
        tensor: BridgeTensor,
        grad: BridgeTensor,
        state: Option<DynState>,
    ) -> (BridgeTensor, Option<DynState>) {
        self.0.step_dyn(rank, lr, tensor, grad, state)
    }

    fn to_device_dyn(&self, state: DynState, device: &Device) -> DynState {
        self.0.to_device_dyn(state, device)
    }

    fn state_flatten(&self, prefix: &str, state: &DynState, out: &mut StateSink) {
        self.0.state_flatten(prefix, state, out);
    }

    fn state_unflatten(&self, rank: usize, prefix: &str, src: &mut StateSource, device: &Device) -> Option<DynState> {
        self.0.state_unflatten(rank, prefix, src, device)
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

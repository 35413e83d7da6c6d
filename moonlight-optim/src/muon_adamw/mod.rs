//! The optimizer of an assignment: Muon for its matrices, AdamW for the rest, on one rank or several.

mod adamw;
mod local;
mod options;
mod partition;
mod sharded;
mod state;
#[cfg(test)]
mod tests;
mod whole_matrix;
mod zero1;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::module::Module;
use burn::optim::{AdamW, AdamWState, GradientsParams};
use burn::tensor::Tensor;

use crate::distributed::{CollectiveError, Traffic, Worker};
use crate::{Adaptive, Assignment, MixedPrecision, MixedPrecisionState, Muon};
pub use options::{DistributedConfig, GatherPrecision, OptimizerError, OptimizerOptions};
pub use partition::DistributedForm;
use partition::{Bucket, partition};
pub(crate) use partition::{By, Target, targets};
use sharded::Reduction;

/// The state of a segment of a parameter, its elements in a row.
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "handles of tensors are large, and there are a few for each parameter")]
enum Held {
    Muon {
        momentum: Tensor<1>,
        /// `[matrices, ...]`.
        second_moment: Option<Tensor<3>>,
        step: usize,
        master: Option<Tensor<1>>,
    },
    AdamW(MixedPrecisionState<AdamWState<1>, 1>),
}

/// An optimizer, and the factor on the learning rate of its group.
#[derive(Clone, Debug)]
struct Group<O> {
    optimizer: O,
    learning_rate_factor: f64,
}

/// Muon and AdamW for a whole module, with the parameter groups of an [`Assignment`]: made by [`Assignment::build`] and
/// [`Assignment::load`].
///
/// Equal matrices are stepped together, in one Newton-Schulz, bit for bit as one by one.
///
/// # Ranks
///
/// One rank is the ordinary case: it holds everything, nothing is communicated, and a parameter without a gradient stays
/// as it is, so that a step can also be taken in parts, with a layer's gradients at a time.
///
/// With several ranks ([`OptimizerOptions::with_worker`]) all hold the whole module and see different data; the gradient of
/// a step is the sum over the ranks. Each rank keeps the state of a part of the parameters, updates these, and all gather
/// the result: "Muon is Scalable for LLM Training" (arXiv 2502.16982), section 2.3 and Algorithm 1; see
/// [`DistributedForm`]. A parameter to which a rank has no gradient counts as one with a gradient of zeros there.
///
/// [`DistributedForm::Flat`] divides alike on one rank and on several, and rounds alike: it treats missing gradients as
/// zeros on one rank, too.
///
/// # A step in parts
///
/// [`step`](Self::step) is all of it. To clip by the global norm, or to reduce gradients while the backward pass is still
/// running: [`offer`](Self::offer) takes gradients as they are made, [`squares`](Self::squares) is this rank's share of
/// the squared norm, and [`apply`](Self::apply) updates.
///
/// # State
///
/// [`save`](Self::save) writes a rank's part of the state to a file; the files of all ranks together are the state, and
/// any number of ranks can load them, in either form.
pub struct MuonAdamW {
    worker: Worker,
    config: DistributedConfig,
    /// In the module's order.
    targets: Vec<Target>,
    by_path: HashMap<String, usize>,
    muon: Vec<Group<Muon>>,
    adamw: Vec<Group<MixedPrecision<AdamW>>>,
    buckets: Vec<Bucket>,
    /// By target and first element.
    states: BTreeMap<(usize, usize), Held>,
    /// One rank: the gradients that were offered.
    offered: GradientsParams,
    /// Several ranks: the gradients that wait for the others of their bucket.
    arrived: HashMap<usize, Tensor<1>>,
    /// Several ranks: the sums, by bucket.
    reductions: Vec<Reduction>,
}

impl std::fmt::Debug for MuonAdamW {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MuonAdamW")
            .field("worker", &self.worker)
            .field("config", &self.config)
            .field("parameters", &self.targets.len())
            .finish_non_exhaustive()
    }
}

impl Assignment {
    /// The optimizer of the module that the rules were assigned to, without any state.
    ///
    /// # Errors
    ///
    /// [`OptimizerError`], for groups that are neither Muon nor AdamW and settings that cannot be divided.
    pub fn build(&self, options: OptimizerOptions) -> Result<MuonAdamW, OptimizerError> {
        let OptimizerOptions { worker, distributed: config } = options;
        let (targets, optimizers) = targets(self);
        if let Some(other) = targets.iter().find(|target| matches!(target.by, By::Other)) {
            return Err(OptimizerError::UnknownOptimizer { group: other.group.clone() });
        }
        let adaptive = optimizers.muon.iter().any(|(muon, _)| muon.adaptive != Adaptive::Off);
        if adaptive && config.form == DistributedForm::Flat {
            return Err(OptimizerError::AdaptiveParts);
        }
        let buckets = partition(&targets, &optimizers, config.form, worker.size(), config.bucket_elements);
        let muon = optimizers.muon.iter().map(|(muon, factor)| Group::new(muon.build(), *factor));
        let adamw = optimizers.adamw.iter().map(|(adamw, factor)| Group::new(adamw.build(), *factor));
        Ok(MuonAdamW {
            by_path: targets.iter().enumerate().map(|(index, target)| (target.path.clone(), index)).collect(),
            muon: muon.collect(),
            adamw: adamw.collect(),
            reductions: buckets.iter().map(|_| Reduction::Open).collect(),
            offered: GradientsParams::new(),
            arrived: HashMap::new(),
            states: BTreeMap::new(),
            worker,
            config,
            targets,
            buckets,
        })
    }

    /// [`Assignment::build`] with the state in `files`, bit for bit, matched by parameter path: the files that the ranks of
    /// a [`MuonAdamW`] saved, of any number and in either form, or the one that Burn's `ModuleOptimizer::save` wrote. Each
    /// rank reads its own part of them.
    ///
    /// A parameter without an entry starts without state, as one that had no gradient before the save.
    ///
    /// # Errors
    ///
    /// [`OptimizerError`].
    pub fn load<P: AsRef<Path>>(&self, files: &[P], options: OptimizerOptions) -> Result<MuonAdamW, OptimizerError> {
        let mut optimizer = self.build(options)?;
        optimizer.restore(files)?;
        Ok(optimizer)
    }
}

impl<O> Group<O> {
    fn new(optimizer: O, learning_rate_factor: f64) -> Self {
        Self { optimizer, learning_rate_factor }
    }
}

impl MuonAdamW {
    /// The rank, and its process group.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// Bytes that this rank has sent so far.
    pub fn traffic(&self) -> Traffic {
        self.worker.traffic()
    }

    /// Whether parameters without a gradient stay as they are, so that a step can be taken with some parameters' gradients
    /// at a time: on one rank with whole matrices.
    pub fn takes_partial_steps(&self) -> bool {
        self.worker.size() == 1 && self.config.form == DistributedForm::WholeMatrix
    }

    /// A step with learning rate `lr`, by the gradients; with several ranks, by the sum of theirs.
    ///
    /// On one rank there are never two copies of more than a batch of parameters, if the caller keeps none.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`], with several ranks; the module is lost.
    ///
    /// # Panics
    ///
    /// If the module is not the one that the rules were assigned to.
    pub fn step<M: Module>(&mut self, lr: f64, module: M, gradients: GradientsParams) -> Result<M, CollectiveError> {
        self.offer(&module, gradients);
        self.apply(lr, 1.0, module)
    }

    /// Takes the gradients of some parameters, complete as far as this rank is concerned. With several ranks a bucket of
    /// which all have come is reduced at once, in the background.
    pub fn offer<M: Module>(&mut self, module: &M, gradients: GradientsParams) {
        if self.takes_partial_steps() {
            self.offer_local(module, gradients);
        } else {
            self.offer_sharded(module, gradients);
        }
    }

    /// The sum of the squares of this rank's part of the gradient, in f64; over all ranks, the square of its norm. Waits
    /// for the reduction of all gradients.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`], with several ranks.
    pub fn squares<M: Module>(&mut self, module: &M) -> Result<f64, CollectiveError> {
        if self.takes_partial_steps() { Ok(self.squares_local(module)) } else { self.squares_sharded(module) }
    }

    /// Updates the module by the gradients that were offered, times `scale`.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`], with several ranks; the module is lost.
    ///
    /// # Panics
    ///
    /// As [`MuonAdamW::step`].
    pub fn apply<M: Module>(&mut self, lr: f64, scale: f64, module: M) -> Result<M, CollectiveError> {
        if self.takes_partial_steps() {
            Ok(self.apply_local(lr, scale, module))
        } else {
            self.apply_sharded(lr, scale, module)
        }
    }
}

/// A gradient times the factor of a step.
fn scaled<const D: usize>(gradient: Tensor<D>, scale: f64) -> Tensor<D> {
    if scale == 1.0 { gradient } else { gradient.mul_scalar(scale) }
}

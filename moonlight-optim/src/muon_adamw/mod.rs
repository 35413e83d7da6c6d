//! The optimizer of a whole module: Muon for its matrices, AdamW for the rest, on one rank or several.

mod adamw;
mod flat;
mod local;
mod options;
mod partition;
mod sharded;
mod state;
#[cfg(test)]
mod tests;
mod whole_matrix;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::module::Module;
use burn::optim::{AdamW, AdamWState, GradientsParams};
use burn::tensor::Tensor;

use crate::distributed::{BytesSent, CollectiveError, Communicator};
use crate::{Adaptive, Assignment, MixedPrecision, MixedPrecisionState, Muon};
pub use options::{DistributedConfig, GatherPrecision, OptimizerError, OptimizerOptions};
pub use partition::DistributedForm;
use partition::{Bucket, partition};
pub(crate) use partition::{OptimizedParameter, OptimizerKind, optimized_parameters};
use sharded::Reduction;

/// The optimizer state of a segment of a parameter: flat tensors with as many elements as the segment.
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "tensor handles are large, and there are only a few for each parameter")]
enum SegmentState {
    Muon {
        momentum: Tensor<1>,
        /// `[matrices, ...]`; see [`MuonState::second_moment`](crate::MuonState::second_moment).
        second_moment: Option<Tensor<3>>,
        step: usize,
        master: Option<Tensor<1>>,
    },
    AdamW(MixedPrecisionState<AdamWState<1>, 1>),
}

/// The optimizer of a parameter group, and the group's factor on the learning rate.
#[derive(Clone, Debug)]
struct Group<O> {
    optimizer: O,
    learning_rate_factor: f64,
}

/// Muon and AdamW for a whole module, with the parameter groups of an [`Assignment`]. Created by [`Assignment::build`], or by
/// [`Assignment::load`] to resume.
///
/// Matrices of equal shape are stepped together in one batched Newton-Schulz, which gives the same bits as one by one.
///
/// ```
/// # use burn::nn::{Linear, LinearConfig};
/// # use burn::optim::GradientsParams;
/// # use burn::tensor::{Device, Tensor};
/// use moonlight_optim::{AdamWConfig, MuonConfig, OptimizerOptions, ParameterRules};
/// # let device = Device::default().autodiff();
/// # let mut model: Linear = LinearConfig::new(8, 16).init(&device);
/// # let loss = |model: &Linear| model.forward(Tensor::<2>::ones([2, 8], &device)).square().mean();
///
/// let rules = ParameterRules::muon_except(Vec::<String>::new(), MuonConfig::new(), AdamWConfig::new());
/// let mut optimizer = rules.assign(&model)?.build(OptimizerOptions::new())?;
/// let gradients = GradientsParams::from_grads(loss(&model).backward(), &model);
///
/// // One call: `model = optimizer.step(3e-4, model, gradients)?`. With gradient clipping to a norm of 1:
/// optimizer.add_gradients(&model, gradients);
/// let norm = optimizer.local_sum_of_squares(&model)?.sqrt(); // of one rank; see below for several
/// model = optimizer.apply(3e-4, (1.0 / norm).min(1.0), model)?;
/// # let _ = model;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Ranks
///
/// One rank is the ordinary case: it holds all state, nothing is communicated, and a parameter without a gradient is left
/// unchanged. A step can therefore also be taken in parts, with one layer's gradients at a time.
///
/// With several ranks ([`OptimizerOptions::with_communicator`]) each holds the whole module and sees different data; the
/// gradient of a step is the sum over the ranks. Each rank keeps the state of a part of the parameters and updates these;
/// then all ranks gather the result ("Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.3 and Algorithm 1; see
/// [`DistributedForm`]). A missing gradient of a rank counts as zeros.
///
/// With [`DistributedForm::Flat`], one rank rounds, and fills in zeros, as several do, so that the world size does not change
/// the result.
///
/// # A step in parts
///
/// [`step`](Self::step) is the whole step. Take it in parts to clip by the global norm, or to reduce gradients while the
/// backward pass is still running: [`add_gradients`](Self::add_gradients) takes gradients as they are computed,
/// [`local_sum_of_squares`](Self::local_sum_of_squares) is this rank's share of the squared norm, and
/// [`apply`](Self::apply) updates the module.
///
/// # State
///
/// [`save`](Self::save) writes a rank's part of the state to a file. The files of all ranks together are the state. Any number
/// of ranks can load them, in either form.
pub struct MuonAdamW {
    communicator: Communicator,
    config: DistributedConfig,
    /// In the module's order.
    parameters: Vec<OptimizedParameter>,
    /// The index in `parameters` of each path.
    by_path: HashMap<String, usize>,
    muon: Vec<Group<Muon>>,
    adamw: Vec<Group<MixedPrecision<AdamW>>>,
    buckets: Vec<Bucket>,
    /// By index of the parameter and first element of the segment.
    states: BTreeMap<(usize, usize), SegmentState>,
    /// One rank: the gradients added since the last step.
    gradients: GradientsParams,
    /// Several ranks: the gradients that wait for the rest of their bucket, by parameter.
    waiting: HashMap<usize, Tensor<1>>,
    /// Several ranks: the sums, by bucket.
    reductions: Vec<Reduction>,
}

impl std::fmt::Debug for MuonAdamW {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MuonAdamW")
            .field("communicator", &self.communicator)
            .field("config", &self.config)
            .field("parameters", &self.parameters.len())
            .finish_non_exhaustive()
    }
}

impl Assignment {
    /// The optimizer of the module that the rules were assigned to, without state.
    ///
    /// # Errors
    ///
    /// [`OptimizerError`], for a group that is neither Muon nor AdamW, and for [`Adaptive`] variants with
    /// [`DistributedForm::Flat`].
    pub fn build(&self, options: OptimizerOptions) -> Result<MuonAdamW, OptimizerError> {
        let OptimizerOptions { communicator, distributed: config } = options;
        let (parameters, optimizers) = optimized_parameters(self);
        if let Some(other) = parameters.iter().find(|parameter| matches!(parameter.kind, OptimizerKind::Other)) {
            return Err(OptimizerError::UnknownOptimizer { group: other.group.clone() });
        }
        // NorMuon averages over whole rows or columns, and both variants rescale by the norm of the whole update: a rank that
        // keeps a part of a matrix could do neither.
        let adaptive = optimizers.muon.iter().any(|(muon, _)| muon.adaptive != Adaptive::Off);
        if adaptive && config.form == DistributedForm::Flat {
            return Err(OptimizerError::AdaptiveNeedsWholeMatrices);
        }
        let buckets = partition(&parameters, &optimizers, config.form, communicator.size(), config.bucket_elements);
        let muon = optimizers.muon.iter().map(|(muon, factor)| Group::new(muon.build(), *factor));
        let adamw = optimizers.adamw.iter().map(|(adamw, factor)| Group::new(adamw.build(), *factor));
        Ok(MuonAdamW {
            by_path: parameters.iter().enumerate().map(|(index, parameter)| (parameter.path.clone(), index)).collect(),
            muon: muon.collect(),
            adamw: adamw.collect(),
            reductions: buckets.iter().map(|_| Reduction::Open).collect(),
            gradients: GradientsParams::new(),
            waiting: HashMap::new(),
            states: BTreeMap::new(),
            communicator,
            config,
            parameters,
            buckets,
        })
    }

    /// As [`Assignment::build`], with the state in `files`, bit for bit. States are matched by parameter path, since Burn's
    /// `ParamId`s differ in every process.
    ///
    /// `files` is either the files of all ranks of a [`MuonAdamW`], saved with any world size and form, or the one file that
    /// Burn's `ModuleOptimizer::save` wrote. Each rank reads its own part of them. A parameter without an entry starts without
    /// state: it had no gradient before the save.
    ///
    /// # Errors
    ///
    /// [`OptimizerError`]; [`StateError`](crate::StateError) for files that cannot be read or do not fit the module.
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
    /// This rank's handle on its process group.
    pub fn communicator(&self) -> &Communicator {
        &self.communicator
    }

    /// What this rank has sent so far.
    pub fn bytes_sent(&self) -> BytesSent {
        self.communicator.bytes_sent()
    }

    /// Whether a parameter without a gradient is left unchanged, so that a step can be taken with the gradients of some
    /// parameters at a time. True on one rank with whole matrices.
    pub fn supports_partial_steps(&self) -> bool {
        self.communicator.size() == 1 && self.config.form == DistributedForm::WholeMatrix
    }

    /// A step with learning rate `lr`, from these gradients; with several ranks, from the sum over the ranks.
    ///
    /// On one rank only one batch of parameters exists twice at a time, unless the caller keeps a copy of the module: see
    /// [`step_batches`](crate::memory::step_batches).
    ///
    /// # Errors
    ///
    /// [`CollectiveError`], with several ranks. The module is lost then.
    ///
    /// # Panics
    ///
    /// If the module is not the one that the rules were assigned to.
    pub fn step<M: Module>(&mut self, lr: f64, module: M, gradients: GradientsParams) -> Result<M, CollectiveError> {
        self.add_gradients(&module, gradients);
        self.apply(lr, 1.0, module)
    }

    /// Adds gradients of this step, each already summed over this rank's micro-batches. With several ranks, the reduction of a
    /// bucket starts in the background as soon as its gradients and those of all buckets before it are complete.
    pub fn add_gradients<M: Module>(&mut self, module: &M, gradients: GradientsParams) {
        if self.supports_partial_steps() {
            self.add_gradients_local(module, gradients);
        } else {
            self.add_gradients_sharded(module, gradients);
        }
    }

    /// The sum of the squares of the gradients that this rank owns, in f64. The sum over all ranks is the square of the
    /// gradient's norm. Waits until all gradients are reduced.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`], with several ranks.
    pub fn local_sum_of_squares<M: Module>(&mut self, module: &M) -> Result<f64, CollectiveError> {
        if self.supports_partial_steps() {
            Ok(self.sum_of_squares_local(module))
        } else {
            self.sum_of_squares_sharded(module)
        }
    }

    /// Updates the module by the gradients added since the last step, times `scale` (1, or the factor that clips them).
    ///
    /// # Errors
    ///
    /// [`CollectiveError`], with several ranks. The module is lost then.
    ///
    /// # Panics
    ///
    /// As [`MuonAdamW::step`].
    pub fn apply<M: Module>(&mut self, lr: f64, scale: f64, module: M) -> Result<M, CollectiveError> {
        if self.supports_partial_steps() {
            Ok(self.apply_local(lr, scale, module))
        } else {
            self.apply_sharded(lr, scale, module)
        }
    }
}

/// A gradient times the step's factor. A factor of 1 is left out: it would copy the gradient.
fn scaled<const D: usize>(gradient: Tensor<D>, scale: f64) -> Tensor<D> {
    if scale == 1.0 { gradient } else { gradient.mul_scalar(scale) }
}

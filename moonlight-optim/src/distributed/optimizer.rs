//! The optimizer of a worker.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use burn::config::Config;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::{AdamW, AdamWState, AdaptiveMomentumState, GradientsParams, Optimizer};
use burn::tensor::{DType, Device, Shape, Tensor, TensorData};
use burn_pack::Scalar;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::partition::{Bucket, By, Optimizers, Segment, Target, holders, partition, targets};
use super::sharded_state::{PartToSave, Piece, collect, write_parts};
use super::{CollectiveError, DistributedForm, Pending, Worker, sum_of_squares};
use crate::batched::in_place_of;
use crate::{Adaptive, Assignment, MixedPrecision, MixedPrecisionState, Muon, StateError};

/// The type in which momentum is gathered for [`DistributedForm::Flat`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum GatherPrecision {
    /// The report's. Every matrix is rounded, on however many workers it lies, so that their number changes nothing.
    #[default]
    Bf16,
    /// Twice the bytes, and the update of a single worker.
    F32,
}

/// How an optimizer is distributed over the ranks of a process group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct DistributedConfig {
    /// How Muon's work and state are divided: `whole-matrix` or `flat`. Default: `whole-matrix`.
    pub form: DistributedForm,
    /// The type of the momentum that `flat` gathers: `bf16` or `f32`. Default: `bf16`.
    #[serde(rename = "gather_dtype")]
    pub gather: GatherPrecision,
    /// Elements of a gradient bucket: it is reduced as soon as all of its gradients exist. Default: 2^22.
    pub bucket_elements: usize,
}

impl Default for DistributedConfig {
    fn default() -> Self {
        Self { form: DistributedForm::default(), gather: GatherPrecision::default(), bucket_elements: 1 << 22 }
    }
}

/// [`Config::save`] and [`Config::load`]; unlike a derived config's, a file may leave out any field.
impl Config for DistributedConfig {}

impl DistributedConfig {
    /// Whole matrices.
    pub fn new() -> Self {
        Self::default()
    }

    crate::setters::setters! {
        with_form(form: DistributedForm);
        with_gather(gather: GatherPrecision);
        with_bucket_elements(bucket_elements: usize);
    }
}

/// Why an optimizer cannot be distributed, or a distributed one did not come through.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DistributedError {
    /// A group with an optimizer of which nothing is known.
    #[error("the group `{group}` has an optimizer that is neither Muon nor AdamW: it is not known how to divide it")]
    UnknownOptimizer {
        /// Its name.
        group: String,
    },
    /// Second moments of whole updates, on parts of matrices.
    #[error("the flat form has parts of matrices, and `adaptive` needs second moments of whole ones")]
    AdaptiveParts,
    /// Workers.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// Saved state.
    #[error(transparent)]
    State(#[from] StateError),
}

/// The state of a stretch of a parameter.
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "handles of tensors are large, and there are a few for each parameter")]
pub(super) enum Held {
    Muon {
        momentum: Tensor<1>,
        /// `[matrices, ...]`.
        second_moment: Option<Tensor<3>>,
        step: usize,
        master: Option<Tensor<1>>,
    },
    AdamW(MixedPrecisionState<AdamWState<1>, 1>),
}

/// A stretch of a parameter that this worker updates.
pub(super) struct Work {
    /// Its bucket, and its place among the worker's segments there.
    pub(super) bucket: usize,
    pub(super) segment: Segment,
    pub(super) value: Tensor<1>,
    pub(super) gradient: Tensor<1>,
}

/// The gradients of a bucket.
#[derive(Debug)]
enum Reduction {
    /// Not all are there.
    Open,
    Running(Box<Pending<Tensor<1>>>),
    /// The sums of this worker's segments.
    Done(Vec<Tensor<1>>),
}

/// The optimizer of one worker for a module that all workers hold: made by [`Assignment::distributed_optimizer`].
///
/// A step is [`step`](Self::step), or in its parts: [`offer`](Self::offer) takes gradients as a backward pass makes them,
/// [`squares`](Self::squares) says how long this worker's part of their sum is, and [`apply`](Self::apply) updates.
///
/// A parameter to which this worker has no gradient counts as one with a gradient of zeros.
pub struct DistributedOptimizer {
    pub(super) worker: Worker,
    pub(super) config: DistributedConfig,
    pub(super) targets: Vec<Target>,
    by_path: HashMap<String, usize>,
    pub(super) optimizers: Optimizers,
    pub(super) muon: Vec<Muon>,
    adamw: Vec<MixedPrecision<AdamW>>,
    pub(super) buckets: Vec<Bucket>,
    /// By target and first element.
    pub(super) states: BTreeMap<(usize, usize), Held>,
    /// Gradients that wait for their bucket.
    arrived: HashMap<usize, Tensor<1>>,
    reductions: Vec<Reduction>,
}

impl std::fmt::Debug for DistributedOptimizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DistributedOptimizer")
            .field("worker", &self.worker)
            .field("config", &self.config)
            .field("parameters", &self.targets.len())
            .finish_non_exhaustive()
    }
}

impl Assignment {
    /// The optimizer of one worker, without any state.
    ///
    /// # Errors
    ///
    /// [`DistributedError`], for settings that cannot be divided.
    pub fn distributed_optimizer(
        &self,
        worker: Worker,
        config: DistributedConfig,
    ) -> Result<DistributedOptimizer, DistributedError> {
        let (targets, optimizers) = targets(self).map_err(|group| DistributedError::UnknownOptimizer { group })?;
        let adaptive = optimizers.muon.iter().any(|(muon, _)| muon.adaptive != Adaptive::Off);
        if adaptive && config.form == DistributedForm::Flat {
            return Err(DistributedError::AdaptiveParts);
        }
        let buckets = partition(&targets, &optimizers, config.form, worker.size(), config.bucket_elements);
        Ok(DistributedOptimizer {
            by_path: targets.iter().enumerate().map(|(index, target)| (target.path.clone(), index)).collect(),
            muon: optimizers.muon.iter().map(|(muon, _)| muon.build()).collect(),
            adamw: optimizers.adamw.iter().map(|(adamw, _)| adamw.build()).collect(),
            reductions: buckets.iter().map(|_| Reduction::Open).collect(),
            arrived: HashMap::new(),
            states: BTreeMap::new(),
            worker,
            config,
            targets,
            optimizers,
            buckets,
        })
    }

    /// [`Assignment::distributed_optimizer`] with this worker's part of the state in `files`: those of any number of
    /// workers, in either form, or the one of a single optimizer. Every value bit for bit.
    ///
    /// # Errors
    ///
    /// [`DistributedError`].
    pub fn load_distributed_optimizer(
        &self,
        worker: Worker,
        config: DistributedConfig,
        files: &[PathBuf],
    ) -> Result<DistributedOptimizer, DistributedError> {
        let mut optimizer = self.distributed_optimizer(worker, config)?;
        optimizer.load(files)?;
        Ok(optimizer)
    }
}

fn absent(target: &Target) -> ! {
    panic!("the module has no `{}`: it is not the one that the rules were assigned to", target.path);
}

/// A parameter of the module as it is.
struct Seen {
    id: ParamId,
    dtype: DType,
    device: Device,
    /// Its values end to end, where this worker owns some.
    value: Option<Tensor<1>>,
}

impl DistributedOptimizer {
    /// The worker.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// A step, as `ModuleOptimizer::step`, by the sum of all workers' gradients.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`]; the module is lost.
    pub fn step<M: Module>(&mut self, lr: f64, module: M, gradients: GradientsParams) -> Result<M, CollectiveError> {
        self.offer(&module, gradients);
        self.complete(&module)?;
        self.apply(lr, 1.0, module)
    }

    /// Takes gradients of some parameters, each whole as far as this worker is concerned. Where those of a bucket are all
    /// there, they start on their way.
    pub fn offer<M: Module>(&mut self, module: &M, mut gradients: GradientsParams) {
        let mut visitor = Arriving { path: Vec::new(), optimizer: self, gradients: &mut gradients };
        module.visit(&mut visitor);
        self.start_ready();
    }

    /// Starts the buckets that are complete, in their order: all workers must.
    fn start_ready(&mut self) {
        for (bucket, reduction) in self.buckets.iter().zip(&mut self.reductions) {
            if !matches!(reduction, Reduction::Open) {
                continue;
            }
            if !bucket.targets.iter().all(|target| self.arrived.contains_key(target)) {
                return;
            }
            let gradients: HashMap<usize, Tensor<1>> =
                bucket.targets.iter().filter_map(|&target| self.arrived.remove_entry(&target)).collect();
            let segment =
                |segment: &Segment| gradients[&segment.target].clone().narrow(0, segment.start, segment.len());
            if self.worker.size() == 1 {
                let own = bucket.parts[0].iter().map(|part| segment(part).cast(DType::F32));
                *reduction = Reduction::Done(own.collect());
                continue;
            }
            let device = gradients.values().next().map(Tensor::device).unwrap_or_default();
            // Gradients of a bucket that are not of one type travel as f32.
            let mut types = gradients.values().map(Tensor::dtype);
            let first = types.next().unwrap_or(DType::F32);
            let dtype = if types.all(|dtype| dtype == first) { first } else { DType::F32 };
            let parts: Vec<Tensor<1>> = bucket
                .parts
                .iter()
                .map(|segments| match segments.as_slice() {
                    [] => Tensor::empty([0], (&device, dtype)),
                    segments => Tensor::cat(segments.iter().map(|part| segment(part).cast(dtype)).collect(), 0),
                })
                .collect();
            let pending = self.worker.start(move |collective| collective.reduce_scatter(parts));
            *reduction = Reduction::Running(Box::new(pending));
        }
    }

    /// Waits until the sums of all gradients are there.
    fn complete<M: Module>(&mut self, module: &M) -> Result<(), CollectiveError> {
        if self.reductions.iter().any(|reduction| matches!(reduction, Reduction::Open)) {
            for (index, seen) in self.look(module).into_iter().enumerate() {
                let open =
                    self.buckets.iter().zip(&self.reductions).any(|(bucket, reduction)| {
                        matches!(reduction, Reduction::Open) && bucket.targets.contains(&index)
                    });
                if let Some(Seen { dtype, device, .. }) = seen.filter(|_| open) {
                    let elements = self.targets[index].elements();
                    self.arrived.entry(index).or_insert_with(|| Tensor::zeros([elements], (&device, dtype)));
                }
            }
            self.start_ready();
        }
        let rank = self.worker.rank();
        for (bucket, reduction) in self.buckets.iter().zip(&mut self.reductions) {
            if !matches!(reduction, Reduction::Running(_)) {
                continue;
            }
            let Reduction::Running(pending) = std::mem::replace(reduction, Reduction::Open) else { continue };
            let sum = pending.wait()?;
            let mut start = 0;
            let own = bucket.parts[rank].iter().map(|segment| {
                let part = sum.clone().narrow(0, start, segment.len());
                start += segment.len();
                part
            });
            *reduction = Reduction::Done(own.collect());
        }
        Ok(())
    }

    /// The sum of the squares of what this worker owns of the summed gradient; over all workers, the square of its norm.
    /// Waits for all gradients.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    pub fn squares<M: Module>(&mut self, module: &M) -> Result<f64, CollectiveError> {
        self.complete(module)?;
        let own = self.reductions.iter().filter_map(|reduction| match reduction {
            Reduction::Done(gradients) => Some(gradients),
            _ => None,
        });
        Ok(own.flatten().map(|gradient| sum_of_squares(gradient.clone())).sum())
    }

    /// Updates the module by the gradients that were offered, times `scale`.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`]; the module is lost.
    pub fn apply<M: Module>(&mut self, lr: f64, scale: f64, module: M) -> Result<M, CollectiveError> {
        self.complete(&module)?;
        let seen = self.look(&module);
        let rank = self.worker.rank();
        let mut works = Vec::new();
        for (index, (bucket, reduction)) in self.buckets.iter().zip(&mut self.reductions).enumerate() {
            let Reduction::Done(gradients) = std::mem::replace(reduction, Reduction::Open) else { continue };
            for (&segment, gradient) in bucket.parts[rank].iter().zip(gradients) {
                let value = seen[segment.target].as_ref().and_then(|seen| seen.value.clone());
                let value = value.unwrap_or_else(|| absent(&self.targets[segment.target]));
                let value = value.narrow(0, segment.start, segment.len());
                let gradient = if scale == 1.0 { gradient } else { gradient.mul_scalar(scale) };
                works.push(Work { bucket: index, segment, value, gradient });
            }
        }
        let segments: Vec<(usize, Segment)> = works.iter().map(|work| (work.bucket, work.segment)).collect();
        let updated = self.update(lr, works)?;
        let mut own: Vec<Vec<Tensor<1>>> = self.buckets.iter().map(|_| Vec::new()).collect();
        for ((bucket, _), values) in segments.into_iter().zip(updated) {
            own[bucket].push(values);
        }
        let ids: Vec<Option<(ParamId, DType, Device)>> =
            seen.into_iter().map(|seen| seen.map(|seen| (seen.id, seen.dtype, seen.device))).collect();
        self.gather(module, own, &ids)
    }

    /// The new values of each of this worker's stretches.
    fn update(&mut self, lr: f64, works: Vec<Work>) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let mut results: Vec<Option<Tensor<1>>> = works.iter().map(|_| None).collect();
        let mut matrices = Vec::new();
        for (place, work) in works.into_iter().enumerate() {
            match self.targets[work.segment.target].by {
                By::Muon { .. } => matrices.push((place, work)),
                By::AdamW { optimizer } => results[place] = Some(self.step_adamw(optimizer, lr, work)),
            }
        }
        let updated = match self.config.form {
            DistributedForm::WholeMatrix => self.step_whole(lr, matrices),
            DistributedForm::Flat => self.step_flat(lr, matrices)?,
        };
        for (place, values) in updated {
            results[place] = Some(values);
        }
        Ok(results.into_iter().flatten().collect())
    }

    fn step_adamw(&mut self, optimizer: usize, lr: f64, work: Work) -> Tensor<1> {
        let factor = self.optimizers.adamw[optimizer].1;
        let adamw = &self.adamw[optimizer];
        let key = (work.segment.target, work.segment.start);
        let state = match self.states.remove(&key) {
            Some(Held::AdamW(state)) => Some(MixedPrecision::<AdamW>::to_device(state, &work.value.device())),
            _ => None,
        };
        let (values, state) = adamw.step(lr * factor, work.value, work.gradient, state);
        if let Some(state) = state {
            self.states.insert(key, Held::AdamW(state));
        }
        values
    }

    /// Gathers what all workers updated, a bucket at a time, and puts it into the module.
    fn gather<M: Module>(
        &self,
        mut module: M,
        own: Vec<Vec<Tensor<1>>>,
        ids: &[Option<(ParamId, DType, Device)>],
    ) -> Result<M, CollectiveError> {
        let alone = self.worker.size() == 1;
        let mut running = Vec::with_capacity(own.len());
        for (bucket, own) in self.buckets.iter().zip(own) {
            if alone {
                running.push((bucket, None, own));
                continue;
            }
            let dtype = self.bucket_dtype(bucket, ids);
            let part = match own.as_slice() {
                [] => {
                    let device = bucket.targets.iter().find_map(|&target| ids[target].as_ref().map(|seen| &seen.2));
                    Tensor::empty([0], (&device.cloned().unwrap_or_default(), dtype))
                }
                _ => Tensor::cat(own.into_iter().map(|values| values.cast(dtype)).collect(), 0),
            };
            let lengths = bucket.lengths();
            let pending = self.worker.start(move |collective| collective.all_gather(part, &lengths));
            running.push((bucket, Some(pending), Vec::new()));
        }
        for (bucket, pending, own) in running {
            let mut segments: Vec<(Segment, Tensor<1>)> = match pending {
                None => bucket.parts[0].iter().copied().zip(own).collect(),
                Some(pending) => {
                    let mut all = Vec::new();
                    for (segments, part) in bucket.parts.iter().zip(pending.wait()?) {
                        let mut start = 0;
                        for &segment in segments {
                            all.push((segment, part.clone().narrow(0, start, segment.len())));
                            start += segment.len();
                        }
                    }
                    all
                }
            };
            segments.sort_by_key(|(segment, _)| (segment.target, segment.start));
            let mut new = HashMap::new();
            let mut segments = segments.into_iter().peekable();
            while let Some((segment, first)) = segments.next() {
                let mut parts = vec![first];
                while let Some((_, next)) = segments.next_if(|(next, _)| next.target == segment.target) {
                    parts.push(next);
                }
                let values = if parts.len() == 1 { parts.swap_remove(0) } else { Tensor::cat(parts, 0) };
                if let Some((id, dtype, _)) = &ids[segment.target] {
                    let shape = Shape::from(self.targets[segment.target].shape.clone());
                    new.insert(*id, (shape, values.cast(*dtype)));
                }
            }
            module = module.map(&mut Replacer(new));
        }
        Ok(module)
    }

    /// The type in which a bucket's parameters travel: theirs, or f32 where they have several.
    fn bucket_dtype(&self, bucket: &Bucket, ids: &[Option<(ParamId, DType, Device)>]) -> DType {
        let mut types = bucket.targets.iter().filter_map(|&target| ids[target].as_ref().map(|seen| seen.1));
        let first = types.next().unwrap_or(DType::F32);
        if types.all(|dtype| dtype == first) { first } else { DType::F32 }
    }

    /// The parameters of the module, by target.
    fn look<M: Module>(&self, module: &M) -> Vec<Option<Seen>> {
        let rank = self.worker.rank();
        let mut owned = vec![false; self.targets.len()];
        for segment in self.buckets.iter().flat_map(|bucket| &bucket.parts[rank]) {
            owned[segment.target] = true;
        }
        let seen = self.targets.iter().map(|_| None).collect();
        let mut looking = Looking { path: Vec::new(), by_path: &self.by_path, owned: &owned, seen };
        module.visit(&mut looking);
        looking.seen
    }

    /// Bytes of this worker's optimizer state, and those of Muon's momentum among them.
    pub fn state_bytes(&self) -> (u64, u64) {
        let bytes = |tensor: &Tensor<1>| (tensor.dims()[0] * tensor.dtype().size()) as u64;
        let (mut all, mut momenta) = (0, 0);
        for held in self.states.values() {
            match held {
                Held::Muon { momentum, second_moment, master, .. } => {
                    momenta += bytes(momentum);
                    all += bytes(momentum) + master.as_ref().map_or(0, bytes);
                    all += second_moment
                        .as_ref()
                        .map_or(0, |second| (second.shape().num_elements() * second.dtype().size()) as u64);
                }
                Held::AdamW(state) => {
                    all += state.master.as_ref().map_or(0, bytes);
                    if let Some(AdamWState { momentum }) = &state.inner {
                        all += bytes(&momentum.moment_1) + bytes(&momentum.moment_2);
                    }
                }
            }
        }
        (all, momenta)
    }

    /// The bytes that a worker sends in a step, in the mean over the workers, by the shapes alone: gradients, momentum,
    /// parameters. With `b` bytes a gradient and a parameter each, the first and the last are `b P (N - 1) / N` of `P`
    /// parameters; the second is none for whole matrices, and for the flat form the bytes of each part of a matrix times
    /// the other workers that hold parts of it.
    pub fn traffic_by_formula<M: Module>(&self, module: &M) -> [f64; 3] {
        let seen = self.look(module);
        let ids: Vec<_> = seen.into_iter().map(|seen| seen.map(|seen| (seen.id, seen.dtype, seen.device))).collect();
        let workers = self.worker.size() as f64;
        let (mut values, mut momentum) = (0.0, 0.0);
        for bucket in &self.buckets {
            let elements: usize = bucket.targets.iter().map(|&target| self.targets[target].elements()).sum();
            values += (elements * self.bucket_dtype(bucket, &ids).size()) as f64 * (workers - 1.0) / workers;
            if self.config.form == DistributedForm::WholeMatrix {
                continue;
            }
            for &target in &bucket.targets {
                let By::Muon { stack: [matrices, ..], .. } = self.targets[target].by else { continue };
                let unit = self.targets[target].unit();
                for matrix in 0..matrices {
                    let others = holders(bucket, target, matrix * unit, (matrix + 1) * unit).len() - 1;
                    momentum += (unit * others * self.gather_dtype().size()) as f64 / workers;
                }
            }
        }
        [values, momentum, values]
    }

    pub(super) fn gather_dtype(&self) -> DType {
        match self.config.gather {
            GatherPrecision::Bf16 => DType::BF16,
            GatherPrecision::F32 => DType::F32,
        }
    }

    /// Writes this worker's part of the state to a file of its own. The files of all workers together are the state.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), StateError> {
        let mut parts = Vec::new();
        let mut scalars = BTreeMap::new();
        for (&(target, start), held) in &self.states {
            let target = &self.targets[target];
            let path = &target.path;
            let mut push = |field: &'static str, shape: Vec<usize>, offset: usize, values: Tensor<1>| {
                parts.push(PartToSave { path: path.clone(), field, shape, offset, values });
            };
            match held {
                Held::Muon { momentum, second_moment, step, master } => {
                    push("momentum", target.shape.clone(), start, momentum.clone());
                    if let Some(master) = master {
                        push("master", target.shape.clone(), start, master.clone());
                    }
                    if let (Some(second), By::Muon { stack: [matrices, ..], .. }) = (second_moment, &target.by) {
                        let [_, rows, columns] = second.dims();
                        let offset = start / target.unit() * rows * columns;
                        let elements = second.shape().num_elements();
                        push(
                            "second_moment",
                            vec![*matrices, rows, columns],
                            offset,
                            second.clone().reshape([elements]),
                        );
                    }
                    scalars.insert((path.clone(), "step"), Scalar::from(*step));
                }
                Held::AdamW(state) => {
                    if let Some(master) = &state.master {
                        push("master", target.shape.clone(), start, master.clone());
                    }
                    if let Some(AdamWState { momentum }) = &state.inner {
                        push("momentum.moment_1", target.shape.clone(), start, momentum.moment_1.clone());
                        push("momentum.moment_2", target.shape.clone(), start, momentum.moment_2.clone());
                        scalars.insert((path.clone(), "momentum.time"), Scalar::from(momentum.time));
                    }
                }
            }
        }
        write_parts(path.as_ref(), parts, scalars)
    }

    fn load(&mut self, files: &[PathBuf]) -> Result<(), StateError> {
        let rank = self.worker.rank();
        let own = self.buckets.iter().flat_map(|bucket| &bucket.parts[rank]);
        let pieces: Vec<Piece> = own.map(|&Segment { target, start, end }| Piece { target, start, end }).collect();
        let mut collected = collect(files, &self.targets, &self.optimizers.muon, &pieces)?;
        let device = Device::default();
        let flat = |data: TensorData| {
            let dtype = data.dtype();
            Tensor::<1>::from_data(data, (&device, dtype))
        };
        for piece in pieces {
            let target = &self.targets[piece.target];
            let master = collected.take(piece, "master").map(flat);
            let held = match &target.by {
                By::Muon { optimizer, .. } => {
                    let Some(momentum) = collected.take(piece, "momentum").map(flat) else { continue };
                    let matrices = (piece.end - piece.start) / target.unit();
                    let shape = self.optimizers.muon[*optimizer].0.second_moment_shape(&target.shape);
                    let second = collected.take(piece, "second_moment").map(flat);
                    let second_moment =
                        second.zip(shape).map(|(second, [_, rows, columns])| second.reshape([matrices, rows, columns]));
                    let step = collected.number(piece.target, "step");
                    Held::Muon { momentum, second_moment, step, master }
                }
                By::AdamW { .. } => {
                    let moments = (
                        collected.take(piece, "momentum.moment_1").map(flat),
                        collected.take(piece, "momentum.moment_2").map(flat),
                    );
                    let (Some(moment_1), Some(moment_2)) = moments else { continue };
                    let time = collected.number(piece.target, "momentum.time");
                    let momentum = AdaptiveMomentumState { time, moment_1, moment_2, max_moment_2: None };
                    Held::AdamW(MixedPrecisionState { inner: Some(AdamWState { momentum }), master })
                }
            };
            self.states.insert((piece.target, piece.start), held);
        }
        Ok(())
    }
}

/// Takes the gradients of targets out of a bundle.
struct Arriving<'a> {
    path: Vec<String>,
    optimizer: &'a mut DistributedOptimizer,
    gradients: &'a mut GradientsParams,
}

impl ModuleVisitor for Arriving<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(&target) = self.optimizer.by_path.get(&self.path.join(".")) else { return };
        let Some(gradient) = self.gradients.remove::<D>(param.id) else { return };
        let elements = gradient.shape().num_elements();
        self.optimizer.arrived.insert(target, gradient.reshape([elements]));
    }
}

/// Looks up the targets in a module.
struct Looking<'a> {
    path: Vec<String>,
    by_path: &'a HashMap<String, usize>,
    owned: &'a [bool],
    seen: Vec<Option<Seen>>,
}

impl ModuleVisitor for Looking<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(&target) = self.by_path.get(&self.path.join(".")) else { return };
        let value = param.val().inner();
        let (dtype, device, elements) = (value.dtype(), value.device(), value.shape().num_elements());
        let value = self.owned[target].then(|| value.reshape([elements]));
        self.seen[target] = Some(Seen { id: param.id, dtype, device, value });
    }
}

/// Puts new values in the place of old ones.
struct Replacer(HashMap<ParamId, (Shape, Tensor<1>)>);

impl ModuleMapper for Replacer {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some((shape, values)) = self.0.remove(&param.id) else { return param };
        param.map(|old| in_place_of(&old, values.reshape(shape)))
    }
}

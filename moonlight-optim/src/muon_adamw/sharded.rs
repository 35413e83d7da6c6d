//! The step of several ranks: gradients are reduced bucket by bucket, each rank updates what it owns, and all ranks gather the
//! result.

use std::collections::HashMap;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Shape, Tensor};

use super::partition::{Bucket, DistributedForm, OptimizedParameter, OptimizerKind, Segment, holders};
use super::{GatherPrecision, MuonAdamW, scaled};
use crate::distributed::{CollectiveError, PendingCollective, SumsOfSquares};
use crate::module_values::Replacer;

/// A segment that this rank owns, with its values and its summed gradient.
pub(super) struct OwnedSegment {
    pub(super) bucket: usize,
    pub(super) segment: Segment,
    pub(super) value: Tensor<1>,
    pub(super) gradient: Tensor<1>,
}

/// The reduction of a bucket's gradients.
#[derive(Debug)]
pub(super) enum Reduction {
    /// Not started: some of the bucket's gradients are missing.
    Open,
    Running(Box<PendingCollective<Tensor<1>>>),
    /// The sums of the segments that this rank owns, in their order.
    Done(Vec<Tensor<1>>),
}

/// A parameter of the module that is being stepped.
struct ModuleParameter {
    id: ParamId,
    dtype: DType,
    device: Device,
    /// Its values, flat, if this rank owns a part of them.
    value: Option<Tensor<1>>,
}

fn refuse_missing(parameter: &OptimizedParameter) -> ! {
    panic!("the module has no `{}`: it is not the one that the rules were assigned to", parameter.path);
}

impl MuonAdamW {
    pub(super) fn add_gradients_sharded<M: Module>(&mut self, module: &M, mut gradients: GradientsParams) {
        let mut visitor = TakeGradients { path: Vec::new(), optimizer: self, gradients: &mut gradients };
        module.visit(&mut visitor);
        self.start_complete_buckets();
    }

    /// Starts the reduction of buckets that have all their gradients. It stops at the first incomplete bucket, even if a later
    /// one is complete: all ranks must start the same collectives in the same order, and gradients may be added in another
    /// order on another rank.
    fn start_complete_buckets(&mut self) {
        for (bucket, reduction) in self.buckets.iter().zip(&mut self.reductions) {
            if !matches!(reduction, Reduction::Open) {
                continue;
            }
            if !bucket.parameters.iter().all(|parameter| self.waiting.contains_key(parameter)) {
                return;
            }
            let gradients: HashMap<usize, Tensor<1>> =
                bucket.parameters.iter().filter_map(|&index| self.waiting.remove_entry(&index)).collect();
            let segment =
                |segment: &Segment| gradients[&segment.parameter].clone().narrow(0, segment.start, segment.len());
            // In f32, as a reduction would return it, so that the flat form gives the same bits on one rank.
            if self.communicator.size() == 1 {
                let own = bucket.parts[0].iter().map(|part| segment(part).cast(DType::F32));
                *reduction = Reduction::Done(own.collect());
                continue;
            }
            let device = gradients.values().next().map(Tensor::device).unwrap_or_default();
            // A message has one dtype: f32 if those of the gradients differ.
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
            let pending = self.communicator.start(move |collective| collective.reduce_scatter(parts));
            *reduction = Reduction::Running(Box::new(pending));
        }
    }

    /// Waits for the sums of all gradients. A parameter without a gradient on this rank counts as zeros: another rank may have
    /// one, so its bucket must be reduced all the same.
    fn finish_reductions<M: Module>(&mut self, module: &M) -> Result<(), CollectiveError> {
        if self.reductions.iter().any(|reduction| matches!(reduction, Reduction::Open)) {
            for (index, found) in self.read_module(module).into_iter().enumerate() {
                let open = self.buckets.iter().zip(&self.reductions).any(|(bucket, reduction)| {
                    matches!(reduction, Reduction::Open) && bucket.parameters.contains(&index)
                });
                if let Some(ModuleParameter { dtype, device, .. }) = found.filter(|_| open) {
                    let elements = self.parameters[index].elements();
                    self.waiting.entry(index).or_insert_with(|| Tensor::zeros([elements], (&device, dtype)));
                }
            }
            self.start_complete_buckets();
        }
        let rank = self.communicator.rank();
        // In the order in which they were started. A sum holds this rank's segments one after the other.
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

    pub(super) fn sum_of_squares_sharded<M: Module>(&mut self, module: &M) -> Result<f64, CollectiveError> {
        self.finish_reductions(module)?;
        let own = self.reductions.iter().filter_map(|reduction| match reduction {
            Reduction::Done(gradients) => Some(gradients),
            _ => None,
        });
        let mut sums = SumsOfSquares::default();
        own.flatten().for_each(|gradient| sums.add(gradient.clone()));
        Ok(sums.total())
    }

    pub(super) fn apply_sharded<M: Module>(&mut self, lr: f64, scale: f64, module: M) -> Result<M, CollectiveError> {
        self.finish_reductions(&module)?;
        let found = self.read_module(&module);
        let rank = self.communicator.rank();
        let mut owned = Vec::new();
        for (index, (bucket, reduction)) in self.buckets.iter().zip(&mut self.reductions).enumerate() {
            let Reduction::Done(gradients) = std::mem::replace(reduction, Reduction::Open) else { continue };
            for (&segment, gradient) in bucket.parts[rank].iter().zip(gradients) {
                let value = found[segment.parameter].as_ref().and_then(|found| found.value.clone());
                let value = value.unwrap_or_else(|| refuse_missing(&self.parameters[segment.parameter]));
                let value = value.narrow(0, segment.start, segment.len());
                owned.push(OwnedSegment { bucket: index, segment, value, gradient: scaled(gradient, scale) });
            }
        }
        let segments: Vec<(usize, Segment)> = owned.iter().map(|owned| (owned.bucket, owned.segment)).collect();
        let updated = self.update(lr, owned)?;
        let mut own: Vec<Vec<Tensor<1>>> = self.buckets.iter().map(|_| Vec::new()).collect();
        for ((bucket, _), values) in segments.into_iter().zip(updated) {
            own[bucket].push(values);
        }
        let ids: Vec<Option<(ParamId, DType, Device)>> =
            found.into_iter().map(|found| found.map(|found| (found.id, found.dtype, found.device))).collect();
        self.gather(module, own, &ids)
    }

    /// Steps the segments that this rank owns. Returns their new values in the same order.
    fn update(&mut self, lr: f64, owned: Vec<OwnedSegment>) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let mut results: Vec<Option<Tensor<1>>> = owned.iter().map(|_| None).collect();
        let mut matrices = Vec::new();
        for (index, owned) in owned.into_iter().enumerate() {
            match self.parameters[owned.segment.parameter].kind {
                OptimizerKind::Muon { .. } => matrices.push((index, owned)),
                OptimizerKind::AdamW { optimizer } => {
                    let key = (owned.segment.parameter, owned.segment.start);
                    results[index] = Some(self.step_adamw(key, optimizer, lr, owned.value, owned.gradient));
                }
                OptimizerKind::Other => {}
            }
        }
        let updated = match self.config.form {
            DistributedForm::WholeMatrix => self.step_whole(lr, matrices),
            DistributedForm::Flat => self.step_flat(lr, matrices)?,
        };
        for (index, values) in updated {
            results[index] = Some(values);
        }
        Ok(results.into_iter().flatten().collect())
    }

    /// Gathers the new values of all ranks, bucket by bucket, and puts them into the module. All gathers are started before
    /// the first is waited for, so that one runs while the values of another are copied.
    fn gather<M: Module>(
        &self,
        mut module: M,
        own: Vec<Vec<Tensor<1>>>,
        ids: &[Option<(ParamId, DType, Device)>],
    ) -> Result<M, CollectiveError> {
        let single_rank = self.communicator.size() == 1;
        let mut running = Vec::with_capacity(own.len());
        for (bucket, own) in self.buckets.iter().zip(own) {
            // The flat form on one rank: nothing to send, but the values are put into the module as below.
            if single_rank {
                running.push((bucket, None, own));
                continue;
            }
            let dtype = self.bucket_dtype(bucket, ids);
            let part = match own.as_slice() {
                [] => {
                    let device = bucket.parameters.iter().find_map(|&index| ids[index].as_ref().map(|found| &found.2));
                    Tensor::empty([0], (&device.cloned().unwrap_or_default(), dtype))
                }
                _ => Tensor::cat(own.into_iter().map(|values| values.cast(dtype)).collect(), 0),
            };
            let lengths = bucket.lengths();
            let pending = self.communicator.start(move |collective| collective.all_gather(part, &lengths));
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
            // In the order of elements: the segments of a parameter are concatenated to its values.
            segments.sort_by_key(|(segment, _)| (segment.parameter, segment.start));
            let mut new = HashMap::new();
            let mut segments = segments.into_iter().peekable();
            while let Some((segment, first)) = segments.next() {
                let mut parts = vec![first];
                while let Some((_, next)) = segments.next_if(|(next, _)| next.parameter == segment.parameter) {
                    parts.push(next);
                }
                let values = if parts.len() == 1 { parts.swap_remove(0) } else { Tensor::cat(parts, 0) };
                if let Some((id, dtype, _)) = &ids[segment.parameter] {
                    let shape = Shape::from(self.parameters[segment.parameter].shape.clone());
                    new.insert(*id, (shape, values.cast(*dtype)));
                }
            }
            module = module.map(&mut Replacer(new));
        }
        Ok(module)
    }

    /// The dtype in which a bucket's parameters are sent: their own, or f32 if their dtypes differ.
    fn bucket_dtype(&self, bucket: &Bucket, ids: &[Option<(ParamId, DType, Device)>]) -> DType {
        let mut types = bucket.parameters.iter().filter_map(|&index| ids[index].as_ref().map(|found| found.1));
        let first = types.next().unwrap_or(DType::F32);
        if types.all(|dtype| dtype == first) { first } else { DType::F32 }
    }

    /// The module's parameters, in the order of `self.parameters`.
    fn read_module<M: Module>(&self, module: &M) -> Vec<Option<ModuleParameter>> {
        let rank = self.communicator.rank();
        let mut owned = vec![false; self.parameters.len()];
        for segment in self.buckets.iter().flat_map(|bucket| &bucket.parts[rank]) {
            owned[segment.parameter] = true;
        }
        let found = self.parameters.iter().map(|_| None).collect();
        let mut visitor = ReadModule { path: Vec::new(), by_path: &self.by_path, owned: &owned, found };
        module.visit(&mut visitor);
        visitor.found
    }

    /// The bytes that a rank sends in a step, as a mean over the ranks: `[gradients, momentum, parameters]`. Predicted from the
    /// shapes.
    ///
    /// With `P` parameters of `b` bytes and `N` ranks, gradients and parameters take `b P (N - 1) / N` each. Momentum takes 0
    /// for whole matrices; for the flat form it takes the bytes of each part of a matrix times the number of other ranks that
    /// hold parts of it.
    pub fn predicted_bytes_sent<M: Module>(&self, module: &M) -> [f64; 3] {
        let found = self.read_module(module);
        let ids: Vec<_> =
            found.into_iter().map(|found| found.map(|found| (found.id, found.dtype, found.device))).collect();
        let ranks = self.communicator.size() as f64;
        let (mut values, mut momentum) = (0.0, 0.0);
        for bucket in &self.buckets {
            let elements: usize = bucket.parameters.iter().map(|&index| self.parameters[index].elements()).sum();
            values += (elements * self.bucket_dtype(bucket, &ids).size()) as f64 * (ranks - 1.0) / ranks;
            if self.config.form == DistributedForm::WholeMatrix {
                continue;
            }
            for &parameter in &bucket.parameters {
                let OptimizerKind::Muon { stack: [matrices, ..], .. } = self.parameters[parameter].kind else {
                    continue;
                };
                let unit = self.parameters[parameter].unit();
                for matrix in 0..matrices {
                    let others = holders(bucket, parameter, matrix * unit, (matrix + 1) * unit).len() - 1;
                    momentum += (unit * others * self.gather_dtype().size()) as f64 / ranks;
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
}

/// Takes the gradients of optimized parameters out of a container.
struct TakeGradients<'a> {
    path: Vec<String>,
    optimizer: &'a mut MuonAdamW,
    gradients: &'a mut GradientsParams,
}

impl ModuleVisitor for TakeGradients<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(&parameter) = self.optimizer.by_path.get(&self.path.join(".")) else { return };
        let Some(gradient) = self.gradients.remove::<D>(param.id) else { return };
        let elements = gradient.shape().num_elements();
        self.optimizer.waiting.insert(parameter, gradient.reshape([elements]));
    }
}

/// Reads the optimized parameters of a module.
struct ReadModule<'a> {
    path: Vec<String>,
    by_path: &'a HashMap<String, usize>,
    owned: &'a [bool],
    found: Vec<Option<ModuleParameter>>,
}

impl ModuleVisitor for ReadModule<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(&parameter) = self.by_path.get(&self.path.join(".")) else { return };
        let value = param.val().inner();
        let (dtype, device, elements) = (value.dtype(), value.device(), value.shape().num_elements());
        let value = self.owned[parameter].then(|| value.reshape([elements]));
        self.found[parameter] = Some(ModuleParameter { id: param.id, dtype, device, value });
    }
}

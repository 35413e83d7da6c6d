//! A step of several ranks: gradients are summed bucket by bucket, each rank updates what it owns, all gather the result.

use std::collections::HashMap;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Shape, Tensor};

use super::partition::{Bucket, By, DistributedForm, Segment, Target, holders};
use super::{GatherPrecision, MuonAdamW, scaled};
use crate::distributed::{CollectiveError, Pending, sum_of_squares};
use crate::module_values::Replacer;

/// A segment of a parameter that this rank updates.
pub(super) struct Work {
    /// Its bucket.
    pub(super) bucket: usize,
    pub(super) segment: Segment,
    pub(super) value: Tensor<1>,
    pub(super) gradient: Tensor<1>,
}

/// The gradients of a bucket.
#[derive(Debug)]
pub(super) enum Reduction {
    /// Some are missing.
    Open,
    Running(Box<Pending<Tensor<1>>>),
    /// The sums of this rank's segments.
    Done(Vec<Tensor<1>>),
}

/// A parameter of the module as it is.
struct Seen {
    id: ParamId,
    dtype: DType,
    device: Device,
    /// Its values in a row, where this rank owns some.
    value: Option<Tensor<1>>,
}

fn absent(target: &Target) -> ! {
    panic!("the module has no `{}`: it is not the one that the rules were assigned to", target.path);
}

impl MuonAdamW {
    pub(super) fn offer_sharded<M: Module>(&mut self, module: &M, mut gradients: GradientsParams) {
        let mut visitor = Arriving { path: Vec::new(), optimizer: self, gradients: &mut gradients };
        module.visit(&mut visitor);
        self.start_ready();
    }

    /// Starts the buckets that are complete, in their order: all ranks must start the same ones.
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
            // Gradients of a bucket that are not of one type are sent as f32.
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

    /// Waits for the sums of all gradients; those that no rank was offered are zeros.
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

    pub(super) fn squares_sharded<M: Module>(&mut self, module: &M) -> Result<f64, CollectiveError> {
        self.complete(module)?;
        let own = self.reductions.iter().filter_map(|reduction| match reduction {
            Reduction::Done(gradients) => Some(gradients),
            _ => None,
        });
        Ok(own.flatten().map(|gradient| sum_of_squares(gradient.clone())).sum())
    }

    pub(super) fn apply_sharded<M: Module>(&mut self, lr: f64, scale: f64, module: M) -> Result<M, CollectiveError> {
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
                works.push(Work { bucket: index, segment, value, gradient: scaled(gradient, scale) });
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

    /// The new values of each of this rank's segments.
    fn update(&mut self, lr: f64, works: Vec<Work>) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let mut results: Vec<Option<Tensor<1>>> = works.iter().map(|_| None).collect();
        let mut matrices = Vec::new();
        for (place, work) in works.into_iter().enumerate() {
            match self.targets[work.segment.target].by {
                By::Muon { .. } => matrices.push((place, work)),
                By::AdamW { optimizer } => {
                    let key = (work.segment.target, work.segment.start);
                    results[place] = Some(self.step_adamw(key, optimizer, lr, work.value, work.gradient));
                }
                By::Other => {}
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

    /// Gathers what all ranks updated, a bucket at a time, and puts it into the module.
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

    /// The type in which a bucket's parameters are sent: theirs, or f32 if they have several.
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

    /// The bytes that a rank sends in a step, in the mean over the ranks, computed from the shapes: gradients, momentum,
    /// parameters. With `b` bytes a gradient and a parameter each, the first and the last are `b P (N - 1) / N` for `P`
    /// parameters and `N` ranks; the second is 0 for whole matrices, and for the flat form the bytes of each part of a
    /// matrix times the other ranks that hold parts of it.
    pub fn traffic_by_formula<M: Module>(&self, module: &M) -> [f64; 3] {
        let seen = self.look(module);
        let ids: Vec<_> = seen.into_iter().map(|seen| seen.map(|seen| (seen.id, seen.dtype, seen.device))).collect();
        let ranks = self.worker.size() as f64;
        let (mut values, mut momentum) = (0.0, 0.0);
        for bucket in &self.buckets {
            let elements: usize = bucket.targets.iter().map(|&target| self.targets[target].elements()).sum();
            values += (elements * self.bucket_dtype(bucket, &ids).size()) as f64 * (ranks - 1.0) / ranks;
            if self.config.form == DistributedForm::WholeMatrix {
                continue;
            }
            for &target in &bucket.targets {
                let By::Muon { stack: [matrices, ..], .. } = self.targets[target].by else { continue };
                let unit = self.targets[target].unit();
                for matrix in 0..matrices {
                    let others = holders(bucket, target, matrix * unit, (matrix + 1) * unit).len() - 1;
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

/// Takes the gradients of targets out of a bundle.
struct Arriving<'a> {
    path: Vec<String>,
    optimizer: &'a mut MuonAdamW,
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

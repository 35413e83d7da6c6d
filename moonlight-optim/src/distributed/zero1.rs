//! The report's Algorithm 1, for a worker with parts of matrices.

use burn::tensor::{DType, Tensor};

use super::CollectiveError;
use super::optimizer::{DistributedOptimizer, Held, Work};
use super::partition::{By, Segment, holders};
use crate::MomentumPrecision;
use crate::batched::equal_batches;
use crate::newton_schulz::full_precision;

/// A stretch of a parameter between momentum and update.
struct Stretch {
    place: usize,
    bucket: usize,
    segment: Segment,
    optimizer: usize,
    value: Tensor<1>,
    /// The Nesterov input, as it travels.
    input: Tensor<1>,
    momentum: Tensor<1>,
    master: Option<Tensor<1>>,
    step: usize,
    /// The updates of its matrices, this worker's part of each, in order.
    updates: Vec<Tensor<1>>,
}

/// A matrix of which this worker holds a part, of the stretch `stretch`.
struct Matrix {
    stretch: usize,
    target: usize,
    optimizer: usize,
    rows: usize,
    columns: usize,
    /// The holders of its parts, in order: worker, start, end.
    holders: Vec<(usize, usize, usize)>,
    /// Its parts, as they come in.
    parts: Vec<Option<Tensor<1>>>,
}

impl DistributedOptimizer {
    /// Steps this worker's stretches; each work is known by its place.
    pub(super) fn step_flat(
        &mut self,
        lr: f64,
        works: Vec<(usize, Work)>,
    ) -> Result<Vec<(usize, Tensor<1>)>, CollectiveError> {
        let mut stretches: Vec<Stretch> =
            works.into_iter().filter_map(|(place, work)| self.momentum(place, work)).collect();
        let mut matrices = self.matrices(&stretches);
        self.exchange(&stretches, &mut matrices)?;
        self.orthogonalise(&mut stretches, matrices);
        Ok(stretches.into_iter().map(|stretch| self.finish(lr, stretch)).collect())
    }

    /// Line 2: momentum on the local part.
    fn momentum(&mut self, place: usize, work: Work) -> Option<Stretch> {
        let By::Muon { optimizer, .. } = self.targets[work.segment.target].by else { return None };
        let device = work.value.device();
        let key = (work.segment.target, work.segment.start);
        let (old, master, step) = match self.states.remove(&key) {
            Some(Held::Muon { momentum, master, step, .. }) => {
                (Some(momentum.to_device(&device)), master.map(|master| master.to_device(&device)), step)
            }
            _ => (None, None, 0),
        };
        let config = self.muon[optimizer].config();
        let mu = config.momentum_at(step);
        let gradient = work.gradient;
        let momentum = match old {
            Some(old) => old.cast(DType::F32).mul_scalar(mu).add(gradient.clone()),
            None => gradient.clone(),
        };
        let input = match config.nesterov {
            true => momentum.clone().mul_scalar(mu).add(gradient),
            false => momentum.clone(),
        };
        let momentum = match config.momentum_precision {
            MomentumPrecision::F32 => momentum,
            MomentumPrecision::Bf16 => momentum.cast(DType::BF16),
        };
        let input = input.cast(self.gather_dtype());
        let (bucket, segment, value) = (work.bucket, work.segment, work.value);
        let updates = Vec::new();
        Some(Stretch { place, bucket, segment, optimizer, value, input, momentum, master, step, updates })
    }

    /// The matrices that the stretches are parts of, in their order, with this worker's parts.
    fn matrices(&self, stretches: &[Stretch]) -> Vec<Matrix> {
        let rank = self.worker.rank();
        let mut matrices = Vec::new();
        for (index, stretch) in stretches.iter().enumerate() {
            let target = stretch.segment.target;
            let By::Muon { optimizer, stack: [_, rows, columns] } = self.targets[target].by else { continue };
            let unit = rows * columns;
            for matrix in stretch.segment.start / unit..stretch.segment.end.div_ceil(unit) {
                let start = matrix * unit;
                let holders = holders(&self.buckets[stretch.bucket], target, start, start + unit);
                let own = |&(worker, from, to): &(usize, usize, usize)| {
                    (worker == rank)
                        .then(|| stretch.input.clone().narrow(0, start + from - stretch.segment.start, to - from))
                };
                let parts = holders.iter().map(own).collect();
                matrices.push(Matrix { stretch: index, target, optimizer, rows, columns, holders, parts });
            }
        }
        matrices
    }

    /// Line 3: the gather. To each worker go, in the order of the matrices, the parts of those that both hold.
    fn exchange(&self, stretches: &[Stretch], matrices: &mut [Matrix]) -> Result<(), CollectiveError> {
        let (rank, size) = (self.worker.rank(), self.worker.size());
        if size == 1 {
            return Ok(());
        }
        let device = stretches.first().map(|stretch| stretch.value.device()).unwrap_or_default();
        let dtype = self.gather_dtype();
        let mut outgoing: Vec<Vec<Tensor<1>>> = vec![Vec::new(); size];
        let mut incoming = vec![0; size];
        for matrix in &*matrices {
            let own = matrix.parts.iter().flatten().next();
            for &(worker, from, to) in matrix.holders.iter().filter(|(worker, ..)| *worker != rank) {
                outgoing[worker].extend(own.cloned());
                incoming[worker] += to - from;
            }
        }
        let joined = |parts: Vec<Tensor<1>>| match parts.is_empty() {
            true => Tensor::empty([0], (&device, dtype)),
            false => Tensor::cat(parts, 0),
        };
        let outgoing: Vec<Tensor<1>> = outgoing.into_iter().map(joined).collect();
        let received = self.worker.run(move |collective| collective.all_to_all(outgoing, &incoming))?;
        let mut taken = vec![0; size];
        for matrix in matrices {
            for (&(worker, from, to), part) in matrix.holders.iter().zip(&mut matrix.parts) {
                if worker != rank {
                    *part = Some(received[worker].clone().narrow(0, taken[worker], to - from));
                    taken[worker] += to - from;
                }
            }
        }
        Ok(())
    }

    /// Lines 4 and 5: Newton-Schulz on the whole, of which the local part stays.
    fn orthogonalise(&self, stretches: &mut [Stretch], matrices: Vec<Matrix>) {
        let rank = self.worker.rank();
        let equal = |one: &Matrix, other: &Matrix| {
            (one.optimizer, one.rows, one.columns) == (other.optimizer, other.rows, other.columns)
        };
        let numbered: Vec<(usize, Matrix)> = matrices.into_iter().enumerate().collect();
        let count = numbered.len();
        let mut updates: Vec<Option<(usize, Tensor<1>)>> = (0..count).map(|_| None).collect();
        let elements = |(_, matrix): &(usize, Matrix)| matrix.rows * matrix.columns;
        for batch in equal_batches(numbered, elements, |(_, one), (_, other)| equal(one, other)) {
            let Some((_, Matrix { optimizer, rows, columns, target, .. })) = batch.first() else { continue };
            let (optimizer, rows, columns) = (*optimizer, *rows, *columns);
            debug_assert!(self.targets[*target].unit() == rows * columns);
            let wholes = batch.iter().map(|(_, matrix)| {
                let parts: Vec<Tensor<1>> = matrix.parts.iter().flatten().cloned().collect();
                Tensor::cat(parts, 0).cast(DType::F32).reshape([1, rows, columns])
            });
            let (update, _) = self.muon[optimizer].direction(Tensor::cat(wholes.collect(), 0), None);
            for (index, (number, matrix)) in batch.into_iter().enumerate() {
                let Some(&(_, from, to)) = matrix.holders.iter().find(|(worker, ..)| *worker == rank) else { continue };
                let whole = update.clone().narrow(0, index, 1).reshape([rows * columns]);
                updates[number] = Some((matrix.stretch, whole.narrow(0, from, to - from)));
            }
        }
        for (stretch, update) in updates.into_iter().flatten() {
            stretches[stretch].updates.push(update);
        }
    }

    /// Line 6: the local part is updated.
    fn finish(&mut self, lr: f64, stretch: Stretch) -> (usize, Tensor<1>) {
        let Stretch { place, segment, optimizer, value, momentum, master, step, updates, .. } = stretch;
        let muon = &self.muon[optimizer];
        let lr = lr * self.optimizers.muon[optimizer].1;
        let rounding = muon.config().rounding;
        let stored = value.dtype();
        let start = match stored == full_precision(stored) {
            true => value,
            false => rounding.start(value, master),
        };
        let moved = muon.moved(lr, step, start, Tensor::cat(updates, 0));
        let (values, master) = rounding.finish(moved, stored);
        let held = Held::Muon { momentum, second_moment: None, step: step + 1, master };
        self.states.insert((segment.target, segment.start), held);
        (place, values)
    }
}

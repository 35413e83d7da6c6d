//! Muon's step in the flat form: the report's Algorithm 1 (Distributed Muon, ZeRO-1). Each rank owns an even part of all
//! elements, and so parts of matrices. The comments name the lines of the algorithm.

use burn::tensor::{DType, Tensor};

use super::partition::{OptimizerKind, Segment, holders};
use super::sharded::OwnedSegment;
use super::{MuonAdamW, SegmentState};
use crate::MomentumPrecision;
use crate::distributed::CollectiveError;
use crate::memory::step_batches;
use crate::newton_schulz::full_precision;

/// A segment of a parameter between momentum and update.
struct MuonSegment {
    /// The caller's index, which is returned with the new values.
    index: usize,
    bucket: usize,
    segment: Segment,
    optimizer: usize,
    value: Tensor<1>,
    /// The input of Newton-Schulz, with Nesterov, in the dtype of the gather.
    input: Tensor<1>,
    momentum: Tensor<1>,
    master: Option<Tensor<1>>,
    step: usize,
    /// This rank's part of the update of each matrix, in order.
    updates: Vec<Tensor<1>>,
}

/// A matrix that this rank owns a part of.
struct Matrix {
    /// Index of the segment that the part belongs to.
    segment: usize,
    parameter: usize,
    optimizer: usize,
    rows: usize,
    columns: usize,
    /// The owners of its parts, in the order of elements: rank, start, end.
    holders: Vec<(usize, usize, usize)>,
    /// The parts, in the same order; `None` until received.
    parts: Vec<Option<Tensor<1>>>,
}

impl MuonAdamW {
    /// Steps the segments that this rank owns. Each comes with an index, which is returned with its new values.
    pub(super) fn step_flat(
        &mut self,
        lr: f64,
        owned: Vec<(usize, OwnedSegment)>,
    ) -> Result<Vec<(usize, Tensor<1>)>, CollectiveError> {
        let mut segments: Vec<MuonSegment> =
            owned.into_iter().filter_map(|(index, owned)| self.momentum(index, owned)).collect();
        let mut matrices = self.matrices(&segments);
        self.gather_parts(&segments, &mut matrices)?;
        self.orthogonalize(&mut segments, matrices);
        Ok(segments.into_iter().map(|segment| self.finish(lr, segment)).collect())
    }

    /// Line 2: the momentum of this rank's part.
    fn momentum(&mut self, index: usize, owned: OwnedSegment) -> Option<MuonSegment> {
        let OptimizerKind::Muon { optimizer, .. } = self.parameters[owned.segment.parameter].kind else { return None };
        let device = owned.value.device();
        let key = (owned.segment.parameter, owned.segment.start);
        let (old, master, step) = match self.states.remove(&key) {
            Some(SegmentState::Muon { momentum, master, step, .. }) => {
                (Some(momentum.to_device(&device)), master.map(|master| master.to_device(&device)), step)
            }
            _ => (None, None, 0),
        };
        let config = self.muon[optimizer].optimizer.config();
        let mu = config.momentum_at(step);
        let gradient = owned.gradient;
        let momentum = match old {
            Some(old) => old.cast(DType::F32).mul_scalar(mu).add(gradient.clone()),
            None => gradient.clone(),
        };
        let input = match config.nesterov {
            true => momentum.clone().mul_scalar(mu).add(gradient),
            false => momentum.clone(),
        };
        // Only the stored momentum is rounded: the input above used the f32 sum.
        let momentum = match config.momentum_precision {
            MomentumPrecision::F32 => momentum,
            MomentumPrecision::Bf16 => momentum.cast(DType::BF16),
        };
        // Rounded on a single rank too, where nothing is sent, so that the world size does not change the result.
        let input = input.cast(self.gather_dtype());
        let (bucket, segment, value) = (owned.bucket, owned.segment, owned.value);
        let updates = Vec::new();
        Some(MuonSegment { index, bucket, segment, optimizer, value, input, momentum, master, step, updates })
    }

    /// The matrices that the segments are parts of, in their order, with this rank's parts filled in.
    fn matrices(&self, segments: &[MuonSegment]) -> Vec<Matrix> {
        let rank = self.communicator.rank();
        let mut matrices = Vec::new();
        for (index, part) in segments.iter().enumerate() {
            let Segment { parameter, start: first, end: last } = part.segment;
            let OptimizerKind::Muon { optimizer, stack: [_, rows, columns] } = self.parameters[parameter].kind else {
                continue;
            };
            let unit = rows * columns;
            // A segment may begin and end within a matrix.
            for matrix in first / unit..last.div_ceil(unit) {
                let start = matrix * unit;
                let holders = holders(&self.buckets[part.bucket], parameter, start, start + unit);
                let own_part = |&(holder, from, to): &(usize, usize, usize)| {
                    (holder == rank).then(|| part.input.clone().narrow(0, start + from - first, to - from))
                };
                let parts = holders.iter().map(own_part).collect();
                matrices.push(Matrix { segment: index, parameter, optimizer, rows, columns, holders, parts });
            }
        }
        matrices
    }

    /// Line 3: the gather. Two ranks exchange their parts of the matrices that they share, in the order of the matrices, which is
    /// the same on both. An all-gather would send every part to every rank.
    fn gather_parts(&self, segments: &[MuonSegment], matrices: &mut [Matrix]) -> Result<(), CollectiveError> {
        let (rank, size) = (self.communicator.rank(), self.communicator.size());
        if size == 1 {
            return Ok(());
        }
        let device = segments.first().map(|segment| segment.value.device()).unwrap_or_default();
        let dtype = self.gather_dtype();
        let mut outgoing: Vec<Vec<Tensor<1>>> = vec![Vec::new(); size];
        let mut incoming = vec![0; size];
        for matrix in &*matrices {
            // Nothing has been received yet, so the only part is this rank's.
            let own = matrix.parts.iter().flatten().next();
            for &(holder, from, to) in matrix.holders.iter().filter(|(holder, ..)| *holder != rank) {
                outgoing[holder].extend(own.cloned());
                incoming[holder] += to - from;
            }
        }
        let joined = |parts: Vec<Tensor<1>>| match parts.is_empty() {
            true => Tensor::empty([0], (&device, dtype)),
            false => Tensor::cat(parts, 0),
        };
        let outgoing: Vec<Tensor<1>> = outgoing.into_iter().map(joined).collect();
        let received = self.communicator.run(move |collective| collective.all_to_all(outgoing, &incoming))?;
        let mut read = vec![0; size]; // elements, by sender
        for matrix in matrices {
            for (&(holder, from, to), part) in matrix.holders.iter().zip(&mut matrix.parts) {
                if holder != rank {
                    *part = Some(received[holder].clone().narrow(0, read[holder], to - from));
                    read[holder] += to - from;
                }
            }
        }
        Ok(())
    }

    /// Lines 4 and 5: Newton-Schulz on the whole matrix; this rank keeps its part of the update. As in the algorithm, every owner
    /// of a part orthogonalizes the whole matrix.
    fn orthogonalize(&self, segments: &mut [MuonSegment], matrices: Vec<Matrix>) {
        let rank = self.communicator.rank();
        let equal = |one: &Matrix, other: &Matrix| {
            (one.optimizer, one.rows, one.columns) == (other.optimizer, other.rows, other.columns)
        };
        // Batches reorder the matrices. Their numbers restore the order, in which a segment's updates are concatenated.
        let numbered: Vec<(usize, Matrix)> = matrices.into_iter().enumerate().collect();
        let count = numbered.len();
        let mut updates: Vec<Option<(usize, Tensor<1>)>> = (0..count).map(|_| None).collect();
        let elements = |(_, matrix): &(usize, Matrix)| matrix.rows * matrix.columns;
        for batch in step_batches(numbered, elements, |(_, one), (_, other)| equal(one, other)) {
            let Some((_, Matrix { optimizer, rows, columns, parameter, .. })) = batch.first() else { continue };
            let (optimizer, rows, columns) = (*optimizer, *rows, *columns);
            debug_assert!(self.parameters[*parameter].unit() == rows * columns);
            let matrices = batch.iter().map(|(_, matrix)| {
                let parts: Vec<Tensor<1>> = matrix.parts.iter().flatten().cloned().collect();
                Tensor::cat(parts, 0).cast(DType::F32).reshape([1, rows, columns])
            });
            let (update, _) = self.muon[optimizer].optimizer.direction(Tensor::cat(matrices.collect(), 0), None);
            for (index, (number, matrix)) in batch.into_iter().enumerate() {
                let Some(&(_, from, to)) = matrix.holders.iter().find(|(holder, ..)| *holder == rank) else { continue };
                let whole = update.clone().narrow(0, index, 1).reshape([rows * columns]);
                updates[number] = Some((matrix.segment, whole.narrow(0, from, to - from)));
            }
        }
        for (segment, update) in updates.into_iter().flatten() {
            segments[segment].updates.push(update);
        }
    }

    /// Line 6: the update of this rank's part.
    fn finish(&mut self, lr: f64, segment: MuonSegment) -> (usize, Tensor<1>) {
        let MuonSegment { index, segment, optimizer, value, momentum, master, step, updates, .. } = segment;
        let group = &self.muon[optimizer];
        let (muon, lr) = (&group.optimizer, lr * group.learning_rate_factor);
        let rounding = muon.config().rounding;
        let stored = value.dtype();
        let start = match stored == full_precision(stored) {
            true => value,
            false => rounding.start(value, master),
        };
        let updated = muon.decay_and_update(lr, step, start, Tensor::cat(updates, 0));
        let (values, master) = rounding.finish(updated, stored);
        let state = SegmentState::Muon { momentum, second_moment: None, step: step + 1, master };
        self.states.insert((segment.parameter, segment.start), state);
        (index, values)
    }
}

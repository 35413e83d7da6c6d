//! Muon's batched step of whole matrices, on one rank and on several.

use burn::tensor::{DType, Device, Tensor};

use super::partition::OptimizerKind;
use super::sharded::OwnedSegment;
use super::{MuonAdamW, SegmentState};
use crate::memory::step_batches;
use crate::newton_schulz::full_precision;
use crate::{MuonState, Rounding};

/// Matrices of one parameter, to be stepped.
#[derive(Clone, Debug)]
pub(super) struct Matrices {
    /// Index of the parameter, and first element of the segment.
    pub(super) key: (usize, usize),
    /// Index of the Muon optimizer.
    pub(super) optimizer: usize,
    /// `[matrices, rows, columns]`.
    pub(super) stack: [usize; 3],
    /// The dtype in which the parameter is stored.
    pub(super) stored: DType,
    pub(super) device: Device,
}

impl Matrices {
    pub(super) fn elements(&self) -> usize {
        self.stack.iter().product()
    }

    /// Whether the two can be stepped as one stack: same settings, shape, dtype and device.
    pub(super) fn equals(&self, other: &Self) -> bool {
        (self.optimizer, self.stack, self.stored) == (other.optimizer, other.stack, other.stored)
            && self.device == other.device
    }
}

impl MuonAdamW {
    /// Steps equal matrices together. Each comes with its values and its gradient as stacks `[matrices, rows, columns]`. Returns
    /// the new values in the same order.
    pub(super) fn step_matrices(&mut self, lr: f64, batch: Vec<(Matrices, Tensor<3>, Tensor<3>)>) -> Vec<Tensor<3>> {
        let Some((first, ..)) = batch.first() else { return Vec::new() };
        let group = &self.muon[first.optimizer];
        let (muon, rounding) = (&group.optimizer, group.optimizer.config().rounding);
        let mut owners = Vec::with_capacity(batch.len());
        let mut members = Vec::with_capacity(batch.len());
        for (Matrices { key, stack, stored, device, .. }, value, gradient) in batch {
            // Taken out of the map: the CPU kernel updates a momentum in place only if there is no other handle on it.
            let (state, master) = match self.states.remove(&key) {
                Some(SegmentState::Muon { momentum, second_moment, step, master }) => {
                    let momentum = momentum.to_device(&device).reshape(stack);
                    let second_moment = second_moment.map(|second| second.to_device(&device));
                    (Some(MuonState { momentum, second_moment, step }), master)
                }
                _ => (None, None),
            };
            // With rounding to nearest, the step itself widens the parameter and rounds the result.
            let start = match stored == full_precision(stored) || rounding == Rounding::Nearest {
                true => value,
                false => rounding.start(value, master.map(|master| master.to_device(&device).reshape(stack))),
            };
            members.push((start, gradient, state));
            owners.push((key, stored));
        }
        let flat = |tensor: Tensor<3>| {
            let elements = tensor.shape().num_elements();
            tensor.reshape([elements])
        };
        let stepped = muon.step_stacks(lr * group.learning_rate_factor, members);
        let mut updated = Vec::with_capacity(stepped.len());
        for ((key, stored), (tensor, state)) in owners.into_iter().zip(stepped) {
            let (tensor, master) = rounding.finish(tensor, stored);
            let MuonState { momentum, second_moment, step } = state;
            let state = SegmentState::Muon { momentum: flat(momentum), second_moment, step, master: master.map(flat) };
            self.states.insert(key, state);
            updated.push(tensor);
        }
        updated
    }

    /// Steps the matrices that this rank of several owns. Each comes with an index, which is returned with its new values.
    pub(super) fn step_whole(&mut self, lr: f64, owned: Vec<(usize, OwnedSegment)>) -> Vec<(usize, Tensor<1>)> {
        let members = owned.into_iter().filter_map(|(index, owned)| {
            let parameter = &self.parameters[owned.segment.parameter];
            let OptimizerKind::Muon { optimizer, stack: [_, rows, columns] } = parameter.kind else { return None };
            let matrices = Matrices {
                key: (owned.segment.parameter, owned.segment.start),
                optimizer,
                stack: [owned.segment.len() / parameter.unit(), rows, columns],
                stored: owned.value.dtype(),
                device: owned.value.device(),
            };
            Some((index, matrices, owned))
        });
        type Member = (usize, Matrices, OwnedSegment);
        let elements = |(_, matrices, _): &Member| matrices.elements();
        let equal = |(_, one, _): &Member, (_, other, _): &Member| one.equals(other);
        let mut results = Vec::new();
        for batch in step_batches(members.collect(), elements, equal) {
            let (indices, batch): (Vec<usize>, Vec<_>) = batch
                .into_iter()
                .map(|(index, matrices, owned)| {
                    let stack = matrices.stack;
                    (index, (matrices, owned.value.reshape(stack), owned.gradient.reshape(stack)))
                })
                .unzip();
            let updated = self.step_matrices(lr, batch).into_iter().map(|tensor| {
                let elements = tensor.shape().num_elements();
                tensor.reshape([elements])
            });
            results.extend(indices.into_iter().zip(updated));
        }
        results
    }
}

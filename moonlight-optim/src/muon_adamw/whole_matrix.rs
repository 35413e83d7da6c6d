//! Newton-Schulz where the matrices are: the batched Muon step, on one rank and on several.

use burn::tensor::{DType, Device, Tensor};

use super::partition::By;
use super::sharded::Work;
use super::{Held, MuonAdamW};
use crate::memory::step_batches;
use crate::newton_schulz::full_precision;
use crate::{MuonState, Rounding};

/// Whole matrices of one parameter that are to be stepped.
#[derive(Clone, Debug)]
pub(super) struct Matrices {
    /// Target and first element.
    pub(super) key: (usize, usize),
    /// Which Muon.
    pub(super) optimizer: usize,
    /// `[matrices, rows, columns]`.
    pub(super) stack: [usize; 3],
    /// The type of the parameter.
    pub(super) stored: DType,
    /// Where the step is taken.
    pub(super) device: Device,
}

impl Matrices {
    pub(super) fn elements(&self) -> usize {
        self.stack.iter().product()
    }

    /// Whether the two can be stepped as one stack.
    pub(super) fn equals(&self, other: &Self) -> bool {
        (self.optimizer, self.stack, self.stored) == (other.optimizer, other.stack, other.stored)
            && self.device == other.device
    }
}

impl MuonAdamW {
    /// Steps equal matrices together: of each, with its values and its gradient (as its stack), the new values.
    pub(super) fn step_matrices(&mut self, lr: f64, batch: Vec<(Matrices, Tensor<3>, Tensor<3>)>) -> Vec<Tensor<3>> {
        let Some((first, ..)) = batch.first() else { return Vec::new() };
        let group = &self.muon[first.optimizer];
        let (muon, rounding) = (&group.optimizer, group.optimizer.config().rounding);
        let mut owners = Vec::with_capacity(batch.len());
        let mut members = Vec::with_capacity(batch.len());
        for (Matrices { key, stack, stored, device, .. }, value, gradient) in batch {
            let (state, master) = match self.states.remove(&key) {
                Some(Held::Muon { momentum, second_moment, step, master }) => {
                    let momentum = momentum.to_device(&device).reshape(stack);
                    let second_moment = second_moment.map(|second| second.to_device(&device));
                    (Some(MuonState { momentum, second_moment, step }), master)
                }
                _ => (None, None),
            };
            // To nearest, the step itself widens the parameter and rounds it.
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
            let held = Held::Muon { momentum: flat(momentum), second_moment, step, master: master.map(flat) };
            self.states.insert(key, held);
            updated.push(tensor);
        }
        updated
    }

    /// Steps the matrices that this rank of several owns; each work is known by its place.
    pub(super) fn step_whole(&mut self, lr: f64, works: Vec<(usize, Work)>) -> Vec<(usize, Tensor<1>)> {
        let waiting = works.into_iter().filter_map(|(place, work)| {
            let target = &self.targets[work.segment.target];
            let By::Muon { optimizer, stack: [_, rows, columns] } = target.by else { return None };
            let matrices = Matrices {
                key: (work.segment.target, work.segment.start),
                optimizer,
                stack: [work.segment.len() / target.unit(), rows, columns],
                stored: work.value.dtype(),
                device: work.value.device(),
            };
            Some((place, matrices, work))
        });
        type Waiting = (usize, Matrices, Work);
        let elements = |(_, matrices, _): &Waiting| matrices.elements();
        let equal = |(_, one, _): &Waiting, (_, other, _): &Waiting| one.equals(other);
        let mut results = Vec::new();
        for batch in step_batches(waiting.collect(), elements, equal) {
            let (places, batch): (Vec<usize>, Vec<_>) = batch
                .into_iter()
                .map(|(place, matrices, work)| {
                    let stack = matrices.stack;
                    (place, (matrices, work.value.reshape(stack), work.gradient.reshape(stack)))
                })
                .unzip();
            let updated = self.step_matrices(lr, batch).into_iter().map(|tensor| {
                let elements = tensor.shape().num_elements();
                tensor.reshape([elements])
            });
            results.extend(places.into_iter().zip(updated));
        }
        results
    }
}

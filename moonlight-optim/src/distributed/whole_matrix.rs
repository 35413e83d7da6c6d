//! Whole-matrix ownership: Newton-Schulz where the matrices are.

use burn::tensor::{DType, Device, Tensor};

use super::optimizer::{DistributedOptimizer, Held, Work};
use super::partition::By;
use crate::batched::equal_batches;
use crate::newton_schulz::full_precision;
use crate::{MuonState, Rounding};

/// Matrices of one parameter that wait for their step.
struct Waiting {
    place: usize,
    key: (usize, usize),
    optimizer: usize,
    /// `[matrices, rows, columns]`.
    stack: [usize; 3],
    stored: DType,
    device: Device,
    value: Tensor<3>,
    gradient: Tensor<3>,
}

impl Waiting {
    fn equals(&self, other: &Self) -> bool {
        (self.optimizer, self.stack, self.stored) == (other.optimizer, other.stack, other.stored)
            && self.device == other.device
    }
}

impl DistributedOptimizer {
    /// Steps this worker's matrices, equal ones together, as [`BatchedOptimizer`](crate::BatchedOptimizer) does; each work
    /// is known by its place.
    pub(super) fn step_whole(&mut self, lr: f64, works: Vec<(usize, Work)>) -> Vec<(usize, Tensor<1>)> {
        let waiting = works.into_iter().filter_map(|(place, work)| {
            let target = &self.targets[work.segment.target];
            let By::Muon { optimizer, stack: [_, rows, columns] } = target.by else { return None };
            let stack = [work.segment.len() / target.unit(), rows, columns];
            let (stored, device) = (work.value.dtype(), work.value.device());
            Some(Waiting {
                place,
                key: (work.segment.target, work.segment.start),
                optimizer,
                stack,
                stored,
                device,
                value: work.value.reshape(stack),
                gradient: work.gradient.reshape(stack),
            })
        });
        let batches =
            equal_batches(waiting.collect(), |waiting: &Waiting| waiting.stack.iter().product(), Waiting::equals);
        let mut results = Vec::new();
        for batch in batches {
            let Some(first) = batch.first() else { continue };
            let muon = self.muon[first.optimizer].clone();
            let factor = self.optimizers.muon[first.optimizer].1;
            let rounding = muon.config().rounding;
            let mut owners = Vec::with_capacity(batch.len());
            let mut members = Vec::with_capacity(batch.len());
            for Waiting { place, key, stack, stored, device, value, gradient, .. } in batch {
                let (state, master) = match self.states.remove(&key) {
                    Some(Held::Muon { momentum, second_moment, step, master }) => {
                        let momentum = momentum.to_device(&device).reshape(stack);
                        let second_moment = second_moment.map(|second| second.to_device(&device));
                        (Some(MuonState { momentum, second_moment, step }), master)
                    }
                    _ => (None, None),
                };
                let master = master.map(|master| master.to_device(&device).reshape(stack));
                let start = match stored == full_precision(stored) || rounding == Rounding::Nearest {
                    true => value,
                    false => rounding.start(value, master),
                };
                members.push((start, gradient, state));
                owners.push((place, key, stored));
            }
            for ((place, key, stored), (tensor, state)) in
                owners.into_iter().zip(muon.step_stacks(lr * factor, members))
            {
                let (tensor, master) = rounding.finish(tensor, stored);
                let flat = |tensor: Tensor<3>| {
                    let elements = tensor.shape().num_elements();
                    tensor.reshape([elements])
                };
                let MuonState { momentum, second_moment, step } = state;
                let (momentum, master) = (flat(momentum), master.map(flat));
                self.states.insert(key, Held::Muon { momentum, second_moment, step, master });
                results.push((place, flat(tensor)));
            }
        }
        results
    }
}

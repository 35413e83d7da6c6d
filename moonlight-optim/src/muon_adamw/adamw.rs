//! AdamW's step of a parameter, or of a segment of one.

use burn::optim::{AdamW, AdamWState, AdaptiveMomentumState, Optimizer};
use burn::tensor::{Shape, Tensor};

use super::{MuonAdamW, SegmentState};
use crate::{MixedPrecision, MixedPrecisionState};

type State<const D: usize> = MixedPrecisionState<AdamWState<D>, D>;

impl MuonAdamW {
    /// Returns the new values. `key` is the index of the parameter and the first element of the segment.
    pub(super) fn step_adamw<const D: usize>(
        &mut self,
        key: (usize, usize),
        optimizer: usize,
        lr: f64,
        value: Tensor<D>,
        gradient: Tensor<D>,
    ) -> Tensor<D> {
        let (shape, device) = (value.shape(), value.device());
        let state = match self.states.remove(&key) {
            Some(SegmentState::AdamW(state)) => {
                Some(MixedPrecision::<AdamW>::to_device(reshaped(state, shape.clone()), &device))
            }
            _ => None,
        };
        let group = &self.adamw[optimizer];
        let (values, state) = group.optimizer.step(lr * group.learning_rate_factor, value, gradient, state);
        if let Some(state) = state {
            let flat = Shape::from([shape.num_elements()]);
            self.states.insert(key, SegmentState::AdamW(reshaped(state, flat)));
        }
        values
    }
}

/// The same state for another shape with as many elements. Between steps states are flat, the only shape that a segment has;
/// AdamW is elementwise and does not depend on it.
fn reshaped<const D: usize, const E: usize>(state: State<D>, shape: Shape) -> State<E> {
    let inner = state.inner.map(|AdamWState { momentum }| {
        let AdaptiveMomentumState { time, moment_1, moment_2, max_moment_2 } = momentum;
        let (moment_1, moment_2) = (moment_1.reshape(shape.clone()), moment_2.reshape(shape.clone()));
        let max_moment_2 = max_moment_2.map(|moment| moment.reshape(shape.clone()));
        AdamWState { momentum: AdaptiveMomentumState { time, moment_1, moment_2, max_moment_2 } }
    });
    MixedPrecisionState { inner, master: state.master.map(|master| master.reshape(shape)) }
}

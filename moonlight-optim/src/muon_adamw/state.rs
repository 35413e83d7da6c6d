//! The size of the optimizer state, saving, and loading.

use std::collections::BTreeMap;
use std::path::Path;

use burn::optim::{AdamWState, AdaptiveMomentumState};
use burn::tensor::{Device, Tensor, TensorData};
use burn_pack::Scalar;

use super::partition::{OptimizerKind, Segment};
use super::{MuonAdamW, SegmentState};
use crate::state::sharded_state::{PartToSave, Piece, collect, write_parts};
use crate::{MixedPrecisionState, StateError};

impl MuonAdamW {
    /// The bytes of this rank's optimizer state, and how many of them are Muon's momentum.
    pub fn state_bytes(&self) -> (u64, u64) {
        let bytes = |tensor: &Tensor<1>| (tensor.dims()[0] * tensor.dtype().size()) as u64;
        let (mut all, mut momenta) = (0, 0);
        for state in self.states.values() {
            match state {
                SegmentState::Muon { momentum, second_moment, master, .. } => {
                    momenta += bytes(momentum);
                    all += bytes(momentum) + master.as_ref().map_or(0, bytes);
                    all += second_moment
                        .as_ref()
                        .map_or(0, |second| (second.shape().num_elements() * second.dtype().size()) as u64);
                }
                SegmentState::AdamW(state) => {
                    all += state.master.as_ref().map_or(0, bytes);
                    if let Some(AdamWState { momentum }) = &state.inner {
                        all += bytes(&momentum.moment_1) + bytes(&momentum.moment_2);
                    }
                }
            }
        }
        (all, momenta)
    }

    /// Writes this rank's part of the state to a file. The files of all ranks together are the state.
    ///
    /// Tensors are copied from the device one at a time, when they are written: the host needs memory for the largest only.
    ///
    /// # Errors
    ///
    /// [`StateError::Unreadable`], with the error of the file system, if the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), StateError> {
        let mut parts = Vec::new();
        let mut scalars = BTreeMap::new();
        for (&(parameter, start), state) in &self.states {
            let parameter = &self.parameters[parameter];
            let path = &parameter.path;
            let mut push = |field: &'static str, shape: Vec<usize>, offset: usize, values: Tensor<1>| {
                parts.push(PartToSave { path: path.clone(), field, shape, offset, values });
            };
            match state {
                SegmentState::Muon { momentum, second_moment, step, master } => {
                    push("momentum", parameter.shape.clone(), start, momentum.clone());
                    if let Some(master) = master {
                        push("master", parameter.shape.clone(), start, master.clone());
                    }
                    if let (Some(second), OptimizerKind::Muon { stack: [matrices, ..], .. }) =
                        (second_moment, &parameter.kind)
                    {
                        let [_, rows, columns] = second.dims();
                        let offset = start / parameter.unit() * rows * columns; // of the segment's first matrix
                        let elements = second.shape().num_elements();
                        let values = second.clone().reshape([elements]);
                        push("second_moment", vec![*matrices, rows, columns], offset, values);
                    }
                    scalars.insert((path.clone(), "step"), Scalar::from(*step));
                }
                SegmentState::AdamW(state) => {
                    if let Some(master) = &state.master {
                        push("master", parameter.shape.clone(), start, master.clone());
                    }
                    if let Some(AdamWState { momentum }) = &state.inner {
                        push("momentum.moment_1", parameter.shape.clone(), start, momentum.moment_1.clone());
                        push("momentum.moment_2", parameter.shape.clone(), start, momentum.moment_2.clone());
                        scalars.insert((path.clone(), "momentum.time"), Scalar::from(momentum.time));
                    }
                }
            }
        }
        write_parts(path.as_ref(), parts, scalars)
    }

    /// Reads this rank's part of the state.
    pub(super) fn restore<P: AsRef<Path>>(&mut self, files: &[P]) -> Result<(), StateError> {
        let rank = self.communicator.rank();
        let own = self.buckets.iter().flat_map(|bucket| &bucket.parts[rank]);
        let pieces: Vec<Piece> =
            own.map(|&Segment { parameter, start, end }| Piece { parameter, start, end }).collect();
        let configs: Vec<_> = self.muon.iter().map(|group| group.optimizer.config()).collect();
        let mut collected = collect(files, &self.parameters, &configs, &pieces)?;
        let device = Device::default();
        let flat = |data: TensorData| {
            let dtype = data.dtype();
            Tensor::<1>::from_data(data, (&device, dtype))
        };
        for piece in pieces {
            let parameter = &self.parameters[piece.parameter];
            let master = collected.take(piece, "master").map(flat);
            let state = match &parameter.kind {
                OptimizerKind::Muon { optimizer, .. } => {
                    let Some(momentum) = collected.take(piece, "momentum").map(flat) else { continue };
                    // The shape is that of the whole parameter's second moment; this piece has only some of the matrices.
                    let matrices = (piece.end - piece.start) / parameter.unit();
                    let shape = configs[*optimizer].second_moment_shape(&parameter.shape);
                    let second = collected.take(piece, "second_moment").map(flat);
                    let second_moment =
                        second.zip(shape).map(|(second, [_, rows, columns])| second.reshape([matrices, rows, columns]));
                    let step = collected.number(piece.parameter, "step");
                    SegmentState::Muon { momentum, second_moment, step, master }
                }
                OptimizerKind::AdamW { .. } => {
                    let moments = (
                        collected.take(piece, "momentum.moment_1").map(flat),
                        collected.take(piece, "momentum.moment_2").map(flat),
                    );
                    let (Some(moment_1), Some(moment_2)) = moments else { continue };
                    let time = collected.number(piece.parameter, "momentum.time");
                    let momentum = AdaptiveMomentumState { time, moment_1, moment_2, max_moment_2: None };
                    SegmentState::AdamW(MixedPrecisionState { inner: Some(AdamWState { momentum }), master })
                }
                OptimizerKind::Other => continue,
            };
            self.states.insert((piece.parameter, piece.start), state);
        }
        Ok(())
    }
}

//! Loading state into Burn's `ModuleOptimizer`.

use std::path::Path;

use burn::optim::ModuleOptimizer;
use burn::store::RecordError;
use burn::tensor::{Bytes, Shape};
use burn_pack::{Scalar, Tensor, Writer};

use super::StateError;
use super::sharded_state::{Piece, RANK, Values, collect};
use crate::Assignment;
use crate::muon_adamw::{OptimizedParameter, optimized_parameters};

impl Assignment {
    /// As [`Assignment::to_module_optimizer`], with the state in `files`, bit for bit, matched by parameter path. `files` is
    /// either the one file that `ModuleOptimizer::save` wrote, in this process or another, or the files of all ranks of a
    /// [`MuonAdamW`](crate::MuonAdamW).
    ///
    /// A parameter without an entry starts without state: it had no gradient before the save.
    ///
    /// # Errors
    ///
    /// [`StateError`], for files that cannot be read or do not fit the module.
    pub fn load_module_optimizer<P: AsRef<Path>>(&self, files: &[P]) -> Result<ModuleOptimizer, StateError> {
        let (parameters, optimizers) = optimized_parameters(self);
        let muon: Vec<_> = optimizers.muon.iter().map(|(config, _)| config).collect();
        let piece = |(index, parameter): (usize, &OptimizedParameter)| Piece {
            parameter: index,
            start: 0,
            end: parameter.elements(),
        };
        let pieces: Vec<Piece> = parameters.iter().enumerate().map(piece).collect();
        // Burn reads only its own record, so the state is rewritten as one, with the `ParamId`s that the module has now.
        let collected = collect(files, &parameters, &muon, &pieces)?;
        let id = |parameter: usize| parameters[parameter].id.val();
        let tensors = collected.fields.into_iter().map(|((piece, field), values)| {
            let Values { dtype, bytes, shape, .. } = values;
            let name = format!("{}.{field}", id(piece.parameter));
            Tensor::new(name, dtype, Shape::from(shape), Some(id(piece.parameter)), Bytes::from_bytes_vec(bytes))
        });
        let tensors: Vec<Tensor> = tensors.collect();
        let count = tensors.len();
        let mut writer = Writer::new(tensors);
        for &parameter in &collected.present {
            let rank = Scalar::from(parameters[parameter].shape.len());
            writer = writer.with_scalar(&format!("{}.{RANK}", id(parameter)), rank);
            writer = writer.with_metadata(&id(parameter).to_string(), &parameters[parameter].path);
        }
        for (&parameter, scalars) in &collected.scalars {
            for (name, value) in scalars {
                writer = writer.with_scalar(&format!("{}.{name}", id(parameter)), *value);
            }
        }
        let unreadable = |error: RecordError| StateError::Unreadable(error.to_string());
        let optimizer = self.to_module_optimizer().from_bytes(writer.into_bytes()?).map_err(unreadable)?;
        // Burn drops a tensor that it cannot place, without an error.
        let restored = optimizer.to_record().len();
        if restored != count {
            return Err(StateError::Unreadable(format!("{restored} of {count} tensors fit their optimizers")));
        }
        Ok(optimizer)
    }
}

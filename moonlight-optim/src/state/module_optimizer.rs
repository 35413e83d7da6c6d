//! State for Burn's `ModuleOptimizer`.

use std::path::Path;

use burn::optim::ModuleOptimizer;
use burn::store::RecordError;
use burn::tensor::{Bytes, Shape};
use burn_pack::{Scalar, Tensor, Writer};

use super::StateError;
use super::sharded_state::{Piece, RANK, Values, collect};
use crate::Assignment;
use crate::muon_adamw::{Target, targets};

impl Assignment {
    /// The optimizer of [`Assignment::to_module_optimizer`] with the state in `files`, matched by parameter path, every
    /// tensor bit for bit: the file that `ModuleOptimizer::save` wrote, in this process or another, or the files of the
    /// ranks of a [`MuonAdamW`](crate::MuonAdamW).
    ///
    /// A parameter without an entry starts without state, as one that had no gradient before the save.
    ///
    /// # Errors
    ///
    /// See [`StateError`].
    pub fn load_module_optimizer<P: AsRef<Path>>(&self, files: &[P]) -> Result<ModuleOptimizer, StateError> {
        let (targets, optimizers) = targets(self);
        let muon: Vec<_> = optimizers.muon.iter().map(|(config, _)| config).collect();
        let piece = |(target, of): (usize, &Target)| Piece { target, start: 0, end: of.elements() };
        let pieces: Vec<Piece> = targets.iter().enumerate().map(piece).collect();
        let collected = collect(files, &targets, &muon, &pieces)?;
        let id = |target: usize| targets[target].id.val();
        let tensors = collected.fields.into_iter().map(|((piece, field), values)| {
            let Values { dtype, bytes, shape, .. } = values;
            let name = format!("{}.{field}", id(piece.target));
            Tensor::new(name, dtype, Shape::from(shape), Some(id(piece.target)), Bytes::from_bytes_vec(bytes))
        });
        let tensors: Vec<Tensor> = tensors.collect();
        let count = tensors.len();
        let mut writer = Writer::new(tensors);
        for &target in &collected.present {
            let rank = Scalar::from(targets[target].shape.len());
            writer = writer.with_scalar(&format!("{}.{RANK}", id(target)), rank);
            writer = writer.with_metadata(&id(target).to_string(), &targets[target].path);
        }
        for (&target, scalars) in &collected.scalars {
            for (name, value) in scalars {
                writer = writer.with_scalar(&format!("{}.{name}", id(target)), *value);
            }
        }
        let unreadable = |error: RecordError| StateError::Unreadable(error.to_string());
        let optimizer = self.to_module_optimizer().from_bytes(writer.into_bytes()?).map_err(unreadable)?;
        let restored = optimizer.to_record().len();
        if restored != count {
            return Err(StateError::Unreadable(format!("{restored} of {count} tensors fit their optimizers")));
        }
        Ok(optimizer)
    }
}

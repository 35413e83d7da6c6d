//! `train.freeze`: parameters without a gradient.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use moonlight_model::CausalLm;
use moonlight_model::config::{ParameterKind, ParameterShape, ProjectionRole};

use crate::error::TrainError;
use crate::frozen::{freeze_error, frozen_parameters};

/// The model in which every parameter is frozen whose name in the checkpoint matches a pattern. `clips`: whether QK-clip is
/// on, which rewrites query and key projections whether or not they have a gradient.
pub(super) fn freeze(model: CausalLm, patterns: &[String], clips: bool) -> Result<CausalLm, TrainError> {
    if patterns.is_empty() {
        return Ok(model);
    }
    let frozen = frozen_parameters(model.config(), patterns)?;
    let shapes = model.config().parameter_shapes();
    let clipped = |shape: &ParameterShape| {
        shape.kind == ParameterKind::Matrix && shape.role.is_some_and(ProjectionRole::is_clipped)
    };
    if clips && shapes.iter().zip(&frozen).any(|(shape, frozen)| *frozen && clipped(shape)) {
        let hint = "set `optimizer.qk_clip = 0`, or train the query and key projections";
        return Err(freeze_error(
            "`optimizer.qk_clip` rewrites query and key projections that are frozen".into(),
            hint,
        ));
    }
    let mut mapper = Freeze { frozen, at: 0, trained: 0 };
    let model = model.map(&mut mapper);
    if mapper.trained == 0 {
        return Err(freeze_error("the whole model is frozen".into(), "leave at least one parameter to train"));
    }
    Ok(model)
}

/// Freezes parameters by their position: `parameter_shapes` lists them in the order in which the module is visited.
struct Freeze {
    frozen: Vec<bool>,
    at: usize,
    trained: usize,
}

impl ModuleMapper for Freeze {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let frozen = self.frozen.get(self.at).copied().unwrap_or_default();
        self.at += 1;
        if frozen {
            return param.set_require_grad(false);
        }
        // The router's correction bias never has a gradient, so it does not count.
        self.trained += usize::from(param.is_require_grad());
        param
    }
}

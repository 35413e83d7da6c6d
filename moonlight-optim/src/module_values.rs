//! Replacing the values of parameters.

use std::collections::HashMap;

use burn::module::{ModuleMapper, Param, ParamId};
use burn::tensor::{GradientCheckpointingStrategy, Shape, Tensor};

/// The autodiff settings of a parameter's tensor.
#[derive(Clone, Copy)]
pub(crate) struct AutodiffSettings {
    checkpointing: Option<GradientCheckpointingStrategy>,
    require_grad: bool,
}

impl AutodiffSettings {
    pub(crate) fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        Self { checkpointing: tensor.gradient_checkpointing_strategy(), require_grad: tensor.is_require_grad() }
    }

    /// `new`, a tensor without a graph, with these settings.
    pub(crate) fn apply<const D: usize>(self, new: Tensor<D>) -> Tensor<D> {
        let mut new = Tensor::from_inner(new);
        if let Some(strategy) = self.checkpointing {
            new = new.with_gradient_checkpointing_strategy(strategy);
        }
        new.set_require_grad(self.require_grad)
    }
}

/// Turns `new`, a tensor without a graph, into the new value of a parameter: it requires a gradient if `old` did, and keeps the
/// gradient checkpointing of `old`. For changing weights outside of an optimizer, as with [`QkClip`](crate::QkClip).
pub fn replace_value<const D: usize>(old: &Tensor<D>, new: Tensor<D>) -> Tensor<D> {
    AutodiffSettings::of(old).apply(new)
}

/// Puts new values into a module. For each `ParamId` it has the parameter's shape, and values in any shape with as many
/// elements.
pub(crate) struct Replacer<const S: usize>(pub(crate) HashMap<ParamId, (Shape, Tensor<S>)>);

impl<const S: usize> ModuleMapper for Replacer<S> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some((shape, values)) = self.0.remove(&param.id) else { return param };
        param.map(|old| replace_value(&old, values.reshape(shape)))
    }
}

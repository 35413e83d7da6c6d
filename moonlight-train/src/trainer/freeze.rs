//! `[train] freeze`: parameters that no gradient reaches.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use moonlight_convert::hugging_face_tensors;
use moonlight_model::{CausalLm, NamePattern};

use crate::error::TrainError;

/// The model with every parameter frozen whose name in the checkpoint matches a pattern. `clips` says whether QK-clip, which
/// rewrites queries and keys, is on.
pub(super) fn freeze(model: CausalLm, patterns: &[String], clips: bool) -> Result<CausalLm, TrainError> {
    if patterns.is_empty() {
        return Ok(model);
    }
    let wrong = |problem: String, hint: &str| TrainError::Request {
        problem: format!("`train.freeze`: {problem}"),
        hint: Some(hint.into()),
    };
    let shapes = model.config().parameter_shapes();
    let mut frozen = vec![false; shapes.len()];
    for text in patterns {
        let pattern = NamePattern::new(text).map_err(|problem| {
            wrong(format!("the pattern `{text}` is malformed: {problem}"), "`*` is within one name, `**` any number")
        })?;
        let mut matches = false;
        for (shape, frozen) in shapes.iter().zip(&mut frozen) {
            let names = hugging_face_tensors(shape);
            let hits = names.iter().filter(|tensor| pattern.matches(&tensor.name)).count();
            if hits > 0 && hits < names.len() {
                return Err(wrong(
                    format!("`{text}` matches {hits} of the {} experts of `{}`", names.len(), shape.path),
                    "the experts of a layer are one parameter: write `*` for their number",
                ));
            }
            matches |= hits > 0;
            *frozen |= hits > 0;
        }
        if !matches {
            let hint = "names are those of the checkpoint, e.g. `model.layers.*.mlp.gate.weight`; `**` is any number of \
                        names";
            return Err(wrong(format!("`{text}` matches no parameter of the model"), hint));
        }
    }
    let clipped =
        |path: &str| ["q_proj.weight", "q_b_proj.weight", "kv_b_proj.weight"].iter().any(|e| path.ends_with(e));
    if clips && shapes.iter().zip(&frozen).any(|(shape, frozen)| *frozen && clipped(&shape.path)) {
        return Err(wrong("queries or keys are frozen, which `optimizer.qk_clip` rewrites".into(), "set it to 0"));
    }
    let mut mapper = Freeze { frozen, at: 0, trained: 0 };
    let model = model.map(&mut mapper);
    if mapper.trained == 0 {
        return Err(wrong("the whole model is frozen".into(), "leave something to train"));
    }
    Ok(model)
}

/// Freezes by the parameter's number, which is that of the list of shapes.
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
        self.trained += usize::from(param.is_require_grad());
        param
    }
}

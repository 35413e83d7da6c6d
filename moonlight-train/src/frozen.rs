//! Which parameters `train.freeze` selects.

use moonlight_convert::hugging_face_tensors;
use moonlight_model::{ModelConfig, NamePattern};

use crate::error::TrainError;

/// For each parameter of the model, in the order of [`ModelConfig::parameter_shapes`], whether its name in the checkpoint
/// matches a pattern.
///
/// # Errors
///
/// A pattern that is malformed, that matches nothing, or that matches a part of a stack of experts.
pub(crate) fn frozen_parameters(config: &ModelConfig, patterns: &[String]) -> Result<Vec<bool>, TrainError> {
    let shapes = config.parameter_shapes();
    let mut frozen = vec![false; shapes.len()];
    for text in patterns {
        let pattern = NamePattern::new(text).map_err(|problem| {
            freeze_error(
                format!("the pattern `{text}` is malformed: {problem}"),
                "`*` matches within one name, `**` any number of names",
            )
        })?;
        let mut matches = false;
        for (shape, frozen) in shapes.iter().zip(&mut frozen) {
            let names = hugging_face_tensors(shape);
            let hits = names.iter().filter(|tensor| pattern.matches(&tensor.name)).count();
            if hits > 0 && hits < names.len() {
                return Err(freeze_error(
                    format!("`{text}` matches {hits} of the {} experts of `{}`", names.len(), shape.path),
                    "write `*` for the expert's number: the experts of a layer are one parameter",
                ));
            }
            matches |= hits > 0;
            *frozen |= hits > 0;
        }
        if !matches {
            let hint = "use the names of the checkpoint, such as `model.layers.*.mlp.gate.weight`; `**` matches any \
                        number of names";
            return Err(freeze_error(format!("`{text}` matches no parameter of the model"), hint));
        }
    }
    Ok(frozen)
}

/// An error about the key `train.freeze`.
pub(crate) fn freeze_error(problem: String, hint: &str) -> TrainError {
    TrainError::Request { problem: format!("`train.freeze`: {problem}"), hint: Some(hint.into()) }
}

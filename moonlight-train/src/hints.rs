//! Hints for errors of the libraries that name options of this program. The libraries themselves name no program and none of
//! its options.

use moonlight_convert::CheckpointError;
use moonlight_convert::adapter::AdapterError;
use moonlight_infer::InferError;
use moonlight_infer::chat::ChatError;

/// The hint for an error of a checkpoint: the library's, except that a model missing from the cache can be downloaded, and that a
/// path that does not exist may have been meant as another kind of name.
pub(crate) fn checkpoint_hint(error: &CheckpointError) -> Option<String> {
    if let CheckpointError::NoSuchDirectory { .. } = error {
        return Some(
            "name a model's directory, the folder of a run, or `org/name` of a model in the Hub's cache".into(),
        );
    }
    let Some((repo, revision)) = error.not_cached() else { return error.hint() };
    let revision = revision.map(|revision| format!(" --revision {revision}")).unwrap_or_default();
    Some(format!("download it with `moonlight-convert download {repo}{revision}`"))
}

/// The hint for a model that cannot be opened or run.
pub(crate) fn infer_hint(error: &InferError) -> Option<String> {
    match error {
        InferError::Checkpoint(error) | InferError::Adapter(AdapterError::Checkpoint(error)) => checkpoint_hint(error),
        InferError::Adapter(AdapterError::NoBase { .. }) => {
            Some("name the base model by `--model BASE`, and the adapter by `--adapter DIR`".into())
        }
        InferError::AdapterOnAdapter(_) => {
            Some("with `--adapter`, name by `--model` the base model that the adapter belongs to".into())
        }
        InferError::TooFewExamples { .. } => Some("lower `--shots`, or use a file with more rows".into()),
        InferError::Chat(ChatError::NoTemplate { .. }) => Some(
            "use `moonlight generate --prompt` for a base model; for a chat model put its `chat_template.jinja` into the \
             folder"
                .into(),
        ),
        error => error.hint(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_names_its_options_and_the_library_does_not() {
        let error = InferError::AdapterOnAdapter("x".into());
        assert!(infer_hint(&error).unwrap().contains("--adapter"));
        assert!(!error.hint().unwrap().contains("--"));
        let error = InferError::from(AdapterError::NoBase { dir: "x".into(), base: None });
        assert!(infer_hint(&error).unwrap().contains("--adapter"));
        let error = InferError::from(ChatError::NoTemplate { dir: "x".into() });
        assert!(infer_hint(&error).unwrap().contains("moonlight generate"));
        assert!(!error.hint().unwrap().contains("moonlight"));
        let error = InferError::TooFewExamples { examples: 1, shots: 2 };
        assert!(infer_hint(&error).unwrap().contains("--shots"));
        assert!(!error.hint().unwrap().contains("--"));
    }

    #[test]
    fn other_hints_are_those_of_the_library() {
        let error = InferError::NoTokenizer("x".into());
        assert_eq!(infer_hint(&error), error.hint());
    }
}

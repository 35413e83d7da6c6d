//! What to do about errors of the libraries, in the words of this program's command line: the libraries name no program and
//! no option of one.

use moonlight_convert::CheckpointError;
use moonlight_convert::adapter::AdapterError;
use moonlight_infer::InferError;
use moonlight_infer::chat::ChatError;

/// What to do about an error of a checkpoint. The library names no program; this one's users fetch models by the other.
pub(crate) fn checkpoint_hint(error: &CheckpointError) -> Option<String> {
    let Some((repo, revision)) = error.not_cached() else { return error.hint() };
    let revision = revision.map(|revision| format!(" --revision {revision}")).unwrap_or_default();
    Some(format!("`moonlight-convert download {repo}{revision}` fetches it"))
}

/// What to do about a model that cannot be opened or run, in the words of this program's command line.
pub(crate) fn infer_hint(error: &InferError) -> Option<String> {
    match error {
        InferError::Checkpoint(error) | InferError::Adapter(AdapterError::Checkpoint(error)) => checkpoint_hint(error),
        InferError::Adapter(AdapterError::NoBase { .. }) => {
            Some("name the base as `--model BASE`, and the adapter as `--adapter DIR`".into())
        }
        InferError::AdapterOnAdapter(_) => {
            Some("`--model` beside `--adapter` is the model that the adapter belongs to".into())
        }
        InferError::TooFewExamples { .. } => Some("take fewer `--shots`, or another file".into()),
        InferError::Chat(ChatError::NoTemplate { .. }) => Some(
            "let a base model continue a text with `moonlight generate --prompt`; a chat model needs its \
             `chat_template.jinja` in the folder"
                .into(),
        ),
        error => error.hint(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_named_here_and_not_by_the_library() {
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
    fn other_hints_are_the_librarys() {
        let error = InferError::NoTokenizer("x".into());
        assert_eq!(infer_hint(&error), error.hint());
    }
}

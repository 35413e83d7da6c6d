//! What helps against an error, in the words of the programs' command lines: the libraries know none of them.

use moonlight_convert::CheckpointError;
use moonlight_convert::adapter::AdapterError;
use moonlight_infer::InferError;
use moonlight_infer::chat::ChatError;

/// For an error of a checkpoint: a model that is not on this machine is fetched by the other program.
pub(crate) fn checkpoint_hint(error: &CheckpointError) -> Option<String> {
    let Some((repo, revision)) = error.not_cached() else { return error.hint() };
    let revision = revision.map(|revision| format!(" --revision {revision}")).unwrap_or_default();
    Some(format!("`moonlight-convert download {repo}{revision}` fetches it"))
}

/// For a model that cannot be opened or run.
pub(crate) fn infer_hint(error: &InferError) -> Option<String> {
    match error {
        InferError::Checkpoint(error) | InferError::Adapter(AdapterError::Checkpoint(error)) => checkpoint_hint(error),
        InferError::Adapter(AdapterError::NoBase { .. }) => {
            Some("name the base as `--model BASE`, and the adapter as `--adapter DIR`".into())
        }
        InferError::AdapterOnAdapter(_) => {
            Some("`--model` beside `--adapter` is the model that the adapter belongs to".into())
        }
        InferError::Chat(ChatError::NoTemplate { .. }) => Some(
            "a model that was never taught to chat goes on from a text: `moonlight generate --prompt`; else put its \
             `chat_template.jinja` into the folder"
                .into(),
        ),
        InferError::TooFewExamples { .. } => Some("take fewer `--shots`, or another file".into()),
        error => error.hint(),
    }
}

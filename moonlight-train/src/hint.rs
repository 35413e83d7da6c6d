//! What helps against an error, in the words of the programs' command lines: the libraries know none of them.

use moonlight_convert::CheckpointError;

/// For an error of a checkpoint: a model that is not on this machine is fetched by the other program.
pub(crate) fn checkpoint_hint(error: &CheckpointError) -> Option<String> {
    let Some((repo, revision)) = error.not_cached() else { return error.hint() };
    let revision = revision.map(|revision| format!(" --revision {revision}")).unwrap_or_default();
    Some(format!("`moonlight-convert download {repo}{revision}` fetches it"))
}

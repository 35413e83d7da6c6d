//! What helps against an error, in the program's own commands and options: the library knows none of them.

use moonlight_convert::CheckpointError;
#[cfg(feature = "download")]
use moonlight_convert::hub::DownloadError;

/// For an error of a checkpoint.
pub(crate) fn checkpoint(error: &CheckpointError) -> Option<String> {
    if let Some((repo, revision)) = error.not_cached() {
        let revision = revision.map(|revision| format!(" --revision {revision}")).unwrap_or_default();
        return Some(format!("`moonlight-convert download {repo}{revision}` fetches it"));
    }
    match error {
        CheckpointError::Exists { .. } => {
            Some("choose another directory, or ask for it to be replaced (`--force`)".into())
        }
        _ => error.hint(),
    }
}

/// For an error of a download.
#[cfg(feature = "download")]
pub(crate) fn download(error: &DownloadError) -> Option<String> {
    match error {
        DownloadError::NoMatch { .. } => Some("`--include '*'` takes every file".into()),
        _ => error.hint(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_that_fetches_a_model_names_its_revision() {
        let hint = |model: &str| {
            let error = CheckpointError::NotCached { model: model.into(), cache: "cache".into() };
            checkpoint(&error).unwrap()
        };
        assert_eq!(hint("moonshotai/Kimi"), "`moonlight-convert download moonshotai/Kimi` fetches it");
        assert_eq!(
            hint("moonshotai/Moonlight@v2"),
            "`moonlight-convert download moonshotai/Moonlight --revision v2` fetches it"
        );
    }

    #[test]
    fn other_hints_are_the_librarys() {
        let error = CheckpointError::NoConfig { dir: "model".into() };
        assert_eq!(checkpoint(&error), error.hint());
        let error = CheckpointError::Exists { dir: "model".into() };
        assert!(checkpoint(&error).unwrap().contains("--force"));
        assert!(!error.hint().unwrap().contains("--force"));
    }
}

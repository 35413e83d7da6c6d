//! Hints in terms of this program's commands and options, which the library does not know.

use crate::CheckpointError;
#[cfg(feature = "download")]
use crate::hub::DownloadError;

/// The hint for an error of a checkpoint.
pub(crate) fn checkpoint(error: &CheckpointError) -> Option<String> {
    if let Some((repo, revision)) = error.not_cached() {
        let revision = revision.map(|revision| format!(" --revision {revision}")).unwrap_or_default();
        return Some(format!("download it with `moonlight-convert download {repo}{revision}`"));
    }
    match error {
        CheckpointError::Exists { dir } if dir.is_file() => {
            Some("choose another name, or replace the file with `--force`".into())
        }
        CheckpointError::Exists { .. } => Some("choose another directory, or replace this one with `--force`".into()),
        _ => error.hint(),
    }
}

/// The hint for an error of a download.
#[cfg(feature = "download")]
pub(crate) fn download(error: &DownloadError) -> Option<String> {
    match error {
        DownloadError::NoMatch { .. } => Some("download all files with `--include '*'`".into()),
        _ => error.hint(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_download_command_names_the_revision() {
        let hint = |model: &str| {
            let error = CheckpointError::NotCached { model: model.into(), cache: "cache".into() };
            checkpoint(&error).unwrap()
        };
        assert_eq!(hint("moonshotai/Kimi"), "download it with `moonlight-convert download moonshotai/Kimi`");
        assert_eq!(
            hint("moonshotai/Moonlight@v2"),
            "download it with `moonlight-convert download moonshotai/Moonlight --revision v2`"
        );
    }

    #[test]
    fn other_hints_are_those_of_the_library() {
        let error = CheckpointError::NoConfig { dir: "model".into() };
        assert_eq!(checkpoint(&error), error.hint());
        let error = CheckpointError::Exists { dir: "model".into() };
        assert!(checkpoint(&error).unwrap().contains("--force"));
        assert!(!error.hint().unwrap().contains("--force"));
    }
}

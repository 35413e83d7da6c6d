//! Where a command's results go: to stdout, or to a file that is there whole or not at all.

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};

use moonlight_convert::FileError;
use moonlight_infer::InferError;
use serde_json::Value;

use crate::error::TrainError;
use crate::file_id::FileId;
use crate::output_file::OutputFile;

/// How messages call the standard output.
const STDOUT: &str = "stdout";

/// Prints to stdout and sees to it that it arrives there.
pub(super) fn print(text: &str) -> Result<(), TrainError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(TrainError::write(STDOUT))
}

/// Text that a model wrote, for stdout: on a terminal what would command it is escaped; for a file or a pipe it is as it is.
pub(super) fn of_model(text: &str) -> std::borrow::Cow<'_, str> {
    match io::stdout().is_terminal() {
        true => moonlight_convert::printable_lines(text),
        false => text.into(),
    }
}

/// Whether all that is wrong is that nobody reads stdout any more, as in `moonlight generate ... | head`.
pub(super) fn is_closed_pipe(error: &TrainError) -> bool {
    match error {
        TrainError::File(FileError { path, source, .. })
        | TrainError::Infer(InferError::File(FileError { path, source, .. })) => {
            path == Path::new(STDOUT) && source.kind() == ErrorKind::BrokenPipe
        }
        _ => false,
    }
}

/// Refuses an output that is one of the inputs.
pub(super) fn refuse_input<'a>(output: &Path, inputs: impl IntoIterator<Item = &'a PathBuf>) -> Result<(), TrainError> {
    match inputs.into_iter().find(|input| FileId::is_same_file(output, input)) {
        None => Ok(()),
        Some(input) => Err(TrainError::Request {
            problem: format!("`{}` would be written over `{}`, which is read", output.display(), input.display()),
            hint: Some("let `--output` be another file".into()),
        }),
    }
}

/// Lines of JSON.
pub(super) struct JsonLines {
    path: PathBuf,
    to: To,
}

enum To {
    Stdout,
    File(OutputFile),
}

impl JsonLines {
    /// Begins a file, which must be none of the inputs, or goes to stdout where there is no path.
    pub(super) fn create<'a>(
        path: Option<&Path>,
        inputs: impl IntoIterator<Item = &'a PathBuf>,
    ) -> Result<Self, TrainError> {
        let Some(path) = path else { return Ok(Self { path: STDOUT.into(), to: To::Stdout }) };
        refuse_input(path, inputs)?;
        let file = OutputFile::create(path).map_err(TrainError::write(path))?;
        Ok(Self { path: path.to_owned(), to: To::File(file) })
    }

    /// Writes a line. The error is that of the functions that take a closure.
    pub(super) fn line(&mut self, value: &Value) -> Result<(), InferError> {
        let line = format!("{value}\n");
        let written = match &mut self.to {
            To::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush())
            }
            To::File(file) => file.write_all(line.as_bytes()),
        };
        written.map_err(FileError::write(&self.path))
    }

    /// Puts the file into its place.
    pub(super) fn finish(self) -> Result<(), TrainError> {
        match self.to {
            To::Stdout => Ok(()),
            To::File(file) => file.finish().map_err(TrainError::write(self.path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_closed_stdout_is_told_from_other_failures() {
        let broken = || io::Error::from(ErrorKind::BrokenPipe);
        assert!(is_closed_pipe(&TrainError::write(STDOUT)(broken())));
        assert!(is_closed_pipe(&TrainError::from(FileError::write::<InferError>(STDOUT)(broken()))));
        assert!(!is_closed_pipe(&TrainError::write("x")(broken())));
        assert!(!is_closed_pipe(&TrainError::write(STDOUT)(ErrorKind::StorageFull.into())));
    }

    #[test]
    fn an_input_is_not_written_over_by_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| dir.path().join(name);
        std::fs::write(place("in"), "kept").unwrap();
        std::fs::hard_link(place("in"), place("also")).unwrap();
        let inputs = [place("other"), place("in")];
        for output in [place("in"), place("also"), dir.path().join("./in")] {
            let error = JsonLines::create(Some(&output), &inputs).err().unwrap();
            assert!(error.to_string().contains("which is read"), "{error}");
        }
        let mut lines = JsonLines::create(Some(&place("out")), &inputs).unwrap();
        lines.line(&json!({"a": 1})).unwrap();
        assert!(!place("out").exists());
        lines.finish().unwrap();
        assert_eq!(std::fs::read_to_string(place("out")).unwrap(), "{\"a\":1}\n");
        assert_eq!(std::fs::read_to_string(place("in")).unwrap(), "kept");
        JsonLines::create(Some(Path::new("/dev/null")), &["/dev/null".into()]).unwrap().finish().unwrap();
    }
}

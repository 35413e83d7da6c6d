//! Where a command's results go: stdout, or a file that is either complete or absent.

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};

use moonlight_convert::FileError;
use moonlight_infer::InferError;
use serde_json::Value;

use crate::error::TrainError;
use crate::file_id::FileId;
use crate::output_file::OutputFile;

/// The name of standard output in messages, in place of a path.
const STDOUT: &str = "stdout";

/// Prints to stdout and flushes, so that a failed write is an error of the command.
pub(super) fn print(text: &str) -> Result<(), TrainError> {
    print_bytes(text.as_bytes())
}

/// [`print`] of bytes.
pub(super) fn print_bytes(bytes: &[u8]) -> Result<(), TrainError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(TrainError::write(STDOUT))
}

/// Text from a model, for stdout. If stdout is a terminal, control sequences are escaped, so that a model cannot control it.
pub(super) fn model_text(text: &str) -> std::borrow::Cow<'_, str> {
    match io::stdout().is_terminal() {
        true => moonlight_convert::printable_lines(text),
        false => text.into(),
    }
}

/// Whether the error is only that the reader of stdout has closed it, as in `moonlight generate ... | head`.
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
            problem: format!("the output `{}` is the input `{}`", output.display(), input.display()),
            hint: Some("choose another file for `--output`".into()),
        }),
    }
}

/// Results as lines of JSON.
pub(super) struct JsonLines {
    path: PathBuf,
    to: To,
}

enum To {
    Stdout,
    File(OutputFile),
}

impl JsonLines {
    /// Creates the file at `path`, which must not be an input, or writes to stdout if there is no path.
    pub(super) fn create<'a>(
        path: Option<&Path>,
        inputs: impl IntoIterator<Item = &'a PathBuf>,
    ) -> Result<Self, TrainError> {
        let Some(path) = path else { return Ok(Self { path: STDOUT.into(), to: To::Stdout }) };
        refuse_input(path, inputs)?;
        let file = OutputFile::create(path).map_err(TrainError::write(path))?;
        Ok(Self { path: path.to_owned(), to: To::File(file) })
    }

    /// Writes a line. The error type is the one that the library's functions expect from a callback.
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

    /// Renames the finished file to its path.
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
    fn a_closed_stdout_is_not_any_failure() {
        let broken = || io::Error::from(ErrorKind::BrokenPipe);
        assert!(is_closed_pipe(&TrainError::write(STDOUT)(broken())));
        assert!(is_closed_pipe(&TrainError::from(FileError::write::<InferError>(STDOUT)(broken()))));
        assert!(!is_closed_pipe(&TrainError::write("x")(broken())));
        assert!(!is_closed_pipe(&TrainError::write(STDOUT)(ErrorKind::StorageFull.into())));
    }

    #[test]
    fn an_input_is_never_the_output_under_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("in"), "kept").unwrap();
        std::fs::hard_link(path("in"), path("also")).unwrap();
        let inputs = [path("other"), path("in")];
        for output in [path("in"), path("also"), dir.path().join("./in")] {
            let error = JsonLines::create(Some(&output), &inputs).err().unwrap();
            assert!(error.to_string().contains("is the input"), "{error}");
        }
        let mut lines = JsonLines::create(Some(&path("out")), &inputs).unwrap();
        lines.line(&json!({"a": 1})).unwrap();
        assert!(!path("out").exists());
        lines.finish().unwrap();
        assert_eq!(std::fs::read_to_string(path("out")).unwrap(), "{\"a\":1}\n");
        assert_eq!(std::fs::read_to_string(path("in")).unwrap(), "kept");
        JsonLines::create(Some(Path::new("/dev/null")), &["/dev/null".into()]).unwrap().finish().unwrap();
    }
}

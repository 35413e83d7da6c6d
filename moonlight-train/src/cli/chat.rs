//! `moonlight chat`.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use moonlight_convert::{Access, FileError};
use moonlight_infer::chat::{ChatEncoder, Message};
use moonlight_infer::generate::{Sampler, Session, StopReason};
use moonlight_infer::tokenizer::Tokenizer;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::INTERRUPTED;
use super::generate::SamplingArguments;
use super::logging::reply;
use super::model::ModelArguments;
use super::output::{model_text, print};
use super::signals::{self, Response, Signal};
use crate::error::TrainError;
use crate::output_file::OutputFile;
use crate::trainer::terminal;

const HELP: &str = "/system TEXT  start again with another system message\n/reset        start again\n\
     /save FILE    write the conversation as a line of JSON\n/help         print this list\n/exit         leave (or Ctrl-D)\n\
     Ctrl-C stops an answer; at the prompt it leaves";

/// Talk to a model in its chat template
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// The system message [default: that of the template]
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// The most tokens of an answer
    #[arg(long, default_value_t = 1024)]
    max_new_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArguments,
}

/// A conversation in progress.
struct Conversation<'a> {
    encoder: ChatEncoder,
    tokenizer: &'a Tokenizer,
    session: Session<'a>,
    sampler: Sampler,
    eos: Vec<u32>,
    max_new_tokens: usize,
    messages: Vec<Message>,
    answering: Arc<Answering>,
}

/// The state that the signal handler shares with the conversation.
#[derive(Default)]
struct Answering {
    /// Whether an answer is being generated.
    now: AtomicBool,
    /// Whether the answer must stop.
    interrupted: AtomicBool,
}

impl Answering {
    /// The first Ctrl-C during an answer stops the answer. A second one, one at the prompt, and any other signal end the program.
    fn respond(&self, signal: Signal) -> Response {
        let stops = signal == Signal::Interrupt && self.now.load(Ordering::SeqCst);
        if stops && !self.interrupted.swap(true, Ordering::SeqCst) { Response::Handled } else { Response::End }
    }

    fn begin(&self) {
        self.interrupted.store(false, Ordering::SeqCst);
        self.now.store(true, Ordering::SeqCst);
    }

    fn end(&self) {
        self.now.store(false, Ordering::SeqCst);
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, TrainError> {
    let opened = arguments.model.open()?;
    let tokenizer = opened.tokenizer.as_ref().ok_or_else(|| TrainError::Request {
        problem: format!("`{}` has no tokenizer", opened.dir.display()),
        hint: Some("`moonlight generate --prompt-tokens 1,2,3` needs none".into()),
    })?;
    let encoder = opened.chat_encoder()?;
    let answering = Arc::new(Answering::default());
    let handle = answering.clone();
    terminal::remember();
    signals::handle(move |signal| {
        let response = handle.respond(signal);
        if response == Response::End {
            terminal::restore_mode(); // at the prompt rustyline has set raw mode, which would outlive the program
        }
        response
    });
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        tracing::info!("chat template: {}; /help for commands", encoder.template().source());
    }
    let mut conversation = Conversation {
        session: Session::new(&opened.model, opened.model.config().max_position_embeddings),
        eos: opened.end_of_turn(&encoder),
        encoder,
        tokenizer,
        sampler: Sampler::new(arguments.sampling.sampling()),
        max_new_tokens: arguments.max_new_tokens,
        messages: system(arguments.system.as_deref()),
        answering,
    };
    let failed = |error| unreadable(&error, interactive);
    let mut editor = DefaultEditor::new().map_err(failed)?;
    loop {
        match editor.readline(if interactive { "> " } else { "" }) {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) => {
                let _ = editor.add_history_entry(&line);
                if conversation.handle_line(&line)?.is_break() {
                    return Ok(ExitCode::SUCCESS);
                }
            }
            // In raw mode Ctrl-C arrives as a key, not as a signal.
            Err(ReadlineError::Interrupted) => return Ok(ExitCode::from(INTERRUPTED)),
            Err(ReadlineError::Eof) => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(failed(error)),
        }
    }
}

/// The error for input that cannot be read.
fn unreadable(error: &ReadlineError, interactive: bool) -> TrainError {
    let is_text = !matches!(error, ReadlineError::Io(error) if error.kind() == std::io::ErrorKind::InvalidData);
    let from = if interactive { "the terminal" } else { "standard input" };
    let (problem, hint) = match is_text {
        true => (format!("{from} cannot be read: {error}"), None),
        false => (
            format!("{from} is not UTF-8"),
            Some("convert it, for example with `iconv -f WINDOWS-1252 -t UTF-8`".into()),
        ),
    };
    TrainError::Request { problem, hint }
}

fn system(text: Option<&str>) -> Vec<Message> {
    text.map(|text| Message::new("system", text)).into_iter().collect()
}

impl Conversation<'_> {
    /// Handles a line of input: a command or a message.
    fn handle_line(&mut self, line: &str) -> Result<ControlFlow<()>, TrainError> {
        let (word, rest) = line.trim().split_once(char::is_whitespace).unwrap_or((line.trim(), ""));
        match word {
            "/exit" | "/quit" => return Ok(ControlFlow::Break(())),
            "/help" => reply!("{HELP}"),
            "/reset" => self.messages.retain(|message| message.role() == "system"),
            "/system" => self.messages = system(Some(rest.trim()).filter(|text| !text.is_empty())),
            // An error is reported and does not end the conversation.
            "/save" => match self.save(Path::new(rest.trim())) {
                Ok(()) => reply!("wrote `{}`", rest.trim()),
                Err(error) => error.report(),
            },
            _ if word.starts_with('/') => reply!("unknown command `{word}`; /help lists the commands"),
            _ => {
                self.answering.begin();
                let answered = self.answer(line);
                self.answering.end();
                if let Err(error) = answered {
                    self.messages.pop(); // the user's message, so that the next one does not follow it unanswered
                    match error {
                        TrainError::File(FileError { access: Access::Write, .. }) => return Err(error),
                        error => error.report(),
                    }
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Sends a message to the model and prints its answer as it is generated.
    fn answer(&mut self, line: &str) -> Result<(), TrainError> {
        self.messages.push(Message::new("user", line));
        let prompt = self.encoder.tokens(&self.messages, true)?;
        let mut stream = self.tokenizer.stream();
        let mut written = Ok(());
        let mut answer = String::new();
        let mut show = |text: String| {
            if written.is_ok() {
                written = print(&model_text(&text));
            }
            answer.push_str(&text);
            written.is_ok()
        };
        let answering = self.answering.clone();
        let generated = self.session.generate(&prompt, self.max_new_tokens, &mut self.sampler, &self.eos, |token| {
            let shown = show(stream.push(token));
            if shown && !answering.interrupted.load(Ordering::SeqCst) {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })?;
        show(stream.finish());
        self.messages.push(Message::new("assistant", answer));
        written.and_then(|()| print("\n"))?;
        match generated.stop {
            StopReason::Eos | StopReason::Interrupted => {}
            StopReason::Length => {
                reply!("(stopped at {} tokens; `--max-new-tokens` allows more)", generated.tokens.len())
            }
        }
        Ok(())
    }

    /// Writes the conversation as a line `{"messages": [...]}`, the format of training data.
    fn save(&self, path: &Path) -> Result<(), TrainError> {
        let line = serde_json::json!({ "messages": self.messages }).to_string() + "\n";
        let shown = if path.as_os_str().is_empty() { PathBuf::from("(no name)") } else { path.to_owned() };
        OutputFile::write(path, line.as_bytes()).map_err(TrainError::write(shown))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_that_cannot_be_read_is_an_error_with_a_hint() {
        let of_bytes = ReadlineError::Io(std::io::Error::new(
            std::io::ErrorKind::InvalidData,
            "stream did not contain valid UTF-8",
        ));
        let error = unreadable(&of_bytes, false);
        assert_eq!(error.to_string(), "standard input is not UTF-8");
        assert!(error.hint().unwrap().contains("iconv"));
        let other = ReadlineError::Io(std::io::Error::other("gone"));
        assert_eq!(unreadable(&other, true).to_string(), "the terminal cannot be read: gone");
    }

    #[test]
    fn the_first_ctrl_c_stops_an_answer_and_everything_else_the_program() {
        let answering = Answering::default();
        assert_eq!(answering.respond(Signal::Interrupt), Response::End, "at the prompt");
        for _ in 0..2 {
            answering.begin();
            assert!(!answering.interrupted.load(Ordering::SeqCst));
            assert_eq!(answering.respond(Signal::Interrupt), Response::Handled);
            assert!(answering.interrupted.load(Ordering::SeqCst));
            assert_eq!(answering.respond(Signal::Interrupt), Response::End, "the second");
            answering.end();
            assert_eq!(answering.respond(Signal::Interrupt), Response::End);
        }
        answering.begin();
        assert_eq!(answering.respond(Signal::Terminate), Response::End);
    }
}

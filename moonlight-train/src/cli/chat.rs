//! `moonlight chat`.

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use moonlight_convert::{Access, FileError};
use moonlight_infer::chat::{ChatEncoder, Message};
use moonlight_infer::generate::{Sampler, Session, Stop};
use moonlight_infer::tokenizer::Tokenizer;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::generate::SamplingArguments;
use super::model::ModelArguments;
use crate::error::TrainError;

const HELP: &str = "/system TEXT  begin anew with another system message\n/reset        begin anew\n\
     /save FILE    write the conversation as a line of JSON\n/help         this\n/exit         leave (or Ctrl-D)\n\
     Ctrl-C stops an answer.";

/// Talk to a model in its own chat template.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// What the system message says; else the template's own.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// The longest answer, in tokens.
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
    /// Set by Ctrl-C, taken back before each answer.
    interrupted: Arc<AtomicBool>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let opened = arguments.model.open()?;
    let tokenizer = opened.tokenizer.as_ref().ok_or_else(|| TrainError::Request {
        problem: format!("`{}` has no tokenizer", opened.dir.display()),
        hint: Some("`moonlight generate --prompt-tokens 1,2,3` needs none".into()),
    })?;
    let encoder = opened.chat_encoder()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let handle = interrupted.clone();
    ctrlc::set_handler(move || handle.store(true, Ordering::Relaxed))
        .map_err(|error| TrainError::Stage(format!("signals cannot be handled: {error}")))?;
    let talking = std::io::stdin().is_terminal();
    if talking {
        eprintln!("chat template: {}; /help for commands", encoder.template().source());
    }
    let mut conversation = Conversation {
        session: Session::new(&opened.model, opened.model.config().max_position_embeddings),
        encoder,
        tokenizer,
        sampler: Sampler::new(arguments.sampling.sampling()),
        eos: opened.end_of_turn(),
        max_new_tokens: arguments.max_new_tokens,
        messages: system(arguments.system.as_deref()),
        interrupted,
    };
    let failed = |error: ReadlineError| TrainError::Stage(format!("the terminal cannot be read: {error}"));
    let mut editor = DefaultEditor::new().map_err(failed)?;
    loop {
        match editor.readline(if talking { "> " } else { "" }) {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) => {
                let _ = editor.add_history_entry(&line);
                if conversation.take(&line)?.is_break() {
                    return Ok(());
                }
            }
            Err(ReadlineError::Interrupted) => eprintln!("/exit or Ctrl-D to leave"),
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
    }
}

fn system(text: Option<&str>) -> Vec<Message> {
    text.map(|text| Message::new("system", text)).into_iter().collect()
}

impl Conversation<'_> {
    /// Takes a line: a command, or what the user says.
    fn take(&mut self, line: &str) -> Result<ControlFlow<()>, TrainError> {
        let (word, rest) = line.trim().split_once(char::is_whitespace).unwrap_or((line.trim(), ""));
        match word {
            "/exit" | "/quit" => return Ok(ControlFlow::Break(())),
            "/help" => eprintln!("{HELP}"),
            "/reset" => self.messages.retain(|message| message.role == "system"),
            "/system" => self.messages = system(Some(rest.trim()).filter(|text| !text.is_empty())),
            // What goes wrong in a conversation does not end it.
            "/save" => match self.save(Path::new(rest.trim())) {
                Ok(()) => eprintln!("saved: {}", rest.trim()),
                Err(error) => error.report(),
            },
            _ if word.starts_with('/') => eprintln!("there is no command `{word}`; /help says which there are"),
            _ => {
                if let Err(error) = self.answer(line) {
                    self.messages.pop();
                    match error {
                        TrainError::File(FileError { access: Access::Write, .. }) => return Err(error),
                        error => error.report(),
                    }
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Says a line to the model and writes its answer as it comes.
    fn answer(&mut self, line: &str) -> Result<(), TrainError> {
        self.messages.push(Message::new("user", line));
        let prompt = self.encoder.tokens(&self.messages, true)?;
        self.interrupted.store(false, Ordering::Relaxed);
        let mut stream = self.tokenizer.stream();
        let mut written = Ok(());
        let mut answer = String::new();
        let mut show = |text: String| {
            let mut stdout = std::io::stdout().lock();
            written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
            answer.push_str(&text);
            written.is_ok()
        };
        let interrupted = self.interrupted.clone();
        let generated = self.session.generate(&prompt, self.max_new_tokens, &mut self.sampler, &self.eos, |token| {
            let shown = show(stream.push(token));
            if shown && !interrupted.load(Ordering::Relaxed) {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })?;
        show(stream.finish());
        self.messages.push(Message::new("assistant", answer));
        written.and_then(|()| writeln!(std::io::stdout())).map_err(TrainError::write("stdout"))?;
        match generated.stop {
            Stop::Eos | Stop::Interrupted => {}
            Stop::Length => eprintln!("(cut at {} tokens)", generated.tokens.len()),
        }
        Ok(())
    }

    /// Writes the conversation as a line `{"messages": [...]}`, which is also a line of training data.
    fn save(&self, path: &Path) -> Result<(), TrainError> {
        let line = serde_json::json!({ "messages": self.messages }).to_string() + "\n";
        let shown = if path.as_os_str().is_empty() { PathBuf::from("(no name)") } else { path.to_owned() };
        std::fs::write(path, line).map_err(TrainError::write(shown))
    }
}

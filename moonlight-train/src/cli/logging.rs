//! Log messages, as plain lines on stderr.

use std::fmt;
use std::io::{self, Write};
use std::time::Instant;

use moonlight_convert::printable_lines;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, fmt as layer};

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Verbosity {
    /// Errors, warnings, and replies to the user.
    Quiet,
    /// In addition the progress of the program, with a line for each step of a run.
    #[default]
    Normal,
    /// In addition details; each line begins with the time since the start and the module.
    Verbose,
}

impl Verbosity {
    fn level(self) -> Level {
        match self {
            Self::Quiet => Level::WARN,
            Self::Normal => Level::INFO,
            Self::Verbose => Level::DEBUG,
        }
    }
}

/// The target of events that answer the user and are printed even by `--quiet`.
pub(super) const REPLY: &str = "moonlight::reply";

/// Prints a line to stderr that the user has asked for, for example by `/help` in a chat.
macro_rules! reply {
    ($($message:tt)*) => { ::tracing::info!(target: $crate::cli::logging::REPLY, $($message)*) };
}
pub(super) use reply;

/// Installs the subscriber that prints the log of this workspace's crates: each message, after `warning: ` or `error: ` for these
/// levels, with control sequences escaped. Does nothing if the process already has a subscriber.
///
/// If stderr is closed or full, the output is lost and nothing else changes: the work of a command is worth more than its log.
pub(super) fn install(verbosity: Verbosity) {
    // The layer would print its internal errors by `eprintln!`, which panics if stderr is closed; so they are turned off.
    let lines = PlainLines { start: (verbosity == Verbosity::Verbose).then(Instant::now) };
    let layer = layer::layer().event_format(lines).log_internal_errors(false).with_writer(|| Stderr);
    let targets = Targets::new().with_target("moonlight", verbosity.level()).with_target(REPLY, Level::INFO);
    let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer.with_filter(targets)));
}

/// Stderr, except that writing to it never fails.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().lock().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Default)]
struct PlainLines {
    /// The start of the program, if each line has the time since then.
    start: Option<Instant>,
}

impl<S, N> FormatEvent<S, N> for PlainLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut message = Message(String::new());
        event.record(&mut message);
        let prefix = match *event.metadata().level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            _ => "",
        };
        let (message, target) = (printable_lines(&message.0), event.metadata().target());
        match self.start {
            None => writeln!(writer, "{prefix}{message}"),
            Some(start) => writeln!(writer, "[{:.3} s {target}] {prefix}{message}", start.elapsed().as_secs_f64()),
        }
    }
}

/// The message of an event, without its other fields.
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_message_is_a_plain_line() {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let lines = layer::layer().event_format(PlainLines::default()).with_writer(move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), || {
            tracing::info!(step = 3, "step:     {}  \"quoted\"\nand a second line", 3);
            tracing::warn!("careful");
            tracing::error!("wrong\nhint: correct it");
            tracing::info!("a \x1b[2J\u{9b}1m file\r");
        });
        let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        let expected = "step:     3  \"quoted\"\nand a second line\nwarning: careful\nerror: wrong\nhint: correct it\n";
        assert_eq!(text, expected.to_owned() + "a \\u{1b}[2J\\u{9b}1m file\\r\n");
    }

    /// The lines that a subscriber of this verbosity prints of one event of each kind.
    fn logged(verbosity: Verbosity) -> String {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let layer = layer::layer().event_format(PlainLines::default()).with_writer(move || writer.clone());
        let targets = Targets::new().with_target("moonlight", verbosity.level()).with_target(REPLY, Level::INFO);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer.with_filter(targets)), || {
            tracing::debug!("debug");
            tracing::info!("info");
            tracing::warn!("careful");
            reply!("reply");
            tracing::error!(target: "other_crate", "theirs");
        });
        let bytes = buffer.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn quiet_keeps_warnings_and_replies() {
        assert_eq!(logged(Verbosity::Quiet), "warning: careful\nreply\n");
        assert_eq!(logged(Verbosity::Normal), "info\nwarning: careful\nreply\n");
        assert_eq!(logged(Verbosity::Verbose), "debug\ninfo\nwarning: careful\nreply\n");
    }
}

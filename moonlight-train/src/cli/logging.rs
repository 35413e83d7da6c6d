//! What the libraries log, as plain lines on stderr.

use std::fmt;
use std::io::{self, Write};

use moonlight_convert::printable_lines;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, fmt as layer};

/// From now on prints what this workspace's crates log: the message alone, after `warning: ` or `error: ` if it is one, with
/// what would command a terminal escaped. Does nothing if the process has a subscriber already.
///
/// A stderr that is closed, gone or full loses lines and nothing else: what a program does is worth more than what it says.
pub(super) fn install() {
    // Its own complaints would go to stderr by `eprintln!`, which panics.
    let lines = layer::layer().event_format(PlainLines).log_internal_errors(false).with_writer(|| Stderr);
    let ours = Targets::new().with_target("moonlight", Level::INFO);
    let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(lines.with_filter(ours)));
}

/// Stderr, where whatever is written counts as written.
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

struct PlainLines;

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
        writeln!(writer, "{prefix}{}", printable_lines(&message.0))
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
        let lines = layer::layer().event_format(PlainLines).with_writer(move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), || {
            tracing::info!(step = 3, "step:     {}  \"quoted\"\nand a second line", 3);
            tracing::warn!("careful");
            tracing::error!("wrong\nhint: mend it");
            tracing::info!("a \x1b[2J\u{9b}1m file\r");
        });
        let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        let expected = "step:     3  \"quoted\"\nand a second line\nwarning: careful\nerror: wrong\nhint: mend it\n";
        assert_eq!(text, expected.to_owned() + "a \\u{1b}[2J\\u{9b}1m file\\r\n");
    }
}

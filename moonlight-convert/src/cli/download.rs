//! `moonlight-convert download`.

use std::process::ExitCode;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use moonlight_convert::hub::{DownloadEvent, DownloadRequest, download};
use moonlight_convert::printable;

use super::output::{Output, note};
use crate::Failure;

/// What to fetch.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The model's name on the Hub, e.g. `moonshotai/Moonlight-16B-A3B-Instruct`.
    repo: String,
    /// A branch, tag or commit; `main` where it is not given.
    #[arg(long)]
    revision: Option<String>,
    /// Files to fetch in place of those that a checkpoint is made of, e.g. `*.json`; may be given several times.
    #[arg(long, value_name = "GLOB")]
    include: Vec<String>,
}

/// Fetches, and prints the snapshot's directory.
pub(crate) fn run(Arguments { repo, revision, include }: Arguments) -> Result<ExitCode, Failure> {
    // Hidden by itself where stderr is no terminal.
    let bar = ProgressBar::no_length().with_style(style());
    let watch = |progress: DownloadEvent<'_>| match progress {
        DownloadEvent::Started { files, bytes } => {
            bar.set_length(bytes);
            bar.set_message(format!("{files} files"));
        }
        DownloadEvent::Cached { bytes } => {
            bar.inc(bytes);
            // What was there did not come over the line: it is no part of the rate.
            bar.reset_eta();
        }
        DownloadEvent::Fetched { bytes } => bar.inc(bytes),
        DownloadEvent::Discarded { bytes } => bar.dec(bytes),
        DownloadEvent::Retrying { file, problem } => above(&bar, &format!("{file}: {problem}; once more")),
        DownloadEvent::Waiting { file } => above(&bar, &format!("{file}: another process fetches it; waiting for it")),
        DownloadEvent::Finished { file, bytes, fetched } => {
            above(&bar, &format!("{file}: {bytes} bytes, {}", if fetched { "fetched" } else { "there already" }));
        }
        _ => {}
    };
    // A signal ends the program at once: what is there of a file is gone on from, and nothing else is left behind.
    let done = download(&DownloadRequest { repo, revision, include }, &watch);
    bar.finish_and_clear();
    let done = done.map_err(Failure::Download)?;
    note(format_args!("{} files, {} bytes, {} fetched; all of them are checked", done.files, done.bytes, done.fetched));
    let mut output = Output::new();
    output.line(format_args!("{}", done.dir.display()));
    output.finish()?;
    Ok(ExitCode::SUCCESS)
}

/// A line above the bar, or on stderr where there is none.
fn above(bar: &ProgressBar, line: &str) {
    if bar.is_hidden() {
        note(format_args!("{line}"));
    } else {
        bar.println(printable(line));
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{msg} [{wide_bar}] {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

//! `moonlight-convert download`.

use std::process::ExitCode;

use crate::hub::{DownloadEvent, DownloadRequest, download};
use crate::printable;
use clap::Args;
use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};

use super::Failure;
use super::output::{Output, note};
use super::units::plural;

/// Arguments of `download`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The model's name on the Hub, for example `moonshotai/Moonlight-16B-A3B-Instruct`
    repo: String,
    /// A branch, tag or commit [default: main]
    #[arg(long)]
    revision: Option<String>,
    /// Download the files that match, for example `*.json`, instead of those of a checkpoint; may be repeated
    #[arg(long, value_name = "GLOB")]
    include: Vec<String>,
}

/// Downloads the model, and prints the snapshot's directory.
pub(crate) fn run(Arguments { repo, revision, include }: Arguments) -> Result<ExitCode, Failure> {
    // indicatif hides the bar if stderr is not a terminal.
    let bar = ProgressBar::no_length().with_style(style());
    let watch = |progress: DownloadEvent<'_>| match progress {
        DownloadEvent::Started { files, bytes } => {
            bar.set_length(bytes);
            bar.set_message(format!("{files} files"));
        }
        DownloadEvent::Cached { bytes } => {
            bar.inc(bytes);
            // Cached bytes were not transferred: they must not count for the rate.
            bar.reset_eta();
        }
        DownloadEvent::Fetched { bytes } => bar.inc(bytes),
        DownloadEvent::Discarded { bytes } => bar.dec(bytes),
        DownloadEvent::Retrying { file, problem } => above(&bar, &format!("{file}: {problem}; retrying")),
        DownloadEvent::Waiting { file } => {
            above(&bar, &format!("{file}: waiting for another process that downloads it"))
        }
        DownloadEvent::Finished { file, bytes, fetched } => {
            let how = if fetched { "downloaded" } else { "already in the cache" };
            above(&bar, &format!("{file}: {}, {how}", DecimalBytes(bytes)));
        }
    };
    // A signal ends the program immediately: partial files are resumed by the next run, and no others are left.
    let done = download(&DownloadRequest { repo, revision, include }, &watch);
    bar.finish_and_clear();
    let done = done.map_err(Failure::Download)?;
    note(format_args!(
        "{}, {}: {} downloaded, all checked",
        plural(done.files, "file"),
        DecimalBytes(done.bytes),
        done.fetched
    ));
    let mut output = Output::new();
    output.line(format_args!("{}", done.dir.display()));
    output.finish()?;
    Ok(ExitCode::SUCCESS)
}

/// Prints a line above the bar, or on stderr without one.
fn above(bar: &ProgressBar, line: &str) {
    if bar.is_hidden() {
        note(format_args!("{line}"));
    } else {
        bar.println(printable(line));
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template(
        "{msg} [{wide_bar}] {decimal_bytes}/{decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar())
}

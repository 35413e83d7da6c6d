//! `moonlight-convert verify`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::manifest::{Depth, MANIFEST, Manifest};
use crate::report::{UnusedDifference, UnusedTensor, check_digests};
use crate::{Checkpoint, SkipReason, printable};
use clap::Args;

use super::Failure;
use super::output::{Output, note};
use super::progress::Bar;
use super::units::plural;

/// Arguments of `verify`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The checkpoint to verify
    a: PathBuf,
    /// The checkpoint to compare with; without it, A is compared with its `manifest.json`
    #[arg(conflicts_with = "sha256")]
    b: Option<PathBuf>,
    /// Check the files of A against a list: lines `DIGEST  NAME` as written by `sha256sum`, or `NUMBER BYTES DIGEST`
    /// for numbered shards
    #[arg(long, value_name = "FILE")]
    sha256: Option<PathBuf>,
    /// The largest difference at which values count as equal
    #[arg(long, default_value_t = 0.0, conflicts_with = "sha256")]
    tolerance: f64,
    /// Compare what exists, if files are missing
    #[arg(long, conflicts_with = "sha256")]
    partial: bool,
    /// Compare only the tensors that the model uses: no vision tower, no multi-token-prediction layers
    #[arg(long, conflicts_with = "sha256")]
    model_only: bool,
}

/// Returns exit code 0 if everything is equal or complete, 1 otherwise.
pub(crate) fn run(arguments: Arguments) -> Result<ExitCode, Failure> {
    let Arguments { a, b, sha256, tolerance, partial, model_only } = arguments;
    match (b, sha256) {
        (_, Some(list)) => digests(&a, &list),
        (Some(b), None) => compare(&Checkpoint::open(a)?, &Checkpoint::open(b)?, tolerance, partial, model_only),
        (None, None) => manifest(&a),
    }
}

fn manifest(dir: &Path) -> Result<ExitCode, Failure> {
    let Some(damages) = Manifest::check(dir, Depth::Digests)? else {
        note(format_args!("error: `{}` has no `{MANIFEST}`", printable(&dir.display().to_string())));
        note(format_args!(
            "hint: pass a second checkpoint, or a list with `--sha256`; only checkpoints of training runs have a manifest"
        ));
        return Ok(ExitCode::FAILURE);
    };
    let mut output = Output::new();
    damages.iter().for_each(|damage| output.line(format_args!("{}", printable(&damage.to_string()))));
    if damages.is_empty() {
        output.line(format_args!("complete: every file is as it was saved"));
    }
    output.finish()?;
    Ok(if damages.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn compare(
    a: &Checkpoint,
    b: &Checkpoint,
    tolerance: f64,
    partial: bool,
    model_only: bool,
) -> Result<ExitCode, Failure> {
    let mut incomplete = false;
    if !partial {
        for checkpoint in [a, b] {
            for problem in checkpoint.problems() {
                note(format_args!("problem: {}: {problem}", checkpoint.dir().display()));
                incomplete = true;
            }
        }
    }
    let comparison = a.compare(b, tolerance, &Bar::new())?;
    let mut output = Output::new();
    for difference in &comparison.differences {
        output.line(format_args!("{difference}"));
    }
    let [redundant, significant]: [Vec<&UnusedTensor>; 2] = {
        let (redundant, significant) = comparison.unused.iter().partition(|unused| unused.reason.is_redundant());
        [redundant, significant]
    };
    if !model_only {
        for unused in &significant {
            output.line(format_args!("{unused}"));
        }
    }
    let count = comparison.differences.len();
    if count > 0 {
        // Before anything is written to stderr, so that a terminal shows the differences above the error.
        output.finish()?;
        // `tensors` does not count those that only one checkpoint contains.
        note(format_args!("error: {count} of {} tensors differ", comparison.tensors.max(count)));
        return Ok(ExitCode::FAILURE);
    }
    if !significant.is_empty() && !model_only {
        output.finish()?;
        note(format_args!(
            "error: {} tensors of the model are equal, but {} tensors that it does not use differ",
            comparison.tensors,
            significant.len()
        ));
        note(format_args!("hint: compare only what the model uses with `--model-only`"));
        return Ok(ExitCode::FAILURE);
    }
    if incomplete {
        note(format_args!("error: all common tensors are equal, but the checkpoints are incomplete"));
        return Ok(ExitCode::FAILURE);
    }
    match comparison.dtypes_differ {
        0 => output.line(format_args!("equal: {} tensors", comparison.tensors)),
        some => output.line(format_args!("equal: {} tensors, {some} of them in different dtypes", comparison.tensors)),
    }
    let ignored = if model_only { &comparison.unused.iter().collect() } else { &redundant };
    let mut reasons: BTreeMap<(SkipReason, UnusedDifference), usize> = BTreeMap::new();
    for unused in ignored {
        *reasons.entry((unused.reason, unused.difference)).or_default() += 1;
    }
    for ((reason, difference), tensors) in reasons {
        let place = match difference {
            UnusedDifference::OnlyInFirst => "only in the first",
            UnusedDifference::OnlyInSecond => "only in the second",
            UnusedDifference::Bytes => "different",
        };
        let tensors = plural(tensors, "tensor");
        output.line(format_args!("ignored: {tensors} {place}: {}", reason.describe()));
    }
    output.finish()?;
    Ok(ExitCode::SUCCESS)
}

fn digests(dir: &Path, list: &Path) -> Result<ExitCode, Failure> {
    let files = check_digests(dir, list, &Bar::new())?;
    let wrong = files.iter().filter(|file| file.problem.is_some()).count();
    let mut output = Output::new();
    for file in &files {
        if let Some(problem) = &file.problem {
            output.line(format_args!("{}: {problem}", file.name));
        }
    }
    if wrong == 0 {
        output.line(format_args!("as listed: {}", plural(files.len(), "file")));
    }
    output.finish()?;
    if wrong == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    note(format_args!("error: {wrong} of {} files differ from the list", files.len()));
    Ok(ExitCode::FAILURE)
}

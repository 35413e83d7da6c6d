//! `moonlight-convert verify`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use moonlight_convert::report::check_digests;
use moonlight_convert::{Checkpoint, CheckpointError};

use super::progress::Bar;

/// What to compare.
#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// One checkpoint.
    a: PathBuf,
    /// The other.
    #[arg(required_unless_present = "sha256", conflicts_with = "sha256")]
    b: Option<PathBuf>,
    /// Check the files of A against a list instead: lines `DIGEST  NAME` as `sha256sum` writes them, or
    /// `NUMBER BYTES DIGEST` for numbered shards.
    #[arg(long, value_name = "FILE")]
    sha256: Option<PathBuf>,
    /// How far values may be apart and still count as equal.
    #[arg(long, default_value_t = 0.0, conflicts_with = "sha256")]
    tolerance: f64,
    /// Compare what is there, where files are absent.
    #[arg(long, conflicts_with = "sha256")]
    partial: bool,
}

/// Exit code 0 where all is equal, 1 where it is not.
pub(crate) fn run(arguments: Verify) -> Result<ExitCode, CheckpointError> {
    let Verify { a, b, sha256, tolerance, partial } = arguments;
    match (b, sha256) {
        (_, Some(list)) => digests(&a, &list),
        (Some(b), None) => compare(&Checkpoint::open(a)?, &Checkpoint::open(b)?, tolerance, partial),
        (None, None) => Ok(ExitCode::from(2)), // refused by the arguments' parser
    }
}

fn compare(a: &Checkpoint, b: &Checkpoint, tolerance: f64, partial: bool) -> Result<ExitCode, CheckpointError> {
    let mut incomplete = false;
    if !partial {
        for checkpoint in [a, b] {
            for problem in checkpoint.problems() {
                eprintln!("problem: {}: {problem}", checkpoint.dir().display());
                incomplete = true;
            }
        }
    }
    let comparison = a.compare(b, tolerance, &Bar::new())?;
    for difference in &comparison.differences {
        println!("{difference}");
    }
    let count = comparison.differences.len();
    if count > 0 {
        eprintln!("error: {count} of {} tensors differ", comparison.tensors.max(count));
        return Ok(ExitCode::FAILURE);
    }
    if incomplete {
        eprintln!("error: what is there is equal, and something is missing");
        return Ok(ExitCode::FAILURE);
    }
    match comparison.dtypes_differ {
        0 => println!("equal: {} tensors", comparison.tensors),
        some => println!("equal: {} tensors, {some} of them in different dtypes", comparison.tensors),
    }
    Ok(ExitCode::SUCCESS)
}

fn digests(dir: &Path, list: &Path) -> Result<ExitCode, CheckpointError> {
    let files = check_digests(dir, list, &Bar::new())?;
    let wrong = files.iter().filter(|file| file.problem.is_some()).count();
    for file in &files {
        if let Some(problem) = &file.problem {
            println!("{}: {problem}", file.name);
        }
    }
    if wrong == 0 {
        println!("as listed: {} files", files.len());
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("error: {wrong} of {} files are not as listed", files.len());
    Ok(ExitCode::FAILURE)
}

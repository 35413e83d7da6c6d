//! `moonlight report`.

use std::path::PathBuf;

use clap::Args;

use crate::error::TrainError;
use crate::output_file::OutputFile;
use crate::study::report::report;
use crate::study::study_file::{SMALL_TIER, Study};

/// Write the page of a study: tables, figures and intervals from the table of its runs
///
/// Nothing is trained: the page is made from `results/NAME.TIER.jsonl` next to the study, and says what is missing or cannot be concluded.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The study, a TOML file
    study: PathBuf,
    /// The size of the study: `small`, or a name from the file's `[tiers]`
    #[arg(long, default_value = SMALL_TIER)]
    tier: String,
    /// The folder for NAME.md and its figures [default: `runs/studies/NAME`]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let study = Study::open(&arguments.study, &arguments.tier)?;
    let report = report(&study)?;
    let folder = arguments.output.clone().unwrap_or_else(|| study.run_dir());
    std::fs::create_dir_all(&folder).map_err(TrainError::write(&folder))?;
    for (name, bytes) in report.figures.iter().map(|(name, svg)| (name.clone(), svg.as_slice())) {
        let path = folder.join(name);
        OutputFile::write(&path, bytes).map_err(TrainError::write(&path))?;
    }
    let path = folder.join(format!("{}.md", study.name));
    OutputFile::write(&path, report.page.as_bytes()).map_err(TrainError::write(&path))?;
    tracing::info!("wrote `{}` and {} figures", path.display(), report.figures.len());
    Ok(())
}

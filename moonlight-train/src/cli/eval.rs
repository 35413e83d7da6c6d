//! `moonlight eval`.

use std::path::PathBuf;

use clap::Args;
use moonlight_convert::printable_lines;
use moonlight_infer::eval::{EvalModel, Task, TaskFormat, evaluate, table, to_json};

use super::model::{ModelArguments, TextArguments};
use super::output::{JsonLines, print};
use crate::error::TrainError;

/// Evaluate on local files: multiple choice, perplexity, exact answers, as lm-evaluation-harness counts them
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    text: TextArguments,
    /// JSONL, a JSON array, CSV or parquet with rows of MMLU, ARC, HellaSwag, `{"text": "..."}` or conversations; may be given several
    /// times
    #[arg(long = "task", value_name = "FILE", required = true)]
    tasks: Vec<PathBuf>,
    /// The format of the rows: auto, mmlu, arc, hellaswag, perplexity or chat
    #[arg(long, default_value = "auto", value_parser = format)]
    format: Format,
    /// The number of examples before each question
    #[arg(long, default_value_t = 0)]
    shots: usize,
    /// The file of the examples [default: the task's other rows]
    #[arg(long, value_name = "FILE", requires = "shots")]
    shots_from: Option<PathBuf>,
    /// Use only so many rows, from the start; 0 for all
    #[arg(long, default_value_t = 0)]
    limit: usize,
    /// Correct two errors of lm-evaluation-harness: count a token that spans context and choice, and add BOS only once. Without it the
    /// results are the harness's, with a note if that matters
    #[arg(long)]
    fix_harness: bool,
    /// Write a line of JSON for each row to this file
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print a line of JSON for each task instead of a table
    #[arg(long)]
    json: bool,
}

/// `None` is `auto`.
type Format = Option<TaskFormat>;

fn format(text: &str) -> Result<Format, String> {
    match text {
        "auto" => Ok(None),
        name => name.parse().map(Some).map_err(|()| "expected auto, mmlu, arc, hellaswag, perplexity or chat".into()),
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let inputs = || arguments.tasks.iter().chain(&arguments.shots_from);
    let mut output = arguments.output.as_deref().map(|path| JsonLines::create(Some(path), inputs())).transpose()?;
    let opened = arguments.model.open()?;
    let tokenizer = arguments.text.tokenizer(opened.tokenizer()?)?;
    let reader = EvalModel { model: &opened.model, tokenizer: &tokenizer, dir: Some(&opened.dir) };
    let mut evaluations = Vec::new();
    for path in &arguments.tasks {
        let task = Task {
            path: path.clone(),
            format: arguments.format,
            shots: arguments.shots,
            shots_from: arguments.shots_from.clone(),
            limit: arguments.limit,
            fix_harness: arguments.fix_harness,
        };
        let evaluation = evaluate(reader, &task)?;
        for note in &evaluation.notes {
            tracing::warn!("{}: {note}", path.display());
        }
        if let Some(output) = &mut output {
            evaluation.records.iter().try_for_each(|record| output.line(record))?;
        }
        evaluations.push(evaluation);
    }
    if let Some(output) = output {
        output.finish()?;
    }
    let text = match arguments.json {
        true => evaluations.iter().map(|evaluation| to_json(evaluation).to_string() + "\n").collect(),
        false => printable_lines(&table(&evaluations)).into_owned(),
    };
    print(&text)
}

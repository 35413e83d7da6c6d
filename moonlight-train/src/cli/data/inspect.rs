//! `moonlight data inspect`.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use moonlight_convert::{Printable, printable, printable_lines};
use moonlight_infer::records::FilePosition;
use moonlight_infer::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::cli::output::print;
use crate::data::{Dataset, Inspection, Sample, SplitStats};
use crate::error::TrainError;
use crate::recipe::Recipe;

/// The longest bar of the histogram, characters.
const BAR: u64 = 40;

/// Print statistics of the data and samples of it; tokens without loss are dim on a terminal, else in `[...]`
#[derive(Debug, Args)]
pub(in crate::cli) struct Arguments {
    /// The recipe, a TOML file
    recipe: PathBuf,
    /// Override a value of the recipe, e.g. `--set data.sequence_length=4096`; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// The number of documents to show, spread over the training data
    #[arg(long, default_value_t = 3)]
    samples: usize,
    /// The most tokens of a document to show; 0 for all
    #[arg(long, default_value_t = 2000, value_name = "TOKENS")]
    longest: usize,
    /// Print one JSON object: statistics, notes, and samples with the ids and loss weights of their tokens
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let recipe = Recipe::load(&arguments.recipe, &arguments.sets)?;
    let tokenizer = recipe.data.open_tokenizer()?;
    let config = recipe.model.config_for(tokenizer.as_ref())?;
    let dataset = Dataset::open(&recipe.data, tokenizer.as_ref(), config.vocab_size, recipe.run.seed)?;
    let inspection = dataset.inspect(arguments.samples)?;
    if arguments.json {
        return print(&(as_json(&inspection, dataset.notes()).to_string() + "\n"));
    }
    let mut text = String::new();
    for note in dataset.notes() {
        text.push_str(&format!("{}\n", printable(note)));
    }
    for (key, stats) in
        std::iter::once(("train", &inspection.train)).chain(Some("valid").zip(inspection.valid.as_ref()))
    {
        text.push_str(&describe(key, stats));
    }
    let show = Show {
        tokenizer: tokenizer.as_ref(),
        specials: tokenizer.as_ref().map(Tokenizer::specials).unwrap_or_default(),
        dim: match std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        {
            true => ["\x1b[2m", "\x1b[0m"],
            false => ["[", "]"],
        },
        longest: if arguments.longest == 0 { usize::MAX } else { arguments.longest },
    };
    for sample in &inspection.samples {
        text.push_str(&show.sample(sample));
    }
    print(&text)
}

fn as_json(inspection: &Inspection, notes: &[String]) -> Value {
    let split = |stats: &SplitStats| {
        json!({
            "documents": stats.documents, "tokens": stats.tokens, "learned": stats.learned,
            "sequences": stats.sequences, "fill": stats.fill, "histogram": stats.histogram,
        })
    };
    let sample = |sample: &Sample| {
        let (tokens, weights): (Vec<u32>, Vec<f32>) = sample.tokens.iter().copied().unzip();
        json!({"path": sample.path.display().to_string(), "line": sample.line, "column": sample.column, "tokens": tokens, "weights": weights})
    };
    json!({
        "train": split(&inspection.train),
        "valid": inspection.valid.as_ref().map(split),
        "samples": inspection.samples.iter().map(sample).collect::<Vec<_>>(),
        "notes": notes,
    })
}

/// The statistics of the training or the validation data.
fn describe(key: &str, stats: &SplitStats) -> String {
    let SplitStats { documents, tokens, learned, sequences, fill, lengths: [shortest, median, longest], histogram } =
        stats;
    let share = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    let mut text = format!(
        "\n{key}: {documents} documents, {tokens} tokens, {learned} learned ({:.1} %), {sequences} sequences",
        share(*learned, *tokens)
    );
    match fill {
        Some(fill) => text.push_str(&format!(", {:.1} % full\n", 100.0 * fill)),
        None => text.push_str(", padded to the longest of a batch\n"),
    }
    text.push_str(&format!("  tokens of a document: {shortest} to {longest}, median {median}\n"));
    let most = histogram.iter().map(|(_, count)| *count).max().unwrap_or(0).max(1);
    for (bound, count) in histogram {
        // A length that occurs has a bar of at least one character.
        let bar = if *count == 0 { 0 } else { (count * BAR / most).max(1) };
        let line = format!("  up to {bound:>7} {count:>8} {}", "#".repeat(bar as usize));
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// How samples are printed.
struct Show<'a> {
    tokenizer: Option<&'a Tokenizer>,
    specials: Vec<(String, u32)>,
    /// Printed before and after tokens that the loss does not count.
    dim: [&'static str; 2],
    longest: usize,
}

impl Show<'_> {
    fn sample(&self, Sample { path, line, column, tokens }: &Sample) -> String {
        let learned = tokens.iter().skip(1).filter(|(_, weight)| *weight > 0.0).count();
        let path = Printable(path.display());
        let place = match (*line, *column) {
            (0, _) => path.to_string(),
            (line, column) => format!("{path}:{}", FilePosition { line: line as usize, column: column as usize }),
        };
        let mut text = format!("\n{place}: {} tokens, {learned} learned\n", tokens.len());
        let shown = &tokens[..tokens.len().min(self.longest)];
        for part in shown.chunk_by(|a, b| a.1 == b.1) {
            let words = self.text(part);
            let words = printable_lines(&words);
            match part[0].1 {
                0.0 => text.extend([self.dim[0], &*words, self.dim[1]]),
                1.0 => text.push_str(&words),
                weight => text.push_str(&format!("{words}{}x{weight}{}", self.dim[0], self.dim[1])),
            }
        }
        text.push('\n');
        if shown.len() < tokens.len() {
            text.push_str(&format!("... and {} tokens more\n", tokens.len() - shown.len()));
        }
        text
    }

    /// The text of tokens, with special tokens spelled out; their ids if there is no tokenizer.
    fn text(&self, tokens: &[(u32, f32)]) -> String {
        let Some(tokenizer) = self.tokenizer else {
            return tokens.iter().map(|(token, _)| token.to_string()).collect::<Vec<_>>().join(" ");
        };
        let name = |token: u32| self.specials.iter().find(|(_, id)| *id == token).map(|(name, _)| name.as_str());
        let mut text = String::new();
        for run in tokens.chunk_by(|a, b| name(a.0).is_none() && name(b.0).is_none()) {
            match name(run[0].0) {
                Some(name) => text.push_str(name),
                None => text.push_str(&tokenizer.decode(&run.iter().map(|(token, _)| *token).collect::<Vec<_>>())),
            }
        }
        text
    }
}

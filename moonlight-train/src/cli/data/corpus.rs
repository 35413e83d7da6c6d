//! `moonlight data corpus`.

use std::path::PathBuf;

use clap::Args;
use moonlight_infer::tokenizer::MIN_VOCAB;

use crate::cli::output::print;
use crate::corpus::{CorpusOptions, registry_sources, write_corpus};
use crate::error::TrainError;

/// Make a corpus from the text on this machine: training and validation text, a tokenizer, and questions
///
/// By default from the sources of crates that cargo has downloaded, so that studies of small models have a real text without a
/// download. Each subfolder of a folder `--from` is a package, and all files of a package are in the same split. The same files and
/// options give the same corpus. Prints the contents of `corpus.json` as one line.
#[derive(Debug, Args)]
pub(in crate::cli) struct Arguments {
    /// A folder whose subfolders are packages; may be given several times [default: `$CARGO_HOME/registry/src/*`]
    #[arg(long, value_name = "DIR")]
    from: Vec<PathBuf>,
    /// The folder to write; it must be absent or empty, or contain the same corpus
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Take files with this extension; may be given several times. With `rs`, folders of tests, benches and examples are left out
    #[arg(long = "extension", value_name = "NAME", default_value = "rs", value_parser = extension)]
    extensions: Vec<String>,
    /// The most training text
    #[arg(long, value_name = "BYTES", default_value_t = 24_000_000)]
    max_bytes: u64,
    /// The most text of one package
    #[arg(long, value_name = "BYTES", default_value_t = 400_000)]
    max_folder_bytes: u64,
    /// Leave out larger files
    #[arg(long, value_name = "BYTES", default_value_t = 100_000)]
    max_file_bytes: u64,
    /// The share of packages for validation, and of its text relative to `--max-bytes`
    #[arg(long, value_name = "SHARE", default_value_t = 0.06, value_parser = fraction)]
    valid_fraction: f64,
    /// The most tokens of the tokenizer, a byte-level BPE
    #[arg(long, value_name = "TOKENS", default_value_t = 4096, value_parser = vocab)]
    vocab: usize,
    /// The most multiple-choice questions
    #[arg(long, value_name = "COUNT", default_value_t = 400)]
    choices: usize,
    /// The most conversations for training
    #[arg(long, value_name = "COUNT", default_value_t = 8000)]
    conversations: usize,
    /// Determines the split, the order of packages, and the questions
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn extension(text: &str) -> Result<String, String> {
    let name = text.strip_prefix('.').unwrap_or(text);
    if name.is_empty() { Err("an extension has at least one letter".into()) } else { Ok(name.to_owned()) }
}

fn fraction(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| *number > 0.0 && *number < 1.0);
    number.ok_or_else(|| "must be a number between 0 and 1".into())
}

fn vocab(text: &str) -> Result<usize, String> {
    let tokens = text.parse().ok().filter(|tokens| (MIN_VOCAB..=1 << 20).contains(tokens));
    tokens.ok_or_else(|| format!("must be a number from {MIN_VOCAB} to {}", 1 << 20))
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let options = CorpusOptions {
        from: if arguments.from.is_empty() { registry_sources()? } else { arguments.from.clone() },
        extensions: arguments.extensions.clone(),
        max_bytes: arguments.max_bytes,
        max_folder_bytes: arguments.max_folder_bytes,
        max_file_bytes: arguments.max_file_bytes,
        valid_fraction: arguments.valid_fraction,
        vocab: arguments.vocab,
        choices: arguments.choices,
        conversations: arguments.conversations,
        seed: arguments.seed,
    };
    let report = write_corpus(&options, &arguments.output)?;
    let line = serde_json::to_string(&report).map_err(|error| TrainError::Internal(error.to_string()))?;
    print(&format!("{line}\n"))
}

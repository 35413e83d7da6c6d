//! `moonlight init`.

use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use moonlight_infer::device::{ComputeDevice, DeviceError};
use moonlight_infer::resolve_model;
use moonlight_model::ModelConfig;

use super::output::print;
use super::units;
use crate::error::TrainError;
use crate::plan::{MemoryPlan, Threads, available_memory};
use crate::recipe::{Draft, ShapedRecipe};

/// The shortest sequences that are tried to fit into memory, tokens.
const SHORTEST: usize = 256;

/// Write a recipe, from options or by asking
///
/// Asks on a terminal for what the options leave open. The settings are chosen so that the predicted memory of a step fits into the
/// budget, as `moonlight plan` predicts it. Every key of the recipe has a comment. A file that exists is not overwritten.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The recipe to write, or `-` for stdout
    #[arg(default_value = "recipe.toml")]
    recipe: PathBuf,
    /// What to train
    #[arg(long, value_enum)]
    task: Option<Task>,
    /// The weights to start from: a Hugging Face directory, a checkpoint or folder of a run, or `org/name` on the Hub
    #[arg(long)]
    model: Option<String>,
    /// The shape to pre-train, or that of weights that are not downloaded yet: a preset, or a file of config.json's keys
    #[arg(long, value_name = "SHAPE")]
    preset: Option<String>,
    /// A glob of training files; may be given several times
    #[arg(long, value_name = "GLOB")]
    data: Vec<String>,
    /// bytes, bytes-chat, or the path of a tokenizer [default: that of the weights, else bytes]
    #[arg(long)]
    tokenizer: Option<String>,
    /// muon or adamw [default: muon to pre-train and for weights that Muon has made, else adamw]
    #[arg(long, value_enum)]
    optimizer: Option<Optimizer>,
    /// The memory that a step must fit into, GB (10^9 bytes) [default on the CPU: what is free on this machine]
    #[arg(long, value_name = "GB", allow_negative_numbers = true, value_parser = super::plan::positive)]
    budget: Option<f64>,
    /// cpu, cuda[:N], wgpu[:N], vulkan[:N], metal, or auto for the first that the build has
    #[arg(long, default_value = "auto")]
    device: String,
    /// The optimizer steps of a pre-training
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
}

/// `--task`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Task {
    /// Train a model from scratch on text
    Pretrain,
    /// Fine-tune all weights on conversations
    Chat,
    /// Train LoRA adapters on conversations
    Lora,
}

/// `--optimizer`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Optimizer {
    /// Muon for matrices, AdamW for the rest
    Muon,
    /// AdamW for everything
    Adamw,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let path = &arguments.recipe;
    let to_stdout = path == Path::new("-");
    if !to_stdout && path.exists() {
        return Err(request(
            format!("`{}` exists", path.display()),
            "choose another name, or remove the file: `init` does not overwrite",
        ));
    }
    let mut stdin = io::stdin().lock();
    let asks = stdin.is_terminal() && io::stderr().is_terminal();
    let answers = Answers::complete(arguments, asks.then_some(&mut stdin as &mut dyn BufRead))?;
    let (text, peak) = answers.fitted(path)?;
    if to_stdout {
        return print(&text);
    }
    let written = File::create_new(path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(TrainError::write(path))?;
    for glob in answers.data.iter().filter(|glob| !glob.contains(['$', '~'])) {
        if glob::glob(glob).is_ok_and(|mut files| files.next().is_none()) {
            tracing::warn!("`{glob}` matches no file yet");
        }
    }
    let shown = path.display();
    tracing::info!("wrote `{shown}`; predicted peak memory {}", units::bytes(peak));
    tracing::info!("next: `moonlight data inspect {shown}`, then `moonlight train {shown}`");
    Ok(())
}

fn request(problem: impl Into<String>, hint: &str) -> TrainError {
    TrainError::Request { problem: problem.into(), hint: Some(hint.into()) }
}

/// What the user chose, by options or on the terminal.
#[derive(Debug)]
struct Answers {
    task: Task,
    model: Option<String>,
    preset: Option<String>,
    data: Vec<String>,
    tokenizer: Option<String>,
    optimizer: Option<Optimizer>,
    /// Bytes.
    budget: Option<u64>,
    device: String,
    steps: u64,
}

impl Answers {
    /// The answers that the options give, completed by the user if `input` is a terminal.
    fn complete(arguments: &Arguments, mut input: Option<&mut dyn BufRead>) -> Result<Self, TrainError> {
        let mut ask = |option: &str, question: &str| match &mut input {
            Some(input) => answer(*input, question),
            None => Err(request(format!("`--{option}` is missing"), "give it, or run `moonlight init` on a terminal")),
        };
        let task = match arguments.task {
            Some(task) => task,
            None => {
                let name = ask("task", "What to train: pretrain, chat or lora?")?;
                Task::from_str(&name, true)
                    .map_err(|_| request(format!("there is no task `{name}`"), "choose pretrain, chat or lora"))?
            }
        };
        let (mut model, mut preset) = (arguments.model.clone(), arguments.preset.clone());
        match task {
            Task::Pretrain if model.is_none() && preset.is_none() => {
                preset = Some(ask("preset", "Shape of the model: a preset such as bench-small, or a config.json?")?);
            }
            Task::Chat | Task::Lora if model.is_none() => {
                model = Some(ask("model", "Weights: a directory, the folder of a run, or org/name?")?);
            }
            _ => {}
        }
        if let Some(model) = &model
            && preset.is_none()
        {
            preset = preset_of(model);
        }
        let mut data = arguments.data.clone();
        if data.is_empty() {
            data = ask("data", "Training files (globs, with blanks between)?")?
                .split_whitespace()
                .map(str::to_owned)
                .collect();
        }
        let on_cpu = match ComputeDevice::open(&arguments.device) {
            Ok(device) => device.is_cpu,
            // The recipe may be for another machine, so a backend that this build lacks counts as a GPU.
            Err(DeviceError::NotBuilt { .. }) => false,
            Err(error) => return Err(error.into()),
        };
        let budget =
            arguments.budget.map(|budget| (budget * 1e9) as u64).or_else(|| available_memory().filter(|_| on_cpu));
        Ok(Self {
            task,
            model,
            preset,
            data,
            tokenizer: arguments.tokenizer.clone(),
            optimizer: arguments.optimizer,
            budget,
            device: arguments.device.clone(),
            steps: arguments.steps,
        })
    }

    /// The recipe that fits into the budget, and its predicted peak memory in bytes.
    fn fitted(&self, path: &Path) -> Result<(String, u64), TrainError> {
        let mut longest = usize::MAX;
        loop {
            let mut recipe = self.recipe(path, longest)?;
            let plan = recipe.plan(path)?;
            let sequence = plan.settings.sequence;
            let Some(budget) = self.budget else { return Ok((recipe.text(path, plan.peak(), None), plan.peak())) };
            for advice in plan.advice(budget) {
                for (key, value) in advice.sets {
                    let comment = format!("To fit into {}.", units::bytes(budget));
                    recipe.set(key, value, &comment);
                }
            }
            let peak = recipe.plan(path)?.peak();
            if peak <= budget {
                return Ok((recipe.text(path, peak, Some(budget)), peak));
            }
            if sequence / 2 < SHORTEST {
                let problem = format!(
                    "no settings fit into {}: the least is {} with sequences of {sequence} tokens",
                    units::bytes(budget),
                    units::bytes(peak)
                );
                let hint = match self.task {
                    Task::Chat => "try `--task lora`, a smaller model, or a larger `--budget`",
                    _ => "choose a smaller model, or a larger `--budget`",
                };
                return Err(request(problem, hint));
            }
            longest = sequence / 2;
        }
    }

    /// The recipe before it is changed to fit, with sequences of at most `longest` tokens.
    fn recipe(&self, path: &Path, longest: usize) -> Result<Sections, TrainError> {
        let mut recipe = Sections::default();
        let name = match path.file_stem().and_then(|stem| stem.to_str()) {
            Some(stem) if stem != "-" => stem,
            _ => "run",
        };
        recipe.section("run");
        recipe.add("name", quoted(name), "The folder of the run, in `runs`.");
        recipe.add("seed", "1".into(), "Everything random in the run follows from it.");
        recipe.add(
            "device",
            quoted(&self.device),
            "`auto` is the first backend of the build: cuda, metal, vulkan, wgpu, cpu.",
        );
        recipe.section("model");
        if let Some(model) = &self.model {
            recipe.add("path", quoted(model), "The weights to start from.");
        }
        if let Some(preset) = &self.preset {
            let comment = match self.model {
                Some(_) => "The shape of the weights, for `moonlight plan` before they are downloaded.",
                None => "The shape: a preset, or a file of config.json's keys.",
            };
            recipe.add("preset", quoted(preset), comment);
        }
        let shape = self.shape(&mut recipe)?;
        let longest = longest.min(shape.max_position_embeddings);
        match self.task {
            Task::Pretrain => self.pretraining(&mut recipe, longest),
            Task::Chat | Task::Lora => self.fine_tuning(&mut recipe, longest),
        }
        Ok(recipe)
    }

    /// The shape of the model in the recipe so far, from a probe with the other required keys.
    fn shape(&self, recipe: &mut Sections) -> Result<ModelConfig, TrainError> {
        let mut probe = recipe.clone();
        probe.section("data");
        probe.add("train", list(&["x".into()]), "");
        if let Some(tokenizer) = &self.tokenizer {
            probe.add("tokenizer", quoted(tokenizer), "");
        }
        probe.section("train");
        probe.add("steps", "1".into(), "");
        probe.section("optimizer");
        probe.add("learning_rate", "1.0".into(), "");
        let shaped = Draft::parse(&probe.body(), Path::new("recipe.toml"), &[])?.resolve_shape(None)?;
        Ok(shaped.config)
    }

    fn data(&self, recipe: &mut Sections, format: &str, comment: &str) {
        recipe.section("data");
        recipe.add("format", quoted(format), comment);
        recipe.add("train", list(&self.data), "Globs of the training files; `~` and `$NAME` are expanded.");
        recipe.add("valid_fraction", "0.01".into(), "The share of the documents that is kept for validation.");
        if let Some(tokenizer) = &self.tokenizer {
            recipe.add("tokenizer", quoted(tokenizer), "`bytes`, `bytes-chat`, or the path of a tokenizer.");
        }
    }

    fn pretraining(&self, recipe: &mut Sections, longest: usize) {
        self.data(recipe, "text", "Each file is a document; of JSON Lines, CSV or parquet, each record's `text`.");
        recipe.add("sequence_length", longest.min(1024).to_string(), "Tokens in a sequence.");
        recipe.section("optimizer");
        match self.optimizer.unwrap_or(Optimizer::Muon) {
            Optimizer::Muon => {
                recipe.add("name", quoted("muon"), "Muon for matrices, AdamW for embedding, head and norms.");
                let comment = "The Muon report (arXiv 2502.16982): 9.5e-4 for 0.4 B parameters, 4.2e-4 for 16 B.";
                recipe.add("learning_rate", "1e-3".into(), comment);
            }
            Optimizer::Adamw => {
                recipe.add("name", quoted("adamw"), "AdamW for everything.");
                recipe.add("learning_rate", "1e-3".into(), "Peak learning rate; larger models take smaller ones.");
            }
        }
        recipe.add("weight_decay", "0.1".into(), "As in the report.");
        recipe.section("schedule");
        recipe.add("name", quoted("cosine"), "From the peak down a cosine.");
        recipe.add("warmup_steps", (self.steps / 10).min(100).to_string(), "Steps up to the peak.");
        recipe.add("final_fraction", "0.1".into(), "The last rate, as a fraction of the peak.");
        recipe.section("train");
        recipe.add("steps", self.steps.to_string(), "Optimizer steps.");
        recipe.add("batch_size", "16".into(), "Sequences in a micro-batch.");
        recipe.add("gradient_accumulation", "1".into(), "Micro-batches in a step.");
        Self::ending(recipe, (self.steps / 10).max(1));
    }

    fn fine_tuning(&self, recipe: &mut Sections, longest: usize) {
        let lora = self.task == Task::Lora;
        if lora {
            recipe.section("lora");
            recipe.add("rank", "8".into(), "The rank of the adapters.");
            recipe.add(
                "alpha",
                "32".into(),
                "The update is scaled by alpha / rank. 32: \"LoRA Without Regret\" (2025).",
            );
            recipe.add(
                "targets",
                list(&["all".into()]),
                "The projections with an adapter: `all`, `attention`, or names.",
            );
        }
        self.data(recipe, "chat", "Each record is a conversation; the assistant's turns are trained.");
        recipe.add(
            "sequence_length",
            longest.min(2048).to_string(),
            "Tokens in a sequence, into which conversations are packed.",
        );
        recipe.add("too_long", quoted("truncate"), "What happens to a longer conversation: truncate, skip or error.");
        recipe.section("optimizer");
        let default = if !lora && self.is_trained_by_muon() { Optimizer::Muon } else { Optimizer::Adamw };
        let (name, rate, comment) = match (self.optimizer.unwrap_or(default), lora) {
            (Optimizer::Muon, false) => {
                ("muon", "5e-5", "The Muon report, section 3.5: fine-tuning weights that Muon has made.")
            }
            (Optimizer::Muon, true) => ("muon", "1e-3", "Not published; compare a few rates."),
            (Optimizer::Adamw, false) => ("adamw", "1e-5", "NeMo Automodel's recipe for Moonlight."),
            (Optimizer::Adamw, true) => {
                ("adamw", "1e-4", "Ten times the rate for all weights: \"LoRA Without Regret\".")
            }
        };
        recipe.add("name", quoted(name), "muon or adamw.");
        recipe.add("learning_rate", rate.into(), comment);
        recipe.add(
            "weight_decay",
            if lora { "0.0" } else { "0.1" }.into(),
            "Weight decay per step, times the learning rate.",
        );
        recipe.section("schedule");
        match lora {
            true => recipe.add("name", quoted("constant"), "After the warm-up."),
            false => recipe.add("name", quoted("linear"), "Down to 0, as in the report."),
        }
        recipe.add("warmup_steps", "10".into(), "Steps up to the peak.");
        if !lora {
            recipe.add("final_fraction", "0.0".into(), "The last rate, as a fraction of the peak.");
        }
        recipe.section("train");
        recipe.add("epochs", "2".into(), "Passes over the data; `steps` is the alternative.");
        recipe.add("batch_size", "8".into(), "Sequences in a micro-batch.");
        recipe.add("gradient_accumulation", "4".into(), "Micro-batches in a step.");
        Self::ending(recipe, 100);
    }

    /// The keys of `[train]` that all tasks share.
    fn ending(recipe: &mut Sections, every: u64) {
        recipe.add("gradient_clip", "1.0".into(), "The largest global norm of the gradient; 0 for no limit.");
        recipe.add("validate_every", every.to_string(), "Steps between validations.");
        recipe.add("validate_batches", "16".into(), "Batches of a validation.");
        recipe.add("checkpoint_every", every.to_string(), "Steps between checkpoints.");
        recipe.add("keep", "2".into(), "The newest checkpoints that are kept.");
    }

    /// Whether Muon probably trained the weights: Moonlight's, recognized by name, and those of a run, because Muon is the default.
    fn is_trained_by_muon(&self) -> bool {
        let model = self.model.as_deref().unwrap_or_default();
        let is_run = resolve_model(model).is_ok_and(|dir| dir.join("trainer.json").exists());
        is_run || model.to_ascii_lowercase().contains("moonlight")
    }
}

/// Asks on stderr until a line is not empty.
fn answer(input: &mut dyn BufRead, question: &str) -> Result<String, TrainError> {
    loop {
        let mut stderr = io::stderr();
        write!(stderr, "{question} ").and_then(|()| stderr.flush()).map_err(TrainError::write("stderr"))?;
        let mut line = String::new();
        if input.read_line(&mut line).map_err(TrainError::read("stdin"))? == 0 {
            return Err(request(
                "the input has ended",
                "answer the questions, or give options: `moonlight init --help`",
            ));
        }
        if !line.trim().is_empty() {
            return Ok(line.trim().to_owned());
        }
    }
}

/// The preset with the name of a repository: `moonlight-16b-a3b` for `moonshotai/Moonlight-16B-A3B`.
fn preset_of(model: &str) -> Option<String> {
    let name = model.rsplit('/').next()?.to_ascii_lowercase();
    ModelConfig::preset(&name).is_ok().then_some(name)
}

/// A TOML string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// A TOML array of strings.
fn list(texts: &[String]) -> String {
    format!("[{}]", texts.iter().map(|text| quoted(text)).collect::<Vec<_>>().join(", "))
}

/// A recipe with comments: sections in order, each with its keys in order.
#[derive(Debug, Clone, Default)]
struct Sections(Vec<(&'static str, Vec<Entry>)>);

#[derive(Debug, Clone)]
struct Entry {
    key: String,
    /// As TOML.
    value: String,
    comment: String,
}

impl Sections {
    /// Starts a section.
    fn section(&mut self, name: &'static str) {
        self.0.push((name, Vec::new()));
    }

    /// Adds a key to the section that was started last.
    fn add(&mut self, key: &str, value: String, comment: &str) {
        let entry = Entry { key: key.to_owned(), value, comment: comment.to_owned() };
        if let Some((_, entries)) = self.0.last_mut() {
            entries.push(entry);
        }
    }

    /// Sets `section.key`, which may be new. The comment is appended to that of an existing key.
    fn set(&mut self, path: &'static str, value: String, comment: &str) {
        let Some((section, key)) = path.split_once('.') else { return };
        let index = match self.0.iter().position(|(name, _)| *name == section) {
            Some(index) => index,
            None => {
                self.0.push((section, Vec::new()));
                self.0.len() - 1
            }
        };
        let entries = &mut self.0[index].1;
        match entries.iter_mut().find(|entry| entry.key == key) {
            Some(entry) => {
                entry.value = value;
                entry.comment = format!("{} {comment}", entry.comment);
            }
            None => entries.push(Entry { key: key.to_owned(), value, comment: comment.to_owned() }),
        }
    }

    /// The TOML.
    fn body(&self) -> String {
        let mut text = String::new();
        for (name, entries) in &self.0 {
            text += &format!("\n[{name}]\n");
            for Entry { key, value, comment } in entries {
                if !comment.is_empty() {
                    text += &format!("# {comment}\n");
                }
                text += &format!("{key} = {value}\n");
            }
        }
        text
    }

    fn plan(&self, path: &Path) -> Result<MemoryPlan, TrainError> {
        let ShapedRecipe { recipe, config, .. } = Draft::parse(&self.body(), path, &[])?.resolve_shape(None)?;
        MemoryPlan::for_shape(&recipe, config, Threads::available())
    }

    /// The recipe with its heading.
    fn text(&self, path: &Path, peak: u64, budget: Option<u64>) -> String {
        let path = if path == Path::new("-") { Path::new("recipe.toml") } else { path }.display();
        let budget = budget.map(|budget| format!(", of {}", units::bytes(budget))).unwrap_or_default();
        format!(
            "# Written by `moonlight init`. The manual lists all keys: docs/src/reference/recipe.md.\n\
             # Predicted peak memory of a step: {}{budget}.\n\
             #\n\
             #     moonlight plan {path}\n\
             #     moonlight data inspect {path}\n\
             #     moonlight train {path}\n{}",
            units::bytes(peak),
            self.body()
        )
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn answers(arguments: &[&str]) -> Answers {
        let program = Program::parse_from(["init"].iter().chain(arguments));
        Answers::complete(&program.arguments, None).unwrap()
    }

    /// Writes a recipe, reads it as strictly as a run does, and returns it with its predicted peak memory.
    fn written(arguments: &[&str]) -> (ShapedRecipe, u64) {
        let (text, peak) = answers(arguments).fitted(Path::new("r.toml")).unwrap();
        let shaped = Draft::parse(&text, Path::new("r.toml"), &[]).unwrap().resolve_shape(None).unwrap();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| line.contains(" = ")) {
            let before = text.lines().nth(number - 1).unwrap();
            assert!(line.starts_with('#') || before.starts_with("# "), "`{line}` has no comment");
        }
        (shaped, peak)
    }

    #[test]
    fn each_task_gives_a_recipe_that_fits() {
        let (pretrain, peak) =
            written(&["--task", "pretrain", "--preset", "bench-small", "--data", "d/*.txt", "--budget", "2"]);
        assert!(peak <= 2_000_000_000 && pretrain.recipe.lora.is_none());
        let moonlight = ["--model", "moonshotai/Moonlight-16B-A3B", "--data", "c.jsonl", "--device", "cuda"];
        let with = |more: &[&'static str]| [more, &moonlight].concat();
        let (chat, peak) = written(&with(&["--task", "chat", "--budget", "80"]));
        assert!(peak <= 80_000_000_000 && chat.recipe.train.fuse_update, "{peak}");
        let (lora, peak) = written(&with(&["--task", "lora", "--budget", "24"]));
        assert!(peak <= 24_000_000_000 && lora.recipe.lora.is_some(), "{peak}");
    }

    #[test]
    fn a_budget_that_nothing_fits_is_an_error_with_a_hint() {
        let arguments = [
            "--task",
            "chat",
            "--model",
            "moonshotai/Moonlight-16B-A3B",
            "--data",
            "c",
            "--budget",
            "8",
            "--device",
            "cuda",
        ];
        let error = answers(&arguments).fitted(Path::new("r.toml")).unwrap_err();
        assert!(error.to_string().starts_with("no settings fit into 8.00 GB"), "{error}");
        assert!(error.hint().unwrap().contains("--task lora"));
    }

    #[test]
    fn a_terminal_is_asked_for_what_is_missing() {
        let program = Program::parse_from(["init"]);
        let mut input = "pretrain\n\nbench-small\na/*.txt b/*.txt\n".as_bytes();
        let answers = Answers::complete(&program.arguments, Some(&mut input)).unwrap();
        assert_eq!((answers.task, answers.data.len()), (Task::Pretrain, 2));
        let error = Answers::complete(&program.arguments, None).unwrap_err();
        assert_eq!(error.to_string(), "`--task` is missing");
    }
}

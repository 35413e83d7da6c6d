//! `moonlight plan`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use moonlight_convert::{Checkpoint, gguf};
use moonlight_infer::resolve_model;
use moonlight_model::ModelConfig;
use moonlight_model::config::ScoringFunc;
use moonlight_optim::distributed::{DistributedForm, GatherPrecision};
use serde_json::{Map, Value, json};

use super::output::print;
use super::{old_names, units};
use crate::analysis::gate_factor::{Estimate, GateFactor};
use crate::error::TrainError;
use crate::plan::{
    Advice, Cluster, MemoryPart, MemoryPlan, MultiGpuPlan, StepPhase, Threads, TokenFlops, available_memory,
    tokens_for_share,
};
use crate::recipe::{Draft, ShapedRecipe, named_config};

/// The memory of GPUs that are sold, GB.
const CARD_SIZES: [u64; 11] = [8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192];
/// Kept free on a GPU for its driver and for fragmentation, GB.
const RESERVE: u64 = 1;

/// Predict parameters, operations and memory of a run or a model
///
/// Needs neither weights nor data nor a tokenizer. Memory is computed from shapes, phase by phase of a step, for tensors alone.
/// On the CPU it is within a tenth of what a run allocates; for GPUs it is arithmetic that was not measured.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The recipe of a training run, a TOML file
    #[arg(required_unless_present_any = ["model", "gate_factor"], conflicts_with = "model")]
    recipe: Option<PathBuf>,
    /// A model to run: a preset, a config.json, a directory with one, the folder of a run, or `org/name` in the Hub's cache
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// The shape to plan with instead of the recipe's: a preset, a config.json or TOML file of its keys, or a directory with one
    #[arg(long, value_name = "SHAPE", conflicts_with = "model")]
    model_config: Option<String>,
    /// Override a value of the recipe, e.g. `--set train.batch_size=1`; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "model")]
    sets: Vec<String>,
    /// Predict for this device instead of `run.device`: cpu, or a GPU such as cuda, which this build need not support
    #[arg(long, conflicts_with = "model")]
    device: Option<String>,
    /// The memory that the run must fit into, GB (10^9 bytes) [default on the CPU: what is free on this machine]
    #[arg(long, value_name = "GB", conflicts_with = "model", allow_negative_numbers = true, value_parser = positive)]
    budget: Option<f64>,
    /// Also plan for so many GPUs, a rank each: memory of each, bytes sent in a step, time
    #[arg(
        long, alias = old_names::GPUS, value_name = "N", conflicts_with = "model",
        value_parser = clap::value_parser!(u64).range(1..=1 << 20)
    )]
    gpus: Option<u64>,
    /// The rate of the slowest link between two GPUs, GB per second in one direction; 50 is one link of 400 Gbit/s
    #[arg(long, value_name = "GBPS", default_value_t = 50.0, requires = "gpus", value_parser = positive)]
    link: f64,
    /// The rate of a GPU's matrix products, TFLOP per second; 989 is an H100 in bf16 (NVIDIA's data sheet)
    #[arg(long, value_name = "TFLOPS", default_value_t = 989.0, requires = "gpus", value_parser = positive)]
    matmul: f64,
    #[command(flatten)]
    gates: GateArguments,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct GateArguments {
    /// Instead of a plan, print the factor on normalized gates with which a token's experts together have the RMS of one expert
    /// (`routed_scaling_factor`; arXiv 2502.16982, appendix C), and its standard error
    #[arg(
        long, requires_all = ["experts", "top_k"],
        conflicts_with_all = ["recipe", "model", "model_config", "sets", "device", "budget", "gpus"]
    )]
    gate_factor: bool,
    /// The number of routed experts, for `--gate-factor`
    #[arg(long, value_name = "N", requires = "gate_factor")]
    experts: Option<usize>,
    /// The number of routed experts of a token
    #[arg(long, value_name = "N", requires = "gate_factor")]
    top_k: Option<usize>,
    /// Divide the experts into so many groups, which are ranked by the sum of their two best scores (DeepSeek-V3)
    #[arg(long, value_name = "N", requires_all = ["gate_factor", "top_groups"])]
    groups: Option<usize>,
    /// The number of groups that the experts of a token may come from
    #[arg(long, value_name = "N", requires_all = ["gate_factor", "groups"])]
    top_groups: Option<usize>,
    /// How logits become scores
    #[arg(long, value_enum, default_value_t = Scoring::Sigmoid, requires = "gate_factor")]
    scoring: Scoring,
    /// The number of tokens that `--gate-factor` simulates; half the standard error takes four times as many
    #[arg(
        long, value_name = "N", default_value_t = 200_000, requires = "gate_factor",
        value_parser = clap::value_parser!(u32).range(2..=1_000_000_000)
    )]
    draws: u32,
    /// The seed of the logits that `--gate-factor` simulates
    #[arg(long, default_value_t = 0, requires = "gate_factor")]
    seed: u64,
}

/// `--scoring`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scoring {
    /// A sigmoid of each logit (Moonlight, DeepSeek-V3)
    Sigmoid,
    /// A softmax over all experts (DeepSeek-V2)
    Softmax,
}

pub(super) fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| "not a positive number".into())
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let text = match (&arguments.recipe, &arguments.model) {
        _ if arguments.gates.gate_factor => gate_factor(&arguments.gates, arguments.json)?,
        (Some(recipe), _) => {
            let plan = RunPlan::new(recipe, arguments)?;
            if arguments.json { format!("{}\n", plan.json()) } else { plan.text() }
        }
        (None, Some(model)) => plan_inference(model, arguments.json)?,
        (None, None) => unreachable!("clap requires one of the three"),
    };
    print(&text)
}

/// The plan of a recipe, with the results that the arguments ask for.
struct RunPlan {
    plan: MemoryPlan,
    threads: Threads,
    /// Where the shape comes from, if not from the recipe.
    assumed: Option<String>,
    /// Micro-batches of a step.
    gradient_accumulation: usize,
    /// Bytes that the run must fit into.
    budget: Option<u64>,
    advice: Vec<Advice>,
    /// Floating-point operations of Newton-Schulz in a step, and the fewest tokens per step at which they are at most a tenth of all.
    newton_schulz: Option<(f64, u64)>,
    multi_gpu: Option<MultiGpuPlan>,
}

impl RunPlan {
    fn new(path: &Path, arguments: &Arguments) -> Result<Self, TrainError> {
        let mut sets = arguments.sets.clone();
        sets.extend(arguments.device.iter().map(|device| format!("run.device=\"{device}\"")));
        let draft = Draft::load(path, &sets)?;
        let ShapedRecipe { recipe, config, assumed } = draft.resolve_shape(arguments.model_config.as_deref())?;
        let threads = Threads::available();
        let plan = MemoryPlan::for_shape(&recipe, config, threads)?;
        let settings = &plan.settings;
        let budget = match arguments.budget {
            Some(budget) => Some((budget * 1e9) as u64),
            None => available_memory().filter(|_| settings.cpu),
        };
        let advice = budget.map(|budget| plan.advice(budget)).unwrap_or_default();
        let gradient_accumulation = recipe.train.gradient_accumulation;
        let multi_gpu = arguments.gpus.map(|world_size| {
            let distributed = recipe.distributed.clone().unwrap_or_default().optimizer;
            let cluster = Cluster {
                world_size,
                link: arguments.link * 1e9,
                matmul: arguments.matmul * 1e12,
                tokens: (recipe.train.batch_size * gradient_accumulation * settings.sequence) as u64,
                flat: distributed.form == DistributedForm::Flat,
                gather_bytes: if distributed.gather == GatherPrecision::Bf16 { 2 } else { 4 },
                newton_schulz: recipe.optimizer.muon.build().newton_schulz().clone(),
            };
            MultiGpuPlan::new(&plan, cluster)
        });
        let token = plan.token_flops().training(settings.recompute) as f64;
        let newton_schulz = plan.newton_schulz_flops(recipe.optimizer.muon.build().newton_schulz());
        let newton_schulz = newton_schulz.map(|step| (step, tokens_for_share(0.1, step, token)));
        Ok(Self { plan, threads, assumed, gradient_accumulation, budget, advice, newton_schulz, multi_gpu })
    }

    fn json(&self) -> Value {
        let plan = &self.plan;
        let parts = |phase: &StepPhase| {
            let part = |&part: &MemoryPart| (part.name().to_owned(), json!(phase.bytes(part)));
            MemoryPart::ALL.iter().map(part).collect::<Map<_, _>>()
        };
        let phases: Vec<_> =
            plan.phases().iter().map(|phase| json!({"moment": phase.name, "bytes": parts(phase)})).collect();
        let advice: Vec<_> =
            self.advice.iter().map(|advice| json!({"change": advice.change, "peak_bytes": advice.peak})).collect();
        let count = plan.parameters();
        let mut value = json!({
            "parameters": {"total": count.total, "activated": count.activated, "embeddings": count.embeddings},
            "assumed": self.assumed,
            "operations_per_token": plan.token_flops().training(plan.settings.recompute),
            "peak_bytes": plan.peak(),
            "largest_moment": plan.largest_phase().name,
            "moments": phases,
            "smallest_gpu_gb": smallest_card(plan.peak()),
            "budget_bytes": self.budget,
            "advice": advice,
        });
        if let Some((step, tokens)) = self.newton_schulz {
            value["newton_schulz_operations"] = json!(step);
            value["tokens_until_newton_schulz_is_a_tenth"] = json!(tokens);
        }
        if let Some(multi_gpu) = &self.multi_gpu {
            value["scale"] = json!(multi_gpu);
            // Earlier versions wrote the world size under this name.
            value["scale"][old_names::GPUS] = json!(multi_gpu.world_size);
        }
        value
    }

    fn text(&self) -> String {
        let (plan, settings) = (&self.plan, &self.plan.settings);
        let flops = plan.token_flops();
        let mut text = String::new();
        if let Some(assumed) = &self.assumed {
            text += &format!("assumed:     {assumed}\n");
        }
        text += &match settings.cpu {
            true => format!("device:      cpu, {} threads (`--device cuda` plans for a GPU)\n", self.threads.0),
            false => "device:      a GPU\n".into(),
        };
        text += &heading(&plan.config, flops);
        let tokens = (settings.batch * settings.sequence * self.gradient_accumulation) as f64;
        let step = flops.training(settings.recompute) as f64 * tokens;
        text += &format!("a step:      {} tokens, {}\n", units::count(tokens), units::flops(step));
        if let Some((optimizer, enough)) = self.newton_schulz {
            text += &format!(
                "Muon:        {} in Newton-Schulz, {:.1} % of the step; at most 10 % from {} tokens a step\n",
                units::flops(optimizer),
                100.0 * optimizer / (optimizer + step),
                units::count(enough as f64)
            );
        }
        text += &self.memory();
        if let Some(multi_gpu) = &self.multi_gpu {
            text += &multi_gpu.table();
        }
        text
    }

    /// The phase that needs the most memory, part by part; the smallest GPU; and the budget with the changes that make the run fit.
    fn memory(&self) -> String {
        let plan = &self.plan;
        let mut text = format!("\npeak memory of a step ({})\n", plan.largest_phase().name);
        let mut line = |name: &str, bytes: u64| text += &format!("  {name:<16} {:>10}\n", units::bytes(bytes));
        for part in MemoryPart::ALL {
            let bytes = plan.largest_phase().bytes(part);
            if bytes > 0 {
                line(part.name(), bytes);
            }
        }
        line("total", plan.peak());
        text += &match smallest_card(plan.peak()) {
            None => format!("\nno single GPU of up to {} GB holds it\n", CARD_SIZES[CARD_SIZES.len() - 1]),
            Some(size) => format!("\nthe smallest GPU that holds it, with {RESERVE} GB to spare: {size} GB\n"),
        };
        let Some(budget) = self.budget else { return text };
        let verdict = if plan.peak() <= budget { "fits into" } else { "does not fit into" };
        text += &format!("{verdict} {}\n", units::bytes(budget));
        for advice in &self.advice {
            text += &format!("  with `{}`: {}\n", advice.change, units::bytes(advice.peak));
        }
        if plan.peak() > budget && self.advice.last().is_none_or(|last| last.peak > budget) {
            text += "  no other key makes it smaller, except a shorter `data.sequence_length` or `[lora]`\n";
        }
        text
    }
}

/// The memory of the smallest GPU that holds so many bytes and the reserve, GB.
fn smallest_card(bytes: u64) -> Option<u64> {
    CARD_SIZES.into_iter().find(|size| bytes <= (size - RESERVE) * 1_000_000_000)
}

/// Parameters and operations of a token.
fn heading(config: &ModelConfig, flops: TokenFlops) -> String {
    let count = config.parameter_count();
    format!(
        "model:       {} parameters, {} of them used for each token, {} in embeddings\n\
         a token:     {} forward, {} of it in attention\n",
        units::count(count.total as f64),
        units::count(count.activated as f64),
        units::count(count.embeddings as f64),
        units::flops(flops.forward() as f64),
        units::flops(flops.attention as f64),
    )
}

/// The configuration of a model to run. A checkpoint that opens takes precedence, because only its files show whether the head is tied.
fn config_of(model: &Path) -> Result<ModelConfig, TrainError> {
    let dir = resolve_model(model);
    if let Ok(dir) = &dir
        && (dir.is_dir() || gguf::is_gguf(dir))
    {
        return match Checkpoint::open(dir) {
            Ok(checkpoint) => Ok(checkpoint.config().clone()),
            Err(error) => match named_config(&dir.to_string_lossy()) {
                Ok(config) => Ok(config),
                Err(_) => Err(error.into()),
            },
        };
    }
    match (named_config(&model.to_string_lossy()), dir) {
        (Ok(config), _) => Ok(config),
        (Err(_), Err(error)) => Err(error.into()),
        (Err(problem), Ok(_)) => Err(TrainError::Request {
            problem: format!("`--model {}` {problem}", model.display()),
            hint: Some("name a preset, a config.json, or a directory with one".into()),
        }),
    }
}

/// The memory to run a model: weights and KV cache.
fn plan_inference(model: &Path, as_json: bool) -> Result<String, TrainError> {
    let config = config_of(model)?;
    let weights = config.parameter_count().total;
    let per_token = (config.num_hidden_layers * config.cache_values_per_token()) as u64;
    let context = config.max_position_embeddings as u64;
    let flops = TokenFlops::for_sequence(&config, config.max_position_embeddings);
    if as_json {
        let count = config.parameter_count();
        let value = json!({
            "parameters": {"total": count.total, "activated": count.activated, "embeddings": count.embeddings},
            "operations_per_token": flops.forward(),
            "weights_bytes": {"f32": 4 * weights, "bf16": 2 * weights},
            "cache_bytes_per_token": {"f32": 4 * per_token, "bf16": 2 * per_token},
            "context": context,
        });
        return Ok(format!("{value}\n"));
    }
    let mut text = heading(&config, flops);
    text += &format!("\n{:<30} {:>10} {:>10}\n", "memory to run it", "bf16", "f32");
    let mut line = |name: &str, values: u64| {
        text += &format!("{name:<30} {:>10} {:>10}\n", units::bytes(2 * values), units::bytes(4 * values));
    };
    line("weights", weights);
    line(&format!("KV cache of {context} tokens"), per_token * context);
    line("total", weights + per_token * context);
    Ok(text)
}

/// The line or the JSON object of `--gate-factor`.
fn gate_factor(arguments: &GateArguments, as_json: bool) -> Result<String, TrainError> {
    let (Some(experts), Some(top_k)) = (arguments.experts, arguments.top_k) else {
        unreachable!("clap requires both with `--gate-factor`");
    };
    let scoring = match arguments.scoring {
        Scoring::Sigmoid => ScoringFunc::Sigmoid,
        Scoring::Softmax => ScoringFunc::Softmax,
    };
    let (groups, top_groups) = (arguments.groups.unwrap_or(1), arguments.top_groups.unwrap_or(1));
    let shape = GateFactor { experts, top_k, groups, top_groups, scoring };
    shape.check()?;
    let Estimate { mean, standard_error } = shape.estimate(arguments.draws as usize, arguments.seed);
    if !as_json {
        return Ok(format!("{mean:.6} {standard_error:.6}\n"));
    }
    let value = json!({
        "factor": mean, "standard_error": standard_error, "draws": arguments.draws, "seed": arguments.seed,
        "experts": experts, "top_k": top_k, "groups": groups, "top_groups": top_groups, "scoring": scoring,
    });
    Ok(format!("{value}\n"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use clap::error::ErrorKind;

    use super::*;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        plan: Arguments,
    }

    fn parsed(line: &str) -> Result<Arguments, clap::Error> {
        Program::try_parse_from(["plan"].into_iter().chain(line.split_whitespace())).map(|program| program.plan)
    }

    #[test]
    fn the_gate_factor_is_one_line_or_one_object() {
        let printed = |line: &str| {
            let arguments = parsed(line).unwrap();
            gate_factor(&arguments.gates, arguments.json)
        };
        let line = printed("--gate-factor --experts 64 --top-k 6 --draws 20000 --seed 4").unwrap();
        let numbers: Vec<f64> = line.split_whitespace().map(|number| number.parse().unwrap()).collect();
        assert_eq!((line.lines().count(), numbers.len()), (1, 2), "{line}");
        assert!((numbers[0] - 2.446).abs() < 1e-3 && numbers[1] < 1e-4, "{line}");

        let options =
            "--gate-factor --experts 32 --top-k 4 --groups 4 --top-groups 2 --scoring softmax --draws 500 --json";
        let value: Value = serde_json::from_str(&printed(options).unwrap()).unwrap();
        let keys =
            ["draws", "seed", "experts", "top_k", "groups", "top_groups", "scoring"].map(|key| value[key].clone());
        assert_eq!(json!(keys), json!([500, 0, 32, 4, 4, 2, "softmax"]));
        assert!(value["factor"].as_f64().unwrap() > 1.0 && value["standard_error"].as_f64().unwrap() > 0.0, "{value}");

        let error = printed("--gate-factor --experts 8 --top-k 9").unwrap_err();
        assert_eq!(error.to_string(), "`--top-k 9` is outside 1..=8");
    }

    #[test]
    fn options_of_the_gate_factor_and_of_a_plan_are_not_mixed() {
        let kind = |line: &str| parsed(line).unwrap_err().kind();
        for line in [
            "--gate-factor",
            "--gate-factor --experts 64",
            "--model bench-small --experts 64",
            "recipe.toml --top-k 6",
            "recipe.toml --scoring softmax",
            "recipe.toml --draws 100",
            "recipe.toml --seed 1",
            "--gate-factor --experts 64 --top-k 6 --groups 8",
            "--gate-factor --experts 64 --top-k 6 --top-groups 4",
            "",
        ] {
            assert_eq!(kind(line), ErrorKind::MissingRequiredArgument, "{line}");
        }
        for other in ["recipe.toml", "--model bench-small", "--device cpu", "--gpus 8", "--budget 8", "--set a=1"] {
            let line = format!("--gate-factor --experts 64 --top-k 6 {other}");
            assert_eq!(kind(&line), ErrorKind::ArgumentConflict, "{line}");
        }
        for draws in [0, 1] {
            let line = format!("--gate-factor --experts 64 --top-k 6 --draws {draws}");
            assert_eq!(kind(&line), ErrorKind::ValueValidation, "{line}");
        }
        parsed("recipe.toml").unwrap();
        parsed("--gate-factor --experts 64 --top-k 6 --json").unwrap();
    }

    #[test]
    fn a_gigabyte_of_a_card_is_kept_free() {
        assert_eq!(
            [1, 7_000_000_000, 7_000_000_001, 191_000_000_000, 191_000_000_001].map(smallest_card),
            [Some(8), Some(8), Some(12), Some(192), None]
        );
    }

    /// The shape and what was assumed of a recipe in `dir` with these lines in `[model]`.
    fn shaped(dir: &Path, model: &str, named: Option<&str>) -> Result<ShapedRecipe, crate::recipe::RecipeError> {
        let rest = "[data]\ntrain = [\"missing\"]\n[optimizer]\nlearning_rate = 1e-3\n[train]\nsteps = 1\n";
        let path = dir.join("recipe.toml");
        Draft::parse(&format!("[model]\n{model}\n{rest}"), &path, &[]).unwrap().resolve_shape(named)
    }

    #[test]
    fn a_plan_needs_a_shape_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let config = ModelConfig::preset("deepseek-v2-lite").unwrap();
        std::fs::create_dir(dir.join("weights")).unwrap();
        std::fs::write(dir.join("weights/config.json"), config.to_json()).unwrap();
        let weights = format!("path = {:?}", dir.join("weights").display().to_string());
        let found = shaped(dir, &weights, None).unwrap();
        assert_eq!((&found.config, found.assumed), (&config, None));

        let absent = shaped(dir, "path = \"org/absent\"\npreset = \"moonlight-16b-a3b\"", None).unwrap();
        assert_eq!(absent.config.dtype.as_deref(), Some("bfloat16"), "weights have the dtype of the preset");
        assert!(absent.assumed.unwrap().contains("`org/absent` does not exist"));

        let error = shaped(dir, "path = \"org/absent\"", None).unwrap_err();
        assert!(error.hint().unwrap().contains("--model-config"), "{error}");
        let given = shaped(dir, "path = \"org/absent\"", Some("bench-small")).unwrap();
        assert_eq!(given.config, ModelConfig::preset("bench-small").unwrap());

        // The vocabulary is that of the tokenizer, here of bytes.
        std::fs::write(dir.join("other.toml"), "[model]\nhidden_size = 64\n").unwrap();
        let shape = "preset = \"bench-small\"";
        std::fs::write(dir.join("whole.toml"), format!("[model]\ndtype = \"bf16\"\n{shape}\n")).unwrap();
        assert!(shaped(dir, "preset = \"whole.toml\"", None).unwrap_err().to_string().contains("no shape of its own"));
        assert!(shaped(dir, "preset = \"other.toml\"", None).is_err());
    }
}

//! `moonlight plan`.

use std::path::{Path, PathBuf};

use clap::Args;
use moonlight_convert::Checkpoint;
use moonlight_infer::resolve_model;
use moonlight_model::ModelConfig;
use moonlight_optim::distributed::{DistributedForm, GatherPrecision};
use serde_json::{Map, Value, json};

use super::output::print;
use crate::error::TrainError;
use crate::plan::{
    Advice, Cluster, MemoryPart, MultiGpuPlan, MemoryPlan, StepPhase, Threads, TokenFlops, available_memory, tokens_for_share,
};
use crate::recipe::Recipe;

/// The memory of GPUs that are sold, GB.
const SIZES: [u64; 4] = [24, 48, 80, 141];
/// Kept free on a GPU, for its driver and for the gaps of its allocator, GB.
const RESERVE: u64 = 1;

/// Parameters, operations and memory of a run or a model, before it is started.
///
/// The memory of a run is predicted from its shapes, phase by phase of a step, for tensors alone: on the CPU within a
/// tenth of what is allocated; of a GPU it is arithmetic that was not measured.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// A recipe to train by.
    #[arg(required_unless_present = "model", conflicts_with = "model")]
    recipe: Option<PathBuf>,
    /// A model to run: a Hugging Face directory, a checkpoint or folder of a run, or `org/name` in the Hub's cache.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Lay a value over the recipe's, e.g. `--set train.batch_size=1`; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "model")]
    sets: Vec<String>,
    /// What the run has to fit into, GB (10^9 bytes); else what this machine has left, for a run on the CPU.
    #[arg(long, value_name = "GB", conflicts_with = "model")]
    budget: Option<f64>,
    /// Also on so many GPUs, a worker each: memory of one, bytes of a step, time.
    #[arg(long, value_name = "N", conflicts_with = "model", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    workers: Option<u64>,
    /// The rate of the slowest link between two workers, GB a second in one direction; 50 is one of 400 Gbit/s.
    #[arg(long, value_name = "GBPS", default_value_t = 50.0, requires = "workers")]
    link: f64,
    /// The rate of a GPU's matrix products, 10^12 operations a second; 989 is an H100's in bf16 (NVIDIA's data sheet).
    #[arg(long, value_name = "TFLOPS", default_value_t = 989.0, requires = "workers")]
    matmul: f64,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let text = match (&arguments.recipe, &arguments.model) {
        (Some(recipe), _) => {
            let plan = RunPlan::new(recipe, arguments)?;
            if arguments.json { format!("{}\n", plan.json()) } else { plan.text() }
        }
        (None, Some(model)) => of_model(model, arguments.json)?,
        (None, None) => unreachable!("clap wants one of the two"),
    };
    print(&text)
}

fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// The plan of a recipe, and what the arguments ask beside it.
struct RunPlan {
    plan: MemoryPlan,
    /// Micro-batches of a step.
    accumulation: usize,
    /// Bytes that the run has to fit into.
    budget: Option<u64>,
    advice: Vec<Advice>,
    /// Floating-point operations of a step's Newton-Schulz, and from how many tokens a step on they are at most a tenth of all.
    newton_schulz: Option<(f64, u64)>,
    multi_gpu: Option<MultiGpuPlan>,
}

impl RunPlan {
    fn new(path: &Path, arguments: &Arguments) -> Result<Self, TrainError> {
        let recipe = Recipe::load(path, &arguments.sets)?;
        let plan = MemoryPlan::for_recipe(&recipe, Threads::available())?;
        let settings = &plan.settings;
        let budget = match arguments.budget {
            Some(budget) => Some((budget * 1e9) as u64),
            None => available_memory().filter(|_| settings.cpu),
        };
        let advice = budget.map(|budget| plan.advice(budget)).unwrap_or_default();
        let accumulation = recipe.train.gradient_accumulation;
        let multi_gpu = arguments.workers.map(|workers| {
            let distributed = recipe.distributed.clone().unwrap_or_default().optimizer;
            let cluster = Cluster {
                workers,
                link: arguments.link * 1e9,
                matmul: arguments.matmul * 1e12,
                tokens: (recipe.train.batch_size * accumulation * settings.sequence) as u64,
                flat: distributed.form == DistributedForm::Flat,
                gather_bytes: if distributed.gather == GatherPrecision::Bf16 { 2 } else { 4 },
            };
            MultiGpuPlan::new(&plan, cluster)
        });
        let token = plan.token_flops().training(settings.recompute) as f64;
        let newton_schulz = plan.newton_schulz_flops(recipe.optimizer.newton_schulz_steps());
        let newton_schulz = newton_schulz.map(|step| (step, tokens_for_share(0.1, step, token)));
        Ok(Self { plan, accumulation, budget, advice, newton_schulz, multi_gpu })
    }

    fn json(&self) -> Value {
        let plan = &self.plan;
        let parts = |phase: &StepPhase| {
            let part = |&part: &MemoryPart| (part.name().to_owned(), json!(phase.of(part)));
            MemoryPart::ALL.iter().map(part).collect::<Map<_, _>>()
        };
        let phases: Vec<_> =
            plan.phases().iter().map(|phase| json!({"moment": phase.what, "bytes": parts(phase)})).collect();
        let advice: Vec<_> =
            self.advice.iter().map(|advice| json!({"change": advice.change, "peak_bytes": advice.peak})).collect();
        let count = plan.parameters();
        let mut value = json!({
            "parameters": {"total": count.total, "activated": count.activated, "embeddings": count.embeddings},
            "operations_per_token": plan.token_flops().training(plan.settings.recompute),
            "peak_bytes": plan.peak(),
            "largest_moment": plan.largest_phase().what,
            "moments": phases,
            "budget_bytes": self.budget,
            "advice": advice,
        });
        if let Some((step, tokens)) = self.newton_schulz {
            value["newton_schulz_operations"] = json!(step);
            value["tokens_until_newton_schulz_is_a_tenth"] = json!(tokens);
        }
        if let Some(multi_gpu) = &self.multi_gpu {
            value["scale"] = json!(multi_gpu);
        }
        value
    }

    fn text(&self) -> String {
        let (plan, settings) = (&self.plan, &self.plan.settings);
        let flops = plan.token_flops();
        let mut text = heading(&plan.config, flops);
        let tokens = (settings.batch * settings.sequence * self.accumulation) as f64;
        let step = flops.training(settings.recompute) as f64 * tokens;
        text += &format!("a step:      {tokens:.0} tokens, {step:.3e} floating-point operations\n");
        if let Some((optimizer, enough)) = self.newton_schulz {
            let share = optimizer / (optimizer + step);
            text += &format!(
                "its Muon:    {optimizer:.3e} more in Newton-Schulz, {:.1} % of both; under 10 % from {enough} tokens a step on\n",
                100.0 * share
            );
        }
        text += &self.memory();
        if let Some(multi_gpu) = &self.multi_gpu {
            text += &multi_gpu.table();
        }
        text
    }

    /// The phase that needs the most memory, part by part; what holds it, and what would make it smaller.
    fn memory(&self) -> String {
        let plan = &self.plan;
        let mut text = format!("\nmemory at the largest moment of a step ({})\n", plan.largest_phase().what);
        for part in MemoryPart::ALL {
            let bytes = plan.largest_phase().of(part);
            if bytes > 0 {
                text += &format!("  {:<16} {:>10.3} GB\n", part.name(), gigabytes(bytes));
            }
        }
        text += &format!("  {:<16} {:>10.3} GB\n\n", "together", gigabytes(plan.peak()));
        let holds = |size: &&u64| gigabytes(plan.peak()) <= (**size - RESERVE) as f64;
        text += &match SIZES.iter().find(holds) {
            None => format!("no GPU of up to {} GB holds it\n", SIZES[SIZES.len() - 1]),
            Some(size) => format!("the smallest GPU that holds it, with {RESERVE} GB to spare: {size} GB\n"),
        };
        let Some(budget) = self.budget else { return text };
        let verdict = if plan.peak() <= budget { "it fits into" } else { "it does not fit into" };
        text += &format!("{verdict} {:.2} GB\n", gigabytes(budget));
        for advice in &self.advice {
            text += &format!("  with `{}`: {:.3} GB\n", advice.change, gigabytes(advice.peak));
        }
        if plan.peak() > budget && self.advice.last().is_none_or(|last| last.peak > budget) {
            text += "  nothing else in a recipe makes it smaller but a shorter `data.sequence_length` or LoRA\n";
        }
        text
    }
}

/// Parameters and operations.
fn heading(config: &ModelConfig, flops: TokenFlops) -> String {
    let count = config.parameter_count();
    let million = |count: u64| count as f64 / 1e6;
    format!(
        "parameters:  {:.2} M, of which a token uses {:.2} M; {:.2} M in embeddings\n\
         a token:     {:.3e} floating-point operations forward, {:.3e} of them in attention\n",
        million(count.total),
        million(count.activated),
        million(count.embeddings),
        flops.forward() as f64,
        flops.attention as f64,
    )
}

fn of_model(path: &Path, as_json: bool) -> Result<String, TrainError> {
    let checkpoint = Checkpoint::open(resolve_model(path)?)?;
    let config = checkpoint.config();
    let weights = config.parameter_count().total;
    let per_token = (config.num_hidden_layers * config.cache_values_per_token()) as u64;
    let context = config.max_position_embeddings as u64;
    let flops = TokenFlops::of(config, config.max_position_embeddings);
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
    let mut text = heading(config, flops);
    text += &format!("\n{:<24} {:>12} {:>12}\n", "memory to run it", "bf16", "f32");
    let mut line = |name: &str, values: u64| {
        let (half, full) = (gigabytes(2 * values), gigabytes(4 * values));
        text += &format!("{name:<24} {half:>9.3} GB {full:>9.3} GB\n");
    };
    line("weights", weights);
    line(&format!("cache of {context} tokens"), per_token * context);
    line("together", weights + per_token * context);
    Ok(text)
}

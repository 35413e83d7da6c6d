//! What a run will need, predicted from shapes alone: parameters, floating-point operations, memory by part.
//!
//! * `activation_memory.rs`: what a layer keeps for its backward pass.
//! * `step_memory.rs`: a training step, phase by phase.
//! * `flops.rs`: floating-point operations of a token and of an optimizer step.
//! * `advice.rs`: which settings to change so that a run fits.
//! * `system_memory.rs`: the memory that is free on this machine.
//! * `multi_gpu.rs`: memory, traffic and time on several GPUs.

mod activation_memory;
mod advice;
mod flops;
mod multi_gpu;
mod step_memory;
mod system_memory;
#[cfg(test)]
mod tests;

use moonlight_infer::device::ComputeDevice;
use moonlight_model::ModelConfig;
use moonlight_model::config::ParameterCount;
use moonlight_optim::{Adaptive, MomentumPrecision, NewtonSchulz, Rounding};

use crate::error::TrainError;
use crate::frozen::frozen_parameters;
use crate::recipe::{Checkpointing, LoraRecipe, ModelDtype, OptimizerName, Recipe};

pub use advice::Advice;
pub use flops::{TokenFlops, newton_schulz_flops, tokens_for_share};
pub use multi_gpu::{Cluster, MultiGpuPlan, Quantity};
pub use step_memory::{MemoryPart, MemorySettings, StepPhase, UpdatedBy};
pub use system_memory::available_memory;

/// CPU threads: each has a scratch buffer, and works on a matrix of its own in Newton-Schulz.
#[derive(Debug, Clone, Copy)]
pub struct Threads(pub usize);

impl Threads {
    /// The threads that a run on this machine would have.
    pub fn available() -> Self {
        Self(rayon::current_num_threads())
    }
}

impl MemorySettings {
    /// The settings of a recipe for a model of this shape, on the CPU or on a GPU.
    ///
    /// # Errors
    ///
    /// A pattern of `train.freeze` that matches no parameter.
    pub fn for_recipe(recipe: &Recipe, config: &ModelConfig, cpu: bool, threads: Threads) -> Result<Self, TrainError> {
        // `auto` trains in f32 on the CPU and in the dtype of the files on a GPU.
        let half = match recipe.model.dtype {
            ModelDtype::Bf16 | ModelDtype::F16 => true,
            ModelDtype::Auto if !cpu => config.dtype.as_deref().is_some_and(|dtype| dtype != "float32"),
            _ => false,
        };
        let accumulates = recipe.train.gradient_accumulation > 1
            || recipe.schedule.accumulation.iter().any(|change| change.gradient_accumulation > 1);
        Ok(Self {
            batch: recipe.train.batch_size,
            sequence: recipe.data.sequence_length,
            bytes_per_value: if half { 2 } else { 4 },
            recompute: recipe.train.activation_checkpointing == Checkpointing::Block,
            loss_chunk_tokens: recipe.train.loss_chunk_tokens,
            fuse_update: recipe.train.fuse_update,
            gradient_accumulation: recipe.train.gradient_accumulation,
            accumulates,
            muon: recipe.optimizer.name == OptimizerName::Muon,
            momentum_bytes: if recipe.optimizer.muon.momentum_precision == MomentumPrecision::Bf16 { 2 } else { 4 },
            second_moment_bytes: if matches!(recipe.optimizer.muon.adaptive, Adaptive::AdaMuon { .. }) { 4 } else { 0 },
            master_weights: recipe.optimizer.muon.rounding == Rounding::MasterWeights,
            cpu,
            unfused_attention: cpu && recipe.model.dtype == ModelDtype::F16,
            threads: threads.0,
            frozen: frozen_parameters(config, &recipe.train.freeze)?,
            lora: recipe.lora.as_ref().map(LoraRecipe::config),
            quantization: recipe.model.quantize.bits(),
            probes: {
                let every = recipe.train.probe_every;
                every > 0 && (every <= recipe.train.steps || recipe.train.epochs > 0.0)
            },
        })
    }
}

/// The memory of a training step, and the shape that it was computed for.
#[derive(Debug, Clone)]
pub struct MemoryPlan {
    /// The shape: vocabulary, layers, widths, experts.
    pub config: ModelConfig,
    /// Everything else that memory depends on.
    pub settings: MemorySettings,
    phases: Vec<StepPhase>,
}

impl MemoryPlan {
    /// Follows one step of a model of this shape.
    pub fn new(config: ModelConfig, settings: MemorySettings) -> Self {
        let phases = step_memory::phases(&config, &settings);
        Self { config, settings, phases }
    }

    /// The plan of a resolved recipe, for the device that it names. A device that this build cannot open is treated as a GPU, so that
    /// a CPU build can plan for one.
    ///
    /// # Errors
    ///
    /// A tokenizer or a `config.json` that cannot be read, and those of [`MemorySettings::for_recipe`].
    pub fn for_recipe(recipe: &Recipe, threads: Threads) -> Result<Self, TrainError> {
        let tokenizer = recipe.data.open_tokenizer()?;
        let config = recipe.model.config_for(tokenizer.as_ref())?;
        Self::for_shape(recipe, config, threads)
    }

    /// Like [`for_recipe`](Self::for_recipe), with a known shape; reads no file.
    ///
    /// # Errors
    ///
    /// Those of [`MemorySettings::for_recipe`].
    pub fn for_shape(recipe: &Recipe, config: ModelConfig, threads: Threads) -> Result<Self, TrainError> {
        let cpu = ComputeDevice::open(&recipe.run.device).is_ok_and(|target| target.is_cpu);
        let settings = MemorySettings::for_recipe(recipe, &config, cpu, threads)?;
        Ok(Self::new(config, settings))
    }

    /// The phase that needs the most memory.
    pub fn largest_phase(&self) -> &StepPhase {
        self.phases.iter().max_by_key(|phase| phase.total()).expect("a step has phases")
    }

    /// The peak memory of a step, bytes.
    pub fn peak(&self) -> u64 {
        self.largest_phase().total()
    }

    /// Floating-point operations of one token, in sequences of the recipe's length.
    pub fn token_flops(&self) -> TokenFlops {
        TokenFlops::for_sequence(&self.config, self.settings.sequence)
    }

    /// Floating-point operations of Newton-Schulz in an optimizer step. `None` unless Muon updates every
    /// matrix: with LoRA or frozen parameters the sum over all matrices would be wrong.
    pub fn newton_schulz_flops(&self, iteration: &NewtonSchulz) -> Option<f64> {
        let MemorySettings { muon, cpu, frozen, lora, .. } = &self.settings;
        let whole = *muon && lora.is_none() && !frozen.contains(&true);
        whole.then(|| newton_schulz_flops(&self.config, iteration, *cpu))
    }

    /// All phases of a step, in order.
    pub fn phases(&self) -> &[StepPhase] {
        &self.phases
    }

    /// The number of parameters: in total, activated by a token, in embeddings.
    pub fn parameters(&self) -> ParameterCount {
        self.config.parameter_count()
    }
}

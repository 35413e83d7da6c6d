//! What a model or a run needs before it is started: parameters, floating-point operations, memory by part.
//!
//! * `activation_memory.rs`: what a layer keeps for its gradient.
//! * `step_memory.rs`: a training step followed phase by phase.
//! * `flops.rs`: the floating-point operations of a token and of an optimizer step.
//! * `advice.rs`: what to change so that a run fits.
//! * `system_memory.rs`: the memory that this machine has left.
//! * `multi_gpu.rs`: the same on several GPUs, and what they send each other.

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
use moonlight_optim::{Adaptive, MomentumPrecision, Rounding};

use crate::error::TrainError;
use crate::frozen::frozen_parameters;
use crate::recipe::{Checkpointing, LoraRecipe, ModelDtype, OptimizerName, Recipe};

pub use advice::Advice;
pub use flops::{TokenFlops, newton_schulz_flops, tokens_for_share};
pub use multi_gpu::{Cluster, MultiGpuPlan, Quantity};
pub use step_memory::{MemoryPart, MemorySettings, StepPhase, UpdatedBy};
pub use system_memory::available_memory;

/// Threads of the CPU that a plan counts with.
#[derive(Debug, Clone, Copy)]
pub struct Threads(pub usize);

impl Threads {
    /// Those of this machine.
    pub fn available() -> Self {
        Self(rayon::current_num_threads())
    }
}

impl MemorySettings {
    /// How a recipe trains a model of this shape, on the CPU or elsewhere.
    ///
    /// # Errors
    ///
    /// A pattern of `train.freeze` that does not fit the model.
    pub fn for_recipe(recipe: &Recipe, config: &ModelConfig, cpu: bool, threads: Threads) -> Result<Self, TrainError> {
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
            bytes: if half { 2 } else { 4 },
            recompute: recipe.train.activation_checkpointing == Checkpointing::Block,
            loss_chunk_tokens: recipe.train.loss_chunk_tokens,
            fused: recipe.train.fuse_update,
            accumulates,
            muon: recipe.optimizer.name == OptimizerName::Muon,
            momentum_bytes: if recipe.optimizer.muon.momentum_precision == MomentumPrecision::Bf16 { 2 } else { 4 },
            second_moment_bytes: if matches!(recipe.optimizer.muon.adaptive, Adaptive::AdaMuon { .. }) { 4 } else { 0 },
            masters: recipe.optimizer.muon.rounding == Rounding::MasterWeights,
            cpu,
            plain_attention: cpu && recipe.model.dtype == ModelDtype::F16,
            threads: threads.0,
            frozen: frozen_parameters(config, &recipe.train.freeze)?,
            lora: recipe.lora.as_ref().map(LoraRecipe::config),
            packed: recipe.model.quantize.bits(),
            probed: {
                let every = recipe.train.probe_every;
                every > 0 && (every <= recipe.train.steps || recipe.train.epochs > 0.0)
            },
        })
    }
}

/// What a run needs.
#[derive(Debug, Clone)]
pub struct MemoryPlan {
    /// The model's shape.
    pub config: ModelConfig,
    /// How it trains.
    pub settings: MemorySettings,
    phases: Vec<StepPhase>,
}

impl MemoryPlan {
    /// The plan of a shape under a settings.
    pub fn new(config: ModelConfig, settings: MemorySettings) -> Self {
        let phases = step_memory::phases(&config, &settings);
        Self { config, settings, phases }
    }

    /// The plan of a recipe, for the device that it names.
    ///
    /// # Errors
    ///
    /// A tokenizer, a model or a device that does not open.
    pub fn for_recipe(recipe: &Recipe, threads: Threads) -> Result<Self, TrainError> {
        let tokenizer = recipe.data.open_tokenizer()?;
        let config = recipe.model.config_for(tokenizer.as_ref())?;
        let cpu = ComputeDevice::open(&recipe.run.device).is_ok_and(|target| target.is_cpu);
        let settings = MemorySettings::for_recipe(recipe, &config, cpu, threads)?;
        Ok(Self::new(config, settings))
    }

    /// The phase that needs the most memory.
    pub fn largest_phase(&self) -> &StepPhase {
        self.phases.iter().max_by_key(|phase| phase.total()).expect("a step has phases")
    }

    /// The most memory that a step needs, bytes.
    pub fn peak(&self) -> u64 {
        self.largest_phase().total()
    }

    /// TokenFlops of a token.
    pub fn token_flops(&self) -> TokenFlops {
        TokenFlops::of(&self.config, self.settings.sequence)
    }

    /// TokenFlops of a step's Newton-Schulz with so many steps of it; `None` where Muon does not train the whole model.
    pub fn newton_schulz_flops(&self, steps: usize) -> Option<f64> {
        let MemorySettings { muon, cpu, frozen, lora, .. } = &self.settings;
        let whole = *muon && lora.is_none() && !frozen.contains(&true);
        whole.then(|| newton_schulz_flops(&self.config, steps, *cpu))
    }

    /// All phases of a step, in their order.
    pub fn phases(&self) -> &[StepPhase] {
        &self.phases
    }

    /// Parameters.
    pub fn parameters(&self) -> ParameterCount {
        self.config.parameter_count()
    }
}

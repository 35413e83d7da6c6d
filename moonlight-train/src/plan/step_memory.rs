//! The memory of a training step, part by part, at each of its phases.
//!
//! A step is followed from phase to phase as the trainer takes it (`trainer/backward.rs`, `trainer/step.rs` and the
//! optimizer), and what is alive at each is added up. The largest phase is what has to fit.

use moonlight_model::ModelConfig;
use moonlight_model::QuantBits;
use moonlight_model::config::{ParameterKind, ParameterShape};
use moonlight_model::kernels::QUANT_BLOCK;
use moonlight_model::lora::{AdapterShape, LoraConfig};
use moonlight_optim::memory::step_batches;
use serde::Serialize;

use super::activation_memory::{of_head, of_layer};

/// What memory is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryPart {
    /// The parameters.
    Weights,
    /// Momentum, Adam's phases, f32 masters.
    OptimizerState,
    /// Gradients of parameters.
    Gradients,
    /// The input of each layer, where layers run again.
    LayerInputs,
    /// What graphs keep for the backward pass, and gradients of activations.
    Activations,
    /// Logits and their gradient.
    Logits,
    /// What an update needs beside parameter, gradient and state.
    Update,
    /// Parameters as they were before the step, where the step is one of those of `train.probe_every`.
    Copy,
}

impl MemoryPart {
    /// All, in the order in which they are printed.
    pub const ALL: [MemoryPart; 8] = [
        MemoryPart::Weights,
        MemoryPart::OptimizerState,
        MemoryPart::Gradients,
        MemoryPart::LayerInputs,
        MemoryPart::Activations,
        MemoryPart::Logits,
        MemoryPart::Update,
        MemoryPart::Copy,
    ];

    /// The name for people.
    pub fn name(self) -> &'static str {
        match self {
            MemoryPart::Weights => "weights",
            MemoryPart::OptimizerState => "optimizer state",
            MemoryPart::Gradients => "gradients",
            MemoryPart::LayerInputs => "layer inputs",
            MemoryPart::Activations => "activations",
            MemoryPart::Logits => "logits",
            MemoryPart::Update => "update",
            MemoryPart::Copy => "copy to compare",
        }
    }
}

/// What is alive at a phase of a step, bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StepPhase {
    /// What happens.
    pub what: String,
    bytes: [u64; MemoryPart::ALL.len()],
}

impl StepPhase {
    /// Bytes of a part.
    pub fn of(&self, part: MemoryPart) -> u64 {
        self.bytes[part as usize]
    }

    /// Bytes of all parts.
    pub fn total(&self) -> u64 {
        self.bytes.iter().sum()
    }

    fn with(mut self, part: MemoryPart, bytes: u64) -> Self {
        self.bytes[part as usize] += bytes;
        self
    }
}

/// Which optimizer updates a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpdatedBy {
    /// Muon.
    Muon,
    /// AdamW.
    AdamW,
    /// None: it is frozen, or a buffer.
    Nothing,
}

/// How a run trains, as far as memory is concerned.
#[derive(Debug, Clone, PartialEq)]
pub struct MemorySettings {
    /// Sequences of a micro-batch.
    pub batch: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Bytes of a weight, an activation and a gradient: 4 or 2.
    pub bytes: u64,
    /// Whether layers run again for their gradients.
    pub recompute: bool,
    /// Tokens of the head at a time; 0 for all.
    pub loss_chunk_tokens: usize,
    /// Whether layers are updated one by one.
    pub fused: bool,
    /// Whether gradients of several micro-batches are summed.
    pub accumulates: bool,
    /// Whether matrices are Muon's.
    pub muon: bool,
    /// Bytes of a momentum value.
    pub momentum_bytes: u64,
    /// Bytes of a second moment for each value that Muon updates: AdaMuon's. (NorMuon has one for each output: next to nothing.)
    pub second_moment_bytes: u64,
    /// Whether parameters that are not f32 have an f32 master.
    pub masters: bool,
    /// Whether weights and checkpoints share their memory: the device is the CPU.
    pub cpu: bool,
    /// Whether attention runs in its plain form, which holds all scores at once: the CPU has no kernel of it for f16.
    pub plain_attention: bool,
    /// Matrices that the CPU's Newton-Schulz works on at a time.
    pub threads: usize,
    /// For each parameter of the model whether it is frozen; empty where none is.
    pub frozen: Vec<bool>,
    /// Adapters beside a frozen model.
    pub lora: Option<LoraConfig>,
    /// QuantBits of the frozen projections, where they are packed.
    pub packed: Option<QuantBits>,
    /// Whether there are steps whose update is measured, against the parameters as they were.
    pub probed: bool,
}

/// A parameter with what it costs.
struct Parameter {
    stage: Stage,
    /// `[stack, rows, columns]`.
    shape: [u64; 3],
    values: u64,
    bytes: u64,
    /// QuantBits of a value, where it is packed.
    packed: Option<QuantBits>,
    by: UpdatedBy,
}

/// When a parameter's gradient is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Head,
    Layer(usize),
    Embedding,
}

/// All phases of a step.
pub(super) fn phases(config: &ModelConfig, settings: &MemorySettings) -> Vec<StepPhase> {
    let frozen = |index: usize| settings.lora.is_some() || settings.frozen.get(index).copied().unwrap_or(false);
    let shapes = config.parameter_shapes();
    let mut parameters: Vec<Parameter> = shapes
        .iter()
        .enumerate()
        .map(|(index, shape)| Parameter::new(shape, frozen(index), settings.bytes, config, settings))
        .collect();
    let adapters = settings.lora.as_ref().map(|lora| lora.adapter_shapes(config)).unwrap_or_default();
    for adapter in &adapters {
        for shape in [&adapter.a, &adapter.b] {
            // Always f32.
            let shape = ParameterShape {
                path: adapter.path.clone(),
                shape: shape.clone(),
                kind: ParameterKind::Matrix,
                role: Some(adapter.role),
                layer: Some(adapter.layer),
            };
            parameters.push(Parameter::new(&shape, false, 4, config, settings));
        }
    }
    Step { config, settings, parameters: &parameters, adapters: &adapters }.phases()
}

impl Parameter {
    fn new(shape: &ParameterShape, frozen: bool, bytes: u64, config: &ModelConfig, settings: &MemorySettings) -> Self {
        let stage = match shape.layer {
            Some(layer) => Stage::Layer(layer),
            None if shape.kind == ParameterKind::Embedding && !config.tie_word_embeddings => Stage::Embedding,
            // A tied embedding has a gradient from the head on.
            None => Stage::Head,
        };
        let by = match shape.kind {
            ParameterKind::CorrectionBias => UpdatedBy::Nothing,
            _ if frozen => UpdatedBy::Nothing,
            ParameterKind::Matrix | ParameterKind::Experts | ParameterKind::Router if settings.muon => UpdatedBy::Muon,
            _ => UpdatedBy::AdamW,
        };
        let dims: Vec<u64> = shape.shape.iter().map(|&dim| dim as u64).collect();
        let shape3 = match dims[..] {
            [stack, rows, columns] => [stack, rows, columns],
            [rows, columns] => [1, rows, columns],
            _ => [1, 1, dims.iter().product()],
        };
        let bytes = if shape.kind == ParameterKind::CorrectionBias { 4 } else { bytes };
        let projection = matches!(shape.kind, ParameterKind::Matrix | ParameterKind::Experts);
        let packed = settings.packed.filter(|_| frozen && projection);
        Self { stage, shape: shape3, values: shape.count(), bytes, packed, by }
    }

    fn weight(&self) -> u64 {
        let Some(bits) = self.packed else { return self.values * self.bytes };
        let [stack, rows, columns] = self.shape;
        let blocks = (rows * columns).div_ceil(QUANT_BLOCK as u64);
        // Numbers and an f32 scale.
        stack * blocks * (bits.bytes(QUANT_BLOCK) as u64 + 4)
    }

    /// One matrix in full, where it is packed: what is there during its product.
    fn unpacked(&self) -> u64 {
        let [_, rows, columns] = self.shape;
        if self.packed.is_some() { rows * columns * self.bytes } else { 0 }
    }

    fn gradient(&self) -> u64 {
        if self.by == UpdatedBy::Nothing { 0 } else { self.weight() }
    }

    fn state(&self, settings: &MemorySettings) -> u64 {
        let master = if settings.masters && self.bytes < 4 { 4 } else { 0 };
        self.values
            * match self.by {
                UpdatedBy::Muon => settings.momentum_bytes + settings.second_moment_bytes + master,
                UpdatedBy::AdamW => 8 + master,
                UpdatedBy::Nothing => 0,
            }
    }
}

/// A step as it is followed.
struct Step<'a> {
    config: &'a ModelConfig,
    settings: &'a MemorySettings,
    parameters: &'a [Parameter],
    adapters: &'a [AdapterShape],
}

impl Step<'_> {
    fn phases(&self) -> Vec<StepPhase> {
        let mut phases = self.pass();
        if !self.settings.fused {
            phases.extend(self.update(|_| true, 0, &mut 0));
        }
        if self.settings.probed {
            let trained = || self.parameters.iter().filter(|parameter| parameter.by != UpdatedBy::Nothing);
            let largest = trained().map(|parameter| parameter.values).max().unwrap_or_default();
            let phase =
                self.standing("measuring the update").with(MemoryPart::Copy, trained().map(Parameter::weight).sum());
            // In f32, and where the parameter is not, both of it in f32 as well.
            let copies = if self.settings.bytes < 4 { MEASURED_COPIES + 2 } else { MEASURED_COPIES };
            phases.push(phase.with(MemoryPart::Update, 4 * copies * largest));
        }
        phases
    }

    /// What is there all the time.
    fn standing(&self, what: &str) -> StepPhase {
        let phase = StepPhase { what: what.to_owned(), bytes: [0; MemoryPart::ALL.len()] };
        phase
            .with(MemoryPart::Weights, self.parameters.iter().map(Parameter::weight).sum())
            .with(MemoryPart::Weights, self.parameters.iter().map(Parameter::unpacked).max().unwrap_or_default())
            .with(
                MemoryPart::OptimizerState,
                self.parameters.iter().map(|parameter| parameter.state(self.settings)).sum(),
            )
            .with(MemoryPart::Activations, self.scratch())
    }

    /// The f32 copies of a product's operands that each thread of the CPU keeps where they are not f32: 256 rows, 128
    /// columns of the matrix, and what comes of them (`moonlight_model::kernels`).
    fn scratch(&self) -> u64 {
        let Self { config, settings, .. } = self;
        if !settings.cpu || settings.bytes == 4 {
            return 0;
        }
        let widest = config.hidden_size.max(config.intermediate_size).max(config.vocab_size) as u64;
        settings.threads as u64 * 4 * ((256 + 128) * widest + 256 * 128)
    }

    fn gradients(&self, of: impl Fn(&Parameter) -> bool) -> u64 {
        self.parameters.iter().filter(|parameter| of(parameter)).map(Parameter::gradient).sum()
    }

    /// Forward and backward of the last micro-batch, and where the step is fused its updates.
    fn pass(&self) -> Vec<StepPhase> {
        let Self { config, settings, .. } = self;
        let bytes = settings.bytes;
        let n = (settings.batch * settings.sequence) as u64;
        let stream = n * config.hidden_size as u64 * bytes; // the residual stream at one place
        let layers = config.num_hidden_layers;
        let activations: Vec<_> = (0..layers)
            .map(|layer| of_layer(config, layer, settings, self.adapters))
            .map(|layer| (layer.kept * bytes, layer.transient * bytes))
            .collect();
        let summed = if settings.accumulates { self.gradients(|_| true) } else { 0 };
        // Gradients that are there when the pass comes to a stage: where sums exist already, new ones last for a stage.
        let kept = |of: &dyn Fn(&Parameter) -> bool| match (settings.fused, settings.accumulates && settings.recompute)
        {
            (true, _) | (_, true) => 0,
            _ => self.gradients(of),
        };
        let mut phases = Vec::new();
        // Parameters that a fused step has updated already, as they were.
        let mut copied = 0;

        let inputs = |layer: usize| if settings.recompute { (layer as u64 + 1) * stream } else { 0 };
        let graph: u64 = if settings.recompute { 0 } else { activations.iter().map(|(kept, _)| kept + stream).sum() };
        let chunk = if settings.loss_chunk_tokens == 0 { n } else { n.min(settings.loss_chunk_tokens as u64) };
        let (head_kept, logits) = of_head(config, chunk, settings.lora.is_some());
        let head = self.gradients(|parameter| parameter.stage == Stage::Head);
        // With the gradient of the logits in hand, that of the head is made; over chunks it is summed.
        let chunks = if chunk < n { 2 } else { 1 };
        let at_head = || {
            self.standing("head and loss")
                .with(MemoryPart::Gradients, summed)
                .with(MemoryPart::LayerInputs, inputs(layers - 1))
                .with(MemoryPart::Activations, graph + head_kept * bytes + 2 * stream)
        };
        phases
            .push(at_head().with(MemoryPart::Logits, logits * bytes).with(MemoryPart::Gradients, (chunks - 1) * head));
        phases.push(at_head().with(MemoryPart::Logits, logits / 2 * bytes).with(MemoryPart::Gradients, chunks * head));
        if settings.fused {
            let beside = inputs(layers - 1) + graph + stream;
            phases.extend(self.update(|parameter| parameter.stage == Stage::Head, beside, &mut copied));
        }
        for layer in (0..layers).rev() {
            let (own, transient) = activations[layer];
            let later = |parameter: &Parameter| match parameter.stage {
                Stage::Head => true,
                Stage::Layer(other) => other > layer,
                Stage::Embedding => false,
            };
            let of_this = |parameter: &Parameter| parameter.stage == Stage::Layer(layer);
            let alive = if settings.recompute {
                own
            } else {
                activations[..=layer].iter().map(|(kept, _)| kept + stream).sum()
            };
            let phase = self
                .standing(&format!("backward of layer {layer}"))
                .with(MemoryPart::Gradients, summed + kept(&later))
                .with(MemoryPart::LayerInputs, inputs(layer))
                .with(MemoryPart::Activations, alive + stream)
                .with(MemoryPart::Copy, copied);
            // At first the gradients of activations, at last those of the layer's parameters.
            phases.push(phase.clone().with(MemoryPart::Activations, transient));
            let left = alive.saturating_sub(own);
            let end = self
                .standing(&format!("backward of layer {layer}"))
                .with(MemoryPart::Gradients, summed + kept(&later) + self.gradients(of_this))
                .with(MemoryPart::LayerInputs, inputs(layer))
                .with(MemoryPart::Activations, left + own / 4 + 3 * stream)
                .with(MemoryPart::Copy, copied);
            phases.push(end);
            if settings.fused && settings.recompute {
                let beside = if layer == 0 { stream } else { inputs(layer - 1) + stream };
                phases.extend(self.update(of_this, beside, &mut copied));
            }
        }
        if settings.fused {
            let rest = |parameter: &Parameter| match parameter.stage {
                Stage::Head => false,
                Stage::Layer(_) => !settings.recompute,
                Stage::Embedding => true,
            };
            phases.extend(self.update(rest, stream, &mut copied));
        } else {
            let all = self.gradients(|_| true);
            let embedding = self.gradients(|parameter| parameter.stage == Stage::Embedding);
            let new = if settings.accumulates && settings.recompute { embedding } else { all };
            phases.push(
                self.standing("end of the backward pass")
                    .with(MemoryPart::Gradients, summed + new)
                    .with(MemoryPart::Activations, 2 * stream),
            );
        }
        phases
    }

    /// The update of some parameters, whose gradients are freed one after the other; `beside` is what else is alive in the meantime, and
    /// `copied` what is kept of parameters that were updated, where the update is to be measured.
    fn update(&self, of: impl Fn(&Parameter) -> bool, beside: u64, copied: &mut u64) -> Vec<StepPhase> {
        let mut waiting: Vec<&Parameter> = self.parameters.iter().filter(|parameter| of(parameter)).collect();
        waiting.retain(|parameter| parameter.by != UpdatedBy::Nothing);
        let mut gradients: u64 = waiting.iter().map(|parameter| parameter.gradient()).sum();
        let (muon, adamw): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|one| one.by == UpdatedBy::Muon);
        let mut phases = Vec::new();
        let mut note = |what: &str, gradients: u64, workspace: u64, weights: u64| {
            let phase = self.standing(what).with(MemoryPart::Gradients, gradients).with(MemoryPart::Copy, *copied);
            phases.push(phase.with(MemoryPart::Update, workspace).with(MemoryPart::Activations, beside));
            *copied += if self.settings.probed { weights } else { 0 };
        };
        let elements = |parameter: &&Parameter| parameter.values as usize;
        for batch in step_batches(muon, elements, |one, other| one.shape == other.shape) {
            let weights = batch.iter().map(|parameter| parameter.weight()).sum();
            note("Muon", gradients, self.muon_workspace(&batch), weights);
            gradients -= batch.iter().map(|parameter| parameter.gradient()).sum::<u64>();
        }
        for parameter in adamw {
            note("AdamW", gradients, ADAMW_COPIES * parameter.values * 4, parameter.weight());
            gradients -= parameter.gradient();
        }
        phases
    }

    fn muon_workspace(&self, batch: &[&Parameter]) -> u64 {
        let Some(first) = batch.first() else { return 0 };
        let settings = self.settings;
        let [stack, rows, columns] = first.shape;
        let values = batch.len() as u64 * first.values;
        let short = rows.min(columns);
        // In Newton-Schulz: the new momentum, what goes in and what comes out, while old momentum and gradient are gone; of
        // a parameter in half precision its f32 form in place of itself, or of its master.
        let narrow = first.bytes < 4;
        let widened = if narrow { 4 - first.bytes } else { 0 };
        let replaced = if narrow && settings.masters { 4 } else { 0 };
        let gone = settings.momentum_bytes + if settings.probed { 0 } else { first.bytes } + replaced;
        let stack_bytes = (12 + widened - gone) * values;
        // X and its successor; the Gram matrix, its polynomial, and in the Gram form three more.
        let matrix = 2 * rows * columns + 5 * short * short;
        let threads = settings.threads as u64;
        if settings.cpu {
            let many = batch.len() as u64 >= 2 * threads && settings.momentum_bytes == 4 && !narrow;
            let at_once = if many || stack * batch.len() as u64 >= 2 * threads { threads } else { 1 };
            // Many are stepped in place, but for parameters that the model before the step holds too.
            let shared = if settings.probed { 4 * values } else { 0 };
            let copies = if many { shared } else { stack_bytes };
            copies + 4 * at_once * matrix
        } else {
            // Every matrix of the batch is on its way at once.
            stack_bytes + 4 * (values + stack * batch.len() as u64 * 3 * short * short)
        }
    }
}

/// Of the largest parameter, for the RMS of its update: the change, its decay, and the one without the other.
const MEASURED_COPIES: u64 = 3;
/// Both phases without their bias, and the new parameter.
const ADAMW_COPIES: u64 = 3;

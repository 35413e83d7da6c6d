//! The memory of a training step: each phase, part by part.
//!
//! The phases follow the trainer (`trainer/backward.rs`, `trainer/step.rs`) and the optimizer. In each phase the live tensors are added
//! up, and the largest sum is the peak. `tests/plan_memory.rs` asserts that it is within a tenth of what a run allocates.

use moonlight_model::ModelConfig;
use moonlight_model::QuantBits;
use moonlight_model::config::{ParameterKind, ParameterShape};
use moonlight_model::kernels::QuantizedShape;
use moonlight_model::lora::{AdapterShape, LoraConfig};
use moonlight_optim::memory::step_batches;
use serde::Serialize;

use super::activation_memory::{head_activations, layer_activations};

/// What memory is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryPart {
    /// The parameters, trained and frozen.
    Weights,
    /// Muon's momentum, Adam's two moments, f32 master weights.
    OptimizerState,
    /// Gradients of parameters, not of activations.
    Gradients,
    /// The input of each layer, kept by activation checkpointing.
    LayerInputs,
    /// What the graph keeps for the backward pass, and gradients of activations.
    Activations,
    /// Logits and their gradient.
    Logits,
    /// Workspace of the optimizer: everything except parameter, gradient and state.
    Update,
    /// Parameters as they were before the step, in the steps of `train.probe_every`.
    ProbeCopy,
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
        MemoryPart::ProbeCopy,
    ];

    /// The name in tables, and the key in `moonlight plan --json`.
    pub fn name(self) -> &'static str {
        match self {
            MemoryPart::Weights => "weights",
            MemoryPart::OptimizerState => "optimizer state",
            MemoryPart::Gradients => "gradients",
            MemoryPart::LayerInputs => "layer inputs",
            MemoryPart::Activations => "activations",
            MemoryPart::Logits => "logits",
            MemoryPart::Update => "update",
            MemoryPart::ProbeCopy => "copy to compare",
        }
    }
}

/// A phase of a step, and the memory in use during it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StepPhase {
    /// What happens: `backward of layer 3`.
    pub name: String,
    bytes: [u64; MemoryPart::ALL.len()],
}

impl StepPhase {
    /// Bytes of a part.
    pub fn bytes(&self, part: MemoryPart) -> u64 {
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
    /// No optimizer: it is frozen, or the router's correction bias, which the trainer updates.
    Nothing,
}

/// Everything in a run that its memory depends on, except the shape of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct MemorySettings {
    /// Sequences in a micro-batch.
    pub batch: usize,
    /// Tokens in a sequence.
    pub sequence: usize,
    /// Bytes of a weight, of an activation and of a gradient: 4 or 2.
    pub bytes_per_value: u64,
    /// Whether each layer runs forward again in the backward pass (`activation_checkpointing = "block"`).
    pub recompute: bool,
    /// Tokens whose logits exist at once; 0 for all.
    pub loss_chunk_tokens: usize,
    /// Whether each layer is updated as soon as its gradients exist (`train.fuse_update`).
    pub fuse_update: bool,
    /// Micro-batches of a step on one rank, at the start of the run.
    pub gradient_accumulation: usize,
    /// Whether gradients of several micro-batches are ever summed, now or later in the schedule.
    pub accumulates: bool,
    /// Whether Muon updates the matrices; else AdamW updates everything.
    pub muon: bool,
    /// Bytes of a momentum value.
    pub momentum_bytes: u64,
    /// Bytes of the second moment of each value that Muon updates: AdaMuon's. NorMuon has one per output, which is not counted.
    pub second_moment_bytes: u64,
    /// Whether parameters in half precision have an f32 master copy.
    pub master_weights: bool,
    /// Whether the device is the CPU: its kernels have scratch buffers, and its Newton-Schulz works on a few matrices at once.
    pub cpu: bool,
    /// Whether attention is computed without the fused kernel, with all scores in memory: f16 on the CPU.
    pub unfused_attention: bool,
    /// CPU threads, each with a scratch buffer and a matrix of its own in Newton-Schulz.
    pub threads: usize,
    /// For each parameter of the model, in order, whether it is frozen; empty if none is.
    pub frozen: Vec<bool>,
    /// LoRA adapters on a frozen model.
    pub lora: Option<LoraConfig>,
    /// The bits of frozen projections, if they are quantized.
    pub quantization: Option<QuantBits>,
    /// Whether some steps measure the update, for which they keep the parameters as they were (`train.probe_every`).
    pub probes: bool,
}

/// The properties of a parameter that memory depends on.
struct Parameter {
    stage: BackwardStage,
    /// `[stack, rows, columns]`; the stack is 1 except for experts.
    shape: [u64; 3],
    values: u64,
    /// Bytes of a value that is not quantized.
    bytes: u64,
    /// Bits of a value, if it is quantized.
    quantization: Option<QuantBits>,
    updated_by: UpdatedBy,
}

/// The stage of the backward pass that makes a parameter's gradient, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BackwardStage {
    Head,
    Layer(usize),
    Embedding,
}

/// All phases of a step, in order.
pub(super) fn phases(config: &ModelConfig, settings: &MemorySettings) -> Vec<StepPhase> {
    let frozen = |index: usize| settings.lora.is_some() || settings.frozen.get(index).copied().unwrap_or(false);
    let shapes = config.parameter_shapes();
    let mut parameters: Vec<Parameter> = shapes
        .iter()
        .enumerate()
        .map(|(index, shape)| Parameter::new(shape, frozen(index), settings.bytes_per_value, config, settings))
        .collect();
    if config.tie_word_embeddings && settings.quantization.is_some() {
        // The head in 8 bits is a copy; the embedding is still needed to read tokens.
        let shape = vec![config.hidden_size, config.vocab_size];
        let head = ParameterShape { path: "lm_head".into(), shape, kind: ParameterKind::Head, role: None, layer: None };
        parameters.push(Parameter::new(&head, true, settings.bytes_per_value, config, settings));
    }
    let adapters = settings.lora.as_ref().map(|lora| lora.adapter_shapes(config)).unwrap_or_default();
    for adapter in &adapters {
        for shape in [&adapter.a, &adapter.b] {
            // Adapters are f32 whatever the dtype of the model.
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
            Some(layer) => BackwardStage::Layer(layer),
            None if shape.kind == ParameterKind::Embedding && !config.tie_word_embeddings => BackwardStage::Embedding,
            // A tied embedding gets its first gradient from the head, and keeps it until the end of the backward pass.
            None => BackwardStage::Head,
        };
        let updated_by = match shape.kind {
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
        let quantization = match shape.kind {
            ParameterKind::Matrix | ParameterKind::Experts => settings.quantization,
            ParameterKind::Head => settings.quantization.map(|_| QuantBits::Eight),
            _ => None,
        };
        let quantization = quantization.filter(|_| frozen);
        Self { stage, shape: shape3, values: shape.count(), bytes, quantization, updated_by }
    }

    /// Bytes of the stored parameter.
    fn weight(&self) -> u64 {
        let Some(bits) = self.quantization else { return self.values * self.bytes };
        let [stack, rows, columns] = self.shape;
        let shape = QuantizedShape { bits, input: rows as usize, output: columns as usize };
        // Scales have 2 bytes.
        stack * (shape.value_bytes() + 2 * shape.scales()) as u64
    }

    fn gradient(&self) -> u64 {
        if self.updated_by == UpdatedBy::Nothing { 0 } else { self.weight() }
    }

    fn state(&self, settings: &MemorySettings) -> u64 {
        let master = if settings.master_weights && self.bytes < 4 { 4 } else { 0 };
        self.values
            * match self.updated_by {
                UpdatedBy::Muon => settings.momentum_bytes + settings.second_moment_bytes + master,
                UpdatedBy::AdamW => 8 + master,
                UpdatedBy::Nothing => 0,
            }
    }
}

/// A step of training, as the phases need it.
struct Step<'a> {
    config: &'a ModelConfig,
    settings: &'a MemorySettings,
    parameters: &'a [Parameter],
    adapters: &'a [AdapterShape],
}

impl Step<'_> {
    fn phases(&self) -> Vec<StepPhase> {
        let mut phases = self.forward_backward();
        if !self.settings.fuse_update {
            phases.extend(self.update(|_| true, 0, &mut 0));
        }
        if self.settings.probes {
            let trained = || self.parameters.iter().filter(|parameter| parameter.updated_by != UpdatedBy::Nothing);
            let largest = trained().map(|parameter| parameter.values).max().unwrap_or_default();
            let phase = self
                .always_live("measuring the update")
                .with(MemoryPart::ProbeCopy, trained().map(Parameter::weight).sum());
            // The RMS is computed in f32, so a narrower parameter is widened, before and after the step.
            let copies = if self.settings.bytes_per_value < 4 { MEASURED_COPIES + 2 } else { MEASURED_COPIES };
            phases.push(phase.with(MemoryPart::Update, 4 * copies * largest));
        }
        phases
    }

    /// A phase with what is live throughout the step: weights, optimizer state, scratch buffers.
    fn always_live(&self, name: &str) -> StepPhase {
        let phase = StepPhase { name: name.to_owned(), bytes: [0; MemoryPart::ALL.len()] };
        phase
            .with(MemoryPart::Weights, self.parameters.iter().map(Parameter::weight).sum())
            .with(
                MemoryPart::OptimizerState,
                self.parameters.iter().map(|parameter| parameter.state(self.settings)).sum(),
            )
            .with(MemoryPart::Activations, self.scratch())
    }

    /// The scratch buffers of the CPU's matrix products, one for each thread: tiles of both operands widened to f32 (256 rows, 128
    /// columns) and their product. Products in f32 need none. Those of quantized weights compute in integers; their gradient
    /// dequantizes a panel of 256 by 256 and widens up to 192 rows.
    fn scratch(&self) -> u64 {
        let Self { config, settings, .. } = self;
        if settings.cpu && settings.quantization.is_some() {
            return settings.threads as u64 * 4 * (256 * 256 + 2 * 192 * 256);
        }
        if !settings.cpu || settings.bytes_per_value == 4 {
            return 0;
        }
        let widest = config.hidden_size.max(config.intermediate_size).max(config.vocab_size) as u64;
        settings.threads as u64 * 4 * ((256 + 128) * widest + 256 * 128)
    }

    /// Bytes of the gradients of the selected parameters.
    fn gradients(&self, of: impl Fn(&Parameter) -> bool) -> u64 {
        self.parameters.iter().filter(|parameter| of(parameter)).map(Parameter::gradient).sum()
    }

    /// Forward and backward pass of the last micro-batch, with the summed gradients of the earlier ones in memory; with `fuse_update`
    /// also the updates.
    fn forward_backward(&self) -> Vec<StepPhase> {
        let Self { config, settings, .. } = self;
        let bytes = settings.bytes_per_value;
        let n = (settings.batch * settings.sequence) as u64;
        let stream = n * config.hidden_size as u64 * bytes; // the residual stream, [tokens, hidden]
        let layers = config.num_hidden_layers;
        let activations: Vec<_> = (0..layers)
            .map(|layer| layer_activations(config, layer, settings, self.adapters))
            .map(|layer| (layer.kept * bytes, layer.transient * bytes))
            .collect();
        let summed = if settings.accumulates { self.gradients(|_| true) } else { 0 };
        // Gradients of the stages that are done. With recomputation and accumulation each stage adds its gradients to the sums and
        // frees them; with `fuse_update` its update consumes them at once.
        let kept = |of: &dyn Fn(&Parameter) -> bool| match (
            settings.fuse_update,
            settings.accumulates && settings.recompute,
        ) {
            (true, _) | (_, true) => 0,
            _ => self.gradients(of),
        };
        let mut phases = Vec::new();
        // With probes, bytes of the old values of parameters that `fuse_update` has already updated.
        let mut copied = 0;

        let inputs = |layer: usize| if settings.recompute { (layer as u64 + 1) * stream } else { 0 };
        let graph: u64 = if settings.recompute { 0 } else { activations.iter().map(|(kept, _)| kept + stream).sum() };
        let chunk = if settings.loss_chunk_tokens == 0 { n } else { n.min(settings.loss_chunk_tokens as u64) };
        let (head_kept, logits) = head_activations(config, chunk, settings.lora.is_some());
        let head = self.gradients(|parameter| parameter.stage == BackwardStage::Head);
        // The head's gradient is computed after that of the logits. With several chunks the sum over earlier chunks exists next to it.
        let chunks = if chunk < n { 2 } else { 1 };
        let at_head = || {
            self.always_live("head and loss")
                .with(MemoryPart::Gradients, summed)
                .with(MemoryPart::LayerInputs, inputs(layers - 1))
                .with(MemoryPart::Activations, graph + head_kept * bytes + 2 * stream)
        };
        phases
            .push(at_head().with(MemoryPart::Logits, logits * bytes).with(MemoryPart::Gradients, (chunks - 1) * head));
        phases.push(at_head().with(MemoryPart::Logits, logits / 2 * bytes).with(MemoryPart::Gradients, chunks * head));
        if settings.fuse_update {
            let live = inputs(layers - 1) + graph + stream;
            phases.extend(self.update(|parameter| parameter.stage == BackwardStage::Head, live, &mut copied));
        }
        for layer in (0..layers).rev() {
            let (of_layer, transient) = activations[layer];
            let later = |parameter: &Parameter| match parameter.stage {
                BackwardStage::Head => true,
                BackwardStage::Layer(other) => other > layer,
                BackwardStage::Embedding => false,
            };
            let of_this = |parameter: &Parameter| parameter.stage == BackwardStage::Layer(layer);
            let alive = if settings.recompute {
                of_layer
            } else {
                activations[..=layer].iter().map(|(kept, _)| kept + stream).sum()
            };
            let phase = self
                .always_live(&format!("backward of layer {layer}"))
                .with(MemoryPart::Gradients, summed + kept(&later))
                .with(MemoryPart::LayerInputs, inputs(layer))
                .with(MemoryPart::Activations, alive + stream)
                .with(MemoryPart::ProbeCopy, copied);
            // Two candidates for the peak: the start, when nothing is freed and gradients of activations are added; and the end, when
            // about a quarter of the layer's values are left and the gradients of its parameters exist.
            phases.push(phase.clone().with(MemoryPart::Activations, transient));
            let left = alive.saturating_sub(of_layer);
            let end = self
                .always_live(&format!("backward of layer {layer}"))
                .with(MemoryPart::Gradients, summed + kept(&later) + self.gradients(of_this))
                .with(MemoryPart::LayerInputs, inputs(layer))
                .with(MemoryPart::Activations, left + of_layer / 4 + 3 * stream)
                .with(MemoryPart::ProbeCopy, copied);
            phases.push(end);
            if settings.fuse_update && settings.recompute {
                let live = if layer == 0 { stream } else { inputs(layer - 1) + stream };
                phases.extend(self.update(of_this, live, &mut copied));
            }
        }
        if settings.fuse_update {
            // Without recomputation the layers' gradients are only complete when the whole graph has run.
            let rest = |parameter: &Parameter| match parameter.stage {
                BackwardStage::Head => false,
                BackwardStage::Layer(_) => !settings.recompute,
                BackwardStage::Embedding => true,
            };
            phases.extend(self.update(rest, stream, &mut copied));
        } else {
            let all = self.gradients(|_| true);
            let embedding = self.gradients(|parameter| parameter.stage == BackwardStage::Embedding);
            let new = if settings.accumulates && settings.recompute { embedding } else { all };
            phases.push(
                self.always_live("end of the backward pass")
                    .with(MemoryPart::Gradients, summed + new)
                    .with(MemoryPart::Activations, 2 * stream),
            );
        }
        phases
    }

    /// The phases that update the selected parameters; each frees its gradients. `live` is the bytes of activations that remain, and
    /// `copied` grows by the old values that probes keep.
    fn update(&self, of: impl Fn(&Parameter) -> bool, live: u64, copied: &mut u64) -> Vec<StepPhase> {
        let mut waiting: Vec<&Parameter> = self.parameters.iter().filter(|parameter| of(parameter)).collect();
        waiting.retain(|parameter| parameter.updated_by != UpdatedBy::Nothing);
        let mut gradients: u64 = waiting.iter().map(|parameter| parameter.gradient()).sum();
        let (muon, adamw): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|one| one.updated_by == UpdatedBy::Muon);
        let mut phases = Vec::new();
        let mut push = |what: &str, gradients: u64, workspace: u64, weights: u64| {
            let phase =
                self.always_live(what).with(MemoryPart::Gradients, gradients).with(MemoryPart::ProbeCopy, *copied);
            phases.push(phase.with(MemoryPart::Update, workspace).with(MemoryPart::Activations, live));
            *copied += if self.settings.probes { weights } else { 0 };
        };
        let elements = |parameter: &&Parameter| parameter.values as usize;
        for batch in step_batches(muon, elements, |one, other| one.shape == other.shape) {
            let weights = batch.iter().map(|parameter| parameter.weight()).sum();
            push("Muon", gradients, self.muon_workspace(&batch), weights);
            gradients -= batch.iter().map(|parameter| parameter.gradient()).sum::<u64>();
        }
        for parameter in adamw {
            push("AdamW", gradients, ADAMW_COPIES * parameter.values * 4, parameter.weight());
            gradients -= parameter.gradient();
        }
        phases
    }

    /// Workspace of Muon for a batch of matrices of one shape, which are updated together.
    fn muon_workspace(&self, batch: &[&Parameter]) -> u64 {
        let Some(first) = batch.first() else { return 0 };
        let settings = self.settings;
        let [stack, rows, columns] = first.shape;
        let values = batch.len() as u64 * first.values;
        let short = rows.min(columns);
        // During Newton-Schulz each element has three f32 values: new momentum, input and output (12 bytes). The old momentum and the
        // gradient, which other parts of the phase still count, are freed by then. A parameter in half precision exists in f32, in place
        // of itself or of its master.
        let narrow = first.bytes < 4;
        let widened = if narrow { 4 - first.bytes } else { 0 };
        let replaced = if narrow && settings.master_weights { 4 } else { 0 };
        let freed = settings.momentum_bytes + if settings.probes { 0 } else { first.bytes } + replaced;
        let stack_bytes = (12 + widened - freed) * values;
        // X and the next X; five short-by-short matrices: the Gram matrix, its polynomial, and three more of the Gram form.
        let matrix = 2 * rows * columns + 5 * short * short;
        let threads = settings.threads as u64;
        if settings.cpu {
            let many = batch.len() as u64 >= 2 * threads && settings.momentum_bytes == 4 && !narrow;
            let at_once = if many || stack * batch.len() as u64 >= 2 * threads { threads } else { 1 };
            // Many matrices are updated in place, unless the probes' copy shares their memory, which makes the update copy them first.
            let shared = if settings.probes { 4 * values } else { 0 };
            let copies = if many { shared } else { stack_bytes };
            copies + 4 * at_once * matrix
        } else {
            // A GPU works on all matrices of the batch at once.
            stack_bytes + 4 * (values + stack * batch.len() as u64 * 3 * short * short)
        }
    }
}

/// f32 tensors of the size of the largest parameter for the RMS of its update: the change, the decay, and their difference.
const MEASURED_COPIES: u64 = 3;
/// f32 tensors in an AdamW update: both bias-corrected moments, and the new parameter.
const ADAMW_COPIES: u64 = 3;

//! Forward and backward of one micro-batch in stages: the head in chunks of tokens, then the layers from the last to the
//! first, then the embedding. A [`GradientSink`] receives the gradients of each stage as soon as they exist.
//!
//! The stages bound three kinds of memory (`b` sequences of `t` tokens, hidden size `h`, vocabulary `v`):
//!
//! * Activations. The graph keeps those of all layers, or with `recompute` those of one layer: only each layer's input stays
//!   in memory, `b t h` elements, and the layer runs a second time before its backward pass.
//! * Logits and their gradient: `2 b t v` elements, or with `loss_chunk_tokens = c` `2 c v`.
//! * Gradients. A sink that updates a layer and frees its gradients holds those of one layer at a time.
//!
//! The gradients differ by rounding only: the head's are summed over its chunks, and with `recompute` the gradient of a layer's
//! input is summed over the layer's branches in another order.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Int, Tensor};
use moonlight_model::{CausalLm, ForwardContext, ForwardStats, LayerOutput, LmBatch, Probe};
use moonlight_optim::MuonAdamW;
use moonlight_optim::distributed::CollectiveError;

use super::model_cell::ModelCell;
use super::step_error::{NonFinite, StepError};

/// What a step recomputes or splits to need less memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryOptions {
    /// Whether each layer runs a second time for its gradient (`train.activation_checkpointing = "block"`).
    pub recompute: bool,
    /// Tokens whose logits are in memory at once; 0 for all of a micro-batch.
    pub loss_chunk_tokens: usize,
}

/// The input of one forward and backward pass.
#[derive(Debug)]
pub(crate) struct MicroBatch {
    pub(crate) batch: LmBatch,
    /// The factor on the sum of losses: 1 over the predicted tokens of the whole step, on all ranks. With it the gradients of
    /// micro-batches and ranks add up to the gradient of the step's mean loss.
    pub(crate) loss_scale: f64,
    /// Weight of the sequence-wise balance loss.
    pub(crate) balance_weight: f64,
    /// The factor on the balance loss, a mean over sequences: this micro-batch's share of the step's sequences.
    pub(crate) balance_scale: f64,
    pub(crate) probe: Probe,
}

/// Receives the gradients of a micro-batch, stage by stage.
pub(crate) trait GradientSink {
    /// The current model. A sink may have updated the parameters of earlier stages; those of later stages are unchanged since
    /// the forward pass.
    fn model(&self) -> &CausalLm;

    /// Receives the gradients of one stage. No later stage has gradients of these parameters.
    fn add(&mut self, gradients: GradientsParams) -> Result<(), CollectiveError>;

    /// Announces that the next micro-batch is the last one of the step.
    fn last_pass(&mut self) {}

    /// Whether a pass with a non-finite loss must still run to its end, because other ranks wait in the collectives that its
    /// gradients start.
    fn must_finish_pass(&self) -> bool {
        false
    }
}

/// Sums the gradients of this rank's micro-batches. In the last one, each stage's sums go to the optimizer at once: with
/// several ranks they are reduced while the backward pass continues.
pub(crate) struct ReducingSink<'a> {
    model: &'a CausalLm,
    optimizer: &'a mut MuonAdamW,
    sums: Sums,
}

enum Sums {
    /// More micro-batches follow.
    Accumulating(GradientsAccumulator<CausalLm>),
    /// The last micro-batch runs; these are the sums over the ones before it.
    Earlier(GradientsParams),
}

impl<'a> ReducingSink<'a> {
    pub(crate) fn new(model: &'a CausalLm, optimizer: &'a mut MuonAdamW) -> Self {
        Self { model, optimizer, sums: Sums::Accumulating(GradientsAccumulator::new()) }
    }

    /// Gives the optimizer the sums of parameters that had no gradient in the last micro-batch.
    pub(crate) fn finish(self) {
        if let Sums::Earlier(rest) = self.sums {
            self.optimizer.add_gradients(self.model, rest);
        }
    }
}

impl GradientSink for ReducingSink<'_> {
    fn model(&self) -> &CausalLm {
        self.model
    }

    fn add(&mut self, gradients: GradientsParams) -> Result<(), CollectiveError> {
        match &mut self.sums {
            Sums::Accumulating(sums) => sums.accumulate(self.model, gradients),
            Sums::Earlier(earlier) => {
                let mut stage = SumStage { earlier, new: gradients, sums: GradientsParams::new() };
                self.model.visit(&mut stage);
                let sums = stage.sums;
                self.optimizer.add_gradients(self.model, sums);
            }
        }
        Ok(())
    }

    fn last_pass(&mut self) {
        if let Sums::Accumulating(sums) = &mut self.sums {
            self.sums = Sums::Earlier(sums.grads());
        }
    }

    fn must_finish_pass(&self) -> bool {
        self.optimizer.communicator().size() > 1
    }
}

/// Adds the gradients of one stage to the sums of the earlier micro-batches. Each sum is `earlier + new`, as in Burn's
/// `GradientsAccumulator`, so that the bits do not depend on when the optimizer gets it.
struct SumStage<'a> {
    earlier: &'a mut GradientsParams,
    new: GradientsParams,
    sums: GradientsParams,
}

impl ModuleVisitor for SumStage<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(new) = self.new.remove::<D>(param.id) else { return };
        let sum = match self.earlier.remove::<D>(param.id) {
            Some(earlier) => earlier.add(new),
            None => new,
        };
        self.sums.register(param.id, sum);
    }
}

/// Updates each stage's parameters as soon as their gradients exist, and frees the gradients.
pub(crate) struct UpdatingSink<'a> {
    model: &'a mut ModelCell,
    optimizer: &'a mut MuonAdamW,
    learning_rate: f64,
    squares: f64,
}

impl<'a> UpdatingSink<'a> {
    pub(crate) fn new(model: &'a mut ModelCell, optimizer: &'a mut MuonAdamW, learning_rate: f64) -> Self {
        Self { model, optimizer, learning_rate, squares: 0.0 }
    }

    /// The square of the gradient's global norm.
    pub(crate) fn squares(&self) -> f64 {
        self.squares
    }
}

impl GradientSink for UpdatingSink<'_> {
    fn model(&self) -> &CausalLm {
        self.model
    }

    fn add(&mut self, gradients: GradientsParams) -> Result<(), CollectiveError> {
        self.optimizer.add_gradients(&**self.model, gradients);
        self.squares += self.optimizer.local_sum_of_squares(&**self.model)?;
        self.model.update(|model| self.optimizer.apply(self.learning_rate, 1.0, model))
    }
}

/// Runs forward and backward, and returns the sum of the losses of all predicted tokens, in nats, with the statistics of the
/// forward pass. For a non-finite loss nothing is added to the sink, unless the sink must finish the pass.
pub(crate) fn backward(
    sink: &mut impl GradientSink,
    input: MicroBatch,
    memory: MemoryOptions,
) -> Result<(f64, ForwardStats), StepError> {
    let MicroBatch { batch, loss_scale, balance_weight, balance_scale, probe } = input;
    let [rows, sequence] = batch.tokens.dims(); // [batch, sequence]
    let context = sink.model().forward_context(&batch, balance_weight, probe);
    let backbone = if memory.recompute {
        Backbone::without_graph(sink.model(), batch.tokens.clone(), &context)
    } else {
        Backbone::with_graph(sink.model(), batch.tokens.clone(), &context)
    };
    let tokens = rows * sequence;
    let head = Head {
        targets: batch.targets.reshape([tokens]),
        mask: batch.loss_mask.reshape([tokens]),
        scale: loss_scale,
        chunk: if memory.loss_chunk_tokens == 0 { tokens } else { memory.loss_chunk_tokens.min(tokens) },
    };
    let (loss_sum, gradient, mut gradients) = head.backward(sink.model(), backbone.output());
    if !loss_sum.is_finite() && !sink.must_finish_pass() {
        return Err(NonFinite { what: "loss", value: loss_sum * loss_scale, rank: None }.into());
    }
    // A tied embedding is also the head: its gradient is complete only after the last stage, so the head's part is kept until
    // then.
    let tied = sink.model().lm_head.is_none().then(|| {
        let mut tied = GradientsParams::new();
        let id = sink.model().embed_tokens.weight.id;
        if let Some(gradient) = gradients.remove::<2>(id) {
            tied.register(id, gradient);
        }
        tied
    });
    sink.add(gradients)?;
    let stats = backbone.backward(sink, batch.tokens, &context, gradient, balance_scale, tied)?;
    Ok((loss_sum, stats))
}

/// The output of embedding and layers, with what their backward pass needs.
struct Backbone {
    /// The last layer's output `[tokens, hidden]`, with the graph of all layers unless they are recomputed.
    last: Tensor<2>,
    balance_loss: Option<Tensor<1>>,
    /// Each layer's input `[tokens, hidden]`, without a graph, if layers are recomputed; otherwise empty.
    inputs: Vec<Tensor<2>>,
    stats: ForwardStats,
}

impl Backbone {
    /// Keeps the whole graph.
    fn with_graph(model: &CausalLm, tokens: Tensor<2, Int>, context: &ForwardContext) -> Self {
        let output = model.forward_hidden(tokens, context);
        let balance_loss = output.balance_loss();
        Self { last: output.hidden, balance_loss, inputs: Vec::new(), stats: output.stats }
    }

    /// Keeps each layer's input only. The layers run on the device without autodiff: Burn frees a dropped graph only in the
    /// next backward pass, so with autodiff all activations would stay until then.
    fn without_graph(model: &CausalLm, tokens: Tensor<2, Int>, context: &ForwardContext) -> Self {
        let (model, context) = (model.valid(), context.clone().inner());
        let mut inputs = Vec::with_capacity(model.layers.len());
        let output = model.forward_hidden_with(tokens.inner(), &context, |_, input| inputs.push(input.clone()));
        Self { last: output.hidden, balance_loss: None, inputs, stats: output.stats }
    }

    /// The last layer's output `[tokens, hidden]` without its graph: the head builds a graph for each of its chunks.
    fn output(&self) -> Tensor<2> {
        let output = self.last.clone();
        if self.inputs.is_empty() { output.inner() } else { output }
    }

    /// Hands the gradients of all parameters to the sink, given `gradient`, that of the last layer's output
    /// (`[tokens, hidden]`). `tied` is the head's part of a tied embedding's gradient.
    fn backward(
        self,
        sink: &mut impl GradientSink,
        tokens: Tensor<2, Int>,
        context: &ForwardContext,
        mut gradient: Tensor<2>,
        balance_scale: f64,
        tied: Option<GradientsParams>,
    ) -> Result<ForwardStats, CollectiveError> {
        let Self { last, balance_loss, inputs, stats } = self;
        if inputs.is_empty() {
            // There is no graph if embedding and layers are frozen.
            let gradients = if last.is_tracked() {
                let gradients = objective(last, gradient, balance_loss, balance_scale).backward();
                GradientsParams::from_grads(gradients, sink.model())
            } else {
                GradientsParams::new()
            };
            sink.add(with_tied_gradient(sink.model(), gradients, tied))?;
            return Ok(stats);
        }
        drop(last); // only its gradient is needed now
        for (index, input) in inputs.into_iter().enumerate().rev() {
            let input = Tensor::from_inner(input).require_grad();
            let LayerOutput { hidden, balance_loss, .. } = sink.model().run_layer(index, input.clone(), context);
            let mut gradients = objective(hidden, gradient, balance_loss, balance_scale).backward();
            gradient = input.grad_remove(&mut gradients).expect("a layer's output depends on its input");
            let gradients = GradientsParams::from_grads(gradients, sink.model());
            sink.add(gradients)?;
        }
        // If the embedding is frozen, nothing is left to compute: a tied head is frozen with it.
        let embedded = sink.model().embed(tokens);
        if embedded.is_tracked() {
            let gradients = objective(embedded, gradient, None, 0.0).backward();
            let gradients = GradientsParams::from_grads(gradients, sink.model());
            sink.add(with_tied_gradient(sink.model(), gradients, tied))?;
        }
        Ok(stats)
    }
}

/// A scalar whose gradient with respect to `output` is `gradient` (plus that of the balance loss): Burn's `backward` starts
/// from ones, and cannot start from a given gradient.
fn objective(output: Tensor<2>, gradient: Tensor<2>, balance_loss: Option<Tensor<1>>, balance_scale: f64) -> Tensor<1> {
    let product = (output * Tensor::from_inner(gradient)).sum();
    match balance_loss {
        Some(loss) => product.cast(loss.dtype()) + loss * balance_scale,
        None => product,
    }
}

/// The gradients of the embedding's stage, plus the head's part if the two are tied.
fn with_tied_gradient(model: &CausalLm, gradients: GradientsParams, tied: Option<GradientsParams>) -> GradientsParams {
    let Some(tied) = tied else { return gradients };
    let mut sum = GradientsAccumulator::new();
    sum.accumulate(model, tied);
    sum.accumulate(model, gradients);
    sum.grads()
}

/// The last norm, the head and the loss of one micro-batch.
struct Head {
    /// `[tokens]`.
    targets: Tensor<1, Int>,
    /// `[tokens]`.
    mask: Tensor<1>,
    scale: f64,
    /// Tokens whose logits are in memory at once.
    chunk: usize,
}

impl Head {
    /// Returns the sum of the losses, the gradient of `hidden` (`[tokens, hidden]`), and the gradients of norm and head. Chunks
    /// are summed in order; their size changes the rounding only.
    fn backward(&self, model: &CausalLm, hidden: Tensor<2>) -> (f64, Tensor<2>, GradientsParams) {
        let [tokens, _] = hidden.dims();
        let mut loss_sum = 0.0;
        let mut sums = GradientsAccumulator::new();
        let mut parts = Vec::with_capacity(tokens.div_ceil(self.chunk));
        for start in (0..tokens).step_by(self.chunk) {
            let range = start..tokens.min(start + self.chunk);
            let part = Tensor::from_inner(hidden.clone().slice_dim(0, range.clone())).require_grad(); // [chunk, hidden]
            let losses = model.token_losses(part.clone(), self.targets.clone().slice_dim(0, range.clone())); // [chunk]
            let loss = (losses * self.mask.clone().slice_dim(0, range)).sum();
            loss_sum += f64::from(loss.clone().into_scalar::<f32>());
            let mut gradients = (loss * self.scale).backward();
            parts.push(part.grad_remove(&mut gradients).expect("the loss depends on the hidden states"));
            sums.accumulate(model, GradientsParams::from_grads(gradients, model));
        }
        let gradient = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, 0) }; // [tokens, hidden]
        (loss_sum, gradient, sums.grads())
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use moonlight_model::ModelConfig;
    use moonlight_optim::{AdamWConfig, MuonConfig, OptimizerOptions, ParameterRules};

    use super::*;
    use crate::data::HostBatch;
    use crate::trainer::step::{StepSettings, UpdateMode, step};
    use crate::trainer::step_result::{StepResult, StepTotals};

    const PLAIN: MemoryOptions = MemoryOptions { recompute: false, loss_chunk_tokens: 0 };
    const MEMORY_CHOICES: [MemoryOptions; 4] = [
        PLAIN,
        MemoryOptions { recompute: true, loss_chunk_tokens: 0 },
        MemoryOptions { recompute: false, loss_chunk_tokens: 7 },
        MemoryOptions { recompute: true, loss_chunk_tokens: 5 },
    ];

    fn model(tied: bool) -> CausalLm {
        let mut config = ModelConfig::preset("bench-small").unwrap();
        (config.vocab_size, config.num_hidden_layers, config.hidden_size) = (50, 3, 32);
        config.tie_word_embeddings = tied;
        let device = Device::default().autodiff();
        device.seed(3);
        config.init(&device).materialize()
    }

    /// Two packed sequences of two documents each, with padding.
    fn batch() -> HostBatch {
        let (batch, sequence) = (2, 12);
        let tokens: Vec<i32> = (0..24).map(|i| (i * 17 + 5) % 50).collect();
        let documents: Vec<i32> = (0..24).map(|i| [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, -1, -1][i % 12]).collect();
        let mask = documents.iter().enumerate().map(|(i, &d)| if d < 0 || i % 12 == 3 { 0.0 } else { 1.0 });
        HostBatch {
            targets: tokens.iter().map(|token| (token * 3 + 1) % 50).collect(),
            loss_mask: mask.collect(),
            documents: Some(documents),
            tokens,
            batch,
            sequence,
        }
    }

    fn input(device: &Device) -> MicroBatch {
        MicroBatch {
            batch: batch().to_device(device),
            loss_scale: 1.0 / batch().predicted(),
            balance_weight: 0.01,
            balance_scale: 1.0,
            probe: Probe::default(),
        }
    }

    /// All values of the parameters, or of their gradients, in the order of the module.
    fn values(model: &CausalLm, gradients: Option<&GradientsParams>) -> Vec<Vec<f32>> {
        struct Collect<'a>(Option<&'a GradientsParams>, Vec<Vec<f32>>);
        impl ModuleVisitor for Collect<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let tensor = match self.0 {
                    Some(gradients) => gradients.get::<D>(param.id),
                    None => Some(param.val().inner()),
                };
                self.1.extend(tensor.map(|tensor| tensor.into_data().iter::<f32>().collect()));
            }
        }
        let mut collect = Collect(gradients, Vec::new());
        model.visit(&mut collect);
        collect.1
    }

    /// The optimizer of one rank.
    fn optimizer(model: &CausalLm) -> MuonAdamW {
        let rules = ParameterRules::moonlight(MuonConfig::new(), AdamWConfig::new());
        rules.assign(model).unwrap().build(OptimizerOptions::new()).unwrap()
    }

    /// Sums the gradients of one micro-batch.
    struct CollectingSink<'a>(&'a CausalLm, GradientsAccumulator<CausalLm>);

    impl GradientSink for CollectingSink<'_> {
        fn model(&self) -> &CausalLm {
            self.0
        }

        fn add(&mut self, gradients: GradientsParams) -> Result<(), CollectiveError> {
            self.1.accumulate(self.0, gradients);
            Ok(())
        }
    }

    /// Loss, statistics and gradients of the model's own pass with one graph.
    fn plain(model: &CausalLm, input: MicroBatch) -> (f64, ForwardStats, GradientsParams) {
        let output = model.loss(&input.batch, input.balance_weight, input.probe);
        let loss_sum = f64::from(output.loss_sum.clone().into_scalar::<f32>());
        let mut objective = output.loss_sum * input.loss_scale;
        if let Some(balance) = output.balance_loss {
            objective = objective + balance * input.balance_scale;
        }
        (loss_sum, output.stats, GradientsParams::from_grads(objective.backward(), model))
    }

    #[test]
    fn every_memory_option_gives_the_gradients_of_the_plain_graph() {
        for tied in [false, true] {
            let model = model(tied);
            let device = Device::default().autodiff();
            let (expected_loss, expected_stats, expected) = plain(&model, input(&device));
            let expected = values(&model, Some(&expected));
            for memory in MEMORY_CHOICES {
                let mut sink = CollectingSink(&model, GradientsAccumulator::new());
                let (loss_sum, stats) = backward(&mut sink, input(&device), memory).unwrap();
                assert!((loss_sum / expected_loss - 1.0).abs() < 1e-6);
                assert_eq!(stats.expert_loads(), expected_stats.expert_loads());
                let gradients = values(&model, Some(&sink.1.grads()));
                assert_eq!(gradients.len(), expected.len(), "tied {tied}, {memory:?}");
                for (ours, expected) in gradients.iter().zip(&expected) {
                    let largest = expected.iter().fold(0_f32, |largest, value| largest.max(value.abs()));
                    let distance = ours.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(distance <= 1e-5 * largest, "tied {tied}, {memory:?}: {distance} of {largest}");
                }
                // A recomputed layer sums the parts of its input's gradient in another order.
                assert!(memory != PLAIN || gradients == expected, "tied {tied}: a bit differs");
            }
        }
    }

    #[test]
    fn updating_during_the_backward_pass_gives_the_same_parameters() {
        for tied in [false, true] {
            let start = model(tied);
            let device = Device::default().autodiff();
            let run = |recompute: bool, update: UpdateMode| {
                let mut model = ModelCell::new(start.clone());
                let mut optimizer = optimizer(&start);
                let settings = StepSettings {
                    learning_rate: 0.01,
                    gradient_clip: 0.0,
                    balance_weight: 0.01,
                    bias_update_rate: 0.001,
                    probe: Probe::default(),
                    memory: MemoryOptions { recompute, loss_chunk_tokens: 0 },
                    update,
                    dropout_seed: None,
                };
                let batches = [batch()];
                let totals = StepTotals::local(&batches);
                let results: Vec<_> = (0..3)
                    .map(|_| {
                        let result = step(&mut model, &mut optimizer, &batches, totals, &settings, &device).unwrap();
                        let norm = (result.gradient_norm() * 1e6).round();
                        (result.loss, result.expert_loads, norm)
                    })
                    .collect();
                (results, values(&model, None))
            };
            for recompute in [false, true] {
                let plain = run(recompute, UpdateMode::AfterBackward);
                assert!(plain.1 != values(&start, None));
                assert!(run(recompute, UpdateMode::DuringBackward) == plain, "tied {tied}, recompute {recompute}");
            }
        }
    }

    /// The batch with each loss weight multiplied by `factor`.
    fn weighted(factor: f32) -> HostBatch {
        let mut batch = batch();
        batch.loss_mask.iter_mut().for_each(|weight| *weight *= factor);
        batch
    }

    const MODES: [UpdateMode; 2] = [UpdateMode::AfterBackward, UpdateMode::DuringBackward];

    /// Results and parameters after a step over each of the lists of micro-batches.
    fn stepped(start: &CausalLm, update: UpdateMode, steps: &[&[HostBatch]]) -> (Vec<StepResult>, Vec<Vec<f32>>) {
        let (mut model, device) = (ModelCell::new(start.clone()), Device::default().autodiff());
        let mut optimizer = optimizer(start);
        let settings = StepSettings {
            learning_rate: 0.01,
            gradient_clip: 0.0,
            balance_weight: 0.0,
            bias_update_rate: 0.001,
            probe: Probe::default(),
            memory: PLAIN,
            update,
            dropout_seed: None,
        };
        let results = steps.iter().map(|batches| {
            step(&mut model, &mut optimizer, batches, StepTotals::local(batches), &settings, &device).unwrap()
        });
        let results = results.collect();
        (results, values(&model, None))
    }

    #[test]
    fn a_step_takes_the_weighted_mean_whatever_the_sum_of_the_weights() {
        let start = model(false);
        let ones = weighted(1.0);
        // A power of two changes no digit of the mean.
        let small = weighted(1.0 / 64.0);
        assert!(ones.predicted() > 1.0 && small.predicted() < 1.0);
        for update in MODES {
            let (expected, parameters) = stepped(&start, update, &[std::slice::from_ref(&ones)]);
            let (results, of_small) = stepped(&start, update, &[std::slice::from_ref(&small)]);
            assert_eq!(
                (results[0].loss, results[0].gradient_squares),
                (expected[0].loss, expected[0].gradient_squares)
            );
            assert!(of_small == parameters, "{update:?}");
        }
        let (expected, parameters) = stepped(&start, UpdateMode::AfterBackward, &[&[ones.clone(), ones]]);
        let (results, of_small) = stepped(&start, UpdateMode::AfterBackward, &[&[small.clone(), small]]);
        assert_eq!(results[0].loss, expected[0].loss);
        assert!(of_small == parameters);
    }

    #[test]
    fn a_step_whose_weights_are_all_zero_changes_nothing() {
        let start = model(false);
        let (some, none) = (weighted(1.0), weighted(0.0));
        let some = std::slice::from_ref(&some);
        let none = std::slice::from_ref(&none);
        for update in MODES {
            let (_, expected) = stepped(&start, update, &[some, some]);
            // A change of momentum, weight decay or router bias in an empty step would show in the parameters.
            let (results, parameters) = stepped(&start, update, &[none, some, none, some, none]);
            assert!(parameters == expected, "{update:?}");
            for empty in [&results[0], &results[2], &results[4]] {
                assert_eq!((empty.loss, empty.gradient_squares), (0.0, 0.0));
                assert!(empty.expert_loads.is_empty());
            }
        }
    }

    #[test]
    fn a_non_finite_loss_updates_nothing() {
        let mut broken = model(false);
        broken.norm.weight = broken.norm.weight.map(|gain| gain.mul_scalar(f32::NAN).detach().require_grad());
        let before = values(&broken, None);
        let device = Device::default().autodiff();
        for update in MODES {
            let (mut model, mut optimizer) = (ModelCell::new(broken.clone()), optimizer(&broken));
            let settings = StepSettings {
                learning_rate: 0.1,
                gradient_clip: 0.0,
                balance_weight: 0.01,
                bias_update_rate: 0.001,
                probe: Probe::default(),
                memory: MemoryOptions { recompute: true, loss_chunk_tokens: 0 },
                update,
                dropout_seed: None,
            };
            let batches = [batch()];
            let result = step(&mut model, &mut optimizer, &batches, StepTotals::local(&batches), &settings, &device);
            let Err(StepError::NonFinite(found)) = result else { panic!("expected an error") };
            assert!(found.what == "loss" && found.value.is_nan() && found.rank.is_none());
            // Compared as text, because NaN is not equal to itself.
            assert!(format!("{before:?}") == format!("{:?}", values(&model, None)), "{update:?}");
        }
    }
}

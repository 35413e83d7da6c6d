//! Forward and backward of one micro-batch in stages: the head in chunks of tokens, then the layers from the last to the
//! first, then the embedding. Whoever takes the gradients gets them a stage at a time.
//!
//! Three stretches of memory are at stake (`b` sequences of `t` tokens, `h` wide, `v` in the vocabulary):
//!
//! * Activations. Kept by the graph of all layers at once, or, with `recompute`, of one layer: between the layers stay
//!   their inputs alone, `b t h` each, and each layer runs a second time when its turn comes.
//! * Logits and their gradient, `2 b t v`: with `loss_chunk_tokens`, `2 c v`.
//! * Gradients. A taker that updates a layer and forgets its gradient holds one layer's at a time.
//!
//! The gradient is the same in all of them: what differs is the order in which a weight's gradient is summed over the
//! chunks of the head, and nothing else.

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Int, Tensor};
use moonlight_model::{CausalLm, ForwardReport, LayerOutput, Pass};
use moonlight_optim::MuonAdamW;

use super::step::{NotFinite, global_norm};
use super::trainee::{MicroBatch, MicroOutcome, Trainee};

/// How memory is spared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sparing {
    /// Whether each layer runs again for its gradient.
    pub recompute: bool,
    /// Tokens that the head takes at a time; 0 for all.
    pub loss_chunk_tokens: usize,
}

/// Takes the gradients of a micro-batch, stage by stage.
pub(crate) trait Taker {
    /// The model as it is now: stages that are still to come must see their own parameters unchanged.
    fn model(&self) -> &CausalLm;

    /// The gradients of one stage, of parameters that no later stage has.
    fn take(&mut self, gradients: GradientsParams);

    /// What is taken from here on is of the step's last micro-batch.
    fn last_pass(&mut self) {}

    /// Whether others count on every stage, so that a loss that is no number does not end the pass.
    fn must_finish(&self) -> bool {
        false
    }
}

/// Sums the gradients of all micro-batches of a step.
pub(crate) struct Summing<'a> {
    model: &'a CausalLm,
    sums: GradientsAccumulator<CausalLm>,
}

impl<'a> Summing<'a> {
    pub(crate) fn new(model: &'a CausalLm) -> Self {
        Self { model, sums: GradientsAccumulator::new() }
    }

    pub(crate) fn finish(mut self) -> GradientsParams {
        self.sums.grads()
    }
}

impl Taker for Summing<'_> {
    fn model(&self) -> &CausalLm {
        self.model
    }

    fn take(&mut self, gradients: GradientsParams) {
        self.sums.accumulate(self.model, gradients);
    }
}

/// Updates each stage's parameters as soon as their gradients are there, and forgets these.
pub(crate) struct Updating<'a> {
    trainee: &'a mut Trainee,
    optimizer: &'a mut MuonAdamW,
    learning_rate: f64,
    /// Sum of the squares of all gradients so far.
    squares: f64,
}

impl<'a> Updating<'a> {
    pub(crate) fn new(trainee: &'a mut Trainee, optimizer: &'a mut MuonAdamW, learning_rate: f64) -> Self {
        Self { trainee, optimizer, learning_rate, squares: 0.0 }
    }

    /// The global norm of the gradient.
    pub(crate) fn norm(&self) -> f64 {
        self.squares.sqrt()
    }
}

impl Taker for Updating<'_> {
    fn model(&self) -> &CausalLm {
        &self.trainee.model
    }

    fn take(&mut self, gradients: GradientsParams) {
        self.squares += global_norm(&self.trainee.model, &gradients).powi(2);
        let model = self.trainee.take_model();
        let stepped = self.optimizer.step(self.learning_rate, model, gradients);
        self.trainee.model = stepped.expect("one rank has no other to lose");
    }
}

/// Forward and backward; nothing is taken from a batch whose loss is no number.
pub(crate) fn backward(taker: &mut impl Taker, input: MicroBatch, sparing: Sparing) -> Result<MicroOutcome, NotFinite> {
    let MicroBatch { batch, loss_scale, balance_weight, balance_scale, probe } = input;
    let [rows, sequence] = batch.tokens.dims();
    let pass = taker.model().pass(&batch, balance_weight, probe);
    let trunk = if sparing.recompute {
        Trunk::without_graph(taker.model(), batch.tokens.clone(), &pass)
    } else {
        Trunk::with_graph(taker.model(), batch.tokens.clone(), &pass)
    };
    let tokens = rows * sequence;
    let head = Head {
        targets: batch.targets.reshape([tokens]),
        mask: batch.loss_mask.reshape([tokens]),
        scale: loss_scale,
        chunk: if sparing.loss_chunk_tokens == 0 { tokens } else { sparing.loss_chunk_tokens.min(tokens) },
    };
    let (loss_sum, gradient, mut gradients) = head.backward(taker.model(), trunk.output());
    if !loss_sum.is_finite() && !taker.must_finish() {
        return Err(NotFinite { what: "loss", value: loss_sum * loss_scale, worker: None });
    }
    // Where the embedding is the head as well, its gradient is whole only at the end.
    let tied = taker.model().lm_head.is_none().then(|| {
        let mut tied = GradientsParams::new();
        let id = taker.model().embed_tokens.weight.id;
        if let Some(own) = gradients.remove::<2>(id) {
            tied.register(id, own);
        }
        tied
    });
    taker.take(gradients);
    let report = trunk.backward(taker, batch.tokens, &pass, gradient, balance_scale, tied);
    Ok(MicroOutcome { loss_sum, report })
}

/// Embedding and layers, as far as they are kept.
struct Trunk {
    /// The last layer's output: the end of the graph, or of nothing where layers run again.
    last: Tensor<2>,
    balance_loss: Option<Tensor<1>>,
    /// Each layer's input, without a graph; empty where the graph holds everything.
    inputs: Vec<Tensor<2>>,
    report: ForwardReport,
}

impl Trunk {
    /// Keeps the whole graph.
    fn with_graph(model: &CausalLm, tokens: Tensor<2, Int>, pass: &Pass) -> Self {
        let mut trunk = Self::at(model.embed(tokens));
        for index in 0..model.layers.len() {
            let LayerOutput { hidden, balance_loss, report } = model.run_layer(index, trunk.last, pass);
            trunk.last = hidden;
            if let Some(loss) = balance_loss {
                trunk.balance_loss = Some(trunk.balance_loss.map_or(loss.clone(), |sum| sum + loss));
            }
            trunk.report.layers.push(report);
        }
        trunk
    }

    /// Keeps each layer's input. A graph that is dropped gives its memory back with the next backward pass only, so there
    /// is none: the layers run on the device without gradients.
    fn without_graph(model: &CausalLm, tokens: Tensor<2, Int>, pass: &Pass) -> Self {
        let (model, pass) = (model.valid(), pass.clone().inner());
        let mut trunk = Self::at(model.embed(tokens.inner()));
        for index in 0..model.layers.len() {
            trunk.inputs.push(trunk.last.clone());
            let LayerOutput { hidden, report, .. } = model.run_layer(index, trunk.last, &pass);
            trunk.last = hidden;
            trunk.report.layers.push(report);
        }
        trunk
    }

    fn at(last: Tensor<2>) -> Self {
        Self { last, balance_loss: None, inputs: Vec::new(), report: ForwardReport::default() }
    }

    fn output(&self) -> Tensor<2> {
        let output = self.last.clone();
        if self.inputs.is_empty() { output.inner() } else { output }
    }

    /// From the gradient of the last layer's output, `[tokens, hidden]`, to those of all parameters.
    fn backward(
        self,
        taker: &mut impl Taker,
        tokens: Tensor<2, Int>,
        pass: &Pass,
        mut gradient: Tensor<2>,
        balance_scale: f64,
        tied: Option<GradientsParams>,
    ) -> ForwardReport {
        let Self { last, balance_loss, inputs, report } = self;
        if inputs.is_empty() {
            // What is frozen up to here has no graph to go back through.
            let gradients = if last.is_tracked() {
                let gradients = objective(last, gradient, balance_loss, balance_scale).backward();
                GradientsParams::from_grads(gradients, taker.model())
            } else {
                GradientsParams::new()
            };
            taker.take(joined(taker.model(), gradients, tied));
            return report;
        }
        drop(last);
        for (index, input) in inputs.into_iter().enumerate().rev() {
            let input = Tensor::from_inner(input).require_grad();
            let LayerOutput { hidden, balance_loss, .. } = taker.model().run_layer(index, input.clone(), pass);
            let mut gradients = objective(hidden, gradient, balance_loss, balance_scale).backward();
            gradient = input.grad_remove(&mut gradients).expect("a layer's output depends on its input");
            let gradients = GradientsParams::from_grads(gradients, taker.model());
            taker.take(gradients);
        }
        let embedded = taker.model().embed(tokens);
        if embedded.is_tracked() {
            let gradients = objective(embedded, gradient, None, 0.0).backward();
            let gradients = GradientsParams::from_grads(gradients, taker.model());
            taker.take(joined(taker.model(), gradients, tied));
        }
        report
    }
}

/// A number whose gradient with respect to `output` is `gradient`.
fn objective(output: Tensor<2>, gradient: Tensor<2>, balance_loss: Option<Tensor<1>>, balance_scale: f64) -> Tensor<1> {
    let product = (output * Tensor::from_inner(gradient)).sum();
    match balance_loss {
        Some(loss) => product.cast(loss.dtype()) + loss * balance_scale,
        None => product,
    }
}

fn joined(model: &CausalLm, gradients: GradientsParams, tied: Option<GradientsParams>) -> GradientsParams {
    let Some(tied) = tied else { return gradients };
    let mut sum = GradientsAccumulator::new();
    sum.accumulate(model, tied);
    sum.accumulate(model, gradients);
    sum.grads()
}

/// The last norm, the head and the loss.
struct Head {
    /// `[tokens]`.
    targets: Tensor<1, Int>,
    /// `[tokens]`.
    mask: Tensor<1>,
    scale: f64,
    chunk: usize,
}

impl Head {
    /// The sum of the losses, the gradient of `hidden` (`[tokens, hidden]`), and those of norm and head.
    fn backward(&self, model: &CausalLm, hidden: Tensor<2>) -> (f64, Tensor<2>, GradientsParams) {
        let [tokens, _] = hidden.dims();
        let mut loss_sum = 0.0;
        let mut sums = GradientsAccumulator::new();
        let mut parts = Vec::with_capacity(tokens.div_ceil(self.chunk));
        for start in (0..tokens).step_by(self.chunk) {
            let range = start..tokens.min(start + self.chunk);
            let part = Tensor::from_inner(hidden.clone().slice_dim(0, range.clone())).require_grad();
            let losses = model.token_losses(part.clone(), self.targets.clone().slice_dim(0, range.clone()));
            let loss = (losses * self.mask.clone().slice_dim(0, range)).sum();
            loss_sum += f64::from(loss.clone().into_scalar::<f32>());
            let mut gradients = (loss * self.scale).backward();
            parts.push(part.grad_remove(&mut gradients).expect("the loss depends on the hidden states"));
            sums.accumulate(model, GradientsParams::from_grads(gradients, model));
        }
        let gradient = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, 0) };
        (loss_sum, gradient, sums.grads())
    }
}

#[cfg(test)]
mod tests {
    use burn::module::{ModuleVisitor, Param};
    use burn::tensor::Device;
    use moonlight_model::{ModelConfig, Probe};
    use moonlight_optim::{AdamWConfig, MuonConfig, OptimizerOptions, ParameterRules};

    use super::*;
    use crate::data::HostBatch;
    use crate::trainer::step::{StepOutcome, StepSettings, step};

    const PLAIN: Sparing = Sparing { recompute: false, loss_chunk_tokens: 0 };
    const WAYS: [Sparing; 4] = [
        PLAIN,
        Sparing { recompute: true, loss_chunk_tokens: 0 },
        Sparing { recompute: false, loss_chunk_tokens: 7 },
        Sparing { recompute: true, loss_chunk_tokens: 5 },
    ];

    fn trainee(tied: bool) -> Trainee {
        let mut config = ModelConfig::preset("bench-small").unwrap();
        (config.vocab_size, config.num_hidden_layers, config.hidden_size) = (50, 3, 32);
        config.tie_word_embeddings = tied;
        let device = Device::default().autodiff();
        device.seed(3);
        Trainee { model: config.init(&device).materialize() }
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

    /// All values of parameters, or of their gradients, in the order of the module.
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

    #[test]
    fn every_way_gives_the_gradients_of_the_plain_graph() {
        for tied in [false, true] {
            let trainee = trainee(tied);
            let device = Device::default().autodiff();
            let plain = Trainee::step(&trainee, input(&device));
            let expected = values(&trainee.model, Some(&plain.grads));
            for sparing in WAYS {
                let mut taker = Summing::new(&trainee.model);
                let outcome = backward(&mut taker, input(&device), sparing).unwrap();
                assert!((outcome.loss_sum / plain.item.loss_sum - 1.0).abs() < 1e-6);
                assert_eq!(outcome.report.expert_loads(), plain.item.report.expert_loads());
                let gradients = values(&trainee.model, Some(&taker.finish()));
                assert_eq!(gradients.len(), expected.len(), "tied {tied}, {sparing:?}");
                for (ours, expected) in gradients.iter().zip(&expected) {
                    let largest = expected.iter().fold(0_f32, |largest, value| largest.max(value.abs()));
                    let distance = ours.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(distance <= 1e-5 * largest, "tied {tied}, {sparing:?}: {distance} of {largest}");
                }
                // A layer that runs again sums the parts of its input's gradient in another order.
                assert!(sparing != PLAIN || gradients == expected, "tied {tied}: not a bit may differ");
            }
        }
    }

    #[test]
    fn a_fused_step_is_the_step() {
        for tied in [false, true] {
            let start = trainee(tied);
            let rules = ParameterRules::moonlight(MuonConfig::new(), AdamWConfig::new());
            let assignment = rules.assign(&start.model).unwrap();
            let device = Device::default().autodiff();
            let run = |recompute: bool, fused: bool| {
                let mut trainee = start.clone();
                let mut optimizer = assignment.build(OptimizerOptions::new()).unwrap();
                let settings = StepSettings {
                    learning_rate: 0.01,
                    gradient_clip: 0.0,
                    balance_weight: 0.01,
                    bias_update_rate: 0.001,
                    probe: Probe::default(),
                    sparing: Sparing { recompute, loss_chunk_tokens: 0 },
                    fused,
                    dropout_seed: None,
                };
                let told: Vec<_> = (0..3)
                    .map(|_| {
                        let told = step(&mut trainee, &mut optimizer, &[batch()], &settings, &device).unwrap();
                        (told.loss, told.expert_loads, (told.gradient_norm * 1e6).round())
                    })
                    .collect();
                (told, values(&trainee.model, None))
            };
            for recompute in [false, true] {
                let plain = run(recompute, false);
                assert!(plain.1 != values(&start.model, None));
                assert!(run(recompute, true) == plain, "tied {tied}, recompute {recompute}");
            }
        }
    }

    /// The batch with each weight of its loss multiplied.
    fn weighted(factor: f32) -> HostBatch {
        let mut batch = batch();
        batch.loss_mask.iter_mut().for_each(|weight| *weight *= factor);
        batch
    }

    /// Loss and parameters after a step over each of the lists of micro-batches.
    fn stepped(start: &Trainee, fused: bool, steps: &[&[HostBatch]]) -> (Vec<StepOutcome>, Vec<Vec<f32>>) {
        let rules = ParameterRules::moonlight(MuonConfig::new(), AdamWConfig::new());
        let (mut trainee, device) = (start.clone(), Device::default().autodiff());
        let mut optimizer = rules.assign(&start.model).unwrap().build(OptimizerOptions::new()).unwrap();
        let settings = StepSettings {
            learning_rate: 0.01,
            gradient_clip: 0.0,
            balance_weight: 0.0,
            bias_update_rate: 0.001,
            probe: Probe::default(),
            sparing: PLAIN,
            fused,
            dropout_seed: None,
        };
        let told = steps.iter().map(|batches| step(&mut trainee, &mut optimizer, batches, &settings, &device).unwrap());
        let told = told.collect();
        (told, values(&trainee.model, None))
    }

    #[test]
    fn a_step_is_the_mean_over_the_weights_whatever_their_sum() {
        let start = trainee(false);
        let ones = weighted(1.0);
        // A power of two, so that a mean of the same numbers is the same number.
        let small = weighted(1.0 / 64.0);
        assert!(ones.predicted() > 1.0 && small.predicted() < 1.0);
        for fused in [false, true] {
            let (expected, parameters) = stepped(&start, fused, &[std::slice::from_ref(&ones)]);
            let (told, of_small) = stepped(&start, fused, &[std::slice::from_ref(&small)]);
            assert_eq!((told[0].loss, told[0].gradient_norm), (expected[0].loss, expected[0].gradient_norm));
            assert!(of_small == parameters, "fused {fused}");
        }
        let (expected, parameters) = stepped(&start, false, &[&[ones.clone(), ones]]);
        let (told, of_small) = stepped(&start, false, &[&[small.clone(), small]]);
        assert_eq!(told[0].loss, expected[0].loss);
        assert!(of_small == parameters);
    }

    #[test]
    fn a_step_without_a_weight_leaves_everything_as_it_was() {
        let start = trainee(false);
        let (some, none) = (weighted(1.0), weighted(0.0));
        let some = std::slice::from_ref(&some);
        let none = std::slice::from_ref(&none);
        for fused in [false, true] {
            let (_, expected) = stepped(&start, fused, &[some, some]);
            // Momentum, decay and the routers' bias wait as well.
            let (told, parameters) = stepped(&start, fused, &[none, some, none, some, none]);
            assert!(parameters == expected, "fused {fused}");
            for empty in [&told[0], &told[2], &told[4]] {
                assert_eq!((empty.loss, empty.gradient_norm), (0.0, 0.0));
                assert!(empty.expert_loads.is_empty());
            }
        }
    }

    #[test]
    fn a_loss_that_is_no_number_updates_nothing() {
        let mut trainee = trainee(false);
        trainee.model.norm.weight =
            trainee.model.norm.weight.map(|gain| gain.mul_scalar(f32::NAN).detach().require_grad());
        let rules = ParameterRules::moonlight(MuonConfig::new(), AdamWConfig::new());
        let mut optimizer = rules.assign(&trainee.model).unwrap().build(OptimizerOptions::new()).unwrap();
        let before = values(&trainee.model, None);
        let mut taker = Updating::new(&mut trainee, &mut optimizer, 0.1);
        let sparing = Sparing { recompute: true, loss_chunk_tokens: 0 };
        let broken = backward(&mut taker, input(&Device::default().autodiff()), sparing).unwrap_err();
        assert!(broken.what == "loss" && broken.value.is_nan());
        let after = values(&trainee.model, None);
        // NaN is no equal of itself.
        assert!(format!("{before:?}") == format!("{after:?}"));
    }
}

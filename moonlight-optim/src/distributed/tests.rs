//! Several workers against one.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Distribution, Tensor};

use super::*;
use crate::{
    AdamWConfig, Adaptive, Blocks, GroupOptimizer, MomentumPrecision, MuonConfig, OptimizerError, OptimizerOptions,
    ParameterRules, Rounding, Rule,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Engines of `size` workers: plain, and where it divides, groups of two within groups.
fn engines(size: usize) -> Vec<Vec<Arc<dyn Collective>>> {
    let mut engines = vec![InProcess::collectives(size, PATIENCE)];
    if size == 1 {
        engines.push(vec![Arc::new(Solo)]);
    }
    if size.is_multiple_of(2) {
        let inners: Vec<_> = (0..size / 2).flat_map(|_| InProcess::collectives(2, PATIENCE)).collect();
        let columns: Vec<_> = (0..2).map(|_| InProcess::collectives(size / 2, PATIENCE)).collect();
        let nested = inners.into_iter().enumerate().map(|(worker, inner)| {
            Arc::new(Nested::new(inner, columns[worker % 2][worker / 2].clone())) as Arc<dyn Collective>
        });
        engines.push(nested.collect());
    }
    engines
}

/// Runs `work` on a thread for each worker; what they return, in the order of the ranks.
fn on_workers<T: Send + 'static>(
    collectives: Vec<Arc<dyn Collective>>,
    work: impl Fn(Worker) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let work = Arc::new(work);
    let threads: Vec<_> = collectives
        .into_iter()
        .map(|collective| {
            let work = work.clone();
            thread::spawn(move || work(Worker::new(collective)))
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

#[test]
fn collectives_do_what_their_names_say() {
    for size in [1, 2, 3, 4, 6] {
        for engine in engines(size) {
            let told = on_workers(engine, move |worker| {
                let device = Device::default();
                let rank = worker.rank();
                let own = move |length: usize, seed: usize| -> Tensor<1> {
                    let values: Vec<f32> = (0..length).map(|i| ((rank + 1) * 100 + seed * 10 + i) as f32).collect();
                    Tensor::from_data(values.as_slice(), &device)
                };
                let lengths: Vec<usize> = (0..size).map(|worker| worker * 2 % 3).collect();
                let sum = {
                    let parts = lengths.iter().enumerate().map(|(to, &length)| own(length, to)).collect();
                    worker.run(move |collective| collective.reduce_scatter(parts)).unwrap()
                };
                let gathered = {
                    let (part, lengths) = (own(lengths[rank], 0), lengths.clone());
                    worker.run(move |collective| collective.all_gather(part, &lengths)).unwrap()
                };
                // To worker `w` go `w + rank` elements.
                let exchanged = {
                    let outgoing = (0..size).map(|to| own(to + rank, to)).collect();
                    let incoming: Vec<usize> = (0..size).map(|from| from + rank).collect();
                    worker.run(move |collective| collective.all_to_all(outgoing, &incoming)).unwrap()
                };
                let all = {
                    let tensor = own(5, 0);
                    worker.run(move |collective| collective.all_reduce(tensor)).unwrap()
                };
                let sent = {
                    let tensor = own(3, 1);
                    worker.run(move |collective| collective.broadcast(tensor, size - 1)).unwrap()
                };
                let numbers = worker.numbers(vec![rank as f64, 0.5]).unwrap();
                worker.run(|collective| collective.barrier()).unwrap();
                let lists = |tensors: Vec<Tensor<1>>| tensors.into_iter().map(floats).collect::<Vec<_>>();
                (rank, lengths, floats(sum), lists(gathered), lists(exchanged), floats(all), floats(sent), numbers)
            });
            let value = |rank: usize, seed: usize, i: usize| ((rank + 1) * 100 + seed * 10 + i) as f32;
            for (place, (rank, lengths, sum, gathered, exchanged, all, sent, numbers)) in told.into_iter().enumerate() {
                assert_eq!(rank, place);
                let total = |seed: usize, i: usize| (0..size).map(|from| value(from, seed, i)).sum::<f32>();
                assert_eq!(sum, (0..lengths[rank]).map(|i| total(rank, i)).collect::<Vec<_>>());
                assert_eq!(all, (0..5).map(|i| total(0, i)).collect::<Vec<_>>());
                assert_eq!(sent, (0..3).map(|i| value(size - 1, 1, i)).collect::<Vec<_>>());
                for from in 0..size {
                    let of = |length: usize, seed: usize| (0..length).map(|i| value(from, seed, i)).collect::<Vec<_>>();
                    assert_eq!(gathered[from], of(lengths[from], 0));
                    assert_eq!(exchanged[from], of(from + rank, rank), "{size} workers, {from} to {rank}");
                    assert_eq!(numbers[from], [from as f64, 0.5]);
                }
            }
        }
    }
}

#[test]
fn groups_wait_for_a_busy_worker_of_another_group() {
    let short = Duration::from_millis(100);
    let inners: Vec<_> = (0..2).flat_map(|_| InProcess::collectives(2, short)).collect();
    let columns: Vec<_> = (0..2).map(|_| InProcess::collectives(2, short)).collect();
    let nested = inners.into_iter().enumerate().map(|(worker, inner)| {
        Arc::new(Nested::new(inner, columns[worker % 2][worker / 2].clone())) as Arc<dyn Collective>
    });
    let told = on_workers(nested.collect(), |worker| {
        let tensor = Tensor::<1>::ones([4], &Device::default());
        if worker.rank() == 0 {
            let _busy = worker.busy();
            thread::sleep(Duration::from_millis(600));
        }
        worker.run(move |collective| collective.all_reduce(tensor)).map(floats)
    });
    for sum in told {
        assert_eq!(sum.unwrap(), [4.0; 4]);
    }
}

#[test]
fn traffic_is_what_the_others_get() {
    let told = on_workers(InProcess::collectives(4, PATIENCE), |worker| {
        let tensor = Tensor::<1>::ones([40], &Device::default());
        worker.run(move |collective| collective.all_reduce(tensor)).unwrap();
        worker.numbers(vec![0.0; 2]).unwrap();
        worker.traffic()
    });
    // Three parts of ten f32 away, its own sum to three others; two numbers to three others.
    let expected = Traffic { reduce_scatter: 120, all_gather: 120, numbers: 48, ..Traffic::default() };
    assert!(told.iter().all(|traffic| *traffic == expected), "{told:?}");
}

#[derive(Module, Debug)]
struct Net {
    tokens: Embedding,
    first: Vec<Linear>,
    experts: Param<Tensor<3>>,
    narrow: Linear,
}

fn net() -> Net {
    let device = &Device::default().autodiff();
    let experts = Tensor::<3>::random([5, 6, 6], Distribution::Normal(0.0, 0.4), device);
    // What is drawn is drawn now: modules draw their parameters when they are first looked at, each clone its own.
    let net = Net {
        tokens: EmbeddingConfig::new(9, 6).init(device),
        first: (0..3).map(|_| LinearConfig::new(6, 6).init(device)).collect(),
        experts: Param::from_tensor(experts),
        narrow: LinearConfig::new(6, 4).init(device),
    };
    values(&net);
    net
}

fn rules(muon: MuonConfig, adamw: AdamWConfig) -> ParameterRules {
    ParameterRules::new()
        .group("muon", GroupOptimizer::from(muon).with_learning_rate_factor(0.5))
        .group("adamw", adamw)
        .rule(Rule::to("adamw").path("tokens.*"))
        .rule(Rule::to("muon").path("first.1.weight").blocks(Blocks::Columns(vec![2])))
        .rule(Rule::to("muon").rank(2..=3))
        .rule(Rule::to("adamw").rank(1..=1))
}

/// The gradient of one micro-batch.
fn gradients(net: &Net, seed: usize) -> GradientsParams {
    let device = &Device::default().autodiff();
    let x = Tensor::<2>::ones([9, 9], device).cumsum(0).mul_scalar(0.07).cumsum(1).add_scalar(seed as f64).sin();
    let mut hidden = x.matmul(net.tokens.weight.val().cast(DType::F32)).add_scalar(0.1);
    for layer in &net.first {
        let bias = layer.bias.as_ref().unwrap().val().cast(DType::F32).unsqueeze();
        hidden = hidden.matmul(layer.weight.val().cast(DType::F32)).add(bias).tanh();
    }
    let experts = hidden.clone().unsqueeze::<3>().matmul(net.experts.val().cast(DType::F32)).square().mean();
    let narrow = hidden.matmul(net.narrow.weight.val().cast(DType::F32)).square().mean();
    let loss = narrow + experts + net.narrow.bias.as_ref().unwrap().val().cast(DType::F32).square().sum();
    GradientsParams::from_grads(loss.backward(), net)
}

/// Every value of every parameter.
fn values(net: &Net) -> Vec<f32> {
    struct All(Vec<f32>);
    impl ModuleVisitor for All {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.extend(floats(param.val().inner()));
        }
    }
    let mut all = All(Vec::new());
    net.visit(&mut all);
    all.0
}

fn in_bf16(net: Net) -> Net {
    struct Narrow;
    impl ModuleMapper for Narrow {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|tensor| tensor.cast(DType::BF16).detach().require_grad())
        }
    }
    net.map(&mut Narrow)
}

const RATE: f64 = 0.03;

fn options(worker: &Worker, config: DistributedConfig) -> OptimizerOptions {
    OptimizerOptions::new().with_worker(worker.clone()).with_distributed(config)
}

/// `steps` steps of a group, of `micro_batches` in all; the parameters at the end.
fn train(
    start: &Net,
    rules: &ParameterRules,
    engine: Vec<Arc<dyn Collective>>,
    config: DistributedConfig,
    (first, steps, micro_batches): (usize, usize, usize),
    (load, save): (Vec<PathBuf>, Option<PathBuf>),
) -> Vec<Vec<f32>> {
    let (start, rules) = (start.clone(), rules.clone());
    on_workers(engine, move |worker| {
        let mut net = start.clone().fork(&Device::default().autodiff());
        let assignment = rules.assign(&net).unwrap();
        let mut optimizer = assignment.load(&load, options(&worker, config)).unwrap();
        for step in first..first + steps {
            let cuts = even_cuts(micro_batches, worker.size());
            let mut sum: Option<GradientsParams> = None;
            for micro in cuts[worker.rank()]..cuts[worker.rank() + 1] {
                let new = gradients(&net, step * micro_batches + micro);
                let mut sums = burn::optim::GradientsAccumulator::new();
                sums.accumulate(&net, sum.take().unwrap_or_default());
                sums.accumulate(&net, new);
                sum = Some(sums.grads());
            }
            optimizer.offer(&net, sum.unwrap());
            let squares = optimizer.squares(&net).unwrap();
            let norm = worker.numbers(vec![squares]).unwrap().concat().iter().sum::<f64>().sqrt();
            net = optimizer.apply(RATE, (0.5 / norm).min(1.0), net).unwrap();
        }
        if let Some(save) = &save {
            optimizer.save(save.join(format!("{}.bpk", worker.rank()))).unwrap();
        }
        values(&net)
    })
}

/// One worker, one optimizer, all micro-batches one after the other.
fn alone(start: &Net, rules: &ParameterRules, (first, steps, micro_batches): (usize, usize, usize)) -> Vec<f32> {
    let mut net = start.clone();
    let mut optimizer = rules.assign(&net).unwrap().to_module_optimizer();
    for step in first..first + steps {
        let mut sums = burn::optim::GradientsAccumulator::new();
        for micro in 0..micro_batches {
            sums.accumulate(&net, gradients(&net, step * micro_batches + micro));
        }
        let mut taken = sums.grads();
        struct Norm<'a>(&'a GradientsParams, f64);
        impl ModuleVisitor for Norm<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.1 += self.0.get::<D>(param.id).map_or(0.0, sum_of_squares);
            }
        }
        let mut norm = Norm(&taken, 0.0);
        net.visit(&mut norm);
        let scale = (0.5 / norm.1.sqrt()).min(1.0);
        struct Scale<'a>(&'a mut GradientsParams, f64);
        impl ModuleVisitor for Scale<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                if let Some(gradient) = self.0.remove::<D>(param.id) {
                    self.0.register(param.id, gradient.mul_scalar(self.1));
                }
            }
        }
        net.visit(&mut Scale(&mut taken, scale));
        net = optimizer.step(RATE, net, taken);
    }
    values(&net)
}

fn config(form: DistributedForm) -> DistributedConfig {
    // Small buckets: several travel at a time.
    DistributedConfig { form, gather: GatherPrecision::F32, bucket_elements: 60 }
}

fn distance(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max)
}

#[test]
fn whole_matrices_on_any_number_of_workers_are_the_single_optimizer_bit_for_bit() {
    let start = net();
    for adaptive in [Adaptive::Off, Adaptive::nor_muon(), Adaptive::ada_muon()] {
        let mut muon = MuonConfig::new();
        muon.adaptive = adaptive;
        let rules = rules(muon, AdamWConfig::new());
        for size in [1, 2, 3, 4] {
            // A micro-batch each: the order of the sum is that of one worker.
            let expected = alone(&start, &rules, (0, 4, size));
            assert!(distance(&expected, &values(&start)) > 1e-2);
            for (nested, engine) in engines(size).into_iter().enumerate() {
                let form = config(DistributedForm::WholeMatrix);
                let got = train(&start, &rules, engine, form, (0, 4, size), (Vec::new(), None));
                for values in &got {
                    if nested == 0 || size <= 2 {
                        assert!(*values == expected, "{adaptive:?}, {size}: {}", distance(values, &expected));
                    } else {
                        // Sums of pairs are summed.
                        assert!(distance(values, &expected) < 1e-4, "{}", distance(values, &expected));
                        assert!(*values == got[0]);
                    }
                }
            }
        }
    }
}

#[test]
fn uneven_shares_give_the_same_within_rounding() {
    let start = net();
    let rules = rules(MuonConfig::new(), AdamWConfig::new());
    let expected = alone(&start, &rules, (0, 3, 5));
    for form in [DistributedForm::WholeMatrix, DistributedForm::Flat] {
        for size in [2, 3, 4] {
            let engine = InProcess::collectives(size, PATIENCE);
            let got = train(&start, &rules, engine, config(form), (0, 3, 5), (Vec::new(), None));
            assert!(got.iter().all(|values| *values == got[0]), "the workers hold the same");
            assert!(distance(&got[0], &expected) < 1e-4, "{form:?} {size}: {}", distance(&got[0], &expected));
        }
    }
}

#[test]
fn algorithm_1_does_not_depend_on_the_number_of_workers() {
    let start = net();
    let rules = rules(MuonConfig::new(), AdamWConfig::new());
    for gather in [GatherPrecision::Bf16, GatherPrecision::F32] {
        let config = DistributedConfig { gather, ..config(DistributedForm::Flat) };
        for size in [2, 3, 4] {
            let by = |workers: usize| {
                let engine = InProcess::collectives(workers, PATIENCE);
                train(&start, &rules, engine, config, (0, 4, size), (Vec::new(), None))
            };
            let (by_many, by_one) = (by(size), by(1));
            assert!(by_many.iter().all(|values| *values == by_one[0]), "{gather:?} {size}");
            let plain = alone(&start, &rules, (0, 4, size));
            let far = distance(&by_one[0], &plain);
            match gather {
                GatherPrecision::F32 => assert!(far < 1e-5, "{far}"),
                // Rounding of what is orthogonalised shows, and stays small.
                GatherPrecision::Bf16 => assert!(far > 1e-6 && far < 2e-2, "{far}"),
            }
        }
    }
}

#[test]
fn parameters_in_half_precision_keep_masters_with_their_owners() {
    let start = in_bf16(net());
    let muon = MuonConfig::new().with_rounding(Rounding::MasterWeights);
    let adamw = AdamWConfig::new().with_rounding(Rounding::MasterWeights);
    let rules = rules(muon.with_momentum_precision(MomentumPrecision::Bf16), adamw);
    for form in [DistributedForm::WholeMatrix, DistributedForm::Flat] {
        let run = |size| {
            let engine = InProcess::collectives(size, PATIENCE);
            train(&start, &rules, engine, config(form), (0, 4, 1.max(size)), (Vec::new(), None))
        };
        // Sums of bf16 gradients are f32 here and bf16 in one worker's accumulation: one micro-batch is compared.
        assert!(distance(&run(1)[0], &alone(&start, &rules, (0, 4, 1))) < 1e-2, "{form:?}");
        assert!(distance(&run(1)[0], &values(&start)) > 1e-2);
        let many = run(3);
        assert!(many.iter().all(|values| *values == many[0]));
    }
}

#[test]
fn state_is_divided_and_what_is_sent_is_the_formula() {
    let start = net();
    let rules = rules(MuonConfig::new(), AdamWConfig::new());
    for form in [DistributedForm::WholeMatrix, DistributedForm::Flat] {
        for size in [1, 2, 3, 4] {
            let (net, rules) = (start.clone(), rules.clone());
            let told = on_workers(InProcess::collectives(size, PATIENCE), move |worker| {
                let config = DistributedConfig { gather: GatherPrecision::Bf16, ..config(form) };
                let mut net = net.clone().fork(&Device::default().autodiff());
                let mut optimizer = rules.assign(&net).unwrap().build(options(&worker, config)).unwrap();
                let formula = optimizer.traffic_by_formula(&net);
                for step in 0..2 {
                    let taken = gradients(&net, step);
                    net = optimizer.step(RATE, net, taken).unwrap();
                }
                (optimizer.state_bytes(), worker.traffic(), formula)
            });
            type Told = ((u64, u64), Traffic, [f64; 3]);
            let sum = |of: fn(&Told) -> u64| told.iter().map(of).sum::<u64>();
            // Muon's 4 bytes of 3 layers, 5 experts and the narrow one; AdamW's 8 of embedding and biases.
            let (muon, adamw) = (3 * 36 + 5 * 36 + 24, 54 + 3 * 6 + 4);
            assert_eq!(sum(|told| told.0.1), 4 * muon);
            assert_eq!(sum(|told| told.0.0), 4 * muon + 8 * adamw);
            let largest = told.iter().map(|told| told.0.1).max().unwrap();
            assert!(largest <= 4 * (muon.div_ceil(size as u64) + 36), "{form:?} {size}: {largest}");
            let [gradients, momentum, parameters] = told[0].2;
            let mean = |bytes: u64| bytes as f64 / (2 * size) as f64;
            let near = |sent: f64, formula: f64| (sent - formula).abs() < 1e-6;
            assert!(near(mean(sum(|told| told.1.reduce_scatter)), gradients));
            assert!(near(mean(sum(|told| told.1.all_to_all)), momentum));
            assert!(near(mean(sum(|told| told.1.all_gather)), parameters));
            let ratio = (gradients + momentum + parameters) / (gradients + parameters);
            let flat = form == DistributedForm::Flat && size > 1;
            assert!(size == 1 || (ratio > 1.0) == flat && ratio <= 1.25, "{form:?} {size}: {ratio}");
        }
    }
}

#[test]
fn what_any_number_of_workers_saved_any_number_goes_on_with() {
    for adaptive in [Adaptive::Off, Adaptive::nor_muon()] {
        let mut muon = MuonConfig::new().with_rounding(Rounding::MasterWeights);
        muon.adaptive = adaptive;
        let rules = rules(muon, AdamWConfig::new().with_rounding(Rounding::MasterWeights));
        let start = in_bf16(net());
        let forms = match adaptive {
            Adaptive::Off => vec![DistributedForm::WholeMatrix, DistributedForm::Flat],
            _ => vec![DistributedForm::WholeMatrix],
        };
        for form in forms {
            let dir = tempfile::tempdir().unwrap();
            let engine = || InProcess::collectives(4, PATIENCE);
            train(&start, &rules, engine(), config(form), (0, 3, 4), (Vec::new(), Some(dir.path().into())));
            let files = |dir: &std::path::Path, count: usize| -> Vec<PathBuf> {
                (0..count).map(|rank| dir.join(format!("{rank}.bpk"))).collect()
            };
            let assignment = rules.assign(&start).unwrap();
            // All of a state: written by one rank as one part of each tensor.
            let merged = |files: &[PathBuf]| -> Vec<(String, Vec<u8>)> {
                let whole = tempfile::tempdir().unwrap();
                let file = whole.path().join("whole.bpk");
                assignment.load(files, OptimizerOptions::new()).unwrap().save(&file).unwrap();
                let reader = burn_pack::Reader::from_file(&file).unwrap();
                let mut scalars: Vec<_> = reader
                    .scalars()
                    .iter()
                    .map(|(name, value)| (name.clone(), format!("{value:?}").into_bytes()))
                    .collect();
                let tensors = reader.into_tensors().unwrap();
                assert!(tensors.iter().all(|tensor| tensor.name.ends_with(":0")));
                scalars.extend(tensors.iter().map(|tensor| (tensor.name.clone(), tensor.to_bytes().unwrap().to_vec())));
                scalars.sort();
                scalars
            };
            let expected = merged(&files(dir.path(), 4));
            assert!(expected.len() > 20, "{}", expected.len());
            for size in [1, 2, 3] {
                // Loaded and saved by another number of workers, not a bit is another.
                let again = tempfile::tempdir().unwrap();
                let target = again.path().to_path_buf();
                let (rules, start, loaded) = (rules.clone(), start.clone(), files(dir.path(), 4));
                on_workers(InProcess::collectives(size, PATIENCE), move |worker| {
                    let assignment = rules.assign(&start).unwrap();
                    let optimizer = assignment.load(&loaded, options(&worker, config(form)));
                    optimizer.unwrap().save(target.join(format!("{}.bpk", worker.rank()))).unwrap();
                });
                assert!(merged(&files(again.path(), size)) == expected, "{form:?} {size}");
            }
            // As the one file of Burn's optimizer, and back.
            let single = dir.path().join("single.bpk");
            assignment.load_module_optimizer(&files(dir.path(), 4)).unwrap().save(&single).unwrap();
            assert!(merged(&[single]) == expected, "{form:?}");
            // A file is missing.
            let error = assignment.load(&files(dir.path(), 4)[1..], OptimizerOptions::new()).unwrap_err();
            assert!(error.to_string().contains("is missing"), "{error}");
            // A file is there twice.
            let twice = [files(dir.path(), 4), files(dir.path(), 1)].concat();
            let error = assignment.load(&twice, OptimizerOptions::new()).unwrap_err();
            assert!(error.to_string().contains("is there twice"), "{error}");
        }
    }
}

#[test]
fn a_group_that_cannot_be_divided_is_named() {
    let start = net();
    let sgd = burn::optim::SgdConfig::new().build();
    let rules = ParameterRules::new().group("sgd", GroupOptimizer::new(sgd, 0.0)).rule(Rule::to("sgd").path("**"));
    let error = rules.assign(&start).unwrap().build(OptimizerOptions::new());
    assert!(error.unwrap_err().to_string().contains("the group `sgd`"));
    let mut muon = MuonConfig::new();
    muon.adaptive = Adaptive::nor_muon();
    let assignment = self::rules(muon, AdamWConfig::new()).assign(&start).unwrap();
    let error = assignment.build(options(&Worker::alone(), config(DistributedForm::Flat))).unwrap_err();
    assert!(matches!(error, OptimizerError::AdaptiveParts));
}

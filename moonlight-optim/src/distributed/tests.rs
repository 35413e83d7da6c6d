//! Several ranks, compared with one.

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

const TIMEOUT: Duration = Duration::from_secs(60);

/// Collectives of `size` ranks of each kind: in one group and, for an even size, in groups of two.
fn backends(size: usize) -> Vec<Vec<Arc<dyn Collective>>> {
    let mut backends = vec![InProcess::collectives(size, TIMEOUT)];
    if size == 1 {
        backends.push(vec![Arc::new(SingleRank)]);
    }
    if size.is_multiple_of(2) {
        let inners: Vec<_> = (0..size / 2).flat_map(|_| InProcess::collectives(2, TIMEOUT)).collect();
        let columns: Vec<_> = (0..2).map(|_| InProcess::collectives(size / 2, TIMEOUT)).collect();
        let hierarchical = inners.into_iter().enumerate().map(|(rank, inner)| {
            Arc::new(HierarchicalCollective::new(inner, columns[rank % 2][rank / 2].clone())) as Arc<dyn Collective>
        });
        backends.push(hierarchical.collect());
    }
    backends
}

/// Runs `work` on a thread for each rank; returns their results in rank order.
fn on_ranks<T: Send + 'static>(
    collectives: Vec<Arc<dyn Collective>>,
    work: impl Fn(Communicator) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let work = Arc::new(work);
    let threads: Vec<_> = collectives
        .into_iter()
        .map(|collective| {
            let work = work.clone();
            thread::spawn(move || work(Communicator::new(collective)))
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
        for collectives in backends(size) {
            let results = on_ranks(collectives, move |communicator| {
                let device = Device::default();
                let rank = communicator.rank();
                let own = move |length: usize, seed: usize| -> Tensor<1> {
                    let values: Vec<f32> = (0..length).map(|i| ((rank + 1) * 100 + seed * 10 + i) as f32).collect();
                    Tensor::from_data(values.as_slice(), &device)
                };
                let lengths: Vec<usize> = (0..size).map(|peer| peer * 2 % 3).collect();
                let sum = {
                    let parts = lengths.iter().enumerate().map(|(to, &length)| own(length, to)).collect();
                    communicator.run(move |collective| collective.reduce_scatter(parts)).unwrap()
                };
                let gathered = {
                    let (part, lengths) = (own(lengths[rank], 0), lengths.clone());
                    communicator.run(move |collective| collective.all_gather(part, &lengths)).unwrap()
                };
                // Rank `r` gets `r + rank` elements.
                let exchanged = {
                    let outgoing = (0..size).map(|to| own(to + rank, to)).collect();
                    let incoming: Vec<usize> = (0..size).map(|from| from + rank).collect();
                    communicator.run(move |collective| collective.all_to_all(outgoing, &incoming)).unwrap()
                };
                let all = {
                    let tensor = own(5, 0);
                    communicator.run(move |collective| collective.all_reduce(tensor)).unwrap()
                };
                let sent = {
                    let tensor = own(3, 1);
                    communicator.run(move |collective| collective.broadcast(tensor, size - 1)).unwrap()
                };
                let scalars = communicator.all_gather_f64(vec![rank as f64, 0.5]).unwrap();
                communicator.run(|collective| collective.barrier()).unwrap();
                let lists = |tensors: Vec<Tensor<1>>| tensors.into_iter().map(floats).collect::<Vec<_>>();
                (rank, lengths, floats(sum), lists(gathered), lists(exchanged), floats(all), floats(sent), scalars)
            });
            let value = |rank: usize, seed: usize, i: usize| ((rank + 1) * 100 + seed * 10 + i) as f32;
            for (index, (rank, lengths, sum, gathered, exchanged, all, sent, scalars)) in
                results.into_iter().enumerate()
            {
                assert_eq!(rank, index);
                let total = |seed: usize, i: usize| (0..size).map(|from| value(from, seed, i)).sum::<f32>();
                assert_eq!(sum, (0..lengths[rank]).map(|i| total(rank, i)).collect::<Vec<_>>());
                assert_eq!(all, (0..5).map(|i| total(0, i)).collect::<Vec<_>>());
                assert_eq!(sent, (0..3).map(|i| value(size - 1, 1, i)).collect::<Vec<_>>());
                for from in 0..size {
                    let of = |length: usize, seed: usize| (0..length).map(|i| value(from, seed, i)).collect::<Vec<_>>();
                    assert_eq!(gathered[from], of(lengths[from], 0));
                    assert_eq!(exchanged[from], of(from + rank, rank), "{size} ranks, {from} to {rank}");
                    assert_eq!(scalars[from], [from as f64, 0.5]);
                }
            }
        }
    }
}

#[test]
fn groups_wait_for_a_busy_rank_of_another_group() {
    let short = Duration::from_millis(100);
    let inners: Vec<_> = (0..2).flat_map(|_| InProcess::collectives(2, short)).collect();
    let columns: Vec<_> = (0..2).map(|_| InProcess::collectives(2, short)).collect();
    let hierarchical = inners.into_iter().enumerate().map(|(rank, inner)| {
        Arc::new(HierarchicalCollective::new(inner, columns[rank % 2][rank / 2].clone())) as Arc<dyn Collective>
    });
    let sums = on_ranks(hierarchical.collect(), |communicator| {
        let tensor = Tensor::<1>::ones([4], &Device::default());
        if communicator.rank() == 0 {
            let _busy = communicator.busy();
            thread::sleep(Duration::from_millis(600));
        }
        communicator.run(move |collective| collective.all_reduce(tensor)).map(floats)
    });
    for sum in sums {
        assert_eq!(sum.unwrap(), [4.0; 4]);
    }
}

#[test]
fn bytes_sent_are_those_that_the_others_receive() {
    let sent = on_ranks(InProcess::collectives(4, TIMEOUT), |communicator| {
        let tensor = Tensor::<1>::ones([40], &Device::default());
        communicator.run(move |collective| collective.all_reduce(tensor)).unwrap();
        communicator.all_gather_f64(vec![0.0; 2]).unwrap();
        communicator.bytes_sent()
    });
    // Three parts of ten f32 each, then this rank's sum to three others; two f64 to three others.
    let expected = BytesSent { reduce_scatter: 120, all_gather: 120, scalars: 48, ..BytesSent::default() };
    assert!(sent.iter().all(|sent| *sent == expected), "{sent:?}");
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
    // Burn draws initial values when a parameter is first read, and each clone draws its own: read them before cloning.
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

fn options(communicator: &Communicator, config: DistributedConfig) -> OptimizerOptions {
    OptimizerOptions::new().with_communicator(communicator.clone()).with_distributed(config)
}

/// Trains for `steps` steps of `micro_batches` each, over all ranks; the parameters of each rank at the end.
fn train(
    start: &Net,
    rules: &ParameterRules,
    collectives: Vec<Arc<dyn Collective>>,
    config: DistributedConfig,
    (first, steps, micro_batches): (usize, usize, usize),
    (load, save): (Vec<PathBuf>, Option<PathBuf>),
) -> Vec<Vec<f32>> {
    let (start, rules) = (start.clone(), rules.clone());
    on_ranks(collectives, move |communicator| {
        let mut net = start.clone().fork(&Device::default().autodiff());
        let assignment = rules.assign(&net).unwrap();
        let mut optimizer = assignment.load(&load, options(&communicator, config)).unwrap();
        for step in first..first + steps {
            let cuts = even_cuts(micro_batches, communicator.size());
            let mut sum: Option<GradientsParams> = None;
            for micro in cuts[communicator.rank()]..cuts[communicator.rank() + 1] {
                let new = gradients(&net, step * micro_batches + micro);
                let mut sums = burn::optim::GradientsAccumulator::new();
                sums.accumulate(&net, sum.take().unwrap_or_default());
                sums.accumulate(&net, new);
                sum = Some(sums.grads());
            }
            optimizer.add_gradients(&net, sum.unwrap());
            let squares = optimizer.local_sum_of_squares(&net).unwrap();
            let norm = communicator.all_gather_f64(vec![squares]).unwrap().concat().iter().sum::<f64>().sqrt();
            net = optimizer.apply(RATE, (0.5 / norm).min(1.0), net).unwrap();
        }
        if let Some(save) = &save {
            optimizer.save(save.join(format!("{}.bpk", communicator.rank()))).unwrap();
        }
        values(&net)
    })
}

/// One rank, Burn's optimizer, all micro-batches one after the other; the parameters at the end.
fn train_single(start: &Net, rules: &ParameterRules, (first, steps, micro_batches): (usize, usize, usize)) -> Vec<f32> {
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
        struct ScaleBy<'a>(&'a mut GradientsParams, f64);
        impl ModuleVisitor for ScaleBy<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                if let Some(gradient) = self.0.remove::<D>(param.id) {
                    self.0.register(param.id, gradient.mul_scalar(self.1));
                }
            }
        }
        net.visit(&mut ScaleBy(&mut taken, scale));
        net = optimizer.step(RATE, net, taken);
    }
    values(&net)
}

fn config(form: DistributedForm) -> DistributedConfig {
    // Small buckets, so that several are reduced at a time.
    DistributedConfig { form, gather: GatherPrecision::F32, bucket_elements: 60 }
}

fn distance(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max)
}

#[test]
fn whole_matrices_on_any_number_of_ranks_are_the_single_optimizer_bit_for_bit() {
    let start = net();
    for adaptive in [Adaptive::Off, Adaptive::nor_muon(), Adaptive::ada_muon()] {
        let mut muon = MuonConfig::new();
        muon.adaptive = adaptive;
        let rules = rules(muon, AdamWConfig::new());
        for size in [1, 2, 3, 4] {
            // One micro-batch a rank, so that the sums have the order of a single rank.
            let expected = train_single(&start, &rules, (0, 4, size));
            assert!(distance(&expected, &values(&start)) > 1e-2);
            for (hierarchical, collectives) in backends(size).into_iter().enumerate() {
                let form = config(DistributedForm::WholeMatrix);
                let got = train(&start, &rules, collectives, form, (0, 4, size), (Vec::new(), None));
                for values in &got {
                    if hierarchical == 0 || size <= 2 {
                        assert!(*values == expected, "{adaptive:?}, {size}: {}", distance(values, &expected));
                    } else {
                        // Pairs are summed first, which rounds differently.
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
    let expected = train_single(&start, &rules, (0, 3, 5));
    for form in [DistributedForm::WholeMatrix, DistributedForm::Flat] {
        for size in [2, 3, 4] {
            let collectives = InProcess::collectives(size, TIMEOUT);
            let got = train(&start, &rules, collectives, config(form), (0, 3, 5), (Vec::new(), None));
            assert!(got.iter().all(|values| *values == got[0]), "all ranks hold the same parameters");
            assert!(distance(&got[0], &expected) < 1e-4, "{form:?} {size}: {}", distance(&got[0], &expected));
        }
    }
}

#[test]
fn algorithm_1_does_not_depend_on_the_world_size() {
    let start = net();
    let rules = rules(MuonConfig::new(), AdamWConfig::new());
    for gather in [GatherPrecision::Bf16, GatherPrecision::F32] {
        let config = DistributedConfig { gather, ..config(DistributedForm::Flat) };
        for size in [2, 3, 4] {
            let by = |ranks: usize| {
                let collectives = InProcess::collectives(ranks, TIMEOUT);
                train(&start, &rules, collectives, config, (0, 4, size), (Vec::new(), None))
            };
            let (by_many, by_one) = (by(size), by(1));
            assert!(by_many.iter().all(|values| *values == by_one[0]), "{gather:?} {size}");
            let plain = train_single(&start, &rules, (0, 4, size));
            let far = distance(&by_one[0], &plain);
            match gather {
                GatherPrecision::F32 => assert!(far < 1e-5, "{far}"),
                // Momentum is rounded to bf16 before it is orthogonalized: a difference is expected, and a small one.
                GatherPrecision::Bf16 => assert!(far > 1e-6 && far < 2e-2, "{far}"),
            }
        }
    }
}

#[test]
fn owners_keep_the_master_weights_of_half_precision_parameters() {
    let start = in_bf16(net());
    let muon = MuonConfig::new().with_rounding(Rounding::MasterWeights);
    let adamw = AdamWConfig::new().with_rounding(Rounding::MasterWeights);
    let rules = rules(muon.with_momentum_precision(MomentumPrecision::Bf16), adamw);
    for form in [DistributedForm::WholeMatrix, DistributedForm::Flat] {
        let run = |size| {
            let collectives = InProcess::collectives(size, TIMEOUT);
            train(&start, &rules, collectives, config(form), (0, 4, 1.max(size)), (Vec::new(), None))
        };
        // Sums of gradients are in f32 here and in bf16 in Burn's accumulator, so only steps of one micro-batch are compared.
        assert!(distance(&run(1)[0], &train_single(&start, &rules, (0, 4, 1))) < 1e-2, "{form:?}");
        assert!(distance(&run(1)[0], &values(&start)) > 1e-2);
        let many = run(3);
        assert!(many.iter().all(|values| *values == many[0]));
    }
}

#[test]
fn state_is_sharded_and_the_bytes_sent_are_those_predicted() {
    let start = net();
    let rules = rules(MuonConfig::new(), AdamWConfig::new());
    for form in [DistributedForm::WholeMatrix, DistributedForm::Flat] {
        for size in [1, 2, 3, 4] {
            let (net, rules) = (start.clone(), rules.clone());
            let results = on_ranks(InProcess::collectives(size, TIMEOUT), move |communicator| {
                let config = DistributedConfig { gather: GatherPrecision::Bf16, ..config(form) };
                let mut net = net.clone().fork(&Device::default().autodiff());
                let mut optimizer = rules.assign(&net).unwrap().build(options(&communicator, config)).unwrap();
                let predicted = optimizer.predicted_bytes_sent(&net);
                for step in 0..2 {
                    let taken = gradients(&net, step);
                    net = optimizer.step(RATE, net, taken).unwrap();
                }
                (optimizer.state_bytes(), communicator.bytes_sent(), predicted)
            });
            type Measured = ((u64, u64), BytesSent, [f64; 3]);
            let sum = |of: fn(&Measured) -> u64| results.iter().map(of).sum::<u64>();
            // Elements: Muon has 3 layers, 5 experts and the narrow one, AdamW the embedding and the biases.
            let (muon, adamw) = (3 * 36 + 5 * 36 + 24, 54 + 3 * 6 + 4);
            assert_eq!(sum(|rank| rank.0.1), 4 * muon);
            assert_eq!(sum(|rank| rank.0.0), 4 * muon + 8 * adamw);
            let largest = results.iter().map(|rank| rank.0.1).max().unwrap();
            assert!(largest <= 4 * (muon.div_ceil(size as u64) + 36), "{form:?} {size}: {largest}");
            let [gradients, momentum, parameters] = results[0].2;
            let mean = |bytes: u64| bytes as f64 / (2 * size) as f64;
            let near = |sent: f64, predicted: f64| (sent - predicted).abs() < 1e-6;
            assert!(near(mean(sum(|rank| rank.1.reduce_scatter)), gradients));
            assert!(near(mean(sum(|rank| rank.1.all_to_all)), momentum));
            assert!(near(mean(sum(|rank| rank.1.all_gather)), parameters));
            let ratio = (gradients + momentum + parameters) / (gradients + parameters);
            let flat = form == DistributedForm::Flat && size > 1;
            assert!(size == 1 || (ratio > 1.0) == flat && ratio <= 1.25, "{form:?} {size}: {ratio}");
        }
    }
}

#[test]
fn a_state_saved_by_any_number_of_ranks_loads_on_any_number() {
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
            let collectives = InProcess::collectives(4, TIMEOUT);
            train(&start, &rules, collectives, config(form), (0, 3, 4), (Vec::new(), Some(dir.path().into())));
            let files = |dir: &std::path::Path, count: usize| -> Vec<PathBuf> {
                (0..count).map(|rank| dir.join(format!("{rank}.bpk"))).collect()
            };
            let assignment = rules.assign(&start).unwrap();
            // The whole state: loaded by one rank and written as one part of each tensor.
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
                // Loaded and saved by another number of ranks, every bit is the same.
                let again = tempfile::tempdir().unwrap();
                let target = again.path().to_path_buf();
                let (rules, start, loaded) = (rules.clone(), start.clone(), files(dir.path(), 4));
                on_ranks(InProcess::collectives(size, TIMEOUT), move |communicator| {
                    let assignment = rules.assign(&start).unwrap();
                    let optimizer = assignment.load(&loaded, options(&communicator, config(form)));
                    optimizer.unwrap().save(target.join(format!("{}.bpk", communicator.rank()))).unwrap();
                });
                assert!(merged(&files(again.path(), size)) == expected, "{form:?} {size}");
            }
            // Through the single file of Burn's optimizer and back.
            let single = dir.path().join("single.bpk");
            assignment.load_module_optimizer(&files(dir.path(), 4)).unwrap().save(&single).unwrap();
            assert!(merged(&[single]) == expected, "{form:?}");
            // A file is missing.
            let error = assignment.load(&files(dir.path(), 4)[1..], OptimizerOptions::new()).unwrap_err();
            assert!(error.to_string().contains("is missing"), "{error}");
            // The same file twice.
            let twice = [files(dir.path(), 4), files(dir.path(), 1)].concat();
            let error = assignment.load(&twice, OptimizerOptions::new()).unwrap_err();
            assert!(error.to_string().contains("appears twice"), "{error}");
        }
    }
}

#[test]
fn a_group_that_cannot_be_sharded_is_named() {
    let start = net();
    let sgd = burn::optim::SgdConfig::new().build();
    let rules = ParameterRules::new().group("sgd", GroupOptimizer::new(sgd, 0.0)).rule(Rule::to("sgd").path("**"));
    let error = rules.assign(&start).unwrap().build(OptimizerOptions::new());
    assert!(error.unwrap_err().to_string().contains("the group `sgd`"));
    let mut muon = MuonConfig::new();
    muon.adaptive = Adaptive::nor_muon();
    let assignment = self::rules(muon, AdamWConfig::new()).assign(&start).unwrap();
    let error = assignment.build(options(&Communicator::single_rank(), config(DistributedForm::Flat))).unwrap_err();
    assert!(matches!(error, OptimizerError::AdaptiveNeedsWholeMatrices));
}

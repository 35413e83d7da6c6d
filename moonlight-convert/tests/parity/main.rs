//! Parity with transformers on checkpoints of six families (the fixtures' script writes the expected values).
//!
//! `cargo test -p moonlight-convert --test parity -- --nocapture` prints the worst value of each check.

mod fixture;
mod round_trip;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Gradients, Int, Tensor, TensorData};
use moonlight_model::{CausalLm, KvCache, LmBatch, Probe, Segments};

use fixture::{FAMILIES, Fixture};

/// The most that a token's log-probability may differ.
const LOGPROB_BUDGET: f64 = 2e-4;
/// The most that a tensor of gradients may differ, relative to its largest element.
const GRADIENT_BUDGET: f64 = 1e-4;
const LOSS_BUDGET: f64 = 1e-5;

fn ids(rows: &[Vec<i32>], device: &Device) -> Tensor<2, Int> {
    let data = TensorData::new(rows.concat(), [rows.len(), rows[0].len()]);
    Tensor::from_data(data, device)
}

/// The log-probability of each token except the first, from logits whose row `first` belongs to token 0.
fn logprobs(logits: &[f32], vocab: usize, tokens: &[i32]) -> Vec<f64> {
    let rows = logits.chunks_exact(vocab);
    rows.zip(&tokens[1..])
        .map(|(row, &next)| {
            let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = row.iter().map(|&logit| f64::from(logit - highest).exp()).sum();
            f64::from(row[next as usize] - highest) - sum.ln()
        })
        .collect()
}

fn worst(actual: &[f64], expected: &[Option<f64>]) -> f64 {
    assert_eq!(actual.len() + 1, expected.len());
    let differences = actual.iter().zip(&expected[1..]).map(|(a, b)| (a - b.expect("only the first is null")).abs());
    differences.fold(0.0, |worst, difference| if difference.is_nan() { f64::NAN } else { f64::max(worst, difference) })
}

#[test]
fn logprobs_of_whole_sequences() {
    let device = Device::default();
    for family in FAMILIES {
        let (fixture, model) = Fixture::open(family, &device);
        let mut error: f64 = 0.0;
        for sequence in &fixture.sequences {
            let logits = model.logits(ids(std::slice::from_ref(&sequence.tokens), &device), None).into_data();
            let actual = logprobs(&logits.try_to_vec::<f32>().unwrap(), fixture.vocab, &sequence.tokens);
            error = error.max(worst(&actual, &sequence.logprobs));
        }
        println!("{family}: log-probabilities differ by at most {error:.1e}");
        assert!(error <= LOGPROB_BUDGET, "{family}: {error}");
    }
}

/// Weights and activations in half precision against transformers in f32. transformers itself differs by 0.004 to 0.01
/// in bf16, and a token with different experts by more, so that the mean is checked.
#[test]
fn logprobs_in_half_precision() {
    // transformers in bf16 differs from itself in f32 by 0.012 in the mean and 0.28 at most for one family.
    const MEAN_BUDGET: f64 = 0.025;
    let device = Device::default();
    for (dtype, family) in
        [DType::BF16, DType::F16].into_iter().flat_map(|dtype| FAMILIES.map(|family| (dtype, family)))
    {
        let (fixture, model) = Fixture::open_in(dtype, family, &device);
        let (mut sum, mut count, mut most) = (0.0, 0.0, 0.0f64);
        for sequence in &fixture.sequences {
            let logits = model.logits(ids(std::slice::from_ref(&sequence.tokens), &device), None);
            assert_eq!(logits.dtype(), dtype);
            let logits = logits.cast(DType::F32).into_data().try_to_vec::<f32>().unwrap();
            let actual = logprobs(&logits, fixture.vocab, &sequence.tokens);
            for (actual, expected) in actual.iter().zip(sequence.logprobs.iter().skip(1).flatten()) {
                let difference = (actual - expected).abs();
                (sum, count, most) = (sum + difference, count + 1.0, most.max(difference));
            }
        }
        let mean = sum / count;
        println!("{family} in {dtype:?}: log-probabilities differ by {mean:.1e} in the mean, {most:.1e} at most");
        assert!(mean <= MEAN_BUDGET, "{family}: {mean}");
    }
}

/// All sequences packed into one row as separate documents: every token attends to its own sequence only.
#[test]
fn logprobs_of_packed_sequences() {
    let device = Device::default();
    for family in FAMILIES {
        let (fixture, model) = Fixture::open(family, &device);
        let row: Vec<i32> = fixture.sequences.iter().flat_map(|sequence| sequence.tokens.clone()).collect();
        let documents: Vec<i32> = (0..).zip(&fixture.sequences).flat_map(|(n, s)| vec![n; s.tokens.len()]).collect();
        let segments = Segments::new(&documents, 1, row.len());
        let logits = model.logits(ids(&[row], &device), Some(&segments)).into_data().try_to_vec::<f32>().unwrap();
        let (mut error, mut start) = (0.0f64, 0);
        for sequence in &fixture.sequences {
            let actual = logprobs(&logits[start * fixture.vocab..], fixture.vocab, &sequence.tokens);
            error = error.max(worst(&actual, &sequence.logprobs));
            start += sequence.tokens.len();
        }
        println!("{family}: packed log-probabilities differ by at most {error:.1e}");
        assert!(error <= LOGPROB_BUDGET, "{family}: {error}");
    }
}

/// The prompt at once, then token by token: tests the KV cache and the absorbed projections.
#[test]
fn logprobs_while_decoding() {
    let device = Device::default();
    for family in FAMILIES {
        let (fixture, model) = Fixture::open(family, &device);
        let mut error: f64 = 0.0;
        for sequence in &fixture.sequences {
            let tokens = &sequence.tokens;
            let mut cache = KvCache::new(model.config(), 1, tokens.len(), &device, model.dtype());
            let (head, tail) = tokens.split_at(tokens.len().div_ceil(3));
            let mut logits = decode(&model, head.to_vec(), &mut cache, &device);
            for &token in tail {
                logits.extend(decode(&model, vec![token], &mut cache, &device));
            }
            error = error.max(worst(&logprobs(&logits, fixture.vocab, tokens), &sequence.logprobs));
        }
        println!("{family}: log-probabilities while decoding differ by at most {error:.1e}");
        assert!(error <= LOGPROB_BUDGET, "{family}: {error}");
    }
}

fn decode(model: &CausalLm, tokens: Vec<i32>, cache: &mut KvCache, device: &Device) -> Vec<f32> {
    model.decode(ids(&[tokens], device), cache).into_data().try_to_vec().unwrap()
}

fn best(logits: &[f32], vocab: usize) -> i32 {
    let last = &logits[logits.len() - vocab..];
    (0..vocab).max_by(|&a, &b| last[a].total_cmp(&last[b])).expect("a vocabulary") as i32
}

#[test]
fn greedy_continuation() {
    let device = Device::default();
    for family in FAMILIES {
        let (fixture, model) = Fixture::open(family, &device);
        let (prompt, expected) = (&fixture.greedy.prompt, &fixture.greedy.continuation);

        let mut whole = prompt.clone();
        for _ in expected {
            let logits = model.logits(ids(&[whole.clone()], &device), None).into_data().try_to_vec::<f32>().unwrap();
            whole.push(best(&logits, fixture.vocab));
        }
        assert_eq!(whole[prompt.len()..], **expected, "{family}, whole passes");

        let mut cache = KvCache::new(model.config(), 1, prompt.len() + expected.len(), &device, model.dtype());
        let mut cached = vec![best(&decode(&model, prompt.clone(), &mut cache, &device), fixture.vocab)];
        while cached.len() < expected.len() {
            let last = cached[cached.len() - 1];
            cached.push(best(&decode(&model, vec![last], &mut cache, &device), fixture.vocab));
        }
        assert_eq!(cached, *expected, "{family}, with the cache");
        println!("{family}: {} greedy tokens are the same, with and without the cache", expected.len());
    }
}

/// The fixture's batch, right-padded, and the number of predicted tokens.
fn padded(sequences: &[Vec<i32>], device: &Device) -> (LmBatch, f32) {
    let length = sequences.iter().map(Vec::len).max().expect("a sequence");
    let (mut tokens, mut targets, mut mask, mut documents) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for sequence in sequences {
        for place in 0..length {
            tokens.push(sequence.get(place).copied().unwrap_or(0));
            targets.push(sequence.get(place + 1).copied().unwrap_or(0));
            mask.push(if place + 1 < sequence.len() { 1.0f32 } else { 0.0 });
            documents.push(if place < sequence.len() { 0 } else { -1 });
        }
    }
    let shape = [sequences.len(), length];
    let predicted = mask.iter().sum();
    let batch = LmBatch {
        tokens: Tensor::from_data(TensorData::new(tokens, shape), device),
        targets: Tensor::from_data(TensorData::new(targets, shape), device),
        loss_mask: Tensor::from_data(TensorData::new(mask, shape), device),
        segments: Some(Segments::new(&documents, shape[0], shape[1])),
    };
    (batch, predicted)
}

/// Puts each parameter's gradient where the parameter was, so that saving the model saves the gradients under the
/// names of the file. A parameter without a gradient becomes zero.
struct GradientsInPlace<'a>(&'a Gradients);

impl ModuleMapper for GradientsInPlace<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let value = param.val();
        let gradient = value.grad(self.0).unwrap_or_else(|| value.clone().inner().zeros_like());
        Param::initialized(param.id, gradient)
    }
}

/// The worst tensor: its name, and how far apart the two are relative to the largest element.
fn furthest(actual: &fixture::Tensors, expected: &fixture::Tensors) -> (String, f64) {
    let mut worst = (String::new(), 0.0);
    for (name, expected) in expected {
        let actual = actual.get(name).unwrap_or_else(|| panic!("no gradient for {name}"));
        assert_eq!(actual.shape, expected.shape, "{name}");
        let scale = expected.values.iter().fold(0.0f64, |most, value| most.max(f64::from(value.abs())));
        let distance = actual
            .values
            .iter()
            .zip(&expected.values)
            .map(|(a, b)| f64::from(a - b).abs())
            .fold(0.0, |most, distance| if distance.is_nan() { f64::NAN } else { f64::max(most, distance) });
        // An expert without a token has no gradient on either side.
        let relative = if scale == 0.0 { distance * f64::INFINITY } else { distance / scale };
        let relative = if distance == 0.0 { 0.0 } else { relative };
        if relative.is_nan() || relative > worst.1 {
            worst = (name.clone(), relative);
        }
    }
    worst
}

#[test]
fn loss_and_gradients() {
    let device = Device::default().autodiff();
    for family in FAMILIES {
        let (fixture, model) = Fixture::open(family, &device);
        let (batch, predicted) = padded(&fixture.batch.sequences, &device);
        let loss = model.loss(&batch, 0.0, Probe::default()).loss_sum / predicted;
        let gradients = loss.backward();
        let loss = f64::from(loss.into_scalar::<f32>());
        let difference = (loss - fixture.batch.loss).abs();
        assert!(difference <= LOSS_BUDGET, "{family}: loss {loss}, expected {}", fixture.batch.loss);

        let actual = fixture::under_published_names(model.map(&mut GradientsInPlace(&gradients)));
        let expected = fixture.tensors("gradients.safetensors");
        let (name, relative) = furthest(&actual, &expected);
        println!("{family}: loss differs by {difference:.1e}, gradients by at most {relative:.1e} ({name})");
        assert!(relative <= GRADIENT_BUDGET, "{family}: {name} differs by {relative}");
        let extra: Vec<_> = actual
            .keys()
            .filter(|name| !expected.contains_key(*name) && !name.ends_with("e_score_correction_bias"))
            .collect();
        assert!(extra.is_empty(), "{family}: gradients that torch does not have: {extra:?}");
    }
}

/// The sequence-wise balance loss, and that its gradient reaches the routers.
#[test]
fn balance_loss() {
    const WEIGHT: f64 = 0.01;
    let device = Device::default().autodiff();
    for family in FAMILIES {
        let (fixture, model) = Fixture::open(family, &device);
        let (batch, _) = padded(&fixture.batch.sequences, &device);
        let output = model.loss(&batch, WEIGHT, Probe::default());
        let Some(expected) = fixture.batch.balance_loss else {
            assert!(output.balance_loss.is_none(), "{family} is dense");
            continue;
        };
        let balance = output.balance_loss.expect("a model with experts") / WEIGHT;
        let gradients = balance.backward();
        let balance = f64::from(balance.into_scalar::<f32>());
        let difference = (balance - expected).abs() / expected;
        let actual = fixture::under_published_names(model.map(&mut GradientsInPlace(&gradients)));
        let (name, relative) = furthest(&actual, &fixture.tensors("balance_gradients.safetensors"));
        println!(
            "{family}: balance loss differs by {difference:.1e}, its gradients by at most {relative:.1e} ({name})"
        );
        assert!(difference <= LOSS_BUDGET, "{family}: {balance}, expected {expected}");
        assert!(relative <= GRADIENT_BUDGET, "{family}: {name} differs by {relative}");
    }
}

//! Every public function of `moonlight_model::kernels` with hostile arguments: wrong and empty shapes, other dtypes, strided and
//! broadcast tensors, offsets that decrease or end wrongly, indices out of range, sizes that overflow.
//!
//! A call must either panic with a message of the function itself, or return what the reference returns, forward and backward.
//! The reference is the same call in f64, a dtype without kernels. The test profile has debug assertions, so parallel writes are
//! recorded, and an overlap or a gap panics with another message.

#![cfg(feature = "cpu")]

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Once};

use burn::tensor::{DType, Device, Gradients, Int, Tensor, TensorData};
use moonlight_model::kernels::*;
use proptest::prelude::*;

/// Calls a function.
type Call = fn(&mut Arguments) -> Outcome;

/// The name of each function, and how to call it.
const CALLS: [(&str, Call); 12] = [
    ("project", call_project),
    ("grouped_matmul", call_grouped_matmul),
    ("quantized_matmul", call_quantized_matmul),
    ("dispatch_rows", call_dispatch_rows),
    ("combine_rows", call_combine_rows),
    ("swiglu", call_swiglu),
    ("rms_norm", call_rms_norm),
    ("rotate", call_rotate),
    ("latent_attention", call_latent_attention),
    ("grouped_attention", call_grouped_attention),
    ("cached_attention", call_cached_attention),
    ("cross_entropy", call_cross_entropy),
];

/// The result of a call: the output and the gradients of its sum; `None` if the layout was refused before the call.
type Outcome = Option<(Vec<usize>, Vec<Vec<f64>>)>;

/// The sizes of a call, and which of its arguments are corrupted, and how.
#[derive(Debug, Clone)]
struct TestCase {
    sizes: [usize; 5],
    corruptions: Vec<(usize, usize)>,
    seed: u64,
}

/// The corruption, modulo 8, that gives a tensor another dtype.
const OTHER_DTYPE: usize = 5;

/// Makes the arguments of a call, valid except those to be corrupted.
struct Arguments<'a> {
    case: &'a TestCase,
    device: Device,
    dtype: DType,
    /// Whether to make empty tensors, which not every backend can.
    empty: bool,
    made: usize,
}

impl Arguments<'_> {
    /// How the next argument is corrupted; `None` if it is valid.
    fn corruption(&mut self) -> Option<usize> {
        self.made += 1;
        self.case.corruptions.iter().find(|(argument, _)| *argument == self.made - 1).map(|(_, how)| *how)
    }

    /// The shape, dtype and layout in memory of the next tensor. Strided and broadcast ones are valid.
    fn tensor<const D: usize>(&mut self, shape: [usize; D], dtype: DType) -> Tensor<D> {
        let corruption = self.corruption();
        let mut made = shape;
        let mut dtype = dtype;
        let place = corruption.unwrap_or(0) / 8 % D;
        match corruption.map(|how| how % 8) {
            Some(0) if self.empty => made[place] = 0,
            Some(0 | 1) => made[place] += 1,
            Some(2) => made[place] = (made[place] - 1).max(1),
            Some(3) => made.reverse(),
            Some(4) => made[place] *= 2,
            Some(OTHER_DTYPE) => dtype = DType::BF16,
            _ => {}
        }
        let seed = self.case.seed as usize + self.made;
        let values = |shape: [usize; D]| {
            let values: Vec<f32> = (0..shape.iter().product())
                .map(|index: usize| ((index * 7919 + seed % 10_007 * 131 + 1) as f32 * 0.618_034).fract() - 0.5)
                .collect();
            Tensor::<D>::from_data(TensorData::new(values, shape), &self.device).cast(dtype)
        };
        match corruption.map(|how| how % 8) {
            Some(6) => {
                made.reverse();
                let mut axes: [isize; D] = std::array::from_fn(|axis| axis as isize);
                axes.reverse();
                values(made).permute(axes)
            }
            Some(7) => {
                let whole = made;
                made[place] = 1;
                values(made).expand(whole)
            }
            _ => values(made),
        }
    }

    /// A tensor of the call's dtype.
    fn float<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        self.tensor(shape, self.dtype).require_grad()
    }

    fn number(&mut self, number: usize) -> usize {
        match self.corruption() {
            None => number,
            Some(how) => [0, number + 1, usize::MAX, number.saturating_sub(1), usize::MAX / 2 + 1, 2 * number][how % 6],
        }
    }

    fn list<T: Copy + TryFrom<u64>>(&mut self, mut list: Vec<T>) -> Vec<T> {
        let Some(how) = self.corruption() else { return list };
        let value = |value: u64| T::try_from(value).ok();
        let place = how / 8 % list.len().max(1);
        match how % 8 {
            0 => list.clear(),
            1 => list.extend(value(0)),
            2 => drop(list.pop()),
            3 => list.reverse(),
            4 => list[place] = value(u64::from(u32::MAX)).unwrap_or(list[place]),
            5 => list[place] = value(place as u64 + 1).unwrap_or(list[place]),
            6 => list[place] = value(0).unwrap_or(list[place]),
            _ => drop(list.remove(0)),
        }
        list
    }

    /// A layout of `tokens` tokens with `k` rows each in `groups` groups, made from its parts; `None` if they are refused.
    fn layout(&mut self, tokens: usize, k: usize, groups: usize) -> Option<Arc<GroupLayout>> {
        let choices: Vec<u32> = (0..tokens * k).map(|slot| (slot * 7 % groups) as u32).collect();
        let layout = GroupLayout::from_choices(&choices, k, groups);
        let offsets = self.list(layout.offsets().iter().map(|&offset| offset as u64).collect());
        let offsets = offsets.into_iter().map(|offset| offset as usize).collect();
        let (tokens, rows) = (self.list(layout.token_of_row().to_vec()), self.list(layout.row_of_slot().to_vec()));
        let k = self.number(k);
        GroupLayout::from_parts(offsets, tokens, rows, k).ok().map(Arc::new)
    }

    fn starts(&mut self, batch: usize, sequence: usize) -> Option<Arc<Vec<u32>>> {
        let starts = (0..batch * sequence).map(|token| (token % sequence / 2 * 2) as u32).collect();
        let starts = self.list(starts);
        (!self.case.seed.is_multiple_of(3)).then(|| Arc::new(starts))
    }
}

type GradientOf = Box<dyn Fn(&Gradients) -> Option<TensorData>>;

fn of<const D: usize>(input: &Tensor<D>) -> GradientOf {
    let input = input.clone();
    Box::new(move |gradients| input.grad(gradients).map(Tensor::into_data))
}

/// An output, and the gradients of its sum.
fn outcome<const D: usize>(output: Tensor<D>, inputs: Vec<GradientOf>) -> Outcome {
    let numbers = |data: TensorData| data.iter::<f64>().collect::<Vec<_>>();
    let shape = output.dims().to_vec();
    let mut values = vec![numbers(output.clone().into_data())];
    if !inputs.is_empty() {
        // Not the plain sum, whose gradient is the same for every input of some functions.
        let gradients = (output.clone() * output).sum().backward();
        values.extend(inputs.iter().map(|input| numbers(input(&gradients).expect("every input takes part"))));
    }
    Some((shape, values))
}

fn call_project(arguments: &mut Arguments) -> Outcome {
    let [rows, input, output, ..] = arguments.case.sizes;
    let (rows, weight) = (arguments.float([rows, input]), arguments.float([input, output]));
    let inputs = vec![of(&rows), of(&weight)];
    outcome(project(rows, weight), inputs)
}

fn call_grouped_matmul(arguments: &mut Arguments) -> Outcome {
    let [tokens, input, output, groups, k] = arguments.case.sizes;
    let layout = arguments.layout(tokens, k, groups)?;
    let (rows, weight) = (arguments.float([tokens * k, input]), arguments.float([groups, input, output]));
    let inputs = vec![of(&rows), of(&weight)];
    outcome(grouped_matmul(rows, weight, &layout), inputs)
}

fn call_quantized_matmul(arguments: &mut Arguments) -> Outcome {
    let [tokens, input, output, groups, k] = arguments.case.sizes;
    let layout = arguments.layout(tokens, k, groups)?;
    let bits = if arguments.case.seed.is_multiple_of(2) { QuantBits::Eight } else { QuantBits::Four };
    let whole = QuantizedShape { bits, input, output };
    let spec = QuantizedShape { bits, input: arguments.number(input), output: arguments.number(output) };
    let rows = arguments.float([tokens * k, input]);
    // The values of float tensors are in -1/2..1/2.
    let values = arguments.tensor([groups, whole.value_bytes()], DType::F32);
    let values: Tensor<2, Int> = (values * 255.0 + 127.5).int();
    let values = if values.device().supports_dtype(DType::U8) { values.cast(DType::U8) } else { values };
    let dtype = if arguments.case.seed.is_multiple_of(3) { DType::F32 } else { DType::F16 };
    let scales = arguments.tensor([groups, whole.scales()], dtype);
    let inputs = vec![of(&rows)];
    outcome(quantized_matmul(rows, values, scales, spec, &layout), inputs)
}

fn call_dispatch_rows(arguments: &mut Arguments) -> Outcome {
    let [tokens, width, _, groups, k] = arguments.case.sizes;
    let layout = arguments.layout(tokens, k, groups)?;
    let tokens = arguments.float([tokens, width]);
    let inputs = vec![of(&tokens)];
    outcome(dispatch_rows(tokens, &layout), inputs)
}

fn call_combine_rows(arguments: &mut Arguments) -> Outcome {
    let [tokens, width, _, groups, k] = arguments.case.sizes;
    let layout = arguments.layout(tokens, k, groups)?;
    let rows = arguments.float([tokens * k, width]);
    let weights = arguments.tensor([tokens, k], DType::F32).require_grad();
    let inputs = vec![of(&rows), of(&weights)];
    outcome(combine_rows(rows, weights, &layout), inputs)
}

fn call_swiglu(arguments: &mut Arguments) -> Outcome {
    let [rows, width, ..] = arguments.case.sizes;
    let (gate, up) = (arguments.float([rows, width]), arguments.float([rows, width]));
    let inputs = vec![of(&gate), of(&up)];
    outcome(swiglu(gate, up), inputs)
}

fn call_rms_norm(arguments: &mut Arguments) -> Outcome {
    let [rows, width, ..] = arguments.case.sizes;
    let (x, gain) = (arguments.float([rows, width]), arguments.float([width]));
    let inputs = vec![of(&x), of(&gain)];
    outcome(rms_norm(x, gain, 1e-3), inputs)
}

fn call_rotate(arguments: &mut Arguments) -> Outcome {
    let [batch, sequence, heads, pairs, start] = arguments.case.sizes;
    let x = arguments.float([batch, sequence, heads, start + 2 * pairs]);
    let cos = arguments.tensor([batch * sequence, pairs], DType::F32);
    let sin = arguments.tensor([batch * sequence, pairs], DType::F32);
    let spec = RotationSpec { start: arguments.number(start), interleave: arguments.case.seed.is_multiple_of(2) };
    let inputs = vec![of(&x)];
    outcome(rotate(x, cos, sin, spec), inputs)
}

fn call_latent_attention(arguments: &mut Arguments) -> Outcome {
    let [batch, sequence, heads, nope, rope] = arguments.case.sizes;
    let starts = arguments.starts(batch, sequence);
    let query = arguments.float([batch, sequence, heads, nope + rope]);
    let key_value = arguments.float([batch, sequence, heads, nope + 2]);
    let shared_key = arguments.float([batch, sequence, rope]);
    let inputs = vec![of(&query), of(&key_value), of(&shared_key)];
    outcome(latent_attention(query, key_value, shared_key, AttentionSpec { scale: 0.7, starts }), inputs)
}

fn call_grouped_attention(arguments: &mut Arguments) -> Outcome {
    let [batch, sequence, key_heads, width, group] = arguments.case.sizes;
    let starts = arguments.starts(batch, sequence);
    let query = arguments.float([batch, sequence, key_heads * group, width]);
    let key_value = arguments.float([batch, sequence, key_heads, width + 3]);
    let inputs = vec![of(&query), of(&key_value)];
    outcome(grouped_attention(query, key_value, AttentionSpec { scale: 0.7, starts }), inputs)
}

fn call_cached_attention(arguments: &mut Arguments) -> Outcome {
    let [batch, count, key_heads, width, group] = arguments.case.sizes;
    let cache = arguments.tensor([batch, key_heads, 7 + count, width + 3], arguments.dtype);
    let query = arguments.tensor([batch * count, key_heads * group, width], arguments.dtype);
    // All sequences, at one position or at different ones.
    let mut spans = Vec::new();
    for sequence in 0..batch {
        let start = if arguments.case.seed.is_multiple_of(2) { 5 } else { sequence % 5 + 2 };
        let [sequence, start, count] = [sequence, start, count].map(|number| arguments.number(number));
        spans.push(CacheSpan { sequence, start, count });
    }
    let window = arguments.case.seed.is_multiple_of(3).then_some(1 + count);
    let (keys, values) = (0..arguments.number(width), arguments.number(width)..arguments.number(width + 3));
    outcome(
        cached_attention(
            query,
            cache,
            CachedAttentionSpec { scale: 0.7, keys, values, window, spans: Arc::new(spans) },
        ),
        vec![],
    )
}

fn call_cross_entropy(arguments: &mut Arguments) -> Outcome {
    let [rows, vocab, ..] = arguments.case.sizes;
    let mut targets: Vec<i32> = (0..rows).map(|row| (row * 3 % vocab) as i32).collect();
    if let Some(how) = arguments.corruption() {
        let place = how / 8 % rows;
        targets[place] = [-1, vocab as i32, i32::MAX, i32::MIN, -100, 1 << 30][how % 6];
    }
    if let Some(how) = arguments.corruption() {
        targets.resize([rows + 1, 2 * rows][how % 2], 0);
    }
    let logits = arguments.float([rows, vocab]);
    let targets = Tensor::<1, Int>::from_data(TensorData::new(targets.clone(), [targets.len()]), &arguments.device);
    let inputs = vec![of(&logits)];
    outcome(cross_entropy(logits, targets), inputs)
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Hides the panic messages of threads that set `QUIET`.
fn install_hook() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                print(info);
            }
        }));
    });
}

/// Runs a call, and returns its outcome or the message of its panic.
fn caught(call: Call, case: &TestCase, device: &Device, dtype: DType, empty: bool) -> Result<Outcome, String> {
    install_hook();
    let mut arguments = Arguments { case, device: device.clone(), dtype, empty, made: 0 };
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(|| call(&mut arguments)));
    QUIET.set(false);
    result.map_err(|payload| match payload.downcast::<String>() {
        Ok(message) => *message,
        Err(payload) => payload.downcast_ref::<&str>().unwrap_or(&"a panic without a message").to_string(),
    })
}

/// Whether a result is that of the reference. The tolerance is that of bf16, which an argument may be; rows that are multiplied by
/// quantized weights are rounded to 8 bits, so an element is off by a share of the largest.
fn agrees(name: &str, found: &Outcome, expected: &Outcome) -> bool {
    let (Some((shape, found)), Some((expected_shape, expected))) = (found, expected) else {
        return found.is_none() && expected.is_none();
    };
    let all_close = |(a, b): (&Vec<f64>, &Vec<f64>)| {
        let largest = b.iter().fold(0.0_f64, |most, b| most.max(b.abs()));
        let close = |(a, b): (&f64, &f64)| match name {
            "quantized_matmul" => (a - b).abs() <= 0.05 * (1.0 + largest),
            _ => (a - b).abs() <= 2e-2 * (1.0 + b.abs()),
        };
        a.len() == b.len() && a.iter().zip(b).all(close)
    };
    shape == expected_shape && found.len() == expected.len() && found.iter().zip(expected).all(all_close)
}

/// The CPU, which runs the reference in f64.
fn cpu() -> Device {
    Device::flex().autodiff()
}

fn test_cases(largest: usize) -> impl Strategy<Value = TestCase> {
    let sizes = prop::array::uniform5(1..=largest);
    let corruptions = prop::collection::vec((0_usize..14, 0_usize..64), 0..3);
    (sizes, corruptions, 0_u64..1000).prop_map(|(sizes, corruptions, seed)| TestCase { sizes, corruptions, seed })
}

/// One call of every function.
fn check(case: &TestCase) -> Result<(), TestCaseError> {
    for (name, call) in CALLS {
        let found = caught(call, case, &cpu(), DType::F32, true);
        let expected = caught(call, case, &cpu(), DType::F64, true);
        match (found, expected) {
            (Ok(found), Ok(expected)) => {
                prop_assert!(agrees(name, &found, &expected), "{name}: {found:?} and not {expected:?}");
            }
            (Err(message), Err(_)) => {
                prop_assert!(message.starts_with(&format!("{name}: ")), "{name} panicked with {message:?}");
                prop_assert!(!case.corruptions.is_empty(), "{name} refused valid arguments: {message}");
            }
            (found, expected) => prop_assert!(false, "{name}: {found:?}, where the reference has {expected:?}"),
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hostile_arguments_are_refused_or_give_what_the_reference_gives(case in test_cases(5)) {
        check(&case)?;
    }
}

proptest! {
    /// A layout made from choices passes the checks for layouts made from parts.
    #[test]
    fn hostile_choices_are_refused_or_give_a_valid_layout(
        choices in prop::collection::vec(prop_oneof![9 => 0_u32..6, 1 => any::<u32>()], 0..40),
        k in 0_usize..4,
        groups in 0_usize..7,
    ) {
        install_hook();
        QUIET.set(true);
        let layout = catch_unwind(|| GroupLayout::from_choices(&choices, k, groups));
        QUIET.set(false);
        let valid = k > 0 && groups > 0 && choices.len() % k == 0 && choices.iter().all(|&choice| (choice as usize) < groups);
        prop_assert_eq!(layout.is_ok(), valid);
        if let Ok(layout) = layout {
            let (offsets, tokens, rows) = (layout.offsets(), layout.token_of_row(), layout.row_of_slot());
            let parts = GroupLayout::from_parts(offsets.to_vec(), tokens.to_vec(), rows.to_vec(), k);
            prop_assert_eq!(parts.as_ref(), Ok(&layout));
            for (slot, &choice) in choices.iter().enumerate() {
                prop_assert!(layout.group(choice as usize).contains(&(rows[slot] as usize)));
            }
        }
    }
}

/// Sizes of more than a block of each kernel, each with one corruption.
#[test]
fn large_arguments_are_refused_or_give_what_the_reference_gives() {
    for (argument, how) in (0..8).map(|argument| (argument, 3 * argument + 1)) {
        for sizes in [[3, 70, 3, 5, 2], [40, 33, 9, 12, 3], [150, 20, 70, 3, 1]] {
            for corruptions in [vec![], vec![(argument, how)]] {
                check(&TestCase { sizes, corruptions, seed: argument as u64 + 1 }).unwrap();
            }
        }
    }
}

/// The tests above compare with the reference, which has the same checks, and would pass if both refused nothing.
#[test]
fn arguments_that_break_a_rule_are_refused() {
    let refused = |name: &str, sizes: [usize; 5], corruption: (usize, usize), message: &str| {
        let (_, call) = CALLS.into_iter().find(|(known, _)| *known == name).expect("the function is in the list");
        let case = TestCase { sizes, corruptions: vec![corruption], seed: 1 };
        let found = caught(call, &case, &cpu(), DType::F32, true);
        let found = found.expect_err(&format!("{name} takes {corruption:?}"));
        assert!(found.starts_with(&format!("{name}: ")) && found.contains(message), "{name}: {found}");
    };
    let sizes = [2, 4, 3, 5, 2];
    for (name, tensors) in [
        ("project", vec![0, 1]),
        ("grouped_matmul", vec![4, 5]),
        ("quantized_matmul", vec![6, 7, 8]),
        ("dispatch_rows", vec![4]),
        ("combine_rows", vec![4, 5]),
        ("swiglu", vec![0, 1]),
        ("rms_norm", vec![0, 1]),
        ("rotate", vec![0, 1, 2]),
        ("latent_attention", vec![1, 2, 3]),
        ("grouped_attention", vec![1, 2]),
        ("cached_attention", vec![0, 1]),
        ("cross_entropy", vec![2]),
    ] {
        for tensor in tensors {
            // An empty first dimension.
            refused(name, sizes, (tensor, 0), if tensor == 7 { "shape" } else { "empty" });
        }
    }
    refused("project", sizes, (1, 1), "`weight` has the shape [5, 3], not [4, 3]");
    refused("project", sizes, (1, 5), "`weight` is BF16, not F32");
    refused("grouped_matmul", sizes, (4, 1), "`rows` has the shape [5, 4], not [4, 4]");
    refused("grouped_matmul", sizes, (5, 1), "`weight` has the shape [6, 4, 3], not [5, 4, 3]");
    refused("quantized_matmul", sizes, (4, 2), "more values than memory");
    refused("quantized_matmul", sizes, (4, 0), "empty");
    refused("combine_rows", sizes, (5, 5), "`weights` is BF16, not F32");
    refused("rotate", sizes, (3, 2), "not a number of pairs");
    refused("rotate", sizes, (3, 1), "not a number of pairs");
    refused("rotate", sizes, (1, 5), "`cos` is BF16, not F32");
    // Starts: none, one too many, decreasing, out of range, after their query.
    for how in [0, 1, 3, 4, 5] {
        refused("latent_attention", sizes, (0, how), "document start");
        refused("grouped_attention", sizes, (0, how), "document start");
    }
    // Spans: a sequence twice or outside the cache, start and count that overflow or exceed the capacity, no tokens.
    refused("cached_attention", sizes, (5, 0), "order of their sequences");
    refused("cached_attention", sizes, (5, 1), "not in the cache");
    refused("cached_attention", sizes, (3, 2), "capacity");
    refused("cached_attention", sizes, (7, 3), "fewer tokens");
    refused("cached_attention", sizes, (4, 2), "capacity");
    refused("cached_attention", sizes, (4, 0), "no token");
    refused("cached_attention", sizes, (8, 0), "the key is not a part");
    refused("cached_attention", sizes, (9, 2), "the value is not a part");
    refused("cached_attention", sizes, (10, 2), "the value is not a part");
    for how in 0..6 {
        refused("cross_entropy", sizes, (0, how), "is not in a vocabulary of 4");
    }
    refused("cross_entropy", sizes, (1, 0), "`targets` has the shape [3], not [2]");
}

/// The first CUDA device, or else the first WGPU device, of those in this build.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn cube_device() -> Device {
    #[cfg(feature = "cuda")]
    if let Some(device) = Device::enumerate(burn::tensor::DeviceType::Cuda).into_iter().next() {
        return device;
    }
    #[cfg(feature = "wgpu")]
    return Device::wgpu(burn::tensor::DeviceKind::DefaultDevice);
    #[cfg(not(feature = "wgpu"))]
    panic!("this test needs a CUDA device");
}

/// A GPU against the CPU in f64. A target outside the vocabulary gives NaN.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
#[test]
#[ignore = "needs a CubeCL device"]
fn cube_hostile_arguments_are_refused_or_give_what_the_reference_gives() {
    use proptest::test_runner::TestRunner;

    let device = cube_device().autodiff();
    // Few sizes and few cases: some kernels are compiled for each shape, which takes long on a software device. Failures are
    // not shrunk for the same reason.
    let config =
        ProptestConfig { cases: 12, max_shrink_iters: 0, failure_persistence: None, ..ProptestConfig::default() };
    let result = TestRunner::new(config).run(&test_cases(2), |mut case| {
        // WGSL has no bf16, so dtypes are not corrupted here; the tests on the CPU do that.
        case.corruptions.retain(|(_, how)| how % 8 != OTHER_DTYPE);
        for (name, call) in CALLS {
            let found = caught(call, &case, &device, DType::F32, false);
            match (found, caught(call, &case, &cpu(), DType::F64, false)) {
                (Ok(found), Ok(expected)) => {
                    prop_assert!(agrees(name, &found, &expected), "{name}: {found:?} and not {expected:?}");
                }
                (Ok(Some((_, values))), Err(message)) if message.contains("is not in a vocabulary") => {
                    let has_nan = values.iter().all(|values| values.iter().any(|value| value.is_nan()));
                    prop_assert!(has_nan, "{name}: {values:?} for {message}");
                }
                (Err(message), Err(_)) => {
                    prop_assert!(message.starts_with(&format!("{name}: ")), "{name} panicked with {message:?}");
                }
                (found, expected) => prop_assert!(false, "{name}: {found:?}, where the reference has {expected:?}"),
            }
        }
        Ok(())
    });
    result.unwrap();
}

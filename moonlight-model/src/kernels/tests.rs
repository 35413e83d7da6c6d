//! Compares the fast kernels with the reference, and the hand-written gradients with Burn's autodiff.

use std::sync::Arc;

use burn::tensor::{Bool, DType, Device, Distribution, Int, Tensor, TensorData, Tolerance};

use super::{
    AttentionSpec, GroupLayout, RotationSpec, combine_rows, cross_entropy, dispatch_rows, grouped_attention,
    grouped_matmul, latent_attention, project, rms_norm, rotate, swiglu,
};

/// Makes a test of each function that runs it at every level of vector instructions that this processor has.
macro_rules! at_each_level {
    ($($name:ident),* $(,)?) => {
        mod at_each_level {
            $(
                #[test]
                fn $name() {
                    #[cfg(feature = "cpu")]
                    moonlight_simd::testing::at_each_level(concat!("kernels: ", stringify!($name)), |_| super::$name());
                    #[cfg(not(feature = "cpu"))]
                    super::$name();
                }
            )*
        }
    };
}

at_each_level! {
    a_projection_is_a_matrix_product,
    products_in_bf16_are_those_in_f32_rounded_once,
    grouped_matmul_multiplies_each_row_by_its_experts_matrix,
    rows_travel_to_their_experts_and_back,
    swiglu_is_silu_times_up,
    rms_norm_divides_by_the_root_mean_square,
    rotate_turns_pairs_by_their_angles,
    latent_attention_is_attention_with_a_shared_key_part,
    grouped_attention_repeats_keys_and_values,
    cross_entropy_is_minus_the_log_probability_of_the_target,
}

/// A layout of `tokens` tokens with `k` different experts each. Every token goes to expert 0 and none to the last expert.
fn layout(tokens: usize, k: usize, experts: usize) -> Arc<GroupLayout> {
    let others = experts - 2;
    let choices: Vec<u32> = (0..tokens)
        .flat_map(|token| (0..k).map(move |choice| if choice == 0 { 0 } else { 1 + (token * 7 + choice) % others }))
        .map(|expert| expert as u32)
        .collect();
    Arc::new(GroupLayout::from_choices(&choices, k, experts))
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// Attention without documents, with a sliding window, and with documents of another length in each sequence.
fn specs(batch: usize, sequence: usize) -> [AttentionSpec; 3] {
    let starts: Vec<u32> = (0..batch)
        .flat_map(|row| {
            let length = 3 + 5 * row;
            (0..sequence).map(move |index| (index / length * length) as u32)
        })
        .collect();
    // A sliding window of 5 tokens, cut short where a document starts.
    let windows = starts.iter().enumerate().map(|(at, &start)| start.max((at % sequence).saturating_sub(4) as u32));
    let windows = Some(Arc::new(windows.collect()));
    let spec = |starts| AttentionSpec { scale: 0.3, starts };
    [spec(None), spec(windows), spec(Some(Arc::new(starts)))]
}

/// Returns the gradient of one input.
type GradientOf<'a> = dyn Fn(&burn::tensor::Gradients) -> Option<TensorData> + 'a;

/// An output, and the gradients of the sum of its products with fixed weights.
fn gradients<const D: usize, const N: usize>(
    output: Tensor<D>,
    inputs: [&GradientOf<'_>; N],
) -> (TensorData, [TensorData; N]) {
    let count = output.shape().num_elements();
    let weights: Vec<f32> = (0..count).map(|index| (index as f32 * 0.37).sin() + 0.2).collect();
    let weights = Tensor::<D>::from_data(TensorData::new(weights, output.shape()), &output.device());
    let value = output.clone().into_data();
    let grads = (output * weights).sum().backward();
    (value, inputs.map(|input| input(&grads).expect("every input has a gradient")))
}

/// Compares values and gradients of the operation with those of the same computation by Burn's tensor operations.
macro_rules! agree {
    ($tolerance:expr, [$($input:ident),+], $fused:expr, $composed:expr) => {{
        $(let $input = $input.require_grad();)+
        let of = |output| gradients(output, [$(&|grads| $input.grad(grads).map(Tensor::into_data)),+]);
        let (value, grads) = of($fused);
        let (expected, expected_grads) = of($composed);
        let tolerance = Tolerance::<f32>::rel_abs($tolerance, $tolerance);
        value.assert_approx_eq(&expected, tolerance);
        for (grad, expected) in grads.iter().zip(&expected_grads) {
            grad.assert_approx_eq(expected, tolerance);
        }
    }};
}

/// Attention composed of tensor operations, with all scores in memory.
fn plain_attention(query: Tensor<4>, key: Tensor<4>, value: Tensor<4>, spec: &AttentionSpec) -> Tensor<4> {
    let [batch, sequence, heads, _] = query.dims();
    let scores = query.swap_dims(1, 2).matmul(key.swap_dims(1, 2).transpose()) * spec.scale;
    let masked: Vec<bool> = (0..batch * sequence)
        .flat_map(|token| {
            let start = spec.starts.as_ref().map_or(0, |starts| starts[token] as usize);
            let query = token % sequence;
            (0..sequence).map(move |key| key < start || key > query)
        })
        .collect();
    let masked = TensorData::new(masked, [batch, 1, sequence, sequence]);
    let masked = Tensor::<4, Bool>::from_data(masked, &scores.device());
    let scores = scores.mask_fill(masked.expand([batch, heads, sequence, sequence]), f32::NEG_INFINITY);
    burn::tensor::activation::softmax(scores, 3).matmul(value.swap_dims(1, 2)).swap_dims(1, 2)
}

/// The default device with autodiff.
fn device() -> Device {
    Device::default().autodiff()
}

fn a_projection_is_a_matrix_product() {
    let device = device();
    // One row and a few (GEMV); several tasks of columns; more rows than a task has.
    for (rows, input, output) in [(1, 5, 1030), (3, 66, 7), (8, 33, 2050), (9, 33, 300), (2100, 12, 9)] {
        let x = random([rows, input], &device);
        let weight = random([input, output], &device);
        agree!(1e-4, [x, weight], project(x.clone(), weight.clone()), x.clone().matmul(weight.clone()));
    }
}

fn products_in_bf16_are_those_in_f32_rounded_once() {
    let device = device();
    let rounded = |tensor: Tensor<2>| tensor.cast(DType::BF16).cast(DType::F32);
    for (tokens, k, experts, input, output) in [(1, 2, 5, 40, 1030), (170, 2, 5, 17, 260)] {
        let layout = layout(tokens, k, experts);
        let rows = rounded(random([layout.rows(), input], &device));
        let weight = rounded(random([experts * input, output], &device)).reshape([experts, input, output]);
        let scale = rounded(random([layout.rows(), output], &device));
        let run = |dtype: DType| {
            let rows = rows.clone().detach().cast(dtype).require_grad();
            let weight = weight.clone().detach().cast(dtype).require_grad();
            let product = grouped_matmul(rows.clone(), weight.clone(), &layout);
            let grads = (product.clone() * scale.clone().cast(dtype)).sum().backward();
            let wide = |data: TensorData| data.convert::<f32>();
            (
                wide(product.into_data()),
                wide(rows.grad(&grads).expect("rows have a gradient").into_data()),
                wide(weight.grad(&grads).expect("weights have a gradient").into_data()),
            )
        };
        let (exact, half) = (run(DType::F32), run(DType::BF16));
        // Half a unit in the last place of the 8 bits of a bf16.
        let tolerance = Tolerance::<f32>::rel_abs(1.0 / 256.0, 1e-5);
        half.0.assert_approx_eq(&exact.0, tolerance);
        half.1.assert_approx_eq(&exact.1, tolerance);
        half.2.assert_approx_eq(&exact.2, tolerance);
    }
}

fn grouped_matmul_multiplies_each_row_by_its_experts_matrix() {
    let device = device();
    // More rows than a task has, an expert without rows, odd sizes, and more experts than tokens.
    for (tokens, k, experts, input, output) in
        [(301, 2, 5, 17, 33), (3, 2, 9, 5, 4), (1, 1, 3, 1, 1), (40, 3, 6, 64, 31)]
    {
        let layout = layout(tokens, k, experts);
        let rows = random([layout.rows(), input], &device);
        let weight = random([experts, input, output], &device);
        agree!(1e-4, [rows, weight], grouped_matmul(rows.clone(), weight.clone(), &layout), {
            let parts = (0..experts)
                .filter(|&expert| !layout.group(expert).is_empty())
                .map(|expert| {
                    let rows = rows.clone().slice_dim(0, layout.group(expert));
                    rows.matmul(weight.clone().slice_dim(0, expert..expert + 1).squeeze_dim(0))
                })
                .collect();
            Tensor::cat(parts, 0)
        });
    }
}

fn rows_travel_to_their_experts_and_back() {
    let device = device();
    for (tokens, k, experts, hidden) in [(130, 3, 7, 19), (1, 2, 4, 3), (67, 1, 3, 8)] {
        let layout = layout(tokens, k, experts);
        let index = |values: &[u32]| {
            let values: Vec<i32> = values.iter().map(|&value| value as i32).collect();
            Tensor::<1, Int>::from_data(TensorData::new(values, [layout.rows()]), &device)
        };
        let x = random([tokens, hidden], &device);
        agree!(1e-5, [x], dispatch_rows(x.clone(), &layout), x.clone().select(0, index(layout.token_of_row())));

        let rows = random([layout.rows(), hidden], &device);
        let weights = random([tokens, k], &device);
        agree!(1e-5, [rows, weights], combine_rows(rows.clone(), weights.clone(), &layout), {
            let slots = rows.clone().select(0, index(layout.row_of_slot())).reshape([tokens, k, hidden]);
            (slots * weights.clone().reshape([tokens, k, 1])).sum_dim(1).reshape([tokens, hidden])
        });
    }
}

fn swiglu_is_silu_times_up() {
    let device = device();
    for shape in [[130, 257], [1, 1], [5, 3]] {
        let gate = random(shape, &device) * 4.0;
        let up = random(shape, &device);
        agree!(1e-5, [gate, up], swiglu(gate.clone(), up.clone()), {
            gate.clone() * burn::tensor::activation::sigmoid(gate.clone()) * up.clone()
        });
    }
}

fn rms_norm_divides_by_the_root_mean_square() {
    let device = device();
    for (rows, width) in [(131, 67), (1, 1), (64, 16)] {
        let x = random([rows, width], &device) * 3.0;
        let gain = random([width], &device);
        agree!(1e-4, [x, gain], rms_norm(x.clone(), gain.clone(), 1e-3), {
            let mean_square = (x.clone() * x.clone()).mean_dim(1);
            x.clone() / (mean_square + 1e-3).sqrt() * gain.clone().unsqueeze()
        });
    }
}

fn rotate_turns_pairs_by_their_angles() {
    let device = device();
    let (batch, sequence, heads, width) = (2, 5, 3, 14);
    for (start, interleave) in [(0, true), (0, false), (6, true), (4, false)] {
        let pairs = (width - start) / 2;
        let x = random([batch, sequence, heads, width], &device);
        let angles = random([batch * sequence, pairs], &device);
        let (cos, sin) = (angles.clone().cos(), angles.sin());
        let spec = RotationSpec { start, interleave };
        agree!(1e-5, [x], rotate(x.clone(), cos.clone(), sin.clone(), spec.clone()), {
            let turn = |t: &Tensor<2>| t.clone().reshape([batch, sequence, 1, pairs]);
            let column = |index: usize| x.clone().slice_dim(3, index..index + 1);
            let pair =
                |p: usize| if interleave { (start + 2 * p, start + 2 * p + 1) } else { (start + p, start + pairs + p) };
            let mut columns: Vec<Tensor<4>> = (0..width).map(column).collect();
            for p in 0..pairs {
                let (i, j) = pair(p);
                let (cos, sin) = (turn(&cos).slice_dim(3, p..p + 1), turn(&sin).slice_dim(3, p..p + 1));
                columns[i] = column(i) * cos.clone() - column(j) * sin.clone();
                columns[j] = column(j) * cos + column(i) * sin;
            }
            Tensor::cat(columns, 3)
        });
    }
}

fn latent_attention_is_attention_with_a_shared_key_part() {
    let device = device();
    // Sequences of one token, shorter than a block, exactly a block, and longer.
    for (batch, sequence, heads, nope, rope, value) in
        [(2, 1, 3, 5, 2, 4), (2, 21, 3, 6, 4, 5), (1, 64, 1, 8, 2, 8), (2, 150, 2, 7, 4, 9)]
    {
        for spec in specs(batch, sequence) {
            let query = random([batch, sequence, heads, nope + rope], &device);
            let key_value = random([batch, sequence, heads, nope + value], &device);
            let shared = random([batch, sequence, rope], &device);
            let fused = |query: &Tensor<4>, key_value: &Tensor<4>, shared: &Tensor<3>| {
                latent_attention(query.clone(), key_value.clone(), shared.clone(), spec.clone())
            };
            agree!(1e-4, [query, key_value, shared], fused(&query, &key_value, &shared), {
                let own = key_value.clone().slice_dim(3, 0..nope);
                let all = shared.clone().reshape([batch, sequence, 1, rope]).expand([batch, sequence, heads, rope]);
                let values = key_value.clone().slice_dim(3, nope..nope + value);
                plain_attention(query.clone(), Tensor::cat(vec![own, all], 3), values, &spec)
            });
        }
    }
}

fn grouped_attention_repeats_keys_and_values() {
    let device = device();
    for (batch, sequence, heads, key_heads, width, value) in
        [(2, 1, 4, 2, 3, 3), (2, 33, 6, 2, 5, 5), (1, 130, 3, 1, 8, 4), (1, 9, 2, 2, 4, 4)]
    {
        for spec in specs(batch, sequence) {
            let query = random([batch, sequence, heads, width], &device);
            let key_value = random([batch, sequence, key_heads, width + value], &device);
            agree!(1e-4, [query, key_value], grouped_attention(query.clone(), key_value.clone(), spec.clone()), {
                let group = heads / key_heads;
                let repeated = key_value
                    .clone()
                    .reshape([batch, sequence, key_heads, 1, width + value])
                    .expand([batch, sequence, key_heads, group, width + value])
                    .reshape([batch, sequence, heads, width + value]);
                let keys = repeated.clone().slice_dim(3, 0..width);
                plain_attention(query.clone(), keys, repeated.slice_dim(3, width..width + value), &spec)
            });
        }
    }
}

fn cross_entropy_is_minus_the_log_probability_of_the_target() {
    let device = device();
    for (rows, vocab) in [(37, 101), (1, 2), (5, 16)] {
        let logits = random([rows, vocab], &device) * 5.0;
        let targets: Vec<i32> = (0..rows).map(|row| (row * 13 % vocab) as i32).collect();
        let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [rows]), &device);
        agree!(1e-4, [logits], cross_entropy(logits.clone(), targets.clone()), {
            let log_probabilities = burn::tensor::activation::log_softmax(logits.clone(), 1);
            -log_probabilities.gather(1, targets.clone().reshape([rows, 1])).reshape([rows])
        });
    }
}

/// Compares the CPU kernels with the reference directly: the tests above run the kernels of the default device.
#[cfg(feature = "cpu")]
mod flex_against_reference {
    use std::sync::Arc;

    use burn::backend::Flex;
    use burn::backend::flex::FlexTensor;
    use burn::backend::ops::{FloatTensorOps, IntTensorOps};
    use burn::tensor::{DType, FloatDType, Shape, TensorData, Tolerance};

    use super::super::reference::{self, AttentionSaved};
    use super::{AttentionSpec, RotationSpec, layout, specs};
    use crate::kernels::*;

    at_each_level! {
        attention_to_a_cache,
        quantized_products,
        grouped_products,
        rows,
        elementwise,
        cross_entropy,
        attention,
        bf16_is_widened_and_rounded_once,
        attention_in_bf16_rounds_the_operands_of_its_products,
    }

    /// Values in -1..1 that depend on index and seed.
    fn numbers<const D: usize>(shape: [usize; D], seed: usize) -> FlexTensor {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count)
            .map(|index| ((index * 7919 + seed * 104_729 + 1) as f32 * 0.618_034).fract() * 2.0 - 1.0)
            .collect();
        Flex::float_from_data(TensorData::new(values, shape), &Default::default())
    }

    fn close(fast: FlexTensor, reference: FlexTensor) {
        assert_eq!(fast.dtype(), DType::F32);
        let tolerance = Tolerance::<f32>::rel_abs(1e-4, 1e-5);
        fast.into_data().assert_approx_eq(&reference.into_data(), tolerance);
    }

    fn close_pair(fast: (FlexTensor, FlexTensor), reference: (FlexTensor, FlexTensor)) {
        close(fast.0, reference.0);
        close(fast.1, reference.1);
    }

    fn attention_to_a_cache() {
        let span = |sequence, start, count| CacheSpan { sequence, start, count };
        let cases = [
            // One sequence: few and many queries, and more keys than a block.
            (1, vec![span(0, 0, 1)]),
            (1, vec![span(0, 600, 1)]),
            (1, vec![span(0, 300, 40)]),
            // All sequences at one position, which the reference computes at once; then at different ones, one without new tokens.
            (3, vec![span(0, 9, 2), span(1, 9, 2), span(2, 9, 2)]),
            (4, vec![span(0, 9, 1), span(1, 0, 5), span(3, 290, 30)]),
        ];
        for (batch, spans) in cases {
            let tokens = spans.iter().map(|span| span.count).sum();
            // Latent attention, with one key head whose value is a part of its key; and grouped-query attention.
            for (heads, key_heads, keys, values) in [(4, 1, 0..19, 0..15), (6, 2, 0..7, 7..14)] {
                let query = numbers([tokens, heads, keys.len()], 1);
                let cache = numbers([batch, key_heads, 640, keys.end.max(values.end)], 2);
                let spec = |window| CachedAttentionSpec {
                    scale: 0.7,
                    keys: keys.clone(),
                    values: values.clone(),
                    window,
                    spans: Arc::new(spans.clone()),
                };
                // Windows of one key, of less than a block of keys, of more than one, and longer than the sequence.
                for window in [Some(1), Some(3), Some(20), Some(290), Some(1000)] {
                    close(
                        Flex::cached_attention_forward(query.clone(), cache.clone(), &spec(window)),
                        reference::cached_attention_forward::<Flex>(query.clone(), cache.clone(), &spec(window)),
                    );
                }
                let spec = spec(None);
                close(
                    Flex::cached_attention_forward(query.clone(), cache.clone(), &spec),
                    reference::cached_attention_forward::<Flex>(query.clone(), cache.clone(), &spec),
                );
                // Probabilities are rounded to bf16, and the output.
                let rounded = Flex::cached_attention_forward(half(&query), half(&cache), &spec);
                let exact = reference::cached_attention_forward::<Flex>(wide(half(&query)), wide(half(&cache)), &spec);
                let off = relative_distance(rounded, exact);
                assert!(off < ATTENTION_BUDGET, "{off}");
            }
        }
    }

    fn quantized_products() {
        let layout = layout(300, 2, 6);
        let (rows, grad) = (numbers([600, 19], 1), numbers([600, 23], 3));
        for (bits, dtype) in [(QuantBits::Eight, FloatDType::F16), (QuantBits::Four, FloatDType::BF16)] {
            let spec = QuantizedShape { bits, input: 19, output: 23 };
            let scales = Flex::float_cast(numbers([6, spec.scales()], 2), dtype);
            let bytes = spec.value_bytes();
            let values: Vec<u8> = (0..6 * bytes).map(|at| (at * 37 + at / 5) as u8).collect();
            let values = FlexTensor::from_data(TensorData::new(values, [6, bytes]));
            // Rows are rounded to 127 steps in the kernel, and the gradient to bf16 where the processor has it.
            let near = |a: FlexTensor, b: FlexTensor| {
                let (a, b) = (a.into_data(), b.into_data());
                let size = b.iter::<f32>().map(|b| b.powi(2)).sum::<f32>().sqrt();
                let off = a.iter::<f32>().zip(b.iter::<f32>()).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
                assert!(off < 6e-3 * size, "{off} of {size}");
            };
            near(
                Flex::quantized_matmul_forward(rows.clone(), values.clone(), scales.clone(), spec, &layout),
                reference::quantized_matmul_forward::<Flex>(
                    rows.clone(),
                    values.clone(),
                    scales.clone(),
                    spec,
                    &layout,
                ),
            );
            near(
                Flex::quantized_matmul_rows_grad(grad.clone(), values.clone(), scales.clone(), spec, &layout),
                reference::quantized_matmul_rows_grad::<Flex>(grad.clone(), values, scales.clone(), spec, &layout),
            );
        }
    }

    fn grouped_products() {
        let layout = layout(300, 2, 6);
        let (rows, weight, grad) = (numbers([600, 19], 1), numbers([6, 19, 23], 2), numbers([600, 23], 3));
        close(
            Flex::grouped_matmul_forward(rows.clone(), weight.clone(), &layout),
            reference::grouped_matmul_forward::<Flex>(rows.clone(), weight.clone(), &layout),
        );
        close(
            Flex::grouped_matmul_rows_grad(grad.clone(), weight.clone(), &layout),
            reference::grouped_matmul_rows_grad::<Flex>(grad.clone(), weight, &layout),
        );
        close(
            Flex::grouped_matmul_weight_grad(rows.clone(), grad.clone(), &layout),
            reference::grouped_matmul_weight_grad::<Flex>(rows, grad, &layout),
        );
    }

    fn rows() {
        let layout = layout(70, 3, 6);
        let (tokens, rows) = (numbers([70, 9], 1), numbers([210, 9], 2));
        let (weights, grad) = (numbers([70, 3], 3), numbers([70, 9], 4));
        close(
            Flex::dispatch_rows_forward(tokens.clone(), &layout),
            reference::dispatch_rows_forward::<Flex>(tokens, &layout),
        );
        close(
            Flex::dispatch_rows_grad(rows.clone(), &layout),
            reference::dispatch_rows_grad::<Flex>(rows.clone(), &layout),
        );
        close(
            Flex::combine_rows_forward(rows.clone(), weights.clone(), &layout),
            reference::combine_rows_forward::<Flex>(rows.clone(), weights.clone(), &layout),
        );
        close_pair(
            Flex::combine_rows_grad(rows.clone(), weights.clone(), grad.clone(), &layout),
            reference::combine_rows_grad::<Flex>(rows, weights, grad, &layout),
        );
    }

    fn elementwise() {
        let (gate, up, grad) = (numbers([70, 33], 1), numbers([70, 33], 2), numbers([70, 33], 3));
        close(
            Flex::swiglu_forward(gate.clone(), up.clone()),
            reference::swiglu_forward::<Flex>(gate.clone(), up.clone()),
        );
        close_pair(
            Flex::swiglu_grad(gate.clone(), up.clone(), grad.clone()),
            reference::swiglu_grad::<Flex>(gate.clone(), up, grad.clone()),
        );
        let gain = numbers([33], 4);
        close(
            Flex::rms_norm_forward(gate.clone(), gain.clone(), 1e-5),
            reference::rms_norm_forward::<Flex>(gate.clone(), gain.clone(), 1e-5),
        );
        close_pair(
            Flex::rms_norm_grad(gate.clone(), gain.clone(), grad.clone(), 1e-5),
            reference::rms_norm_grad::<Flex>(gate, gain, grad, 1e-5),
        );
        for spec in [RotationSpec { start: 3, interleave: true }, RotationSpec { start: 1, interleave: false }] {
            let pairs = (9 - spec.start) / 2;
            let (x, cos, sin) = (numbers([2, 5, 3, 9], 5), numbers([10, pairs], 6), numbers([10, pairs], 7));
            assert_eq!(spec.start + 2 * pairs, 9, "the rotated part must be pairs");
            close(
                Flex::rotate_forward(x.clone(), cos.clone(), sin.clone(), &spec),
                reference::rotate_forward::<Flex>(x, cos, sin, &spec),
            );
        }
    }

    fn cross_entropy() {
        let (logits, grad) = (numbers([21, 50], 1), numbers([21], 2));
        let targets: Vec<i32> = (0..21).map(|row| row * 2).collect();
        let targets = Flex::int_from_data(TensorData::new(targets, [21]), &Default::default());
        close(
            Flex::cross_entropy_forward(logits.clone(), targets.clone()),
            reference::cross_entropy_forward::<Flex>(logits.clone(), targets.clone()),
        );
        close(
            Flex::cross_entropy_grad(logits.clone(), targets.clone(), grad.clone()),
            reference::cross_entropy_grad::<Flex>(logits, targets, grad),
        );
    }

    fn attention_agrees(
        query: FlexTensor,
        key_value: FlexTensor,
        shared_key: Option<FlexTensor>,
        spec: &AttentionSpec,
    ) {
        let fast = Flex::attention_forward(query.clone(), key_value.clone(), shared_key.clone(), spec);
        let slow = reference::attention_forward::<Flex>(query.clone(), key_value.clone(), shared_key.clone(), spec);
        close_pair(fast.clone(), slow);
        let (output, log_sum) = fast;
        let shape: [usize; 4] = output.layout().shape().dims();
        let saved = AttentionSaved::<Flex> { query, key_value, shared_key, output, log_sum };
        let grad = numbers(shape, 9);
        let (query, key_value, shared) = Flex::attention_grad(saved.clone(), grad.clone(), spec);
        let (slow_query, slow_key_value, slow_shared) = reference::attention_grad::<Flex>(saved, grad, spec);
        close_pair((query, key_value), (slow_query, slow_key_value));
        match (shared, slow_shared) {
            (Some(shared), Some(slow)) => close(shared, slow),
            (None, None) => {}
            _ => panic!("only one of the two has a gradient for the shared key"),
        }
    }

    fn attention() {
        for (batch, sequence) in [(2, 1), (2, 40), (1, 131)] {
            for spec in specs(batch, sequence) {
                let query = numbers([batch, sequence, 4, 10], 1);
                let shared = numbers([batch, sequence, 4], 2);
                attention_agrees(query.clone(), numbers([batch, sequence, 4, 6 + 7], 3), Some(shared), &spec);
                attention_agrees(query, numbers([batch, sequence, 2, 10 + 10], 4), None, &spec);
            }
        }
    }

    fn half(tensor: &FlexTensor) -> FlexTensor {
        Flex::float_cast(tensor.clone(), FloatDType::BF16)
    }

    fn wide(tensor: FlexTensor) -> FlexTensor {
        Flex::float_cast(tensor, FloatDType::F32)
    }

    /// Asserts that results in bf16 are those in f32 for the same inputs, rounded once.
    fn rounded_once<const N: usize>(half: [FlexTensor; N], full: [FlexTensor; N]) {
        for (half, full) in half.into_iter().zip(full) {
            assert_eq!(half.dtype(), DType::BF16);
            let tolerance = Tolerance::<f32>::rel_abs(1.0 / 256.0, 1e-6);
            wide(half).into_data().assert_approx_eq(&full.into_data(), tolerance);
        }
    }

    fn bf16_is_widened_and_rounded_once() {
        let layout = layout(70, 3, 6);
        let numbers = |shape: &[usize], seed| {
            half(&Flex::float_reshape(numbers([shape.iter().product()], seed), Shape::from(shape)))
        };
        let (tokens, rows) = (numbers(&[70, 33], 1), numbers(&[210, 33], 2));
        let (gate, up, grad) = (numbers(&[70, 33], 3), numbers(&[70, 33], 4), numbers(&[70, 33], 5));
        let weights = wide(numbers(&[70, 3], 6));
        let full = |tensor: &FlexTensor| wide(tensor.clone());
        rounded_once(
            [
                Flex::dispatch_rows_forward(tokens.clone(), &layout),
                Flex::dispatch_rows_grad(rows.clone(), &layout),
                Flex::combine_rows_forward(rows.clone(), weights.clone(), &layout),
                Flex::combine_rows_grad(rows.clone(), weights.clone(), grad.clone(), &layout).0,
                Flex::swiglu_forward(gate.clone(), up.clone()),
                Flex::swiglu_grad(gate.clone(), up.clone(), grad.clone()).0,
                Flex::swiglu_grad(gate.clone(), up.clone(), grad.clone()).1,
            ],
            [
                Flex::dispatch_rows_forward(full(&tokens), &layout),
                Flex::dispatch_rows_grad(full(&rows), &layout),
                Flex::combine_rows_forward(full(&rows), weights.clone(), &layout),
                Flex::combine_rows_grad(full(&rows), weights.clone(), full(&grad), &layout).0,
                Flex::swiglu_forward(full(&gate), full(&up)),
                Flex::swiglu_grad(full(&gate), full(&up), full(&grad)).0,
                Flex::swiglu_grad(full(&gate), full(&up), full(&grad)).1,
            ],
        );
        close(
            Flex::combine_rows_grad(rows.clone(), weights.clone(), grad.clone(), &layout).1,
            Flex::combine_rows_grad(full(&rows), weights, full(&grad), &layout).1,
        );

        let gain = numbers(&[33], 7);
        let (grad_x, grad_gain) = Flex::rms_norm_grad(gate.clone(), gain.clone(), grad.clone(), 1e-5);
        let (full_x, full_gain) = Flex::rms_norm_grad(full(&gate), full(&gain), full(&grad), 1e-5);
        rounded_once([grad_x, grad_gain], [full_x, full_gain]);
        // As in transformers, there is a second rounding, before the gain.
        let normalized = half(&Flex::rms_norm_forward(
            full(&gate),
            full(&Flex::float_ones(Shape::new([33]), &Default::default(), FloatDType::F32)),
            1e-5,
        ));
        let spread = Flex::float_expand(Flex::float_reshape(full(&gain), Shape::new([1, 33])), Shape::new([70, 33]));
        rounded_once([Flex::rms_norm_forward(gate.clone(), gain, 1e-5)], [Flex::float_mul(wide(normalized), spread)]);

        let spec = RotationSpec { start: 3, interleave: true };
        let (x, cos, sin) = (numbers(&[2, 5, 3, 9], 8), wide(numbers(&[10, 3], 9)), wide(numbers(&[10, 3], 10)));
        rounded_once(
            [Flex::rotate_forward(x.clone(), cos.clone(), sin.clone(), &spec)],
            [Flex::rotate_forward(full(&x), cos, sin, &spec)],
        );

        let (logits, grad) = (numbers(&[21, 50], 11), wide(numbers(&[21], 12)));
        let targets: Vec<i32> = (0..21).map(|row| row * 2).collect();
        let targets = Flex::int_from_data(TensorData::new(targets, [21]), &Default::default());
        close(
            Flex::cross_entropy_forward(logits.clone(), targets.clone()),
            Flex::cross_entropy_forward(full(&logits), targets.clone()),
        );
        rounded_once(
            [Flex::cross_entropy_grad(logits.clone(), targets.clone(), grad.clone())],
            [Flex::cross_entropy_grad(full(&logits), targets, grad)],
        );
    }

    /// The distance of `half` from `full`, relative to the norm of `full`.
    fn relative_distance(half: FlexTensor, full: FlexTensor) -> f64 {
        assert_eq!(half.dtype(), DType::BF16);
        let (half, full): (Vec<f32>, Vec<f32>) =
            (wide(half).into_data().iter::<f32>().collect(), full.into_data().iter::<f32>().collect());
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let difference = norm(&mut half.iter().zip(&full).map(|(half, full)| half - full));
        difference / norm(&mut full.iter().copied())
    }

    /// The budget of attention in bf16: results, and the probabilities and gradients of scores that are multiplied, are rounded, each by
    /// 2^-8 at most and by a third of that in the mean. Sums over many keys lose as much, relative to the norm of the result, unless
    /// their terms cancel.
    const ATTENTION_BUDGET: f64 = 1.0 / 256.0;

    fn attention_in_bf16_rounds_the_operands_of_its_products() {
        for spec in specs(2, 70) {
            let (query, shared) = (half(&numbers([2, 70, 4, 10], 1)), half(&numbers([2, 70, 4], 2)));
            let (key_value, grad) = (half(&numbers([2, 70, 4, 6 + 7], 3)), half(&numbers([2, 70, 4, 7], 4)));
            let full = |tensor: &FlexTensor| wide(tensor.clone());
            let (output, log_sum) =
                Flex::attention_forward(query.clone(), key_value.clone(), Some(shared.clone()), &spec);
            let (full_output, full_log_sum) =
                Flex::attention_forward(full(&query), full(&key_value), Some(full(&shared)), &spec);
            let distance = relative_distance(output.clone(), full_output);
            assert!(distance < ATTENTION_BUDGET, "the output differs by {distance}");
            // Scores and softmax are in f32.
            close(log_sum.clone(), full_log_sum);
            let saved = |of: &dyn Fn(&FlexTensor) -> FlexTensor| AttentionSaved::<Flex> {
                query: of(&query),
                key_value: of(&key_value),
                shared_key: Some(of(&shared)),
                output: of(&output),
                log_sum: log_sum.clone(),
            };
            let (a, b, c) = Flex::attention_grad(saved(&FlexTensor::clone), grad.clone(), &spec);
            let (d, e, f) = Flex::attention_grad(saved(&full), full(&grad), &spec);
            let gradient = "there is a gradient for the shared key";
            let pairs = [(a, d), (b, e), (c.expect(gradient), f.expect(gradient))];
            for ((half, full), name) in pairs.into_iter().zip(["query", "key and value", "shared key"]) {
                let distance = relative_distance(half, full);
                assert!(distance < ATTENTION_BUDGET, "the gradient of the {name} differs by {distance}");
            }
        }
    }

    /// The names and values of results. Their sums are not exact in f32, so that another order of sums changes bits.
    type Outputs = Vec<(&'static str, Vec<f32>)>;

    fn output(outputs: &mut Outputs, name: &'static str, tensors: impl IntoIterator<Item = FlexTensor>) {
        for tensor in tensors {
            let values: Vec<f32> = tensor.into_data().iter::<f32>().collect();
            assert!(values.iter().any(|value| *value != 0.0), "{name} is all zeros");
            outputs.push((name, values));
        }
    }

    /// Results of the kernels that the compiler vectorizes.
    fn elementwise_outputs(half_precision: bool) -> Outputs {
        let numbers2 =
            |shape, seed| if half_precision { half(&numbers::<2>(shape, seed)) } else { numbers(shape, seed) };
        let mut outputs = Outputs::new();
        let layout = layout(70, 3, 6);
        let (rows, weights, grad) = (numbers2([210, 39], 2), numbers([70, 3], 3), numbers2([70, 39], 4));
        output(&mut outputs, "dispatch", [Flex::dispatch_rows_grad(rows.clone(), &layout)]);
        output(&mut outputs, "combine", [Flex::combine_rows_forward(rows.clone(), weights.clone(), &layout)]);
        let (grad_rows, grad_weights) = Flex::combine_rows_grad(rows, weights, grad, &layout);
        output(&mut outputs, "combine, gradients", [grad_rows, grad_weights]);
        let (gate, up, grad) = (numbers2([70, 39], 1), numbers2([70, 39], 2), numbers2([70, 39], 3));
        output(&mut outputs, "swiglu", [Flex::swiglu_forward(gate.clone(), up.clone())]);
        let (grad_gate, grad_up) = Flex::swiglu_grad(gate.clone(), up, grad.clone());
        output(&mut outputs, "swiglu, gradients", [grad_gate, grad_up]);
        let gain = if half_precision { half(&numbers([39], 4)) } else { numbers([39], 4) };
        output(&mut outputs, "norm", [Flex::rms_norm_forward(gate.clone(), gain.clone(), 1e-5)]);
        let (grad_x, grad_gain) = Flex::rms_norm_grad(gate, gain, grad, 1e-5);
        output(&mut outputs, "norm, gradients", [grad_x, grad_gain]);
        let targets: Vec<i32> = (0..21).map(|row| row * 2).collect();
        let targets = Flex::int_from_data(TensorData::new(targets, [21]), &Default::default());
        let logits = numbers2([21, 50], 5);
        output(&mut outputs, "loss", [Flex::cross_entropy_forward(logits.clone(), targets.clone())]);
        output(&mut outputs, "loss, gradients", [Flex::cross_entropy_grad(logits, targets, numbers([21], 6))]);
        // Few rows, which run as GEMV and not as a matrix product. In bf16 some levels have instructions for them.
        if !half_precision {
            for width in [70, 2100] {
                output(
                    &mut outputs,
                    "few rows",
                    [Flex::project_forward(numbers([5, 300], 7), numbers([300, width], 8))],
                );
            }
        }
        outputs
    }

    /// Results of the kernels with matrix products.
    fn product_outputs() -> Outputs {
        let mut outputs = Outputs::new();
        let (rows, weight) = (numbers([60, 150], 1), numbers([150, 70], 2));
        output(&mut outputs, "product", [Flex::project_forward(rows.clone(), weight.clone())]);
        output(&mut outputs, "product, rows", [Flex::project_rows_grad(numbers([60, 70], 3), weight)]);
        output(&mut outputs, "product, weight", [Flex::project_weight_grad(rows, numbers([60, 70], 4))]);
        let spec = &specs(2, 40)[1];
        let (query, key_value) = (numbers([2, 40, 4, 10], 1), numbers([2, 40, 2, 10 + 10], 4));
        let (attended, log_sum) = Flex::attention_forward(query, key_value, None, spec);
        output(&mut outputs, "attention", [attended, log_sum]);
        outputs
    }

    #[test]
    fn levels_give_the_same_bits_without_products_and_the_same_values_with_them() {
        use moonlight_simd::{Level, testing};
        let run = || [elementwise_outputs(false), elementwise_outputs(true), product_outputs()];
        let plain = testing::at_level(Level::Scalar, run);
        testing::at_each_level("kernels: equal bits at each level", |level| {
            let [single, half, products] = run();
            for (found, plain) in single.iter().chain(&half).zip(plain[0].iter().chain(&plain[1])) {
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&found.1), bits(&plain.1), "{} at {level}", found.0);
            }
            for ((name, found), (_, plain)) in products.iter().zip(&plain[2]) {
                for (found, plain) in found.iter().zip(plain) {
                    assert!((found - plain).abs() <= 1e-5 * (1.0 + plain.abs()), "{name} at {level}: {found}, {plain}");
                }
            }
        });
    }
}

//! Causal attention by blocks of queries and keys, without a `[sequence, sequence]` tensor in the forward or backward pass.
//!
//! The forward pass is FlashAttention (arXiv 2205.14135): a cube takes [`BLOCK`] queries of one head, visits the keys that they
//! see [`BLOCK`] at a time, and keeps a running maximum and sum for the softmax of each query. The backward pass computes the
//! scores again from the logarithms of the sums, once for the gradient of queries and once for that of keys and values, so
//! that no two cubes write the same value (FlashAttention-2, arXiv 2307.08691). Blocks of keys after a block of queries, or
//! before its first document, are not visited.
//!
//! Loops over the values of a block are not marked `#[unroll]`: a software Vulkan driver takes long to compile the unrolled
//! code.
//!
//! All work is products of 32 x 32 blocks in shared memory. Three blocks take 12.7 KB of the 16 KB that WebGPU guarantees. Sums
//! are in f32 for every dtype.

use burn::backend::Cube;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::launch;
use super::tensor::{assert_dtype, assert_shape, buffers, elem_type, empty, to_f32, to_float_tensor, upload};
use crate::kernels::reference::{self, AttentionSaved};
use crate::kernels::{AttentionKernel, AttentionSpec};

impl AttentionKernel for Cube {
    fn attention_forward(
        query: FloatTensor<Self>,
        key_value: FloatTensor<Self>,
        shared_key: Option<FloatTensor<Self>>,
        spec: &AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let shared = shared_key.as_ref().unwrap_or(&query);
        let Some([query, key_value, shared]) = buffers([&query, &key_value, shared]) else {
            return reference::attention_forward::<Self>(query, key_value, shared_key, spec);
        };
        if key_value.dtype != query.dtype || shared.dtype != query.dtype {
            return reference::attention_forward::<Self>(
                to_float_tensor(query),
                to_float_tensor(key_value),
                shared_key.map(|_| to_float_tensor(shared)),
                spec,
            );
        }
        let (output, log_sum) = forward(query, key_value, shared_key.map(|_| shared), spec);
        (to_float_tensor(output), to_float_tensor(log_sum))
    }

    fn attention_grad(
        saved: AttentionSaved<Self>,
        output_grad: FloatTensor<Self>,
        spec: &AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, Option<FloatTensor<Self>>) {
        let AttentionSaved { query, key_value, shared_key, output, log_sum } = &saved;
        let delta = Self::float_sum_dim(Self::float_mul(to_f32(output_grad.clone()), to_f32(output.clone())), 3);
        let shared = shared_key.as_ref().unwrap_or(query);
        let Some([query, key_value, shared_key, log_sum, output_grad, delta]) =
            buffers([query, key_value, shared, log_sum, &output_grad, &delta])
        else {
            return reference::attention_grad::<Self>(saved, output_grad, spec);
        };
        let dtype = query.dtype;
        if [&key_value, &shared_key, &output_grad].iter().any(|tensor| tensor.dtype != dtype)
            || log_sum.dtype != DType::F32
        {
            return reference::attention_grad::<Self>(saved, to_float_tensor(output_grad), spec);
        }
        let shared_key = saved.shared_key.as_ref().map(|_| shared_key);
        let saved = BackwardInputs { query, key_value, shared_key, log_sum, grad: output_grad, delta };
        let (query, key_value, shared) = grad(saved, spec);
        // Each head wrote its own part of the gradient of the shared key, which is their sum.
        let shared = shared.map(|parts| {
            let [batch, _, sequence, width] = parts.meta.shape().dims();
            let sum = Self::float_sum_dim(to_float_tensor(parts), 1);
            Self::float_cast(Self::float_reshape(sum, Shape::new([batch, sequence, width])), FloatDType::from(dtype))
        });
        (to_float_tensor(query), to_float_tensor(key_value), shared)
    }
}

/// Queries, keys and columns in a block.
const BLOCK: usize = 32;
/// Units of a cube across the columns of a block, and down its rows.
const ACROSS: usize = 8;
const DOWN: usize = 16;
const UNITS: usize = ACROSS * DOWN;
/// The patch of a block that a unit computes: consecutive rows, and columns [`ACROSS`] apart, so that neighboring units access
/// neighboring columns.
const PATCH_ROWS: usize = BLOCK / DOWN;
const PATCH_COLUMNS: usize = BLOCK / ACROSS;
const PATCH: usize = PATCH_ROWS * PATCH_COLUMNS;
/// The distance between rows of a block in shared memory: one more than the columns, so that rows begin in different banks and a
/// column can be read without bank conflicts.
const PITCH: usize = BLOCK + 1;
const SHARED: usize = BLOCK * PITCH;
/// The score of a key that a query does not see. It is finite, because a query may see no key of a block: from minus infinity the
/// running maximum would be minus infinity, and `exp(score - maximum)` NaN.
const MASKED: f32 = -1e30;

/// The compile-time sizes of the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct HeadShape {
    heads: usize,
    key_heads: usize,
    /// Width of the part of a key that belongs to one key head.
    own: usize,
    /// Width of the part of a key that all heads share.
    shared: usize,
    value: usize,
    /// Whether there are document starts or a window; if not, `starts` is not read.
    documents: bool,
}

impl HeadShape {
    /// # Panics
    ///
    /// If shapes or dtypes do not match.
    fn new(query: &CubeTensor, key_value: &CubeTensor, shared_key: Option<&CubeTensor>, spec: &AttentionSpec) -> Self {
        let [batch, sequence, heads, width] = query.meta.shape().dims();
        let (key_heads, pair) = (key_value.meta.shape()[2], key_value.meta.shape()[3]);
        let shared = shared_key.map_or(0, |shared| shared.meta.shape()[2]);
        assert!(shared < width && width - shared < pair, "a head must have a key part of its own and a value");
        assert_shape(query, [batch, sequence, heads, width]);
        assert_shape(key_value, [batch, sequence, key_heads, pair]);
        assert_dtype(key_value, query.dtype);
        if let Some(shared_key) = shared_key {
            assert_shape(shared_key, [batch, sequence, shared]);
            assert_dtype(shared_key, query.dtype);
        }
        assert!(heads.is_multiple_of(key_heads), "key heads must divide heads");
        let starts = spec.starts.as_ref().map_or(batch * sequence, |starts| starts.len());
        assert!(starts == batch * sequence, "there must be one document start for each query");
        let own = width - shared;
        Self { heads, key_heads, own, shared, value: pair - own, documents: spec.starts.is_some() }
    }

    fn width(&self) -> usize {
        self.own + self.shared
    }
}

/// A block of queries and a block of keys.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct BlockPair {
    batch: usize,
    head: usize,
    key_head: usize,
    /// The first query.
    query: usize,
    /// The first key.
    key: usize,
    sequence: usize,
}

/// Uploads the first key of each query. Without starts the buffer has one unused value, because WebGPU has no empty buffers.
fn starts(like: &CubeTensor, spec: &AttentionSpec) -> BufferArg {
    upload(like, spec.starts.as_ref().map_or(&[0], |starts| starts.as_slice()))
}

/// One cube for each block of positions of each head.
fn cube_per_block(sequence: usize, heads: usize, batch: usize) -> (CubeCount, CubeDim) {
    let count = CubeCount::Static(sequence.div_ceil(BLOCK) as u32, heads as u32, batch as u32);
    (count, CubeDim::new_1d(UNITS as u32))
}

/// The output, `[batch, sequence, heads, value]`, and the logarithms of the softmax denominators, `[batch, heads, sequence]`; see
/// `reference::attention_forward`.
fn forward(
    query: CubeTensor,
    key_value: CubeTensor,
    shared_key: Option<CubeTensor>,
    spec: &AttentionSpec,
) -> (CubeTensor, CubeTensor) {
    let heads = HeadShape::new(&query, &key_value, shared_key.as_ref(), spec);
    let (batch, sequence) = (query.meta.shape()[0], query.meta.shape()[1]);
    let (query, key_value) = (into_contiguous(query), into_contiguous(key_value));
    // A kernel needs a buffer for each argument; without a shared key this one is not read.
    let shared_key = shared_key.map_or_else(|| query.clone(), into_contiguous);
    let output = empty(&query, [batch, sequence, heads.heads, heads.value], query.dtype);
    let log_sum = empty(&query, [batch, heads.heads, sequence], DType::F32);
    let over = cube_per_block(sequence, heads.heads, batch);
    let (starts, dtype) = (starts(&query, spec), elem_type(&query));
    // SAFETY: `load_head`, `load_keys` and `load_values` read only positions below `sequence` and columns below the width of a
    // head, `start_of` clamps positions to below `sequence`, and results are written within the same bounds. `HeadShape::new`
    // asserted that the tensors have these shapes and one dtype; they are contiguous. Starts only bound loops.
    unsafe {
        launch!(
            forward_kernel,
            over,
            [query, key_value, shared_key, output, log_sum],
            starts,
            sequence,
            spec.scale,
            heads,
            dtype
        );
    }
    (output, log_sum)
}

/// The inputs of the backward pass: the inputs of the forward pass and its `log_sum`, the gradient of the output, and `delta`, f32
/// `[batch, sequence, heads, 1]`, the sum over a head of the products of that gradient and the output.
struct BackwardInputs {
    query: CubeTensor,
    key_value: CubeTensor,
    shared_key: Option<CubeTensor>,
    log_sum: CubeTensor,
    grad: CubeTensor,
    delta: CubeTensor,
}

/// Gradients for the query and for keys and values, and for each key head its part of the gradient for the shared key, f32
/// `[batch, key heads, sequence, shared]`.
fn grad(saved: BackwardInputs, spec: &AttentionSpec) -> (CubeTensor, CubeTensor, Option<CubeTensor>) {
    let heads = HeadShape::new(&saved.query, &saved.key_value, saved.shared_key.as_ref(), spec);
    let (batch, sequence) = (saved.query.meta.shape()[0], saved.query.meta.shape()[1]);
    let (query, key_value) = (into_contiguous(saved.query), into_contiguous(saved.key_value));
    let has_shared = saved.shared_key.is_some();
    let shared_key = saved.shared_key.map_or_else(|| query.clone(), into_contiguous);
    let (log_sum, grad) = (into_contiguous(saved.log_sum), into_contiguous(saved.grad));
    let delta = into_contiguous(saved.delta);
    assert_shape(&log_sum, [batch, heads.heads, sequence]);
    assert_dtype(&log_sum, DType::F32);
    assert_shape(&grad, [batch, sequence, heads.heads, heads.value]);
    assert_dtype(&grad, query.dtype);
    // The sum over the last dimension of `grad * output`; Burn keeps the dimension.
    assert_shape(&delta, [batch, sequence, heads.heads, 1]);
    assert_dtype(&delta, DType::F32);
    let grad_query = empty(&query, [batch, sequence, heads.heads, heads.width()], query.dtype);
    let grad_key_value = empty(&query, [batch, sequence, heads.key_heads, heads.own + heads.value], query.dtype);
    // WebGPU has no empty buffers.
    let grad_shared = empty(&query, [batch, heads.key_heads, sequence, heads.shared.max(1)], DType::F32);
    let dtype = elem_type(&query);
    // SAFETY: as in `forward`; `log_sum` and `delta` are read at positions clamped to below `sequence`, and their shapes and dtypes
    // and those of the gradient are asserted above.
    unsafe {
        launch!(
            query_grad_kernel,
            cube_per_block(sequence, heads.heads, batch),
            [query, key_value, shared_key, log_sum, delta, grad, grad_query],
            starts(&query, spec),
            sequence,
            spec.scale,
            heads,
            dtype
        );
        launch!(
            key_grad_kernel,
            cube_per_block(sequence, heads.key_heads, batch),
            [query, key_value, shared_key, log_sum, delta, grad, grad_key_value, grad_shared],
            starts(&query, spec),
            sequence,
            spec.scale,
            heads,
            dtype
        );
    }
    (grad_query, grad_key_value, has_shared.then_some(grad_shared))
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn forward_kernel<F: Float>(
    query: &[F],
    key_value: &[F],
    shared_key: &[F],
    output: &mut [F],
    log_sum: &mut [f32],
    starts: &[u32],
    sequence: usize,
    scale: f32,
    #[comptime] heads: HeadShape,
    #[define(F)] _dtype: ElemType,
) {
    let (batch, head) = (CUBE_POS_Z as usize, CUBE_POS_Y as usize);
    let first = CUBE_POS_X as usize * BLOCK;
    let key_head = head / comptime!(heads.heads / heads.key_heads);
    let value_chunks = comptime!(heads.value.div_ceil(BLOCK));
    let (row, column) = patch_origin();

    let mut scores = Shared::<[f32]>::new_slice(SHARED);
    let mut left = Shared::<[f32]>::new_slice(SHARED);
    let mut right = Shared::<[f32]>::new_slice(SHARED);
    let mut sums = zeros(comptime!(value_chunks * PATCH));
    let mut totals = zeros(PATCH_ROWS);
    let mut largest = zeros(PATCH_ROWS);
    let mut first_key = Array::<usize>::new(PATCH_ROWS);
    #[unroll]
    for i in 0..PATCH_ROWS {
        largest[i] = MASKED;
        first_key[i] = start_of(starts, batch, first + row + i, sequence, heads);
    }

    // Starts never decrease along a sequence, so the first query of the block sees the earliest key.
    let mut key = start_of(starts, batch, first, sequence, heads) / BLOCK * BLOCK;
    let end = min(first + BLOCK, sequence);
    while key < end {
        let blocks = BlockPair { batch, head, key_head, query: first, key, sequence };
        let mut patch = key_products::<F>(&mut left, &mut right, query, key_value, shared_key, blocks, heads);
        #[unroll]
        for i in 0..PATCH_ROWS {
            #[unroll]
            for j in 0..PATCH_COLUMNS {
                let (at, to) = (first + row + i, key + column + j * ACROSS);
                let seen = to <= at && to >= first_key[i];
                let score = select(seen, patch[i * PATCH_COLUMNS + j] * scale, MASKED);
                patch[i * PATCH_COLUMNS + j] = score;
                scores[(row + i) * PITCH + column + j * ACROSS] = score;
            }
        }
        sync_cube(); // all scores of the block are written
        // Each unit computes maximum and sum over all columns of its rows, which saves an exchange between units that share a row.
        let mut shrink = Array::<f32>::new(PATCH_ROWS);
        #[unroll]
        for i in 0..PATCH_ROWS {
            let mut most = largest[i];
            for j in 0..BLOCK {
                most = max(most, scores[(row + i) * PITCH + j]);
            }
            shrink[i] = (largest[i] - most).exp();
            largest[i] = most;
        }
        sync_cube(); // all scores are read before they are replaced by probabilities
        #[unroll]
        for i in 0..PATCH_ROWS {
            #[unroll]
            for j in 0..PATCH_COLUMNS {
                let score = patch[i * PATCH_COLUMNS + j];
                // If no key was visible yet, `largest` is `MASKED`, and the exponential of a masked score would be 1.
                let probability = select(score > MASKED, (score - largest[i]).exp(), 0f32);
                scores[(row + i) * PITCH + column + j * ACROSS] = probability;
            }
        }
        sync_cube(); // all probabilities of the block are written
        #[unroll]
        for i in 0..PATCH_ROWS {
            // Earlier sums are relative to the old maximum.
            let mut total = totals[i] * shrink[i];
            for j in 0..BLOCK {
                total += scores[(row + i) * PITCH + j];
            }
            totals[i] = total;
            #[unroll]
            for chunk in 0..value_chunks {
                #[unroll]
                for j in 0..PATCH_COLUMNS {
                    sums[chunk * PATCH + i * PATCH_COLUMNS + j] *= shrink[i];
                }
            }
        }
        #[unroll]
        for chunk in 0..value_chunks {
            load_values::<F>(&mut right, key_value, blocks, chunk, heads);
            sync_cube();
            add_product(&scores, &right, &mut sums, chunk, false);
            sync_cube();
        }
        key += BLOCK;
    }

    #[unroll]
    for i in 0..PATCH_ROWS {
        let at = first + row + i;
        if at < sequence {
            #[unroll]
            for chunk in 0..value_chunks {
                #[unroll]
                for j in 0..PATCH_COLUMNS {
                    let to = chunk * BLOCK + column + j * ACROSS;
                    if to < heads.value {
                        output[((batch * sequence + at) * heads.heads + head) * heads.value + to] =
                            F::cast_from(sums[chunk * PATCH + i * PATCH_COLUMNS + j] / totals[i]);
                    }
                }
            }
            if column == 0 {
                log_sum[(batch * heads.heads + head) * sequence + at] = largest[i] + totals[i].ln();
            }
        }
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn query_grad_kernel<F: Float>(
    query: &[F],
    key_value: &[F],
    shared_key: &[F],
    log_sum: &[f32],
    delta: &[f32],
    grad: &[F],
    grad_query: &mut [F],
    starts: &[u32],
    sequence: usize,
    scale: f32,
    #[comptime] heads: HeadShape,
    #[define(F)] _dtype: ElemType,
) {
    let (batch, head) = (CUBE_POS_Z as usize, CUBE_POS_Y as usize);
    let first = CUBE_POS_X as usize * BLOCK;
    let key_head = head / comptime!(heads.heads / heads.key_heads);
    let width = comptime!(heads.own + heads.shared);
    let chunks = comptime!(width.div_ceil(BLOCK));
    let (row, column) = patch_origin();

    let mut scores = Shared::<[f32]>::new_slice(SHARED);
    let mut left = Shared::<[f32]>::new_slice(SHARED);
    let mut right = Shared::<[f32]>::new_slice(SHARED);
    let mut sums = zeros(comptime!(chunks * PATCH));

    let mut key = start_of(starts, batch, first, sequence, heads) / BLOCK * BLOCK;
    let end = min(first + BLOCK, sequence);
    while key < end {
        let blocks = BlockPair { batch, head, key_head, query: first, key, sequence };
        let (_, grad_scores) = softmax_grad::<F>(
            &mut left, &mut right, query, key_value, shared_key, log_sum, delta, grad, starts, blocks, scale, heads,
        );
        store_patch(&mut scores, &grad_scores);
        #[unroll]
        for chunk in 0..chunks {
            load_keys::<F>(&mut right, key_value, shared_key, blocks, chunk, heads);
            sync_cube();
            add_product(&scores, &right, &mut sums, chunk, false);
            sync_cube();
        }
        key += BLOCK;
    }

    #[unroll]
    for i in 0..PATCH_ROWS {
        let at = first + row + i;
        if at < sequence {
            #[unroll]
            for chunk in 0..chunks {
                #[unroll]
                for j in 0..PATCH_COLUMNS {
                    let to = chunk * BLOCK + column + j * ACROSS;
                    if to < width {
                        grad_query[((batch * sequence + at) * heads.heads + head) * width + to] =
                            F::cast_from(sums[chunk * PATCH + i * PATCH_COLUMNS + j]);
                    }
                }
            }
        }
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn key_grad_kernel<F: Float>(
    query: &[F],
    key_value: &[F],
    shared_key: &[F],
    log_sum: &[f32],
    delta: &[f32],
    grad: &[F],
    grad_key_value: &mut [F],
    grad_shared: &mut [f32],
    starts: &[u32],
    sequence: usize,
    scale: f32,
    #[comptime] heads: HeadShape,
    #[define(F)] _dtype: ElemType,
) {
    let (batch, key_head) = (CUBE_POS_Z as usize, CUBE_POS_Y as usize);
    let key = CUBE_POS_X as usize * BLOCK;
    let group = comptime!(heads.heads / heads.key_heads);
    let (width, pair) = comptime!((heads.own + heads.shared, heads.own + heads.value));
    let (chunks, value_chunks) = comptime!((width.div_ceil(BLOCK), heads.value.div_ceil(BLOCK)));
    let (row, column) = patch_origin();

    let mut scores = Shared::<[f32]>::new_slice(SHARED);
    let mut left = Shared::<[f32]>::new_slice(SHARED);
    let mut right = Shared::<[f32]>::new_slice(SHARED);
    let mut key_sums = zeros(comptime!(chunks * PATCH));
    let mut value_sums = zeros(comptime!(value_chunks * PATCH));

    let last = min(key + BLOCK, sequence) - 1; // the last key of the block
    for member in 0..group {
        let head = key_head * group + member;
        let mut first = key;
        let mut seen = true;
        while seen {
            let blocks = BlockPair { batch, head, key_head, query: first, key, sequence };
            let (probabilities, grad_scores) = softmax_grad::<F>(
                &mut left, &mut right, query, key_value, shared_key, log_sum, delta, grad, starts, blocks, scale, heads,
            );
            store_patch(&mut scores, &probabilities);
            #[unroll]
            for chunk in 0..value_chunks {
                load_head::<F>(&mut right, grad, blocks, chunk, heads.heads, heads.value);
                sync_cube();
                add_product(&scores, &right, &mut value_sums, chunk, true);
                sync_cube();
            }
            store_patch(&mut scores, &grad_scores);
            #[unroll]
            for chunk in 0..chunks {
                load_head::<F>(&mut right, query, blocks, chunk, heads.heads, width);
                sync_cube();
                add_product(&scores, &right, &mut key_sums, chunk, true);
                sync_cube();
            }
            first += BLOCK;
            // If the first query of a block does not see these keys, no later query does.
            seen = false;
            if first < sequence {
                seen = start_of(starts, batch, first, sequence, heads) <= last;
            }
        }
    }

    #[unroll]
    for i in 0..PATCH_ROWS {
        let at = key + row + i;
        if at < sequence {
            let line = ((batch * sequence + at) * heads.key_heads + key_head) * pair;
            #[unroll]
            for j in 0..PATCH_COLUMNS {
                #[unroll]
                for chunk in 0..chunks {
                    let to = chunk * BLOCK + column + j * ACROSS;
                    let sum = key_sums[chunk * PATCH + i * PATCH_COLUMNS + j];
                    if to < heads.own {
                        grad_key_value[line + to] = F::cast_from(sum);
                    } else if to < width {
                        let part = (batch * heads.key_heads + key_head) * sequence + at;
                        grad_shared[part * heads.shared + to - heads.own] = sum;
                    }
                }
                #[unroll]
                for chunk in 0..value_chunks {
                    let to = chunk * BLOCK + column + j * ACROSS;
                    if to < heads.value {
                        grad_key_value[line + heads.own + to] =
                            F::cast_from(value_sums[chunk * PATCH + i * PATCH_COLUMNS + j]);
                    }
                }
            }
        }
    }
}

/// The first row and the first column of the patch of a unit.
#[cube]
fn patch_origin() -> (usize, usize) {
    (UNIT_POS as usize / ACROSS * PATCH_ROWS, UNIT_POS as usize % ACROSS)
}

#[cube]
fn zeros(#[comptime] count: usize) -> Array<f32> {
    let mut array = Array::<f32>::new(count);
    #[unroll]
    for at in 0..count {
        array[at] = 0f32;
    }
    array
}

/// The first key that a query sees. Queries after the end of the sequence get that of the last query.
#[cube]
fn start_of(starts: &[u32], batch: usize, query: usize, sequence: usize, #[comptime] heads: HeadShape) -> usize {
    let mut start = 0usize;
    if comptime!(heads.documents) {
        start = starts[batch * sequence + min(query, sequence - 1)] as usize;
    }
    start
}

/// The unit's patch of `queries x keys^T`.
#[cube]
fn key_products<F: Float>(
    left: &mut Shared<[f32]>,
    right: &mut Shared<[f32]>,
    query: &[F],
    key_value: &[F],
    shared_key: &[F],
    blocks: BlockPair,
    #[comptime] heads: HeadShape,
) -> Array<f32> {
    let width = comptime!(heads.own + heads.shared);
    let mut patch = zeros(PATCH);
    for chunk in 0..comptime!(width.div_ceil(BLOCK)) {
        load_head::<F>(left, query, blocks, chunk, heads.heads, width);
        load_keys::<F>(right, key_value, shared_key, blocks, chunk, heads);
        sync_cube();
        add_transposed_product(left, right, &mut patch);
        sync_cube();
    }
    patch
}

/// The unit's patch of `output gradient x values^T`.
#[cube]
fn value_products<F: Float>(
    left: &mut Shared<[f32]>,
    right: &mut Shared<[f32]>,
    grad: &[F],
    key_value: &[F],
    blocks: BlockPair,
    #[comptime] heads: HeadShape,
) -> Array<f32> {
    let mut patch = zeros(PATCH);
    for chunk in 0..comptime!(heads.value.div_ceil(BLOCK)) {
        load_head::<F>(left, grad, blocks, chunk, heads.heads, heads.value);
        load_values::<F>(right, key_value, blocks, chunk, heads);
        sync_cube();
        add_transposed_product(left, right, &mut patch);
        sync_cube();
    }
    patch
}

/// The unit's patches of the probabilities, computed again from the logarithms of the softmax denominators, and of the gradients of
/// the scores. Both gradient kernels begin with it.
#[cube]
fn softmax_grad<F: Float>(
    left: &mut Shared<[f32]>,
    right: &mut Shared<[f32]>,
    query: &[F],
    key_value: &[F],
    shared_key: &[F],
    log_sum: &[f32],
    delta: &[f32],
    grad: &[F],
    starts: &[u32],
    blocks: BlockPair,
    scale: f32,
    #[comptime] heads: HeadShape,
) -> (Array<f32>, Array<f32>) {
    let mut probabilities = key_products::<F>(left, right, query, key_value, shared_key, blocks, heads);
    let mut grad_scores = value_products::<F>(left, right, grad, key_value, blocks, heads);
    let (row, column) = patch_origin();
    #[unroll]
    for i in 0..PATCH_ROWS {
        let at = blocks.query + row + i;
        let known = min(at, blocks.sequence - 1); // stays in bounds; queries after the end are masked below
        let first_key = start_of(starts, blocks.batch, at, blocks.sequence, heads);
        let log_sum = log_sum[(blocks.batch * heads.heads + blocks.head) * blocks.sequence + known];
        let delta = delta[(blocks.batch * blocks.sequence + known) * heads.heads + blocks.head];
        #[unroll]
        for j in 0..PATCH_COLUMNS {
            let to = blocks.key + column + j * ACROSS;
            let seen = to <= at && to >= first_key && at < blocks.sequence;
            let probability = select(seen, (probabilities[i * PATCH_COLUMNS + j] * scale - log_sum).exp(), 0f32);
            probabilities[i * PATCH_COLUMNS + j] = probability;
            grad_scores[i * PATCH_COLUMNS + j] = probability * (grad_scores[i * PATCH_COLUMNS + j] - delta) * scale;
        }
    }
    (probabilities, grad_scores)
}

/// Writes the patch of each unit to a block.
#[cube]
fn store_patch(block: &mut Shared<[f32]>, patch: &Array<f32>) {
    let (row, column) = patch_origin();
    #[unroll]
    for i in 0..PATCH_ROWS {
        #[unroll]
        for j in 0..PATCH_COLUMNS {
            block[(row + i) * PITCH + column + j * ACROSS] = patch[i * PATCH_COLUMNS + j];
        }
    }
}

/// Fills a block with chunk `chunk` of the columns of one head at the positions of the queries, from `[batch, sequence, heads, width]`;
/// zero outside the tensor, so that products need no bounds.
#[cube]
fn load_head<F: Float>(
    block: &mut Shared<[f32]>,
    tensor: &[F],
    blocks: BlockPair,
    chunk: usize,
    #[comptime] heads: usize,
    #[comptime] width: usize,
) {
    for round in 0..comptime!(BLOCK * BLOCK / UNITS) {
        let index = UNIT_POS as usize + round * UNITS;
        let (at, to) = (blocks.query + index / BLOCK, chunk * BLOCK + index % BLOCK);
        let mut value = 0f32;
        if at < blocks.sequence && to < width {
            let line = ((blocks.batch * blocks.sequence + at) * heads + blocks.head) * width;
            value = f32::cast_from(tensor[line + to]);
        }
        block[index / BLOCK * PITCH + index % BLOCK] = value;
    }
}

/// Fills a block with chunk `chunk` of the columns of the keys: the key head's own part, then the shared part.
#[cube]
fn load_keys<F: Float>(
    block: &mut Shared<[f32]>,
    key_value: &[F],
    shared_key: &[F],
    blocks: BlockPair,
    chunk: usize,
    #[comptime] heads: HeadShape,
) {
    let pair = comptime!(heads.own + heads.value);
    for round in 0..comptime!(BLOCK * BLOCK / UNITS) {
        let index = UNIT_POS as usize + round * UNITS;
        let (at, to) = (blocks.key + index / BLOCK, chunk * BLOCK + index % BLOCK);
        let position = blocks.batch * blocks.sequence + at;
        let mut value = 0f32;
        if at < blocks.sequence {
            if to < heads.own {
                value = f32::cast_from(key_value[(position * heads.key_heads + blocks.key_head) * pair + to]);
            }
            // Never true without a shared key, whose buffer is then that of the query.
            if to >= heads.own && to < comptime!(heads.own + heads.shared) {
                value = f32::cast_from(shared_key[position * heads.shared + to - heads.own]);
            }
        }
        block[index / BLOCK * PITCH + index % BLOCK] = value;
    }
}

/// Fills a block with chunk `chunk` of the columns of the values.
#[cube]
fn load_values<F: Float>(
    block: &mut Shared<[f32]>,
    key_value: &[F],
    blocks: BlockPair,
    chunk: usize,
    #[comptime] heads: HeadShape,
) {
    let pair = comptime!(heads.own + heads.value);
    for round in 0..comptime!(BLOCK * BLOCK / UNITS) {
        let index = UNIT_POS as usize + round * UNITS;
        let (at, to) = (blocks.key + index / BLOCK, chunk * BLOCK + index % BLOCK);
        let mut value = 0f32;
        if at < blocks.sequence && to < heads.value {
            let position = blocks.batch * blocks.sequence + at;
            let line = (position * heads.key_heads + blocks.key_head) * pair;
            value = f32::cast_from(key_value[line + heads.own + to]);
        }
        block[index / BLOCK * PITCH + index % BLOCK] = value;
    }
}

/// Adds `left x right^T` to the patch of each unit.
#[cube]
fn add_transposed_product(left: &mut Shared<[f32]>, right: &mut Shared<[f32]>, patch: &mut Array<f32>) {
    let (row, column) = patch_origin();
    for step in 0..BLOCK {
        let mut factors = Array::<f32>::new(PATCH_COLUMNS);
        #[unroll]
        for j in 0..PATCH_COLUMNS {
            factors[j] = right[(column + j * ACROSS) * PITCH + step];
        }
        #[unroll]
        for i in 0..PATCH_ROWS {
            let factor = left[(row + i) * PITCH + step];
            #[unroll]
            for j in 0..PATCH_COLUMNS {
                patch[i * PATCH_COLUMNS + j] += factor * factors[j];
            }
        }
    }
}

/// Adds `left x right`, or `left^T x right`, to chunk `chunk` of the patches of each unit.
#[cube]
fn add_product(
    left: &Shared<[f32]>,
    right: &Shared<[f32]>,
    sums: &mut Array<f32>,
    #[comptime] chunk: usize,
    #[comptime] transposed: bool,
) {
    let (row, column) = patch_origin();
    for step in 0..BLOCK {
        let mut factors = Array::<f32>::new(PATCH_COLUMNS);
        #[unroll]
        for j in 0..PATCH_COLUMNS {
            factors[j] = right[step * PITCH + column + j * ACROSS];
        }
        #[unroll]
        for i in 0..PATCH_ROWS {
            let at = if comptime!(transposed) { step * PITCH + row + i } else { (row + i) * PITCH + step };
            let factor = left[at];
            #[unroll]
            for j in 0..PATCH_COLUMNS {
                sums[chunk * PATCH + i * PATCH_COLUMNS + j] += factor * factors[j];
            }
        }
    }
}

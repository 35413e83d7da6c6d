//! Attention without matrix units, which runs on every device.
//!
//! A cube takes [`BLOCK`] queries, or keys, and visits [`BLOCK`] of the others at a time. All work is products of 32 x 32 blocks in
//! shared memory. Three blocks take 12.7 KB of the 16 KB that WebGPU guarantees.
//!
//! Loops over the values of a block are not marked `#[unroll]`: a software Vulkan driver takes long to compile the unrolled
//! code.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{Grads, HeadShape, Inputs, MASKED, Upstream, start_of, zeros};
use crate::kernels::cube::tensor::{address_type_of, elem_type};
#[cfg(all(test, feature = "kernel-text"))]
use crate::kernels::cube::text::Dialect;

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

/// One cube for each block of positions of each head.
fn cube_per_block(sequence: usize, heads: usize, batch: usize) -> (CubeCount, CubeDim) {
    let count = CubeCount::Static(sequence.div_ceil(BLOCK) as u32, heads as u32, batch as u32);
    (count, CubeDim::new_1d(UNITS as u32))
}

/// # Safety
///
/// The results have the shapes and dtypes that `super::forward` gives them.
pub(super) unsafe fn forward(inputs: &Inputs, output: &CubeTensor, log_sum: &CubeTensor, starts: BufferArg) {
    let Inputs { query, key_value, shared_key, heads, batch, sequence, scale } = inputs;
    // SAFETY: `load_head`, `load_keys` and `load_values` read only positions below `sequence` and columns below the width of a
    // head, `start_of` clamps positions to below `sequence`, and results are written within the same bounds.
    unsafe {
        let (count, dim) = cube_per_block(*sequence, heads.heads, *batch);
        forward_kernel::launch_unchecked(
            &query.client,
            count,
            dim,
            address_type_of(&[query, key_value, shared_key, output, log_sum]),
            query.clone().into_buffer_arg(),
            key_value.clone().into_buffer_arg(),
            shared_key.clone().into_buffer_arg(),
            output.clone().into_buffer_arg(),
            log_sum.clone().into_buffer_arg(),
            starts,
            *sequence,
            *scale,
            *heads,
            elem_type(query),
        );
    }
}

/// # Safety
///
/// All tensors have the shapes and dtypes that `super::grad` asserts and gives them.
pub(super) unsafe fn grad(inputs: &Inputs, upstream: &Upstream, grads: &Grads, starts: [BufferArg; 2]) {
    let Inputs { query, key_value, shared_key, heads, batch, sequence, scale } = inputs;
    let Upstream { log_sum, delta, grad } = upstream;
    let Grads { query: grad_query, key_value: grad_key_value, shared_key: grad_shared } = grads;
    let [query_starts, key_starts] = starts;
    // SAFETY: as in `forward`; `log_sum` and `delta` are read at positions clamped to below `sequence`.
    unsafe {
        let (count, dim) = cube_per_block(*sequence, heads.heads, *batch);
        query_grad_kernel::launch_unchecked(
            &query.client,
            count,
            dim,
            address_type_of(&[query, key_value, shared_key, log_sum, delta, grad, grad_query]),
            query.clone().into_buffer_arg(),
            key_value.clone().into_buffer_arg(),
            shared_key.clone().into_buffer_arg(),
            log_sum.clone().into_buffer_arg(),
            delta.clone().into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            grad_query.clone().into_buffer_arg(),
            query_starts,
            *sequence,
            *scale,
            *heads,
            elem_type(query),
        );
        let (count, dim) = cube_per_block(*sequence, heads.key_heads, *batch);
        key_grad_kernel::launch_unchecked(
            &query.client,
            count,
            dim,
            address_type_of(&[query, key_value, shared_key, log_sum, delta, grad, grad_key_value, grad_shared]),
            query.clone().into_buffer_arg(),
            key_value.clone().into_buffer_arg(),
            shared_key.clone().into_buffer_arg(),
            log_sum.clone().into_buffer_arg(),
            delta.clone().into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            grad_key_value.clone().into_buffer_arg(),
            grad_shared.clone().into_buffer_arg(),
            key_starts,
            *sequence,
            *scale,
            *heads,
            elem_type(query),
        );
    }
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

/// The kernels of this file as text.
#[cfg(all(test, feature = "kernel-text"))]
pub(in crate::kernels::cube) fn kernels(on: &Dialect) -> Vec<Box<dyn CubeKernel>> {
    use crate::kernels::cube::text::{buffer, kernel};
    let float = on.float;
    let mut list = Vec::new();
    for (shared, documents) in [(64, false), (0, true)] {
        let heads = HeadShape { heads: 16, key_heads: 16, own: 192 - shared, shared, value: 128, documents };
        list.push(kernel!(
            on,
            UNITS,
            forward_kernel::ForwardKernel,
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            (),
            (),
            heads,
            float
        ));
        list.push(kernel!(
            on,
            UNITS,
            query_grad_kernel::QueryGradKernel,
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            (),
            (),
            heads,
            float
        ));
        list.push(kernel!(
            on,
            UNITS,
            key_grad_kernel::KeyGradKernel,
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            (),
            (),
            heads,
            float
        ));
    }
    list
}

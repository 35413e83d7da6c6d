//! Attention on matrix units (tensor cores): in bf16 and f16, and in f32 rounded to TF32. Sums are in f32.
//!
//! A cube computes [`TILE`] rows (queries, or keys for their gradients), each of its planes [`ROWS`] of them. It visits [`STRIP`] of the
//! others at a time, which all planes read from shared memory. The scores of a plane stay in registers: they are a result of the first
//! product and the left factor of the second.
//!
//! For that, products are `mma.m16n8k16` and `mma.m16n8k8`, whose registers are specified (PTX ISA, "Matrix fragments for
//! mma"). With `g = lane / 4` and `t = lane % 4`, a lane has of the
//!
//! * result the rows `g` and `g + 8` and the columns `2t` and `2t + 1`;
//! * left factor the same rows, and of the right one the column `g`, both at the depths `2t`, `2t + 1`, `2t + 8` and `2t + 9` for halves,
//!   `t` and `t + 4` for TF32.
//!
//! A sum may be taken in any order, and columns may be computed in any. So which column of a tensor is which depth or column of a fragment is
//! chosen such that a lane reads and writes 16 bytes at once, a chunk: in a group of eight chunks of a row, the first product gives
//! lane `t` the chunks `2t` and `2t + 1`, and the second gives lane `g` chunk `g`, one value for each of its fragments. With rows in
//! shared memory 16 bytes longer than their groups, neither has bank conflicts.

use burn_cubecl::tensor::CubeTensor;
use cubecl::cmma::MmaDefinition;
use cubecl::ir::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

use super::{Grads, HeadShape, Inputs, MASKED, Upstream, start_of, zeros};
use crate::kernels::cube::grouped_mma::stage_of;
use crate::kernels::cube::tensor::{address_type_of, elem_type};

/// Rows of a plane.
const ROWS: usize = 16;
/// Units of a plane.
const PLANE: usize = 32;
const PLANES: usize = 4;
const UNITS: usize = PLANES * PLANE;
/// Rows of a cube.
const TILE: usize = PLANES * ROWS;
/// Positions that are visited at a time.
const STRIP: usize = 32;
/// Columns of a fragment of a result.
const COLUMNS: usize = 8;
/// Fragments of the scores of a plane and a strip.
const FRAGMENTS: usize = STRIP / COLUMNS;
/// Values that a lane has of a fragment of a result.
const VALUES: usize = 4;
/// Bytes that a lane reads at once.
const CHUNK: usize = 16;
/// Chunks of a group of columns.
const CHUNKS: usize = 8;

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Plan {
    heads: HeadShape,
    /// Depth of a fragment.
    step: usize,
    /// Values of a chunk.
    chunk: usize,
}

impl Plan {
    fn group(&self) -> usize {
        CHUNKS * self.chunk
    }

    /// Groups of columns of a query or key.
    fn groups(&self) -> usize {
        self.heads.width().div_ceil(self.group())
    }

    /// Groups of columns of a value.
    fn value_groups(&self) -> usize {
        self.heads.value.div_ceil(self.group())
    }

    /// Chunks from one row of a query or key to the next in shared memory.
    fn pitch(&self) -> usize {
        self.groups() * CHUNKS + 1
    }

    fn value_pitch(&self) -> usize {
        self.value_groups() * CHUNKS + 1
    }
}

/// Whether these kernels run: the device has `mma` for the dtype and enough shared memory.
pub(super) fn takes(inputs: &Inputs) -> bool {
    let query = &inputs.query;
    let Some((stage, step)) = stage_of(query) else { return false };
    // Only NVIDIA's units have this shape, so the registers are as described above.
    let (m, n, k) = (ROWS as u32, COLUMNS as u32, step as u32);
    let wanted = MmaConfig { a_type: stage, b_type: stage, cd_type: ElemType::Float(FloatKind::F32), m, n, k };
    let properties = query.client.properties();
    let planes = [properties.hardware.plane_size_min, properties.hardware.plane_size_max];
    let (plan, _) = plan_of(inputs);
    let shared = STRIP * (plan.pitch() + plan.value_pitch()) * CHUNK;
    properties.features.matmul.mma.contains(&wanted)
        && planes == [PLANE as u32; 2]
        && shared <= properties.hardware.max_shared_memory_size
}

/// The plan, and the types of values in memory and in fragments.
fn plan_of(inputs: &Inputs) -> (Plan, [ElemType; 2]) {
    let (stage, step) = stage_of(&inputs.query).expect("`takes` was asked first");
    let chunk = CHUNK / inputs.query.dtype.size();
    (Plan { heads: inputs.heads, step, chunk }, [elem_type(&inputs.query), stage])
}

/// The sizes of the vectors of a kernel: of those in memory, of chunks, and of a lane's registers.
fn vectors(plan: &Plan) -> (usize, usize, usize) {
    let HeadShape { own, shared, value, .. } = plan.heads;
    let whole = [own, shared, value].iter().all(|width| width.is_multiple_of(plan.chunk));
    (if whole { plan.chunk } else { 1 }, plan.chunk, plan.step / COLUMNS)
}

/// One cube for each tile of positions of each head.
fn cube_per_tile(sequence: usize, heads: usize, batch: usize) -> CubeCount {
    CubeCount::Static(sequence.div_ceil(TILE) as u32, heads as u32, batch as u32)
}

/// # Safety
///
/// The inputs are such that [`takes`] allows it, and the results have the shapes and dtypes that `super::forward` gives them.
pub(super) unsafe fn forward(inputs: &Inputs, output: &CubeTensor, log_sum: &CubeTensor, starts: BufferArg) {
    let Inputs { query, key_value, shared_key, heads, batch, sequence, scale } = inputs;
    let (plan, types) = plan_of(inputs);
    let (memory, chunk, registers) = vectors(&plan);
    // SAFETY: `chunk_of` and `key_chunk` read only positions below `sequence` and columns below the width of a head, `start_of` clamps
    // positions to below `sequence`, and results are written within the same bounds. A vector is read where its first value is
    // within the bounds, which are multiples of its size.
    unsafe {
        forward_kernel::launch_unchecked(
            &query.client,
            cube_per_tile(*sequence, heads.heads, *batch),
            CubeDim::new_1d(UNITS as u32),
            address_type_of(&[query, key_value, shared_key, output, log_sum]),
            memory,
            chunk,
            registers,
            query.clone().into_buffer_arg(),
            key_value.clone().into_buffer_arg(),
            shared_key.clone().into_buffer_arg(),
            output.clone().into_buffer_arg(),
            log_sum.clone().into_buffer_arg(),
            starts,
            *sequence,
            *scale,
            plan,
            types,
        );
    }
}

/// # Safety
///
/// The inputs are such that [`takes`] allows it, and all tensors have the shapes and dtypes that `super::grad` asserts and gives them.
pub(super) unsafe fn grad(inputs: &Inputs, upstream: &Upstream, grads: &Grads, starts: [BufferArg; 2]) {
    let Inputs { query, key_value, shared_key, heads, batch, sequence, scale } = inputs;
    let Upstream { log_sum, delta, grad } = upstream;
    let Grads { query: grad_query, key_value: grad_key_value, shared_key: grad_shared } = grads;
    let [query_starts, key_starts] = starts;
    let (plan, types) = plan_of(inputs);
    let (memory, chunk, registers) = vectors(&plan);
    // SAFETY: as in `forward`; `log_sum` and `delta` are read at positions clamped to below `sequence`.
    unsafe {
        query_grad_kernel::launch_unchecked(
            &query.client,
            cube_per_tile(*sequence, heads.heads, *batch),
            CubeDim::new_1d(UNITS as u32),
            address_type_of(&[query, key_value, shared_key, log_sum, delta, grad, grad_query]),
            memory,
            chunk,
            registers,
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
            plan,
            types,
        );
        key_grad_kernel::launch_unchecked(
            &query.client,
            cube_per_tile(*sequence, heads.key_heads, *batch),
            CubeDim::new_1d(UNITS as u32),
            address_type_of(&[query, key_value, shared_key, log_sum, delta, grad, grad_key_value, grad_shared]),
            memory,
            chunk,
            registers,
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
            plan,
            types,
        );
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn forward_kernel<F: Numeric, S: Numeric, N: Size, V: Size, W: Size>(
    query: &[Vector<F, N>],
    key_value: &[Vector<F, N>],
    shared_key: &[Vector<F, N>],
    output: &mut [Vector<F, N>],
    log_sum: &mut [f32],
    starts: &[u32],
    sequence: usize,
    scale: f32,
    #[comptime] plan: Plan,
    #[define(F, S)] _types: [ElemType; 2],
) {
    let heads = comptime!(plan.heads);
    let (width, groups, value_groups) = comptime!((heads.width(), plan.groups(), plan.value_groups()));
    let (pitch, value_pitch) = comptime!((plan.pitch(), plan.value_pitch()));
    let (batch, head) = (CUBE_POS_Z as usize, CUBE_POS_Y as usize);
    let key_head = head / comptime!(heads.heads / heads.key_heads);
    let first = CUBE_POS_X as usize * TILE;
    let lane = Lane::new();
    let row = first + lane.plane * ROWS + lane.g;

    let mut keys = Shared::<[Vector<S, V>]>::new_slice(comptime!(STRIP * pitch));
    let mut values = Shared::<[Vector<S, V>]>::new_slice(comptime!(STRIP * value_pitch));
    let mut left = Array::<Vector<S, V>>::new(comptime!(groups * VALUES));
    let mut first_key = Array::<usize>::new(2usize);
    let mut largest = zeros(2usize);
    let mut totals = zeros(2usize);
    let mut sums = zeros(comptime!(value_groups * plan.chunk * VALUES));
    #[unroll]
    for r in 0..2usize {
        let at = row + r * COLUMNS;
        largest[r] = MASKED;
        first_key[r] = start_of(starts, batch, at, sequence, heads);
        #[unroll]
        for group in 0..groups {
            #[unroll]
            for half in 0..2usize {
                let column = group * comptime!(plan.group()) + (2 * lane.t + half) * V::value();
                let line = ((batch * sequence + at) * heads.heads + head) * width;
                left[comptime!(group * VALUES + r * 2 + half)] =
                    chunk_of::<F, S, N, V>(query, line, column, width, at < sequence);
            }
        }
    }

    // Starts never decrease along a sequence, so the first query of the tile sees the earliest key.
    let mut key = start_of(starts, batch, first, sequence, heads) / STRIP * STRIP;
    let end = min(first + TILE, sequence);
    while key < end {
        let line = (batch * sequence * heads.key_heads + key_head) * comptime!(heads.own + heads.value);
        load_keys::<F, S, N, V>(&mut keys, key_value, shared_key, batch, key_head, key, sequence, plan);
        load_strip::<F, S, N, V>(
            &mut values,
            key_value,
            line + heads.own,
            comptime!(heads.key_heads * (heads.own + heads.value)),
            key,
            sequence,
            heads.value,
            value_groups,
        );
        sync_cube();
        // Else no query of the plane sees a key of the strip.
        if key < first + (lane.plane + 1) * ROWS {
            let mut scores = zeros(comptime!(FRAGMENTS * VALUES));
            #[unroll]
            for group in 0..groups {
                add_scores::<S, V, W>(&left, comptime!(group * VALUES), &keys, pitch, group, &mut scores, &lane, plan);
            }
            #[unroll]
            for r in 0..2usize {
                let at = row + r * COLUMNS;
                let mut most = largest[r];
                #[unroll]
                for fragment in 0..FRAGMENTS {
                    #[unroll]
                    for e in 0..2usize {
                        let index = comptime!(fragment * VALUES + r * 2 + e);
                        let to = key + fragment * COLUMNS + 2 * lane.t + e;
                        let seen = to <= at && to >= first_key[r];
                        scores[index] = select(seen, scores[index] * scale, MASKED);
                        most = max(most, scores[index]);
                    }
                }
                // The four lanes with this row.
                most = max(most, plane_shuffle_xor(most, 1u32));
                most = max(most, plane_shuffle_xor(most, 2u32));
                // Earlier sums are relative to the old maximum.
                let shrink = (largest[r] - most).exp();
                largest[r] = most;
                let mut total = totals[r] * shrink;
                #[unroll]
                for fragment in 0..FRAGMENTS {
                    #[unroll]
                    for e in 0..2usize {
                        let index = comptime!(fragment * VALUES + r * 2 + e);
                        // If no key was visible yet, the maximum is `MASKED`, and the exponential of a masked score would be 1.
                        let probability = select(scores[index] > MASKED, (scores[index] - most).exp(), 0f32);
                        scores[index] = probability;
                        total += probability;
                    }
                }
                totals[r] = total;
                #[unroll]
                for fragment in 0..comptime!(value_groups * plan.chunk) {
                    sums[comptime!(fragment * VALUES + r * 2)] *= shrink;
                    sums[comptime!(fragment * VALUES + r * 2 + 1)] *= shrink;
                }
            }
            add_product::<S, V, W>(&scores, &values, value_pitch, value_groups, &mut sums, &lane, plan);
        }
        // The next strip may not be written before all planes have read this one.
        sync_cube();
        key += STRIP;
    }

    #[unroll]
    for r in 0..2usize {
        let at = row + r * COLUMNS;
        let mut total = totals[r];
        total += plane_shuffle_xor(total, 1u32);
        total += plane_shuffle_xor(total, 2u32);
        if at < sequence {
            let line = ((batch * sequence + at) * heads.heads + head) * heads.value;
            store_row::<F, N>(output, line, heads.value, value_groups, 1f32 / total, &sums, r, &lane, plan);
            if lane.t == 0 {
                log_sum[(batch * heads.heads + head) * sequence + at] = largest[r] + total.ln();
            }
        }
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn query_grad_kernel<F: Numeric, S: Numeric, N: Size, V: Size, W: Size>(
    query: &[Vector<F, N>],
    key_value: &[Vector<F, N>],
    shared_key: &[Vector<F, N>],
    log_sum: &[f32],
    delta: &[f32],
    grad: &[Vector<F, N>],
    grad_query: &mut [Vector<F, N>],
    starts: &[u32],
    sequence: usize,
    scale: f32,
    #[comptime] plan: Plan,
    #[define(F, S)] _types: [ElemType; 2],
) {
    let heads = comptime!(plan.heads);
    let (width, groups, value_groups) = comptime!((heads.width(), plan.groups(), plan.value_groups()));
    let (pitch, value_pitch) = comptime!((plan.pitch(), plan.value_pitch()));
    let (batch, head) = (CUBE_POS_Z as usize, CUBE_POS_Y as usize);
    let key_head = head / comptime!(heads.heads / heads.key_heads);
    let first = CUBE_POS_X as usize * TILE;
    let lane = Lane::new();
    let row = first + lane.plane * ROWS + lane.g;

    let mut keys = Shared::<[Vector<S, V>]>::new_slice(comptime!(STRIP * pitch));
    let mut values = Shared::<[Vector<S, V>]>::new_slice(comptime!(STRIP * value_pitch));
    let mut first_key = Array::<usize>::new(2usize);
    let mut log_sums = zeros(2usize);
    let mut deltas = zeros(2usize);
    let mut sums = zeros(comptime!(groups * plan.chunk * VALUES));
    #[unroll]
    for r in 0..2usize {
        let at = row + r * COLUMNS;
        let known = min(at, sequence - 1); // stays in bounds; queries after the end are masked below
        first_key[r] = start_of(starts, batch, at, sequence, heads);
        log_sums[r] = log_sum[(batch * heads.heads + head) * sequence + known];
        deltas[r] = delta[(batch * sequence + known) * heads.heads + head];
    }

    let mut key = start_of(starts, batch, first, sequence, heads) / STRIP * STRIP;
    let end = min(first + TILE, sequence);
    while key < end {
        let line = (batch * sequence * heads.key_heads + key_head) * comptime!(heads.own + heads.value);
        load_keys::<F, S, N, V>(&mut keys, key_value, shared_key, batch, key_head, key, sequence, plan);
        load_strip::<F, S, N, V>(
            &mut values,
            key_value,
            line + heads.own,
            comptime!(heads.key_heads * (heads.own + heads.value)),
            key,
            sequence,
            heads.value,
            value_groups,
        );
        sync_cube();
        if key < first + (lane.plane + 1) * ROWS {
            let mut scores = zeros(comptime!(FRAGMENTS * VALUES));
            let mut grads = zeros(comptime!(FRAGMENTS * VALUES));
            let head_line = (batch * sequence * heads.heads + head) * width;
            let step = comptime!(heads.heads * width);
            #[unroll]
            for group in 0..groups {
                let left = rows_of::<F, S, N, V>(query, head_line, step, row, sequence, width, group, &lane, plan);
                add_scores::<S, V, W>(&left, 0usize, &keys, pitch, group, &mut scores, &lane, plan);
            }
            let head_line = (batch * sequence * heads.heads + head) * heads.value;
            let step = comptime!(heads.heads * heads.value);
            #[unroll]
            for group in 0..value_groups {
                let left = rows_of::<F, S, N, V>(grad, head_line, step, row, sequence, heads.value, group, &lane, plan);
                add_scores::<S, V, W>(&left, 0usize, &values, value_pitch, group, &mut grads, &lane, plan);
            }
            #[unroll]
            for r in 0..2usize {
                let at = row + r * COLUMNS;
                #[unroll]
                for fragment in 0..FRAGMENTS {
                    #[unroll]
                    for e in 0..2usize {
                        let index = comptime!(fragment * VALUES + r * 2 + e);
                        let to = key + fragment * COLUMNS + 2 * lane.t + e;
                        let seen = to <= at && to >= first_key[r] && at < sequence;
                        let probability = select(seen, (scores[index] * scale - log_sums[r]).exp(), 0f32);
                        grads[index] = probability * (grads[index] - deltas[r]) * scale;
                    }
                }
            }
            add_product::<S, V, W>(&grads, &keys, pitch, groups, &mut sums, &lane, plan);
        }
        sync_cube();
        key += STRIP;
    }

    #[unroll]
    for r in 0..2usize {
        let at = row + r * COLUMNS;
        if at < sequence {
            let line = ((batch * sequence + at) * heads.heads + head) * width;
            store_row::<F, N>(grad_query, line, width, groups, 1f32, &sums, r, &lane, plan);
        }
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn key_grad_kernel<F: Numeric, S: Numeric, N: Size, V: Size, W: Size>(
    query: &[Vector<F, N>],
    key_value: &[Vector<F, N>],
    shared_key: &[Vector<F, N>],
    log_sum: &[f32],
    delta: &[f32],
    grad: &[Vector<F, N>],
    grad_key_value: &mut [Vector<F, N>],
    grad_shared: &mut [f32],
    starts: &[u32],
    sequence: usize,
    scale: f32,
    #[comptime] plan: Plan,
    #[define(F, S)] _types: [ElemType; 2],
) {
    let heads = comptime!(plan.heads);
    let (width, groups, value_groups) = comptime!((heads.width(), plan.groups(), plan.value_groups()));
    let (pitch, value_pitch) = comptime!((plan.pitch(), plan.value_pitch()));
    let pair = comptime!(heads.own + heads.value);
    let (batch, key_head) = (CUBE_POS_Z as usize, CUBE_POS_Y as usize);
    let first = CUBE_POS_X as usize * TILE;
    let lane = Lane::new();
    let row = first + lane.plane * ROWS + lane.g;

    let mut queries = Shared::<[Vector<S, V>]>::new_slice(comptime!(STRIP * pitch));
    let mut outputs = Shared::<[Vector<S, V>]>::new_slice(comptime!(STRIP * value_pitch));
    let mut key_sums = zeros(comptime!(groups * plan.chunk * VALUES));
    let mut value_sums = zeros(comptime!(value_groups * plan.chunk * VALUES));

    let last = min(first + TILE, sequence) - 1; // the last key of the tile
    for member in 0..comptime!(heads.heads / heads.key_heads) {
        let head = key_head * comptime!(heads.heads / heads.key_heads) + member;
        let head_at = batch * sequence * heads.heads + head;
        let mut from = first;
        let mut seen = true;
        while seen {
            load_strip::<F, S, N, V>(
                &mut queries,
                query,
                head_at * width,
                comptime!(heads.heads * width),
                from,
                sequence,
                width,
                groups,
            );
            load_strip::<F, S, N, V>(
                &mut outputs,
                grad,
                head_at * heads.value,
                comptime!(heads.heads * heads.value),
                from,
                sequence,
                heads.value,
                value_groups,
            );
            sync_cube();
            // Else all keys of the plane are after the queries of the strip.
            if first + lane.plane * ROWS < from + STRIP {
                let mut scores = zeros(comptime!(FRAGMENTS * VALUES));
                let mut grads = zeros(comptime!(FRAGMENTS * VALUES));
                #[unroll]
                for group in 0..groups {
                    let mut left = Array::<Vector<S, V>>::new(VALUES);
                    #[unroll]
                    for r in 0..2usize {
                        #[unroll]
                        for half in 0..2usize {
                            let column = group * comptime!(plan.group()) + (2 * lane.t + half) * V::value();
                            let at = row + r * COLUMNS;
                            left[comptime!(r * 2 + half)] = key_chunk::<F, S, N, V>(
                                key_value, shared_key, batch, key_head, at, sequence, column, plan,
                            );
                        }
                    }
                    add_scores::<S, V, W>(&left, 0usize, &queries, pitch, group, &mut scores, &lane, plan);
                }
                let line = (batch * sequence * heads.key_heads + key_head) * pair + heads.own;
                let step = comptime!(heads.key_heads * pair);
                #[unroll]
                for group in 0..value_groups {
                    let left =
                        rows_of::<F, S, N, V>(key_value, line, step, row, sequence, heads.value, group, &lane, plan);
                    add_scores::<S, V, W>(&left, 0usize, &outputs, value_pitch, group, &mut grads, &lane, plan);
                }
                #[unroll]
                for fragment in 0..FRAGMENTS {
                    #[unroll]
                    for e in 0..2usize {
                        let at = from + fragment * COLUMNS + 2 * lane.t + e;
                        let known = min(at, sequence - 1);
                        let first_key = start_of(starts, batch, at, sequence, heads);
                        let log_sum = log_sum[(batch * heads.heads + head) * sequence + known];
                        let delta = delta[(batch * sequence + known) * heads.heads + head];
                        #[unroll]
                        for r in 0..2usize {
                            let index = comptime!(fragment * VALUES + r * 2 + e);
                            let to = row + r * COLUMNS;
                            let seen = to <= at && to >= first_key && at < sequence;
                            let probability = select(seen, (scores[index] * scale - log_sum).exp(), 0f32);
                            scores[index] = probability;
                            grads[index] = probability * (grads[index] - delta) * scale;
                        }
                    }
                }
                add_product::<S, V, W>(&scores, &outputs, value_pitch, value_groups, &mut value_sums, &lane, plan);
                add_product::<S, V, W>(&grads, &queries, pitch, groups, &mut key_sums, &lane, plan);
            }
            sync_cube();
            from += STRIP;
            // If the first query of a strip does not see these keys, no later query does.
            seen = false;
            if from < sequence {
                seen = start_of(starts, batch, from, sequence, heads) <= last;
            }
        }
    }

    #[unroll]
    for r in 0..2usize {
        let at = row + r * COLUMNS;
        if at < sequence {
            let line = ((batch * sequence + at) * heads.key_heads + key_head) * pair;
            store_row::<F, N>(grad_key_value, line, heads.own, groups, 1f32, &key_sums, r, &lane, plan);
            let line = line + heads.own;
            store_row::<F, N>(grad_key_value, line, heads.value, value_groups, 1f32, &value_sums, r, &lane, plan);
            if comptime!(heads.shared > 0) {
                let part = ((batch * heads.key_heads + key_head) * sequence + at) * heads.shared;
                store_shared(grad_shared, part, groups, &key_sums, r, &lane, plan);
            }
        }
    }
}

/// The place of a unit: its plane, and `g` and `t` as in the description of the module.
#[derive(CubeType)]
struct Lane {
    plane: usize,
    g: usize,
    t: usize,
}

#[cube]
impl Lane {
    fn new() -> Lane {
        let lane = UNIT_POS as usize % PLANE;
        Lane { plane: UNIT_POS as usize / PLANE, g: lane / 4, t: lane % 4 }
    }
}

/// The chunk of a row from column `column`; `line` is where the row begins. Zero outside.
#[cube]
fn chunk_of<F: Numeric, S: Numeric, N: Size, V: Size>(
    tensor: &[Vector<F, N>],
    line: usize,
    column: usize,
    #[comptime] width: usize,
    inside: bool,
) -> Vector<S, V> {
    let (size, whole) = (N::value(), V::value());
    let mut values = Array::<S>::new(whole);
    #[unroll]
    for piece in 0..comptime!(whole / size) {
        let to = column + comptime!(piece * size);
        let mut read = Vector::<F, N>::new(F::from_int(0));
        if inside && to < width {
            read = tensor[(line + to) / size];
        }
        keep::<F, S, N>(&mut values, comptime!(piece * size), read);
    }
    chunk_from::<S, V>(&values)
}

/// [`chunk_of`] for a key, which is the part of its key head and the part of all.
#[cube]
fn key_chunk<F: Numeric, S: Numeric, N: Size, V: Size>(
    key_value: &[Vector<F, N>],
    shared_key: &[Vector<F, N>],
    batch: usize,
    key_head: usize,
    at: usize,
    sequence: usize,
    column: usize,
    #[comptime] plan: Plan,
) -> Vector<S, V> {
    let heads = comptime!(plan.heads);
    let (size, whole) = (N::value(), V::value());
    let position = batch * sequence + at;
    let mut values = Array::<S>::new(whole);
    #[unroll]
    for piece in 0..comptime!(whole / size) {
        let to = column + comptime!(piece * size);
        let mut read = Vector::<F, N>::new(F::from_int(0));
        if at < sequence {
            if to < heads.own {
                let line = (position * heads.key_heads + key_head) * comptime!(heads.own + heads.value);
                read = key_value[(line + to) / size];
            }
            // Never true without a shared key, whose buffer is then that of the query.
            if to >= heads.own && to < comptime!(heads.width()) {
                read = shared_key[(position * heads.shared + to - heads.own) / size];
            }
        }
        keep::<F, S, N>(&mut values, comptime!(piece * size), read);
    }
    chunk_from::<S, V>(&values)
}

/// Puts a vector's values from index `at` of an array.
#[cube]
fn keep<F: Numeric, S: Numeric, N: Size>(values: &mut Array<S>, #[comptime] at: usize, read: Vector<F, N>) {
    #[unroll]
    for e in 0..N::value() {
        values[comptime!(at + e)] = S::cast_from(read.extract(e));
    }
}

/// The values of an array as a vector.
#[cube]
fn chunk_from<S: Numeric, V: Size>(values: &Array<S>) -> Vector<S, V> {
    let mut chunk = Vector::<S, V>::new(values[0usize]);
    #[unroll]
    for e in 1..V::value() {
        chunk.insert(e, values[e]);
    }
    chunk
}

/// The chunks of a group of the lane's two rows, for [`add_scores`]. Row `at` of the tensor begins at `line + at * step`.
#[cube]
fn rows_of<F: Numeric, S: Numeric, N: Size, V: Size>(
    tensor: &[Vector<F, N>],
    line: usize,
    #[comptime] step: usize,
    row: usize,
    sequence: usize,
    #[comptime] width: usize,
    #[comptime] group: usize,
    lane: &Lane,
    #[comptime] plan: Plan,
) -> Array<Vector<S, V>> {
    let mut chunks = Array::<Vector<S, V>>::new(VALUES);
    #[unroll]
    for r in 0..2usize {
        #[unroll]
        for half in 0..2usize {
            let at = row + r * COLUMNS;
            let column = comptime!(group * plan.group()) + (2 * lane.t + half) * V::value();
            chunks[comptime!(r * 2 + half)] =
                chunk_of::<F, S, N, V>(tensor, line + at * step, column, width, at < sequence);
        }
    }
    chunks
}

/// Fills a strip with the rows `from..`. Row `at` of the tensor begins at `line + at * step`.
#[cube]
fn load_strip<F: Numeric, S: Numeric, N: Size, V: Size>(
    strip: &mut Shared<[Vector<S, V>]>,
    tensor: &[Vector<F, N>],
    line: usize,
    #[comptime] step: usize,
    from: usize,
    sequence: usize,
    #[comptime] width: usize,
    #[comptime] groups: usize,
) {
    let chunks = comptime!(groups * CHUNKS);
    #[unroll]
    for round in 0..comptime!(STRIP * chunks / UNITS) {
        let index = UNIT_POS as usize + comptime!(round * UNITS);
        let (row, chunk) = (index / chunks, index % chunks);
        let at = from + row;
        strip[row * comptime!(chunks + 1) + chunk] =
            chunk_of::<F, S, N, V>(tensor, line + at * step, chunk * V::value(), width, at < sequence);
    }
}

/// [`load_strip`] for keys.
#[cube]
fn load_keys<F: Numeric, S: Numeric, N: Size, V: Size>(
    strip: &mut Shared<[Vector<S, V>]>,
    key_value: &[Vector<F, N>],
    shared_key: &[Vector<F, N>],
    batch: usize,
    key_head: usize,
    from: usize,
    sequence: usize,
    #[comptime] plan: Plan,
) {
    let chunks = comptime!(plan.groups() * CHUNKS);
    #[unroll]
    for round in 0..comptime!(STRIP * chunks / UNITS) {
        let index = UNIT_POS as usize + comptime!(round * UNITS);
        let (row, chunk) = (index / chunks, index % chunks);
        strip[row * comptime!(chunks + 1) + chunk] = key_chunk::<F, S, N, V>(
            key_value,
            shared_key,
            batch,
            key_head,
            from + row,
            sequence,
            chunk * V::value(),
            plan,
        );
    }
}

/// Where the scores of a lane have element `e` of a register of the left factor, at a step of the second product.
fn score_at(step: usize, register: usize, e: usize, size: usize) -> usize {
    let depth = register / 2 * size + e;
    let fragment = step * size + depth / 2;
    fragment * VALUES + register % 2 * 2 + depth % 2
}

/// A register of values of a chunk, from value `at`.
#[cube]
fn part_of<S: Numeric, V: Size, W: Size>(chunk: Vector<S, V>, #[comptime] at: usize) -> Vector<S, W> {
    let mut values = Vector::<S, W>::new(chunk.extract(at));
    #[unroll]
    for e in 1..W::value() {
        values.insert(e, chunk.extract(comptime!(at + e)));
    }
    values
}

/// Adds to the scores of the plane's rows and a strip the products over a group of columns: `left x strip^T`. The chunks of `left` are
/// those from `at`, two for each row.
#[cube]
fn add_scores<S: Numeric, V: Size, W: Size>(
    left: &Array<Vector<S, V>>,
    #[comptime] at: usize,
    strip: &Shared<[Vector<S, V>]>,
    #[comptime] pitch: usize,
    #[comptime] group: usize,
    scores: &mut Array<f32>,
    lane: &Lane,
    #[comptime] plan: Plan,
) {
    let size = W::value();
    #[unroll]
    for half in 0..2usize {
        let mut right = Array::<Vector<S, V>>::new(FRAGMENTS);
        #[unroll]
        for fragment in 0..FRAGMENTS {
            let row = fragment * COLUMNS + lane.g;
            right[fragment] = strip[row * pitch + comptime!(group * CHUNKS) + 2 * lane.t + half];
        }
        // A chunk has the depths of two steps.
        #[unroll]
        for step in 0..2usize {
            let mut a = Array::<Vector<S, W>>::new(4usize);
            #[unroll]
            for register in 0..4usize {
                let from = left[comptime!(at + register % 2 * 2 + half)];
                a[register] = part_of::<S, V, W>(from, comptime!((2 * step + register / 2) * size));
            }
            #[unroll]
            for fragment in 0..FRAGMENTS {
                let mut b = Array::<Vector<S, W>>::new(2usize);
                #[unroll]
                for register in 0..2usize {
                    b[register] = part_of::<S, V, W>(right[fragment], comptime!((2 * step + register) * size));
                }
                multiply::<S, W>(&a, &b, scores, fragment, plan);
            }
        }
    }
}

/// Adds `scores x strip` to the sums of the plane's rows.
#[cube]
fn add_product<S: Numeric, V: Size, W: Size>(
    scores: &Array<f32>,
    strip: &Shared<[Vector<S, V>]>,
    #[comptime] pitch: usize,
    #[comptime] groups: usize,
    sums: &mut Array<f32>,
    lane: &Lane,
    #[comptime] plan: Plan,
) {
    let size = W::value();
    #[unroll]
    for step in 0..comptime!(STRIP / plan.step) {
        // Scores of the columns `2t`, `2t + 1` of one fragment (TF32), or of two (halves), are depths of the left factor.
        let mut a = Array::<Vector<S, W>>::new(4usize);
        #[unroll]
        for register in 0..4usize {
            let first = comptime!(score_at(step, register, 0, size));
            let mut values = Vector::<S, W>::new(S::cast_from(scores[first]));
            #[unroll]
            for e in 1..size {
                values.insert(e, S::cast_from(scores[comptime!(score_at(step, register, e, size))]));
            }
            a[register] = values;
        }
        #[unroll]
        for group in 0..groups {
            let mut rows = Array::<Vector<S, V>>::new(comptime!(2 * size));
            #[unroll]
            for depth in 0..comptime!(2 * size) {
                let row = comptime!(step * plan.step + depth % 2 + depth / 2 * COLUMNS) + 2 * lane.t;
                rows[depth] = strip[row * pitch + comptime!(group * CHUNKS) + lane.g];
            }
            #[unroll]
            for column in 0..plan.chunk {
                let mut b = Array::<Vector<S, W>>::new(2usize);
                #[unroll]
                for register in 0..2usize {
                    let first = rows[comptime!(register * size)].extract(column);
                    let mut values = Vector::<S, W>::new(first);
                    #[unroll]
                    for e in 1..size {
                        values.insert(e, rows[comptime!(register * size + e)].extract(column));
                    }
                    b[register] = values;
                }
                multiply::<S, W>(&a, &b, sums, comptime!(group * plan.chunk + column), plan);
            }
        }
    }
}

/// `sums += a x b` for one fragment.
#[cube]
fn multiply<S: Numeric, W: Size>(
    a: &Array<Vector<S, W>>,
    b: &Array<Vector<S, W>>,
    sums: &mut Array<f32>,
    #[comptime] fragment: usize,
    #[comptime] plan: Plan,
) {
    let definition = MmaDefinition::<S, S, f32>::new(ROWS, COLUMNS, plan.step);
    let size!(P) = 2usize;
    let mut c = Array::<Vector<f32, P>>::new(2usize);
    #[unroll]
    for r in 0..2usize {
        let mut values = Vector::<f32, P>::new(sums[comptime!(fragment * VALUES + r * 2)]);
        values.insert(1usize, sums[comptime!(fragment * VALUES + r * 2 + 1)]);
        c[r] = values;
    }
    let d = definition.execute(a, b, &c);
    #[unroll]
    for r in 0..2usize {
        sums[comptime!(fragment * VALUES + r * 2)] = d[r].extract(0usize);
        sums[comptime!(fragment * VALUES + r * 2 + 1)] = d[r].extract(1usize);
    }
}

/// Writes row `r` of the lane's sums, times `factor`, to the line of a tensor.
#[cube]
fn store_row<F: Numeric, N: Size>(
    out: &mut [Vector<F, N>],
    line: usize,
    #[comptime] width: usize,
    #[comptime] groups: usize,
    factor: f32,
    sums: &Array<f32>,
    #[comptime] r: usize,
    lane: &Lane,
    #[comptime] plan: Plan,
) {
    let size = N::value();
    #[unroll]
    for group in 0..groups {
        #[unroll]
        for e in 0..2usize {
            let column = comptime!(group * plan.group()) + (2 * lane.t + e) * plan.chunk;
            #[unroll]
            for piece in 0..comptime!(plan.chunk / size) {
                let to = column + comptime!(piece * size);
                let fragment = comptime!(group * plan.chunk + piece * size);
                let first = sums[comptime!(fragment * VALUES + r * 2 + e)];
                let mut values = Vector::<F, N>::new(F::cast_from(first * factor));
                #[unroll]
                for at in 1..size {
                    let sum = sums[comptime!((fragment + at) * VALUES + r * 2 + e)];
                    values.insert(at, F::cast_from(sum * factor));
                }
                if to < width {
                    out[(line + to) / size] = values;
                }
            }
        }
    }
}

/// Writes the columns of the shared part of row `r` of the lane's sums; `line` is where this part begins.
#[cube]
fn store_shared(
    out: &mut [f32],
    line: usize,
    #[comptime] groups: usize,
    sums: &Array<f32>,
    #[comptime] r: usize,
    lane: &Lane,
    #[comptime] plan: Plan,
) {
    let heads = comptime!(plan.heads);
    #[unroll]
    for group in 0..groups {
        #[unroll]
        for e in 0..2usize {
            #[unroll]
            for at in 0..plan.chunk {
                let to = comptime!(group * plan.group() + at) + (2 * lane.t + e) * plan.chunk;
                if to >= heads.own && to < comptime!(heads.width()) {
                    out[line + to - heads.own] = sums[comptime!((group * plan.chunk + at) * VALUES + r * 2 + e)];
                }
            }
        }
    }
}

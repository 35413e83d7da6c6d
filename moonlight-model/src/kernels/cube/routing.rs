//! The choice of experts, its counts, and the order of the rows, all on the device, so that the host does not wait in a layer of experts.

use burn::backend::Cube;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::launch;
use super::reduce::{UNITS, cube_per_row, row_of_cube};
use super::tensor::{assert_dtype, assert_shape, buffers, elem_type, empty, int_buffer, same_device, to_int_tensor};
#[cfg(all(test, feature = "kernel-text"))]
use super::text::Dialect;
use crate::config::limits::MAX_EXPERTS;
use crate::kernels::group_layout::{Section, TILE_ROWS, most_tiles, packed_len};
use crate::kernels::{RoutingKernel, reference};
use crate::moe::RoutingRule;
use crate::moe::shape::TopkMethod;

impl RoutingKernel for Cube {
    fn choose_experts_forward(
        scores: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
        rule: &RoutingRule,
    ) -> IntTensor<Self> {
        let found = match &bias {
            None => buffers([&scores]).map(|[scores]| (scores, None)),
            Some(bias) => buffers([&scores, bias]).map(|[scores, bias]| (scores, Some(bias))),
        };
        match found {
            Some((scores, bias)) if scores.dtype == DType::F32 => to_int_tensor(choose(scores, bias, rule)),
            _ => reference::choose_experts_forward::<Self>(scores, bias, rule),
        }
    }

    fn count_choices_forward(
        choices: IntTensor<Self>,
        counted: Option<IntTensor<Self>>,
        groups: usize,
        sections: usize,
    ) -> IntTensor<Self> {
        match (int_buffer(&choices), counted.as_ref().map(int_buffer)) {
            (Some(choices), None) => to_int_tensor(count(choices, None, groups, sections)),
            (Some(choices), Some(Some(counted))) => to_int_tensor(count(choices, Some(counted), groups, sections)),
            _ => reference::count_choices_forward::<Self>(choices, counted, groups, sections),
        }
    }

    fn sort_choices_forward(choices: IntTensor<Self>, counts: IntTensor<Self>) -> IntTensor<Self> {
        match (int_buffer(&choices), int_buffer(&counts)) {
            (Some(choices), Some(counts)) => to_int_tensor(sort(choices, counts)),
            _ => reference::sort_choices_forward::<Self>(choices, counts),
        }
    }
}

/// The `k` experts of each token, i32 `[tokens, k]`.
fn choose(scores: CubeTensor, bias: Option<CubeTensor>, rule: &RoutingRule) -> CubeTensor {
    let RoutingRule { experts, k, groups, groups_per_token, .. } = *rule;
    let scores = into_contiguous(scores);
    let tokens = scores.meta.shape()[0];
    assert_shape(&scores, [tokens, experts]);
    assert!(experts <= MAX_EXPERTS && groups > 0 && experts.is_multiple_of(groups), "{rule:?} has no kernel");
    let biased = bias.is_some();
    if let Some(bias) = &bias {
        assert_shape(bias, [experts]);
        assert_dtype(bias, DType::F32);
    }
    // A kernel needs a buffer for each argument; without a bias this one is not read.
    let bias = bias.map_or_else(|| empty(&scores, [1], DType::F32), into_contiguous);
    let out = empty(&scores, [tokens, k], DType::I32);
    let limit = match rule.method {
        _ if groups == 1 => GroupLimit::None,
        TopkMethod::Greedy => GroupLimit::None,
        TopkMethod::NoauxTc => GroupLimit::ByTwoBest,
        TopkMethod::GroupLimitedGreedy => GroupLimit::ByBest,
    };
    // SAFETY: the kernel reads scores and bias of experts below `experts` and tokens below `tokens`, and writes `k` choices of each
    // token. Its shared memory has room for `MAX_EXPERTS`, which experts and groups do not exceed, as asserted. The tensors
    // have these shapes and are contiguous.
    unsafe {
        launch!(
            choose_kernel,
            cube_per_row(tokens),
            [scores, bias, out],
            tokens,
            experts,
            k,
            groups,
            groups_per_token,
            biased,
            limit
        );
    }
    out
}

/// The choices of each group in each section, i32 `[sections, groups]`.
fn count(choices: CubeTensor, counted: Option<CubeTensor>, groups: usize, sections: usize) -> CubeTensor {
    let choices = into_contiguous(choices);
    let [tokens, k] = choices.meta.shape().dims();
    assert_shape(&choices, [tokens, k]);
    assert!(tokens.is_multiple_of(sections), "{sections} sections do not divide {tokens} tokens");
    let masked = counted.is_some();
    if let Some(counted) = &counted {
        assert_shape(counted, [tokens]);
        same_device(counted, &choices);
    }
    let counted = counted.map_or_else(|| empty(&choices, [1], DType::I32), into_contiguous);
    let out = empty(&choices, [sections, groups], DType::I32);
    let (cubes, slots) = (sections * groups, tokens / sections * k);
    let dtypes = [elem_type(&choices), elem_type(&counted)];
    // SAFETY: a cube reads the slots of its section, which are within the choices because the sections divide the tokens, and the
    // tokens of these slots, and writes the count with its own index. The tensors have these shapes and are contiguous.
    unsafe {
        launch!(count_kernel, cube_per_row(cubes), [choices, counted, out], cubes, groups, slots, k, masked, dtypes);
    }
    out
}

/// The buffer of a layout: see [`Section`].
fn sort(choices: CubeTensor, counts: CubeTensor) -> CubeTensor {
    let (choices, counts) = (into_contiguous(choices), into_contiguous(counts));
    let [tokens, k] = choices.meta.shape().dims();
    let [_, groups] = counts.meta.shape().dims();
    assert_shape(&choices, [tokens, k]);
    assert_shape(&counts, [1, groups]);
    assert_dtype(&counts, DType::I32);
    same_device(&counts, &choices);
    let rows = tokens * k;
    assert!(i32::try_from(rows).is_ok(), "{rows} rows are more than an i32 can count");
    let out = empty(&choices, [packed_len(groups, rows)], DType::I32);
    let starts = |section: Section| section.start(groups, rows);
    // SAFETY: `counts` are those of `choices` (this module makes both), so that offsets add up to `rows`, each slot has one row, and
    // the tiles of all groups are at most `most_tiles`. A choice beyond the groups, which only a caller could bring in, belongs to the last group, as
    // in `count_kernel`. The buffer has the length of all sections.
    unsafe {
        launch!(
            sort_kernel,
            cube_per_row(groups),
            [choices, counts, out],
            groups,
            rows,
            k,
            starts(Section::TokenOfRow),
            starts(Section::RowOfSlot),
            starts(Section::Tiles),
            most_tiles(groups, rows),
            elem_type(&choices)
        );
    }
    out
}

/// Whether the experts of a token come from its best groups alone, and what a group is ranked by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum GroupLimit {
    None,
    /// The sum of its two best experts.
    ByTwoBest,
    /// Its best expert.
    ByBest,
}

/// The rank of minus infinity, which masked experts have.
const MASKED: u32 = 0x007F_FFFF;
/// The rank of NaN.
const NAN: u32 = 1;

/// A score as an integer, so that a comparison does not depend on how a device treats NaN: larger for larger scores, [`NAN`] below
/// all numbers. 0 is left for what was chosen already.
#[cube]
fn rank_of(score: f32) -> u32 {
    let bits = u32::reinterpret(score);
    let size = bits & 0x7FFF_FFFFu32;
    let mut rank = bits | 0x8000_0000u32;
    if bits != size {
        rank = !bits;
    }
    if size == 0u32 {
        rank = 0x8000_0000u32.runtime();
    }
    if size > 0x7F80_0000u32 {
        rank = NAN.runtime();
    }
    rank
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn choose_kernel(
    scores: &[f32],
    bias: &[f32],
    choices: &mut [i32],
    tokens: usize,
    experts: usize,
    k: usize,
    groups: usize,
    groups_per_token: usize,
    #[comptime] biased: bool,
    #[comptime] limit: GroupLimit,
) {
    let token = row_of_cube(tokens);
    let unit = UNIT_POS as usize;
    let mut ranks = Shared::<[u32]>::new_slice(MAX_EXPERTS);
    let mut best_ranks = Shared::<[u32]>::new_slice(UNITS);
    let mut best_places = Shared::<[u32]>::new_slice(UNITS);
    let mut expert = unit;
    while expert < experts {
        let mut score = scores[token * experts + expert];
        if comptime!(biased) {
            score += bias[expert];
        }
        ranks[expert] = rank_of(score);
        expert += UNITS;
    }
    sync_cube();
    if comptime!(limit != GroupLimit::None) {
        let mut group_ranks = Shared::<[u32]>::new_slice(MAX_EXPERTS);
        let size = experts / groups;
        let mut group = unit;
        while group < groups {
            group_ranks[group] = rank_of_group(scores, bias, token * experts, group * size, size, biased, limit);
            group += UNITS;
        }
        sync_cube();
        // The groups that are kept have the rank 0 afterwards.
        for _ in 0..groups_per_token {
            let _group = take_best(&mut group_ranks, &mut best_ranks, &mut best_places, groups);
        }
        let mut expert = unit;
        while expert < experts {
            if group_ranks[expert / size] != 0u32 {
                ranks[expert] = MASKED.runtime();
            }
            expert += UNITS;
        }
        sync_cube();
    }
    for choice in 0..k {
        let best = take_best(&mut ranks, &mut best_ranks, &mut best_places, experts);
        if unit == 0 {
            choices[token * k + choice] = i32::cast_from(best);
        }
    }
}

/// The rank of a group of `size` experts from `first` on; that of NaN if one of the scores is.
#[cube]
fn rank_of_group(
    scores: &[f32],
    bias: &[f32],
    line: usize,
    first: usize,
    size: usize,
    #[comptime] biased: bool,
    #[comptime] limit: GroupLimit,
) -> u32 {
    let mut best = 0f32;
    let mut best_rank = 0u32;
    let mut second = 0f32;
    let mut second_rank = 0u32;
    let mut has_nan = false;
    for at in 0..size {
        let mut score = scores[line + first + at];
        if comptime!(biased) {
            score += bias[first + at];
        }
        let rank = rank_of(score);
        if rank == NAN {
            has_nan = true;
        }
        if rank > best_rank {
            second = best;
            second_rank = best_rank;
            best = score;
            best_rank = rank;
        } else if rank > second_rank {
            second = score;
            second_rank = rank;
        }
    }
    let mut rank = best_rank;
    if comptime!(limit == GroupLimit::ByTwoBest) {
        rank = rank_of(best + second);
    }
    if has_nan {
        rank = NAN.runtime();
    }
    rank
}

/// The index of the largest of the first `count` ranks, of equal ones the lowest index; its rank is then 0. All units get the index.
#[cube]
fn take_best(
    ranks: &mut Shared<[u32]>,
    best_ranks: &mut Shared<[u32]>,
    best_places: &mut Shared<[u32]>,
    count: usize,
) -> u32 {
    let unit = UNIT_POS as usize;
    let mut rank = 0u32;
    let mut place = 0u32;
    let mut at = unit;
    while at < count {
        if ranks[at] > rank {
            rank = ranks[at];
            place = u32::cast_from(at);
        }
        at += UNITS;
    }
    best_ranks[unit] = rank;
    best_places[unit] = place;
    sync_cube();
    let mut half = comptime!(UNITS / 2).runtime();
    while half > 0 {
        if unit < half {
            let (own, other) = (best_ranks[unit], best_ranks[unit + half]);
            let (own_place, other_place) = (best_places[unit], best_places[unit + half]);
            if other > own || (other == own && other_place < own_place) {
                best_ranks[unit] = other;
                best_places[unit] = other_place;
            }
        }
        sync_cube();
        half /= 2;
    }
    let place = best_places[0];
    if unit == 0 {
        ranks[place as usize] = 0u32;
    }
    // All units must have read the place before the next search writes it, and see the rank that was taken.
    sync_cube();
    place
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn count_kernel<I: Int, M: Int>(
    choices: &[I],
    counted: &[M],
    out: &mut [i32],
    cubes: usize,
    groups: usize,
    slots: usize,
    k: usize,
    #[comptime] masked: bool,
    #[define(I, M)] _dtypes: [ElemType; 2],
) {
    let cube = row_of_cube(cubes);
    let (first, group) = (cube / groups * slots, cube % groups);
    let mut scratch = Shared::<[u32]>::new_slice(UNITS);
    let mut count = 0u32;
    let mut at = UNIT_POS as usize;
    while at < slots {
        let slot = first + at;
        let mut counts = group_of::<I>(choices[slot], groups) == group;
        if comptime!(masked) {
            counts = counts && counted[slot / k] != M::from_int(0);
        }
        count += u32::cast_from(counts);
        at += UNITS;
    }
    let (_before, count) = sums_of_units(&mut scratch, count);
    if UNIT_POS == 0 {
        out[cube] = i32::cast_from(count);
    }
}

/// The group of a choice; what is not a group is in the last.
#[cube]
fn group_of<I: Int>(choice: I, groups: usize) -> usize {
    min(usize::cast_from(choice), groups - 1)
}

/// The sum of the values of the units before this one, and of all units.
#[cube]
fn sums_of_units(scratch: &mut Shared<[u32]>, value: u32) -> (u32, u32) {
    let unit = UNIT_POS as usize;
    scratch[unit] = value;
    sync_cube();
    // The sum of twice as many values in each round (Hillis and Steele, 1986).
    let mut distance = 1usize;
    while distance < UNITS {
        let mut sum = scratch[unit];
        if unit >= distance {
            sum += scratch[unit - distance];
        }
        sync_cube();
        scratch[unit] = sum;
        sync_cube();
        distance *= 2;
    }
    let (up_to, all) = (scratch[unit], scratch[UNITS - 1]);
    // No unit may write `scratch` again before all have read it.
    sync_cube();
    (up_to - value, all)
}

/// One cube for each group. Each unit goes through consecutive slots twice, to count and to write, so that rows of a group are in the
/// order of the tokens.
#[cube(launch_unchecked, address_type = "dynamic")]
fn sort_kernel<I: Int>(
    choices: &[I],
    counts: &[i32],
    out: &mut [u32],
    groups: usize,
    rows: usize,
    k: usize,
    token_of_row: usize,
    row_of_slot: usize,
    tiles: usize,
    most_tiles: usize,
    #[define(I)] _dtype: ElemType,
) {
    let group = row_of_cube(groups);
    let unit = UNIT_POS as usize;
    let mut scratch = Shared::<[u32]>::new_slice(UNITS);
    // Rows and tiles of the groups before this one.
    let mut rows_before = 0u32;
    let mut tiles_before = 0u32;
    let mut at = unit;
    while at < group {
        let count = u32::cast_from(counts[at]);
        rows_before += count;
        tiles_before += count.div_ceil(TILE_ROWS as u32);
        at += UNITS;
    }
    let (_before, first_row) = sums_of_units(&mut scratch, rows_before);
    let (_before, first_tile) = sums_of_units(&mut scratch, tiles_before);
    let end_row = first_row + u32::cast_from(counts[group]);

    let share = rows.div_ceil(UNITS);
    let (start, end) = (min(unit * share, rows), min((unit + 1) * share, rows));
    let mut own = 0u32;
    let mut slot = start;
    while slot < end {
        own += u32::cast_from(group_of::<I>(choices[slot], groups) == group);
        slot += 1;
    }
    let (before, _all) = sums_of_units(&mut scratch, own);
    let mut row = (first_row + before) as usize;
    for slot in start..end {
        if group_of::<I>(choices[slot], groups) == group {
            out[token_of_row + row] = u32::cast_from(slot / k);
            out[row_of_slot + slot] = u32::cast_from(row);
            row += 1;
        }
    }

    let own_tiles = u32::cast_from(counts[group]).div_ceil(TILE_ROWS as u32);
    let mut tile = unit as u32;
    while tile < own_tiles {
        let place = tiles + 3 * (first_tile + tile) as usize;
        out[place] = group as u32;
        out[place + 1] = first_row + tile * TILE_ROWS as u32;
        out[place + 2] = end_row;
        tile += UNITS as u32;
    }
    if unit == 0 {
        out[group] = first_row;
    }
    // The last group also writes the end, and the tiles that no group needs.
    if group == groups - 1 {
        if unit == 0 {
            out[groups] = end_row;
        }
        let mut tile = (first_tile + own_tiles) as usize + unit;
        while tile < most_tiles {
            let place = tiles + 3 * tile;
            out[place] = 0u32;
            out[place + 1] = 0u32;
            out[place + 2] = 0u32;
            tile += UNITS;
        }
    }
}

/// The kernels of this file as text.
#[cfg(all(test, feature = "kernel-text"))]
pub(super) fn kernels(on: &Dialect) -> Vec<Box<dyn CubeKernel>> {
    use super::text::{buffer, kernel};
    let mut list = Vec::new();
    for limit in [GroupLimit::None, GroupLimit::ByTwoBest, GroupLimit::ByBest] {
        for biased in [false, true] {
            list.push(kernel!(
                on,
                UNITS,
                choose_kernel::ChooseKernel,
                buffer(),
                buffer(),
                buffer(),
                (),
                (),
                (),
                (),
                (),
                biased,
                limit
            ));
        }
    }
    for masked in [false, true] {
        list.push(kernel!(
            on,
            UNITS,
            count_kernel::CountKernel,
            buffer(),
            buffer(),
            buffer(),
            (),
            (),
            (),
            (),
            masked,
            [on.int; 2]
        ));
    }
    list.push(kernel!(
        on,
        UNITS,
        sort_kernel::SortKernel,
        buffer(),
        buffer(),
        buffer(),
        (),
        (),
        (),
        (),
        (),
        (),
        (),
        on.int
    ));
    list
}

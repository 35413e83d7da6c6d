//! One cube to a row: how the rows are spread over cubes, and how the units of a cube come to one number.

use cubecl::prelude::*;

/// Units of a cube that works on a row.
pub(super) const UNITS: usize = 128;

/// A cube for each row. WebGPU counts to 65,535 in each direction, so there may be more cubes than rows.
pub(super) fn cube_per_row(rows: usize) -> (CubeCount, CubeDim) {
    let across = rows.clamp(1, 32_768);
    let count = CubeCount::Static(across as u32, rows.div_ceil(across) as u32, 1);
    (count, CubeDim::new_1d(UNITS as u32))
}

/// The row of this cube. Cubes beyond the last row do that one again, for all of a cube must meet where it waits.
#[cube]
pub(super) fn row_of_cube(rows: usize) -> usize {
    min(CUBE_POS, rows - 1)
}

/// How two numbers become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Reduction {
    Sum,
    Largest,
}

/// The sum of all units' numbers, for all units.
#[cube]
pub(super) fn sum_of_units(scratch: &mut Shared<[f32]>, value: f32) -> f32 {
    reduce_units(scratch, value, Reduction::Sum)
}

/// The largest of all units' numbers, for all units.
#[cube]
pub(super) fn largest_of_units(scratch: &mut Shared<[f32]>, value: f32) -> f32 {
    reduce_units(scratch, value, Reduction::Largest)
}

#[cube]
fn reduce_units(scratch: &mut Shared<[f32]>, value: f32, #[comptime] reduction: Reduction) -> f32 {
    let unit = UNIT_POS as usize;
    scratch[unit] = value;
    sync_cube();
    let mut half = comptime!(UNITS / 2).runtime();
    while half > 0 {
        if unit < half {
            let (own, other) = (scratch[unit], scratch[unit + half]);
            scratch[unit] = match comptime!(reduction) {
                Reduction::Sum => own + other,
                Reduction::Largest => max(own, other),
            };
        }
        sync_cube();
        half /= 2;
    }
    let reduced = scratch[0];
    sync_cube();
    reduced
}

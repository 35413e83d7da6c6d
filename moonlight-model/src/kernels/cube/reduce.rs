//! Kernels with one cube for each row: the assignment of rows to cubes, and reductions over the units of a cube.

use cubecl::prelude::*;

/// Units of a cube.
pub(super) const UNITS: usize = 128;

/// One cube for each row. WebGPU allows 65,535 cubes in a dimension, so many rows take two dimensions, which may have more cubes than
/// there are rows.
pub(super) fn cube_per_row(rows: usize) -> (CubeCount, CubeDim) {
    let across = rows.clamp(1, 32_768);
    let count = CubeCount::Static(across as u32, rows.div_ceil(across) as u32, 1);
    (count, CubeDim::new_1d(UNITS as u32))
}

/// The row of this cube. Surplus cubes repeat the last row and write the same values, because a unit must not leave a kernel before
/// its synchronization points.
#[cube]
pub(super) fn row_of_cube(rows: usize) -> usize {
    min(CUBE_POS, rows - 1)
}

/// The operation of a reduction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Reduction {
    Sum,
    Largest,
}

/// The sum over all units, returned to all units.
#[cube]
pub(super) fn sum_of_units(scratch: &mut Shared<[f32]>, value: f32) -> f32 {
    reduce_units(scratch, value, Reduction::Sum)
}

/// The maximum over all units, returned to all units.
#[cube]
pub(super) fn largest_of_units(scratch: &mut Shared<[f32]>, value: f32) -> f32 {
    reduce_units(scratch, value, Reduction::Largest)
}

/// A tree reduction in shared memory. Its order is fixed, so the result is the same in every run.
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
    // No unit may write `scratch` for the next reduction before all have read this one.
    sync_cube();
    reduced
}

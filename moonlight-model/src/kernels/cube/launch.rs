//! The macro `launch!`, which launches a kernel on contiguous tensors.

use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

/// `launch!(kernel, over, [tensors], others)` launches a kernel. `over` is the number of cubes and their size; the kernel's arguments
/// are the buffers of `tensors`, then `others`. It is as unsafe as the kernel's `launch_unchecked`: every index that the kernel
/// computes must be within its buffer, and the buffers must have the types that it reads.
macro_rules! launch {
    ($kernel:ident, $over:expr, [$first:ident $(, $tensor:ident)*] $(, $other:expr)+) => {{
        let (count, dim) = $over;
        $kernel::launch_unchecked(
            &$first.client,
            count,
            dim,
            $crate::kernels::cube::tensor::address_type_of(&[&$first $(, &$tensor)*]),
            $first.clone().into_buffer_arg(),
            $($tensor.clone().into_buffer_arg(),)*
            $($other),+
        )
    }};
}
pub(super) use launch;

/// One unit for each of `count` values.
pub(super) fn unit_per_value(like: &CubeTensor, count: usize) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new(&like.client, count);
    (calculate_cube_count_elemwise(&like.client, count, dim), dim)
}

//! How a kernel is launched on contiguous tensors.

use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

/// `launch!(kernel, over, [tensors], others)`: launches a kernel over `over`, its count of cubes and their size, on
/// tensors, of which it gets the buffers, and whatever else it takes after them. As unsafe as the kernel's own
/// `launch_unchecked`: every index that it computes must lie in its buffer, and the buffers must hold the types it reads.
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

/// A unit for each of `count` numbers.
pub(super) fn unit_per_value(like: &CubeTensor, count: usize) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new(&like.client, count);
    (calculate_cube_count_elemwise(&like.client, count, dim), dim)
}

//! Rotary embedding of the last dimensions of each head.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use rayon::prelude::*;

use super::dtype::Element;
use super::tensor::{by_dtype, dims, tensor_of, values, values_of, zeros};
use crate::kernels::{RotaryKernel, RotationSpec, reference};

impl RotaryKernel for Flex {
    fn rotate_forward(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: &RotationSpec,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [x] f32: [cos, sin],
            E => forward::<E>(&x, &cos, &sin, spec),
            reference::rotate_forward::<Self>(x, cos, sin, spec)
        )
    }
}

fn forward<E: Element>(x: &FlexTensor, cos: &FlexTensor, sin: &FlexTensor, spec: &RotationSpec) -> FlexTensor {
    let [batch, sequence, heads, width] = dims(x);
    let (x, cos, sin) = (values_of::<E>(x), values(cos), values(sin));
    let pairs = (width - spec.start) / 2;
    let mut out = zeros::<E>(x.len());
    let token = heads * width;
    out.par_chunks_mut(token)
        .zip(x.par_chunks(token).zip(cos.par_chunks(pairs).zip(sin.par_chunks(pairs))))
        .with_min_len(16) // tokens; one is too little work for a task
        .for_each(|(out, (x, (cos, sin)))| {
            for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                out[..spec.start].copy_from_slice(&x[..spec.start]);
                let (out, x) = (&mut out[spec.start..], &x[spec.start..]);
                for (pair, (&cos, &sin)) in cos.iter().zip(sin).enumerate() {
                    let (i, j) = if spec.interleave { (2 * pair, 2 * pair + 1) } else { (pair, pair + pairs) };
                    // Cos and sin are rounded before the products, as in transformers.
                    let (cos, sin) = (E::narrow(cos).wide(), E::narrow(sin).wide());
                    let (a, b) = (x[i].wide(), x[j].wide());
                    out[i] = E::narrow(a * cos - b * sin);
                    out[j] = E::narrow(b * cos + a * sin);
                }
            }
        });
    tensor_of(out, [batch, sequence, heads, width])
}

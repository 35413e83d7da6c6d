//! The rotary embedding, in place in each head.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::{RotationSpec, dims, tensor, values};

pub(super) fn forward(x: &FlexTensor, cos: &FlexTensor, sin: &FlexTensor, spec: &RotationSpec) -> FlexTensor {
    let [batch, sequence, heads, width] = dims(x);
    let (x, cos, sin) = (values(x), values(cos), values(sin));
    let pairs = (width - spec.start) / 2;
    let mut out = vec![0.0; x.len()];
    let token = heads * width;
    out.par_chunks_mut(token)
        .zip(x.par_chunks(token).zip(cos.par_chunks(pairs).zip(sin.par_chunks(pairs))))
        .with_min_len(16)
        .for_each(|(out, (x, (cos, sin)))| {
            for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                out[..spec.start].copy_from_slice(&x[..spec.start]);
                let (out, x) = (&mut out[spec.start..], &x[spec.start..]);
                for (pair, (&cos, &sin)) in cos.iter().zip(sin).enumerate() {
                    let (i, j) = if spec.interleave { (2 * pair, 2 * pair + 1) } else { (pair, pair + pairs) };
                    out[i] = x[i] * cos - x[j] * sin;
                    out[j] = x[j] * cos + x[i] * sin;
                }
            }
        });
    tensor(out, [batch, sequence, heads, width])
}

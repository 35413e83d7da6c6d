//! Causal attention by blocks of queries and keys, without a `[sequence, sequence]` tensor in the forward or backward pass.
//!
//! The forward pass is FlashAttention (arXiv 2205.14135): a cube takes some queries of one head, visits the keys that they see block by
//! block, and keeps a running maximum and sum for the softmax of each query. The backward pass computes the scores again from
//! the logarithms of the sums, once for the gradient of queries and once for that of keys and values, so that no two cubes
//! write the same value (FlashAttention-2, arXiv 2307.08691). Blocks of keys after a block of queries, or before its first
//! document, are not visited. Sums are in f32 for every dtype.
//!
//! There are two sets of kernels: `mma` multiplies on matrix units, `scalar` runs everywhere.

mod mma;
mod scalar;
#[cfg(all(test, feature = "kernel-text"))]
pub(super) use scalar::kernels;

use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Cube, TensorMetadata};
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::tensor::{assert_dtype, assert_shape, buffers, empty, to_f32, to_float_tensor, upload};
use crate::kernels::reference::{self, AttentionSaved};
use crate::kernels::{AttentionKernel, AttentionSpec, F32Matmul, f32_matmul};

impl AttentionKernel for Cube {
    fn attention_forward(
        query: FloatTensor<Self>,
        key_value: FloatTensor<Self>,
        shared_key: Option<FloatTensor<Self>>,
        spec: &AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        try_forward(&query, &key_value, shared_key.as_ref(), spec, Units::allowed_for(&query))
            .unwrap_or_else(|| reference::attention_forward::<Self>(query, key_value, shared_key, spec))
    }

    fn attention_grad(
        saved: AttentionSaved<Self>,
        output_grad: FloatTensor<Self>,
        spec: &AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, Option<FloatTensor<Self>>) {
        try_grad(&saved, &output_grad, spec, Units::allowed_for(&saved.query))
            .unwrap_or_else(|| reference::attention_grad::<Self>(saved, output_grad, spec))
    }
}

/// What multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Units {
    /// Matrix units where the kernels of `mma` run, otherwise as `Scalar`.
    Fastest,
    Scalar,
}

impl Units {
    /// Matrix units, unless they would round the factors and the program does not allow it.
    fn allowed_for(query: &FloatTensor<Cube>) -> Self {
        let exact = query.dtype() == DType::F32 && f32_matmul() == F32Matmul::F32;
        if exact { Self::Scalar } else { Self::Fastest }
    }
}

/// `reference::attention_forward`; `None` if the kernels do not read these tensors.
pub(super) fn try_forward(
    query: &FloatTensor<Cube>,
    key_value: &FloatTensor<Cube>,
    shared_key: Option<&FloatTensor<Cube>>,
    spec: &AttentionSpec,
    units: Units,
) -> Option<(FloatTensor<Cube>, FloatTensor<Cube>)> {
    let has_shared = shared_key.is_some();
    let [query, key_value, shared_key] = buffers([query, key_value, shared_key.unwrap_or(query)])?;
    if key_value.dtype != query.dtype || shared_key.dtype != query.dtype {
        return None;
    }
    let (output, log_sum) = forward(query, key_value, has_shared.then_some(shared_key), spec, units);
    Some((to_float_tensor(output), to_float_tensor(log_sum)))
}

/// Gradients for the query, for keys and values, and for the shared key, if there is one.
type AttentionGrads = (FloatTensor<Cube>, FloatTensor<Cube>, Option<FloatTensor<Cube>>);

/// `reference::attention_grad`; `None` if the kernels do not read these tensors.
pub(super) fn try_grad(
    saved: &AttentionSaved<Cube>,
    output_grad: &FloatTensor<Cube>,
    spec: &AttentionSpec,
    units: Units,
) -> Option<AttentionGrads> {
    let AttentionSaved { query, key_value, shared_key, output, log_sum } = saved;
    let has_shared = shared_key.is_some();
    let delta = Cube::float_sum_dim(Cube::float_mul(to_f32(output_grad.clone()), to_f32(output.clone())), 3);
    let shared = shared_key.as_ref().unwrap_or(query);
    let [query, key_value, shared_key, log_sum, grad, delta] =
        buffers([query, key_value, shared, log_sum, output_grad, &delta])?;
    let dtype = query.dtype;
    if [&key_value, &shared_key, &grad].iter().any(|tensor| tensor.dtype != dtype) || log_sum.dtype != DType::F32 {
        return None;
    }
    let inputs = Inputs::new(query, key_value, has_shared.then_some(shared_key), spec);
    let grads = backward(&inputs, Upstream::new(&inputs, log_sum, delta, grad), spec, units);
    // Each head wrote its own part of the gradient of the shared key, which is their sum.
    let shared = has_shared.then(|| {
        let [batch, _, sequence, width] = grads.shared_key.meta.shape().dims();
        let sum = Cube::float_sum_dim(to_float_tensor(grads.shared_key), 1);
        Cube::float_cast(Cube::float_reshape(sum, Shape::new([batch, sequence, width])), FloatDType::from(dtype))
    });
    Some((to_float_tensor(grads.query), to_float_tensor(grads.key_value), shared))
}

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

/// Uploads the first key of each query. Without starts the buffer has one unused value, because WebGPU has no empty buffers.
fn starts(like: &CubeTensor, spec: &AttentionSpec) -> BufferArg {
    upload(like, spec.starts.as_ref().map_or(&[0], |starts| starts.as_slice()))
}

/// What a launch needs: contiguous tensors of one dtype with the shapes of `heads`.
struct Inputs {
    query: CubeTensor,
    key_value: CubeTensor,
    /// A kernel needs a buffer for each argument; without a shared key this is the query's, and not read.
    shared_key: CubeTensor,
    heads: HeadShape,
    batch: usize,
    sequence: usize,
    scale: f32,
}

impl Inputs {
    /// # Panics
    ///
    /// If shapes or dtypes do not match.
    fn new(query: CubeTensor, key_value: CubeTensor, shared_key: Option<CubeTensor>, spec: &AttentionSpec) -> Self {
        let heads = HeadShape::new(&query, &key_value, shared_key.as_ref(), spec);
        let (batch, sequence) = (query.meta.shape()[0], query.meta.shape()[1]);
        let (query, key_value) = (into_contiguous(query), into_contiguous(key_value));
        let shared_key = shared_key.map_or_else(|| query.clone(), into_contiguous);
        Self { query, key_value, shared_key, heads, batch, sequence, scale: spec.scale }
    }
}

/// What the backward pass begins with: the forward pass's `log_sum`, `delta`, f32 `[batch, sequence, heads, 1]`, the sum over a head of the
/// products of output and its gradient, and this gradient. All are contiguous.
struct Upstream {
    log_sum: CubeTensor,
    delta: CubeTensor,
    grad: CubeTensor,
}

impl Upstream {
    /// # Panics
    ///
    /// If shapes or dtypes do not match.
    fn new(inputs: &Inputs, log_sum: CubeTensor, delta: CubeTensor, grad: CubeTensor) -> Self {
        let Inputs { query, heads, batch, sequence, .. } = inputs;
        assert_shape(&log_sum, [*batch, heads.heads, *sequence]);
        assert_dtype(&log_sum, DType::F32);
        assert_shape(&grad, [*batch, *sequence, heads.heads, heads.value]);
        assert_dtype(&grad, query.dtype);
        // Burn keeps the dimension of a sum.
        assert_shape(&delta, [*batch, *sequence, heads.heads, 1]);
        assert_dtype(&delta, DType::F32);
        Self { log_sum: into_contiguous(log_sum), delta: into_contiguous(delta), grad: into_contiguous(grad) }
    }
}

/// Gradients for the query and for keys and values, and for each key head its part of the gradient for the shared key, f32
/// `[batch, key heads, sequence, shared]`, which has one unused column without a shared key.
struct Grads {
    query: CubeTensor,
    key_value: CubeTensor,
    shared_key: CubeTensor,
}

/// The output, `[batch, sequence, heads, value]`, and the logarithms of the softmax denominators, `[batch, heads, sequence]`; see
/// `reference::attention_forward`.
fn forward(
    query: CubeTensor,
    key_value: CubeTensor,
    shared_key: Option<CubeTensor>,
    spec: &AttentionSpec,
    units: Units,
) -> (CubeTensor, CubeTensor) {
    let inputs = Inputs::new(query, key_value, shared_key, spec);
    let Inputs { query, heads, batch, sequence, .. } = &inputs;
    let output = empty(query, [*batch, *sequence, heads.heads, heads.value], query.dtype);
    let log_sum = empty(query, [*batch, heads.heads, *sequence], DType::F32);
    let run = if units == Units::Fastest && mma::takes(&inputs) { mma::forward } else { scalar::forward };
    // SAFETY: `HeadShape::new` asserted the shapes and dtypes, and the results have been made to fit. Starts only bound loops.
    unsafe { run(&inputs, &output, &log_sum, starts(query, spec)) }
    (output, log_sum)
}

fn backward(inputs: &Inputs, upstream: Upstream, spec: &AttentionSpec, units: Units) -> Grads {
    let Inputs { query, heads, batch, sequence, .. } = inputs;
    let (batch, sequence) = (*batch, *sequence);
    let grads = Grads {
        query: empty(query, [batch, sequence, heads.heads, heads.width()], query.dtype),
        key_value: empty(query, [batch, sequence, heads.key_heads, heads.own + heads.value], query.dtype),
        // WebGPU has no empty buffers.
        shared_key: empty(query, [batch, heads.key_heads, sequence, heads.shared.max(1)], DType::F32),
    };
    let run = if units == Units::Fastest && mma::takes(inputs) { mma::grad } else { scalar::grad };
    // SAFETY: as in `forward`; `Upstream::new` asserted its shapes and dtypes.
    unsafe { run(inputs, &upstream, &grads, [starts(query, spec), starts(query, spec)]) }
    grads
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

#[cube]
fn zeros(#[comptime] count: usize) -> Array<f32> {
    let mut array = Array::<f32>::new(count);
    #[unroll]
    for at in 0..count {
        array[at] = 0f32;
    }
    array
}

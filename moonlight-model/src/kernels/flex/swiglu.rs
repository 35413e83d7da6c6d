//! `silu(gate) * up` and its gradients, each in one pass.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use moonlight_simd::by_level;
use rayon::prelude::*;

use super::dtype::Element;
use super::math::sigmoid;
use super::tensor::{by_dtype, dims, tensor_of, values_of, zeros};
use crate::kernels::{SwigluKernel, reference};

impl SwigluKernel for Flex {
    fn swiglu_forward(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        by_dtype!([gate, up], E => forward::<E>(&gate, &up), reference::swiglu_forward::<Self>(gate, up))
    }

    fn swiglu_grad(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        output_grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        by_dtype!(
            [gate, up, output_grad],
            E => grad::<E>(&gate, &up, &output_grad),
            reference::swiglu_grad::<Self>(gate, up, output_grad)
        )
    }
}

/// Values of a task.
const VALUES_PER_TASK: usize = 16 * 1024;

fn forward<E: Element>(gate: &FlexTensor, up: &FlexTensor) -> FlexTensor {
    let shape: [usize; 2] = dims(gate);
    let (gate, up) = (values_of::<E>(gate), values_of::<E>(up));
    let mut out = zeros::<E>(gate.len());
    out.par_chunks_mut(VALUES_PER_TASK)
        .zip(gate.par_chunks(VALUES_PER_TASK).zip(up.par_chunks(VALUES_PER_TASK)))
        .for_each(|(out, (gate, up))| forward_chunk(out, gate, up));
    tensor_of(out, shape)
}

fn grad<E: Element>(gate: &FlexTensor, up: &FlexTensor, grad: &FlexTensor) -> (FlexTensor, FlexTensor) {
    let shape: [usize; 2] = dims(gate);
    let (gate, up, grad) = (values_of::<E>(gate), values_of::<E>(up), values_of::<E>(grad));
    let mut grad_gate = zeros::<E>(gate.len());
    let mut grad_up = zeros::<E>(gate.len());
    grad_gate
        .par_chunks_mut(VALUES_PER_TASK)
        .zip(grad_up.par_chunks_mut(VALUES_PER_TASK))
        .zip(gate.par_chunks(VALUES_PER_TASK).zip(up.par_chunks(VALUES_PER_TASK)).zip(grad.par_chunks(VALUES_PER_TASK)))
        .for_each(|((grad_gate, grad_up), ((gate, up), grad))| grad_chunk(grad_gate, grad_up, gate, up, grad));
    (tensor_of(grad_gate, shape), tensor_of(grad_up, shape))
}

by_level! {
    fn forward_chunk[E: Element](out: &mut [E], gate: &[E], up: &[E]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            let gate = gate.wide();
            *out = E::narrow(gate * sigmoid(gate) * up.wide());
        }
    }
}

by_level! {
    fn grad_chunk[E: Element](grad_gate: &mut [E], grad_up: &mut [E], gate: &[E], up: &[E], grad: &[E]) {
        let inputs = gate.iter().zip(up).zip(grad);
        for ((grad_gate, grad_up), ((gate, up), grad)) in grad_gate.iter_mut().zip(grad_up).zip(inputs) {
            let (gate, grad) = (gate.wide(), grad.wide());
            let sigmoid = sigmoid(gate);
            *grad_up = E::narrow(grad * gate * sigmoid);
            *grad_gate = E::narrow(grad * up.wide() * sigmoid * (1.0 + gate * (1.0 - sigmoid)));
        }
    }
}

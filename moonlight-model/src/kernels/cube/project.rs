//! Projections. Burn's product computes them, except in f32 where the program does not allow TF32: Burn has no product without it on
//! devices with tensor cores.

use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Cube, TensorMetadata};
use burn::tensor::{DType, Shape};

use super::grouped_mma::has_matrix_units;
use super::tensor::buffers;
use crate::kernels::{F32Matmul, GroupLayout, GroupedMatmulKernel, ProjectKernel, f32_matmul, reference};

impl ProjectKernel for Cube {
    fn project_forward(rows: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        match would_round(&rows, &weight) {
            true => Self::grouped_matmul_forward(rows.clone(), stack_of_one(weight), &one_group(&rows)),
            false => reference::project_forward::<Self>(rows, weight),
        }
    }

    fn project_rows_grad(grad: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        match would_round(&grad, &weight) {
            true => Self::grouped_matmul_rows_grad(grad.clone(), stack_of_one(weight), &one_group(&grad)),
            false => reference::project_rows_grad::<Self>(grad, weight),
        }
    }

    fn project_weight_grad(rows: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        if !would_round(&rows, &grad) {
            return reference::project_weight_grad::<Self>(rows, grad);
        }
        let shape = Shape::new([rows.shape()[1], grad.shape()[1]]);
        Self::float_reshape(Self::grouped_matmul_weight_grad(rows.clone(), grad, &one_group(&rows)), shape)
    }
}

/// Whether Burn's product would round these factors, and may not.
fn would_round(left: &FloatTensor<Cube>, right: &FloatTensor<Cube>) -> bool {
    let exact = f32_matmul() == F32Matmul::F32 && left.dtype() == DType::F32;
    exact && buffers([left, right]).is_some_and(|[left, _]| has_matrix_units(&left))
}

fn one_group(rows: &FloatTensor<Cube>) -> GroupLayout {
    GroupLayout::uniform(1, rows.shape()[0]).exact()
}

fn stack_of_one(weight: FloatTensor<Cube>) -> FloatTensor<Cube> {
    let [input, output] = weight.shape().dims();
    Cube::float_reshape(weight, Shape::new([1, input, output]))
}

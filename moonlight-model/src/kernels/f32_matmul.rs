//! [`F32Matmul`]: whether products of f32 matrices may be rounded to TF32.

use std::sync::atomic::{AtomicBool, Ordering};

/// How a GPU with matrix units (tensor cores) multiplies f32 matrices; torch calls it `float32_matmul_precision`.
///
/// It has an effect on CUDA alone, and none on bf16 and f16. The router, norms and the loss are in f32 in either case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum F32Matmul {
    /// Both factors are rounded to TF32, which has 10 bits of mantissa instead of 23, and multiplied on matrix units: eight times as
    /// fast as f32 on an A100. Sums are in f32.
    #[default]
    Tf32,
    /// Products are in f32.
    F32,
}

static EXACT: AtomicBool = AtomicBool::new(false);

/// Sets how this process multiplies f32 matrices.
pub fn set_f32_matmul(matmul: F32Matmul) {
    EXACT.store(matmul == F32Matmul::F32, Ordering::Relaxed);
}

/// How this process multiplies f32 matrices.
pub fn f32_matmul() -> F32Matmul {
    if EXACT.load(Ordering::Relaxed) { F32Matmul::F32 } else { F32Matmul::Tf32 }
}

//! [`Matrix`]: a weight as decoding reads it, in f32, bf16 or quantized.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Int, Tensor, bf16, f16};
use moonlight_simd::quant::{BLOCK, QuantizedMatrix, ScaleType, Shape as QuantizedShape, TILE};

use super::super::dtype::widen;
use crate::huge_pages;

/// A weight `[experts, input, output]`; other weights have one expert. It shares its memory with the parameter.
#[derive(Debug)]
pub(crate) struct Matrix {
    store: Store,
    experts: usize,
    pub(super) input: usize,
    pub(super) output: usize,
    /// `[output]`.
    pub(super) bias: Option<Vec<f32>>,
}

#[derive(Debug)]
enum Store {
    /// f32 or bf16, contiguous.
    Plain(FlexTensor),
    /// u8 `[experts, bytes]`, and f16 or bf16 `[experts, scales]`.
    Quantized { values: FlexTensor, scales: FlexTensor, scale_type: ScaleType, shape: QuantizedShape },
}

/// One expert of a [`Matrix`].
#[derive(Clone, Copy)]
pub(super) enum View<'a> {
    /// `[input, output]`.
    F32(&'a [f32]),
    /// `[input, output]`.
    Bf16(&'a [bf16]),
    Quantized(QuantizedMatrix<'a>),
}

impl Matrix {
    /// A weight `[.., input, output]` in f32 or bf16. `None` if it has another dtype, is not on the CPU or has a graph.
    pub(crate) fn new<const D: usize>(weight: Tensor<D>) -> Option<Self> {
        let dims = weight.dims();
        let [input, output] = [dims[D - 2], dims[D - 1]];
        let store = Store::Plain(contiguous(weight)?);
        Some(Self { store, experts: dims[..D - 2].iter().product(), input, output, bias: None })
    }

    /// Adds a bias `[output]`. `None` if its dtype is not f32 or bf16.
    pub(crate) fn with_bias(self, bias: Option<Tensor<1>>) -> Option<Self> {
        let bias = match bias {
            None => None,
            Some(bias) => Some(vector(bias)?),
        };
        Some(Self { bias, ..self })
    }

    /// A quantized weight: u8 `[experts, bytes]` and f16 or bf16 `[experts, scales]` in the order of [`moonlight_simd::quant`].
    pub(crate) fn quantized(values: Tensor<2, Int>, scales: Tensor<2>, shape: QuantizedShape) -> Option<Self> {
        let [experts, _] = values.dims();
        let values = values.try_into_primitive::<Flex>().ok()?;
        let scales = scales.try_into_primitive::<Flex>().ok()?;
        let scale_type = match scales.dtype() {
            DType::F16 => ScaleType::F16,
            DType::BF16 => ScaleType::Bf16,
            _ => return None,
        };
        let is_ready = values.dtype() == DType::U8 && values.is_contiguous() && scales.is_contiguous();
        if is_ready {
            huge_pages::collapse(values.bytes());
            huge_pages::collapse(scales.bytes());
        }
        let (input, output) = (shape.input, shape.output);
        let store = Store::Quantized { values, scales, scale_type, shape };
        is_ready.then_some(Self { store, experts, input, output, bias: None })
    }

    pub(super) fn is_quantized(&self) -> bool {
        matches!(self.store, Store::Quantized { .. })
    }

    /// The weight of one expert.
    pub(super) fn view(&self, expert: usize) -> View<'_> {
        assert!(expert < self.experts, "expert {expert} exceeds {}", self.experts);
        let size = self.input * self.output;
        match &self.store {
            Store::Plain(tensor) if tensor.dtype() == DType::F32 => View::F32(&plain(tensor)[expert * size..][..size]),
            Store::Plain(tensor) => View::Bf16(&plain(tensor)[expert * size..][..size]),
            Store::Quantized { values, scales, scale_type, shape } => {
                let values = &plain::<u8>(values)[expert * shape.value_bytes()..][..shape.value_bytes()];
                let scales: &[u16] = match scale_type {
                    ScaleType::F16 => bytemuck::cast_slice(plain::<f16>(scales)),
                    ScaleType::Bf16 => bytemuck::cast_slice(plain::<bf16>(scales)),
                };
                let scales = &scales[expert * shape.scales()..][..shape.scales()];
                View::Quantized(QuantizedMatrix::new(*shape, *scale_type, values, scales))
            }
        }
    }
}

impl View<'_> {
    /// Bytes of `rows` inputs of `columns` outputs.
    pub(super) fn bytes(&self, rows: usize, columns: usize) -> usize {
        match self {
            View::F32(_) => 4 * rows * columns,
            View::Bf16(_) => 2 * rows * columns,
            View::Quantized(matrix) => {
                let shape = matrix.shape();
                columns.div_ceil(TILE) * rows.div_ceil(BLOCK) * (shape.bits.tile_bytes() + 2 * TILE)
            }
        }
    }
}

/// An embedding `[vocab, hidden]` in f32 or bf16.
#[derive(Debug)]
pub(crate) struct Table {
    tensor: FlexTensor,
    pub(super) width: usize,
    pub(super) rows: usize,
}

impl Table {
    /// `None` for other dtypes, devices and tensors with a graph.
    pub(crate) fn new(table: Tensor<2>) -> Option<Self> {
        let [rows, width] = table.dims();
        Some(Self { tensor: contiguous(table)?, width, rows })
    }

    /// Writes row `index` to `out`.
    pub(super) fn row(&self, index: usize, out: &mut [f32]) {
        match self.tensor.dtype() {
            DType::F32 => out.copy_from_slice(&plain(&self.tensor)[index * self.width..][..self.width]),
            _ => widen::<bf16>(&plain(&self.tensor)[index * self.width..][..self.width], out),
        }
    }

    /// The dtype of the model.
    pub(super) fn dtype(&self) -> DType {
        self.tensor.dtype()
    }

    pub(super) fn view(&self) -> View<'_> {
        match self.tensor.dtype() {
            DType::F32 => View::F32(plain(&self.tensor)),
            _ => View::Bf16(plain(&self.tensor)),
        }
    }
}

/// The values of a small parameter in f32. `None` for dtypes other than f32 and bf16, other devices and tensors with a graph.
pub(crate) fn vector<const D: usize>(tensor: Tensor<D>) -> Option<Vec<f32>> {
    let tensor = contiguous(tensor)?;
    match tensor.dtype() {
        DType::F32 => Some(plain::<f32>(&tensor).to_vec()),
        _ => {
            let values = plain::<bf16>(&tensor);
            let mut wide = vec![0.0; values.len()];
            widen::<bf16>(values, &mut wide);
            Some(wide)
        }
    }
}

/// The tensor of the CPU backend, if it is contiguous and of a dtype that decoding reads. A copy would double the memory of a model, so
/// other tensors are left to Burn's operations.
fn contiguous<const D: usize>(tensor: Tensor<D>) -> Option<FlexTensor> {
    let tensor = tensor.try_into_primitive::<Flex>().ok()?;
    let is_ready = matches!(tensor.dtype(), DType::F32 | DType::BF16) && tensor.is_contiguous();
    if is_ready {
        huge_pages::collapse(tensor.bytes());
    }
    is_ready.then_some(tensor)
}

fn plain<E: burn::tensor::Element + bytemuck::Pod>(tensor: &FlexTensor) -> &[E] {
    tensor.as_slice().expect("dtype and layout were checked when the view was made")
}

//! Changes that an adapter makes to the weights themselves: fully trained embeddings, norms and biases; LoRA of embedding
//! and head; DoRA; and what PiSSA and OLoRA subtract from the base. They are applied once, when the adapter is loaded, in
//! f32, and the result is rounded to the weight's dtype.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData};
use faer::{Mat, MatRef};
use moonlight_model::CausalLm;

use crate::module_path::ModulePath;

/// A change of one parameter. Matrices are in Burn's layout, `[in, out]`, the embedding `[vocab, hidden]`.
#[derive(Debug, Clone)]
pub(super) enum WeightChange {
    /// Replaces the value.
    Replace(TensorData),
    /// Subtracts the best approximation of this rank (PiSSA, arXiv 2404.02948).
    SubtractPrincipal(usize),
    /// Subtracts `scale Q_r R_r` of the QR decomposition of the transpose (OLoRA, arXiv 2406.01775), that is, `scale`
    /// times the component in the space that the weights of the first `rank` inputs span.
    SubtractFirstColumns { rank: usize, scale: f64 },
    /// Adds `scale a b`.
    Add { a: TensorData, b: TensorData, scale: f64 },
    /// `m (W + scale a b) / |W + scale a b|`, with the norm over the inputs of each output (DoRA, arXiv 2402.09353).
    Dora { a: TensorData, b: TensorData, scale: f64, magnitude: TensorData },
    /// Replaces some rows of the embedding.
    Rows(Vec<usize>, TensorData),
    /// Replaces some columns of the head.
    Columns(Vec<usize>, TensorData),
}

/// Changes by the path of the parameter. Those of one parameter are applied in order.
pub(super) type WeightChanges = BTreeMap<String, Vec<WeightChange>>;

/// Applies the changes to a model. The error is the path of a parameter whose shape differs from the config's, because
/// it is quantized.
pub(super) fn apply(model: CausalLm, changes: WeightChanges) -> Result<CausalLm, String> {
    if changes.is_empty() {
        return Ok(model);
    }
    let shapes = model.config().parameter_shapes().into_iter();
    let shapes = shapes.filter(|shape| changes.contains_key(&shape.path)).map(|shape| (shape.path, shape.shape));
    let mut mapper = ChangeMapper { shapes: shapes.collect(), changes, path: ModulePath::default(), quantized: None };
    let model = model.map(&mut mapper);
    mapper.quantized.map_or(Ok(model), Err)
}

struct ChangeMapper {
    shapes: BTreeMap<String, Vec<usize>>,
    changes: WeightChanges,
    path: ModulePath,
    quantized: Option<String>,
}

impl ModuleMapper for ChangeMapper {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.dotted();
        let Some(changes) = self.changes.remove(&path) else { return param };
        if self.shapes.get(&path).is_none_or(|shape| param.lazy_shape().as_slice() != shape.as_slice()) {
            self.quantized = self.quantized.take().or(Some(path));
            return param;
        }
        param.map(|tensor| {
            let (dtype, trained) = (tensor.dtype(), tensor.is_require_grad());
            let value = changes.into_iter().fold(tensor.detach().cast(DType::F32), apply_change);
            value.cast(dtype).set_require_grad(trained)
        })
    }
}

fn apply_change<const D: usize>(weight: Tensor<D>, change: WeightChange) -> Tensor<D> {
    let device = weight.device();
    let shape = weight.shape();
    let matrix = |data: TensorData| Tensor::<2>::from_data(data, (&device, DType::F32));
    let reshaped = |tensor: Tensor<2>| tensor.reshape(shape.clone());
    // All changes but a replacement concern matrices, so that `D` is 2.
    let as_matrix = |weight: Tensor<D>| -> Tensor<2> {
        let dims = weight.dims();
        weight.reshape([dims[0], dims[D - 1]])
    };
    let product = |a: TensorData, b: TensorData, scale: f64| matrix(a).matmul(matrix(b)).mul_scalar(scale);
    match change {
        WeightChange::Replace(data) => Tensor::from_data(data, (&device, DType::F32)),
        WeightChange::SubtractPrincipal(rank) => {
            reshaped(on_host(as_matrix(weight), |weight| without_principal(weight, rank)))
        }
        WeightChange::SubtractFirstColumns { rank, scale } => {
            reshaped(on_host(as_matrix(weight), |weight| without_first_columns(weight, rank, scale as f32)))
        }
        WeightChange::Add { a, b, scale } => reshaped(as_matrix(weight) + product(a, b, scale)),
        WeightChange::Dora { a, b, scale, magnitude } => {
            let sum = as_matrix(weight) + product(a, b, scale); // [in, out]
            let norm = (sum.clone() * sum.clone()).sum_dim(0).sqrt(); // [1, out]
            let magnitude = Tensor::<1>::from_data(magnitude, (&device, DType::F32)).unsqueeze::<2>(); // [1, out]
            reshaped(sum * (magnitude / norm))
        }
        WeightChange::Rows(rows, data) => reshaped(with_rows(as_matrix(weight), &rows, matrix(data))),
        WeightChange::Columns(columns, data) => {
            reshaped(with_rows(as_matrix(weight).transpose(), &columns, matrix(data)).transpose())
        }
    }
}

/// Replaces rows of a matrix. If a row is listed twice, the last value counts.
fn with_rows(weight: Tensor<2>, rows: &[usize], values: Tensor<2>) -> Tensor<2> {
    let mut seen = BTreeSet::new();
    let last: Vec<usize> = (0..rows.len()).rev().filter(|&at| seen.insert(rows[at])).collect();
    let device = weight.device();
    let indices = |list: Vec<i64>| {
        let count = list.len();
        Tensor::<1, Int>::from_data(TensorData::new(list, [count]), &device)
    };
    let values = values.select(0, indices(last.iter().map(|&at| at as i64).collect()));
    let rows = indices(last.iter().map(|&at| rows[at] as i64).collect());
    // `select_assign` can only add. Subtracting the old row first leaves exactly 0, so that the sum is exactly the new
    // value.
    let old = weight.clone().select(0, rows.clone());
    weight.select_assign(0, rows.clone(), old.neg(), IndexingUpdateOp::Add).select_assign(
        0,
        rows,
        values,
        IndexingUpdateOp::Add,
    )
}

/// Applies `change` on the host, where faer computes the decompositions; `None` leaves the weight unchanged.
fn on_host(weight: Tensor<2>, change: impl FnOnce(MatRef<'_, f32>) -> Option<Mat<f32>>) -> Tensor<2> {
    let [rows, columns] = weight.dims();
    let device = weight.device();
    let values: Vec<f32> = weight.clone().into_data().iter::<f32>().collect();
    let Some(new) = change(MatRef::from_row_major_slice(&values, rows, columns)) else { return weight };
    let values: Vec<f32> = (0..rows * columns).map(|at| new[(at / columns, at % columns)]).collect();
    Tensor::from_data(TensorData::new(values, [rows, columns]), (&device, DType::F32))
}

/// The weight without its `rank` largest singular values; `None` if the decomposition does not converge, that is, for
/// non-finite values.
fn without_principal(weight: MatRef<'_, f32>, rank: usize) -> Option<Mat<f32>> {
    let svd = weight.thin_svd().ok()?;
    let rank = rank.min(weight.nrows()).min(weight.ncols());
    let (u, v, s) = (svd.U().get(.., ..rank), svd.V().get(.., ..rank), svd.S().column_vector());
    let scaled = Mat::from_fn(u.nrows(), rank, |row, column| u[(row, column)] * s[column]);
    Some(weight - scaled * v.transpose())
}

/// The weight less `scale` times its component in the space that its first `rank` rows span: `weight` is `[in, out]`, the
/// transpose of the matrix that OLoRA decomposes.
fn without_first_columns(weight: MatRef<'_, f32>, rank: usize, scale: f32) -> Option<Mat<f32>> {
    let rank = rank.min(weight.nrows()).min(weight.ncols());
    let first = weight.get(..rank, ..).transpose().to_owned();
    let q = first.qr().compute_thin_Q();
    Some(weight - faer::Scale(scale) * ((weight * &q) * q.transpose()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn tensor(values: &[f32], shape: [usize; 2]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values.to_vec(), shape), &Device::default())
    }

    fn values(tensor: Tensor<2>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    fn assert_near(found: Vec<f32>, expected: &[f32]) {
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?} is not {expected:?}");
    }

    #[test]
    fn pissa_subtracts_the_largest_singular_values_and_olora_the_first_inputs() {
        let weight = || tensor(&[3.0, 0.0, 0.0, 2.0, 0.0, 0.0], [3, 2]);
        assert_near(
            values(apply_change(weight(), WeightChange::SubtractPrincipal(1))),
            &[0.0, 0.0, 0.0, 2.0, 0.0, 0.0],
        );
        assert_near(values(apply_change(weight(), WeightChange::SubtractPrincipal(9))), &[0.0; 6]);
        // The first input's row is (1, 1): the component of the others along it is subtracted, too.
        let weight = || tensor(&[1.0, 1.0, 2.0, 0.0, 0.0, 4.0], [3, 2]);
        let left = [0.0, 0.0, 1.0, -1.0, -2.0, 2.0];
        let without = |rank, scale| values(apply_change(weight(), WeightChange::SubtractFirstColumns { rank, scale }));
        assert_near(without(1, 1.0), &left);
        assert_near(without(5, 1.0), &[0.0; 6]);
        assert_near(without(1, 0.5), &[0.5, 0.5, 1.5, -0.5, -1.0, 3.0]);
    }

    #[test]
    fn dora_gives_each_output_its_magnitude() {
        let data = |values: &[f32], shape: [usize; 2]| TensorData::new(values.to_vec(), shape);
        let change = WeightChange::Dora {
            a: data(&[1.0, 0.0], [2, 1]),
            b: data(&[1.0, 0.0], [1, 2]),
            scale: 2.0,
            magnitude: TensorData::new(vec![10.0f32, 1.0], [2]),
        };
        // The columns are (1 + 2, 4) and (0, 2).
        assert_near(values(apply_change(tensor(&[1.0, 0.0, 4.0, 2.0], [2, 2]), change)), &[6.0, 0.0, 8.0, 1.0]);
    }

    #[test]
    fn rows_and_columns_are_replaced() {
        let weight = || tensor(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [3, 2]);
        let new = || TensorData::new(vec![7.0f32, 8.0, 9.0, 10.0], [2, 2]);
        let rows = apply_change(weight(), WeightChange::Rows(vec![2, 0], new()));
        assert_near(values(rows), &[9.0, 10.0, 3.0, 4.0, 7.0, 8.0]);
        let twice = apply_change(weight(), WeightChange::Rows(vec![1, 1], new()));
        assert_near(values(twice), &[1.0, 2.0, 9.0, 10.0, 5.0, 6.0]);
        let columns = TensorData::new(vec![7.0f32, 8.0, 9.0], [1, 3]);
        assert_near(
            values(apply_change(weight(), WeightChange::Columns(vec![1], columns))),
            &[1.0, 7.0, 3.0, 8.0, 5.0, 9.0],
        );
    }
}

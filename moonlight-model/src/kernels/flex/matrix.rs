//! Strided views of matrices, and their products.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use crate::disjoint::BlockMut;
use moonlight_simd::gemm::Operand;

use super::dtype::Element;

/// A read-only matrix: element `(i, j)` is at `i * row_stride + j * column_stride`.
pub(super) struct Matrix<'a, E = f32> {
    values: *const E,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
    lifetime: PhantomData<&'a [E]>,
}

// Not derived, which would require `E: Clone`; the view has a pointer only.
impl<E> Clone for Matrix<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E> Copy for Matrix<'_, E> {}

impl<'a, E> Matrix<'a, E> {
    /// A view of `rows x columns` whose rows begin `row_stride` values apart.
    ///
    /// # Panics
    ///
    /// If the view exceeds `values`.
    pub(super) fn strided(values: &'a [E], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * row_stride + columns <= values.len(), "the view exceeds its slice");
        Self { values: values.as_ptr(), rows, columns, row_stride, column_stride: 1, lifetime: PhantomData }
    }

    /// A view of a whole slice as `rows x columns`.
    pub(super) fn new(values: &'a [E], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    pub(super) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    fn operand(self) -> Operand<E> {
        Operand { values: self.values, row_stride: self.row_stride, column_stride: self.column_stride }
    }
}

/// A matrix that is written; its columns are contiguous.
pub(super) struct MatrixMut<'a> {
    values: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

impl<'a> MatrixMut<'a> {
    /// See [`Matrix::strided`].
    pub(super) fn strided(values: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        let mut block = BlockMut::new(values, rows, columns, row_stride);
        let values = block.as_mut_ptr();
        Self { values, rows, columns, row_stride, lifetime: PhantomData }
    }
}

/// What a product does with the elements of its output.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Write {
    /// Overwrites them.
    Set,
    /// Adds to them.
    Add,
}

/// `out = scale * lhs * rhs`, or `out += scale * lhs * rhs`, on the calling thread.
///
/// # Panics
///
/// If the shapes do not match.
pub(super) fn multiply<E: Element>(
    out: &mut MatrixMut<'_>,
    lhs: Matrix<'_, E>,
    rhs: Matrix<'_, E>,
    scale: f32,
    write: Write,
) {
    assert!(lhs.columns == rhs.rows && out.rows == lhs.rows && out.columns == rhs.columns, "shapes must fit");
    let keep = if write == Write::Add { 1.0 } else { 0.0 };
    let shape = [lhs.rows, lhs.columns, rhs.columns];
    // SAFETY: the constructors of all three views asserted that they are within their memory; the memory of `out` is borrowed for
    // writing, and the shapes match by the assertion.
    unsafe { E::multiply(shape, out.values, out.row_stride, lhs.operand(), rhs.operand(), keep, scale) };
}

/// `out = lhs * rhs`, summed in f32 and rounded once, on the calling thread. Afterwards all of `out` is initialized.
///
/// # Panics
///
/// If the shapes do not match.
pub(super) fn multiply_into<E: Element>(mut out: BlockMut<'_, MaybeUninit<E>>, lhs: Matrix<'_, E>, rhs: Matrix<'_, E>) {
    assert!(lhs.columns == rhs.rows && out.rows() == lhs.rows && out.columns() == rhs.columns, "shapes must fit");
    let (shape, stride) = ([lhs.rows, lhs.columns, rhs.columns], out.row_stride());
    // SAFETY: as in `multiply`; `out` is not read.
    unsafe { E::multiply_into(shape, out.as_mut_ptr().cast(), stride, lhs.operand(), rhs.operand()) };
}

#[cfg(test)]
mod tests {
    use crate::disjoint::DisjointVec;

    use super::*;

    #[test]
    fn products_are_set_and_added_to() {
        let mut memory = [9.0; 4];
        let mut out = MatrixMut::strided(&mut memory, 2, 2, 2);
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 1.0, 1.0]);
        let (a, b) = (Matrix::new(&a, 2, 2), Matrix::new(&b, 2, 2));
        multiply(&mut out, a, b, 1.0, Write::Set);
        multiply(&mut out, a, b.transposed(), 2.0, Write::Add);
        assert_eq!(memory, [3.0 + 2.0, 2.0 + 6.0, 7.0 + 6.0, 4.0 + 14.0]);
    }

    #[test]
    fn a_product_over_nothing_is_zero() {
        let memory = DisjointVec::<f32>::new(6);
        // SAFETY: it is the only claim.
        let out = unsafe { memory.block(3, 0..2, 0..3) };
        multiply_into(out, Matrix::<f32>::new(&[], 2, 0), Matrix::new(&[], 0, 3));
        // SAFETY: the product wrote all of the block.
        assert_eq!(unsafe { memory.finish() }, [0.0; 6]);
    }

    #[test]
    #[should_panic(expected = "exceeds its slice")]
    fn a_view_that_exceeds_its_slice_is_refused() {
        Matrix::strided(&[0.0; 10], 3, 3, 4);
    }
}

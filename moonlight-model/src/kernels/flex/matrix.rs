//! Strided views of f32 matrices and their product.

use std::marker::PhantomData;

/// A matrix that is read: element `(i, j)` lies at `i * row_stride + j * column_stride`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: *const f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
    life: PhantomData<&'a [f32]>,
}

impl<'a> Matrix<'a> {
    /// A view of `rows x columns` whose rows begin `row_stride` values apart.
    ///
    /// # Panics
    ///
    /// When the view reaches past the end of `values`.
    pub(super) fn strided(values: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * row_stride + columns <= values.len(), "the view leaves its slice");
        Self { values: values.as_ptr(), rows, columns, row_stride, column_stride: 1, life: PhantomData }
    }

    /// A view of a whole slice as `rows x columns`.
    pub(super) fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
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
}

/// A matrix that is written, with unit column stride.
pub(super) struct MatrixMut<'a> {
    values: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    life: PhantomData<&'a mut [f32]>,
}

impl<'a> MatrixMut<'a> {
    /// See [`Matrix::strided`].
    pub(super) fn strided(values: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * row_stride + columns <= values.len(), "the view leaves its slice");
        Self { values: values.as_mut_ptr(), rows, columns, row_stride, life: PhantomData }
    }

    /// Sets every element to zero.
    pub(super) fn clear(&mut self) {
        for row in 0..self.rows {
            // SAFETY: the row is the view's own, and zero is a valid f32.
            unsafe { self.values.add(row * self.row_stride).write_bytes(0, self.columns) };
        }
    }

    /// The same view, for one product of several.
    pub(super) fn reborrow(&mut self) -> MatrixMut<'_> {
        MatrixMut { life: PhantomData, ..*self }
    }

    /// A view of memory that several tasks write at once.
    ///
    /// # Safety
    ///
    /// The elements of the view are inside one allocation, and nobody else touches them while the view lives.
    pub(super) unsafe fn from_raw(values: *mut f32, rows: usize, columns: usize, row_stride: usize) -> Self {
        Self { values, rows, columns, row_stride, life: PhantomData }
    }
}

/// Memory that several tasks write, each its own part.
pub(super) struct SharedSlice<T>(*mut T);

// SAFETY: the pointer is only used through `at` and `row`, whose callers promise that no two tasks write one element.
unsafe impl<T: Send> Sync for SharedSlice<T> {}

impl<T> SharedSlice<T> {
    pub(super) fn new(values: &mut [T]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// # Safety
    ///
    /// The element lies inside the allocation, and so does what the caller reaches from it; no other task touches that.
    pub(super) unsafe fn at(&self, first: usize) -> *mut T {
        // SAFETY: passed on to the caller.
        unsafe { self.0.add(first) }
    }

    /// # Safety
    ///
    /// The row lies inside the allocation and holds values; no other task touches it.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that no two tasks write one element")]
    pub(super) unsafe fn row(&self, first: usize, columns: usize) -> &mut [T] {
        // SAFETY: passed on to the caller.
        unsafe { std::slice::from_raw_parts_mut(self.at(first), columns) }
    }
}

/// `count` values that `fill` writes, without clearing their memory first.
///
/// # Safety
///
/// `fill` writes every value.
pub(super) unsafe fn written<T>(count: usize, fill: impl FnOnce(&SharedSlice<T>)) -> Vec<T> {
    let mut values = Vec::with_capacity(count);
    fill(&SharedSlice(values.as_mut_ptr()));
    // SAFETY: the memory is there, and the caller promises that it was written.
    unsafe { values.set_len(count) };
    values
}

/// What a product does with the values that are there.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Write {
    /// Overwrites them.
    Set,
    /// Adds to them.
    Add,
}

/// `out = scale * lhs * rhs`, or `out += …`, on the calling thread.
pub(super) fn multiply(out: MatrixMut<'_>, lhs: Matrix<'_>, rhs: Matrix<'_>, scale: f32, write: Write) {
    assert!(lhs.columns == rhs.rows && out.rows == lhs.rows && out.columns == rhs.columns, "shapes must fit");
    // SAFETY: the views were checked against their slices when they were made, and the shapes fit each other.
    unsafe {
        gemm::gemm(
            out.rows,
            out.columns,
            lhs.columns,
            out.values,
            1,
            out.row_stride as isize,
            write == Write::Add,
            lhs.values,
            lhs.column_stride as isize,
            lhs.row_stride as isize,
            rhs.values,
            rhs.column_stride as isize,
            rhs.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

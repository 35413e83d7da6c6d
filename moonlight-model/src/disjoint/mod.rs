//! Several tasks write one buffer, each its own rows or blocks: bounds are always checked, and under debug assertions
//! every overlap and every gap as well.
//!
//! `chunks_mut` divides a slice into runs. What several tasks write of a row-major matrix is often a *block* instead, some
//! columns of some rows, whose elements interleave with those of other blocks. [`DisjointMut`] hands out rows and blocks of
//! a slice through a shared reference, [`DisjointVec`] those of new memory that need not be cleared first.
//!
//! Two rules make this sound, and claiming a part is `unsafe` because the second is the caller's:
//!
//! 1. A part lies inside the buffer. Asserted at every claim, in every build.
//! 2. No element is claimed twice, ever. Recorded under `debug_assertions`, one bit an element, where a second claim
//!    panics; trusted otherwise.
//!
//! How many elements were claimed is counted in every build, so [`DisjointMut::finish`] and [`DisjointVec::finish`] fail on
//! a gap in every build where rule 2 holds. The cost is one check and one atomic addition a claim, so claim tiles and not
//! elements.
//!
//! ```
//! use moonlight_model::disjoint::DisjointVec;
//!
//! // A [4, 6] matrix by four tasks, each a block of [2, 3].
//! let matrix = DisjointVec::<u32>::new(24);
//! std::thread::scope(|scope| {
//!     for (task, (top, left)) in [(0, 0), (0, 3), (2, 0), (2, 3)].into_iter().enumerate() {
//!         let matrix = &matrix;
//!         scope.spawn(move || {
//!             // SAFETY: no two of the four blocks share an element.
//!             let mut block = unsafe { matrix.block(6, top..top + 2, left..left + 3) };
//!             for row in 0..2 {
//!                 block.row(row).write_copy_of_slice(&[task as u32; 3]);
//!             }
//!         });
//!     }
//! });
//! // SAFETY: every task wrote all of its block.
//! let values = unsafe { matrix.finish() };
//! assert_eq!(values[..6], [0, 0, 0, 1, 1, 1]);
//! assert_eq!(values[18..], [2, 2, 2, 3, 3, 3]);
//! ```

use std::marker::PhantomData;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(debug_assertions)]
mod claim_bitmap;

/// A slice of which several tasks write, each its own rows or blocks.
pub struct DisjointMut<'a, T> {
    start: NonNull<T>,
    length: usize,
    claimed: AtomicUsize,
    #[cfg(debug_assertions)]
    bitmap: claim_bitmap::ClaimBitmap,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]`, which may be sent where `T` may.
unsafe impl<T: Send> Send for DisjointMut<'_, T> {}
// SAFETY: a shared reference only gives out `&mut` to elements that nobody else has, by rule 2; that is sending them.
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    /// All of `values`, of which nothing is claimed yet.
    pub fn new(values: &'a mut [T]) -> Self {
        // SAFETY: the slice is borrowed for `'a`.
        unsafe { Self::from_raw(NonNull::from(&mut *values).cast(), values.len()) }
    }

    /// # Safety
    ///
    /// `length` elements at `start` may be read and written by nobody else during `'a`.
    unsafe fn from_raw(start: NonNull<T>, length: usize) -> Self {
        Self {
            start,
            length,
            claimed: AtomicUsize::new(0),
            #[cfg(debug_assertions)]
            bitmap: claim_bitmap::ClaimBitmap::new(length),
            lifetime: PhantomData,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Claims the elements of `range`, which lie beside each other.
    ///
    /// # Safety
    ///
    /// No other claim on this buffer, earlier or later, has any of these elements.
    ///
    /// # Panics
    ///
    /// If the range leaves the buffer; under debug assertions, if an element was claimed before.
    #[expect(clippy::mut_from_ref, reason = "the buffer is exclusive, and no element is claimed twice")]
    pub unsafe fn row(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.length, "{range:?} leaves a buffer of {}", self.length);
        self.claim(&range, 1, 0);
        // SAFETY: the range lies inside, as was just asserted, and nobody else has any of it, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(range.start), range.len()) }
    }

    /// Claims `columns` of `rows` of the buffer seen as a row-major matrix with rows of `width` elements.
    ///
    /// # Safety
    ///
    /// As for [`row`](Self::row).
    ///
    /// # Panics
    ///
    /// If the block leaves the matrix or the matrix the buffer; under debug assertions, if an element was claimed before.
    pub unsafe fn block(&self, width: usize, rows: Range<usize>, columns: Range<usize>) -> BlockMut<'_, T> {
        let reach = rows.end.checked_mul(width);
        assert!(
            rows.start <= rows.end
                && columns.start <= columns.end
                && columns.end <= width
                && reach.is_some_and(|reach| reach <= self.length),
            "rows {rows:?} and columns {columns:?} leave a buffer of {} in rows of {width}",
            self.length
        );
        let first = rows.start * width + columns.start;
        self.claim(&(first..first + columns.len()), rows.len(), width);
        let offset = if rows.is_empty() || columns.is_empty() { 0 } else { first };
        BlockMut {
            // SAFETY: an element of the block lies at `offset`, by the assertion above, or it is the start.
            start: unsafe { self.start.add(offset) },
            rows: rows.len(),
            columns: columns.len(),
            row_stride: width,
            lifetime: PhantomData,
        }
    }

    /// Ends the writing.
    ///
    /// # Panics
    ///
    /// If an element was never claimed.
    pub fn finish(self) {
        self.assert_complete();
    }

    /// Counts `rows` runs of a length, of which `first` is the first and each begins `stride` elements after the last.
    fn claim(&self, first: &Range<usize>, rows: usize, stride: usize) {
        #[cfg(debug_assertions)]
        for row in 0..rows {
            self.bitmap.claim(first.start + row * stride..first.end + row * stride);
        }
        let _ = stride;
        self.claimed.fetch_add(first.len() * rows, Ordering::Relaxed);
    }

    fn assert_complete(&self) {
        let claimed = self.claimed.load(Ordering::Relaxed);
        assert!(
            claimed == self.length,
            "a gap: {claimed} of {} elements were claimed{}",
            self.length,
            self.first_gap()
        );
    }

    fn first_gap(&self) -> String {
        #[cfg(debug_assertions)]
        if let Some(gap) = self.bitmap.first_gap(self.length) {
            return format!(", not element {gap}");
        }
        String::new()
    }
}

/// New memory of which several tasks write the first values, each its own rows or blocks; see [`DisjointMut`] for how they
/// are claimed.
pub struct DisjointVec<T: 'static> {
    /// Owns what it points to.
    claims: DisjointMut<'static, MaybeUninit<T>>,
}

impl<T> DisjointVec<T> {
    /// Memory for `length` values, none of which is there yet.
    pub fn new(length: usize) -> Self {
        let memory = Box::into_raw(Box::<[T]>::new_uninit_slice(length));
        // SAFETY: a box is not null, and this one is given up to be owned by the result alone.
        Self { claims: unsafe { DisjointMut::from_raw(NonNull::new_unchecked(memory).cast(), length) } }
    }

    /// Ends the writing and gives the values.
    ///
    /// # Safety
    ///
    /// Whoever claimed an element has written a value to it.
    ///
    /// # Panics
    ///
    /// If an element was never claimed.
    pub unsafe fn finish(self) -> Vec<T> {
        self.claims.assert_complete();
        #[cfg_attr(not(debug_assertions), allow(unused_mut, reason = "there is no record"))]
        let mut this = ManuallyDrop::new(self);
        #[cfg(debug_assertions)]
        drop(std::mem::take(&mut this.claims.bitmap)); // which would leak with the rest of `this`
        let memory = this.memory();
        // SAFETY: the memory is that of `new`, which `self` no longer frees. As many elements were claimed as there are, none
        // of them twice (rule 2), so all were; and what was claimed was written, as the caller promises.
        unsafe { Box::from_raw(memory).assume_init() }.into_vec()
    }

    fn memory(&self) -> *mut [MaybeUninit<T>] {
        std::ptr::slice_from_raw_parts_mut(self.claims.start.as_ptr(), self.claims.length)
    }
}

impl<T> Deref for DisjointVec<T> {
    type Target = DisjointMut<'static, MaybeUninit<T>>;

    fn deref(&self) -> &Self::Target {
        &self.claims
    }
}

impl<T> Drop for DisjointVec<T> {
    fn drop(&mut self) {
        // SAFETY: the memory is that of `new`, and nothing else frees it. Values in it are forgotten, which is safe.
        drop(unsafe { Box::from_raw(self.memory()) });
    }
}

/// Some columns of some rows of a row-major matrix, for one task to write.
pub struct BlockMut<'a, T> {
    start: NonNull<T>,
    rows: usize,
    columns: usize,
    row_stride: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]`, of which it reaches a part.
unsafe impl<T: Send> Send for BlockMut<'_, T> {}
// SAFETY: as above; a shared reference gives out sizes alone.
unsafe impl<T: Sync> Sync for BlockMut<'_, T> {}

impl<'a, T> BlockMut<'a, T> {
    /// `[rows, columns]` from the start of `values` on, whose rows begin `row_stride` elements apart.
    ///
    /// # Panics
    ///
    /// If rows overlap, or the last leaves the slice.
    pub fn new(values: &'a mut [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        let reach = rows.saturating_sub(1).checked_mul(row_stride).and_then(|reach| reach.checked_add(columns));
        assert!(
            (rows <= 1 || columns <= row_stride) && (rows == 0 || reach.is_some_and(|reach| reach <= values.len())),
            "[{rows}, {columns}] with rows {row_stride} apart leaves a slice of {}",
            values.len()
        );
        Self { start: NonNull::from(values).cast(), rows, columns, row_stride, lifetime: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// How many elements after a row's first the next row's first lies.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// A row's elements.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the row is one of the block's, as was just asserted; whoever made the block asserted that its rows lie in
        // the buffer, and the block is borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(row * self.row_stride), self.columns) }
    }

    /// The first element. Element `(row, column)` of the block lies `row * row_stride + column` further.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.start.as_ptr()
    }
}

#[cfg(test)]
mod tests;

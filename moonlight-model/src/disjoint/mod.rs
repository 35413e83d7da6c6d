//! Parallel writes to one buffer, by tasks with disjoint rows or blocks. Bounds are checked in every build, overlaps with debug
//! assertions.
//!
//! `chunks_mut` divides a slice into consecutive chunks. A task that writes a row-major matrix often has a *block* instead, some
//! columns of some rows, whose elements alternate in memory with those of other blocks. [`DisjointMut`] hands out rows and blocks of
//! a slice through a shared reference, [`DisjointVec`] those of new memory, which need not be initialized first.
//!
//! Two rules make this sound. To claim a part is `unsafe`, because the caller must ensure the second:
//!
//! 1. A part is within the buffer. Every claim asserts it, in every build.
//! 2. No element is claimed twice, ever. With debug assertions claims are recorded, one bit for each element, and a second claim
//!    panics; without them the caller is trusted.
//!
//! The number of claimed elements is counted in every build. If rule 2 holds, [`DisjointMut::finish`] and [`DisjointVec::finish`]
//! therefore panic on a gap in every build. A claim costs one check and one atomic addition, so claim tiles, not elements.
//!
//! ```
//! use moonlight_model::disjoint::DisjointVec;
//!
//! // Four tasks write a [4, 6] matrix, each a block of [2, 3].
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

/// A slice that several tasks write, each its own rows or blocks.
pub struct DisjointMut<'a, T> {
    start: NonNull<T>,
    length: usize,
    claimed: AtomicUsize,
    #[cfg(debug_assertions)]
    bitmap: claim_bitmap::ClaimBitmap,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]`, which can be sent if `T` can.
unsafe impl<T: Send> Send for DisjointMut<'_, T> {}
// SAFETY: a shared reference only hands out `&mut` to elements that no other claim contains, by rule 2, which is sending them.
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    /// All of `values`, with no element claimed.
    pub fn new(values: &'a mut [T]) -> Self {
        // SAFETY: the slice is borrowed for `'a`.
        unsafe { Self::from_raw(NonNull::from(&mut *values).cast(), values.len()) }
    }

    /// # Safety
    ///
    /// During `'a`, the `length` elements at `start` must be valid and not accessed by other means.
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

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Claims the elements in `range`.
    ///
    /// # Safety
    ///
    /// No other claim on this buffer, earlier or later, may contain any of these elements.
    ///
    /// # Panics
    ///
    /// If the range exceeds the buffer; with debug assertions, if an element was claimed before.
    #[expect(clippy::mut_from_ref, reason = "the buffer is exclusive, and no element is claimed twice")]
    pub unsafe fn row(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.length, "{range:?} exceeds a buffer of {}", self.length);
        self.claim(&range, 1, 0);
        // SAFETY: the range is within the buffer, as asserted, and no other claim contains any of its elements, as the caller ensures.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(range.start), range.len()) }
    }

    /// Claims the columns `columns` of the rows `rows` of the buffer, as a row-major matrix with rows of `width` elements.
    ///
    /// # Safety
    ///
    /// As for [`row`](Self::row).
    ///
    /// # Panics
    ///
    /// If the block exceeds the matrix or the buffer; with debug assertions, if an element was claimed before.
    pub unsafe fn block(&self, width: usize, rows: Range<usize>, columns: Range<usize>) -> BlockMut<'_, T> {
        let reach = rows.end.checked_mul(width);
        assert!(
            rows.start <= rows.end
                && columns.start <= columns.end
                && columns.end <= width
                && reach.is_some_and(|reach| reach <= self.length),
            "rows {rows:?} and columns {columns:?} exceed a buffer of {} with rows of {width}",
            self.length
        );
        let first = rows.start * width + columns.start;
        self.claim(&(first..first + columns.len()), rows.len(), width);
        let offset = if rows.is_empty() || columns.is_empty() { 0 } else { first };
        BlockMut {
            // SAFETY: `offset` is an element of the block, within the buffer by the assertion above, or 0 for an empty block.
            start: unsafe { self.start.add(offset) },
            rows: rows.len(),
            columns: columns.len(),
            row_stride: width,
            lifetime: PhantomData,
        }
    }

    /// Ends the parallel writes.
    ///
    /// # Panics
    ///
    /// If an element was never claimed.
    pub fn finish(self) {
        self.assert_complete();
    }

    /// Counts and records `rows` ranges with the length of `first`; each begins `stride` elements after the one before.
    fn claim(&self, first: &Range<usize>, rows: usize, stride: usize) {
        #[cfg(debug_assertions)]
        for row in 0..rows {
            self.bitmap.claim(first.start + row * stride..first.end + row * stride);
        }
        let _ = stride;
        // Relaxed is enough: `finish` takes `self`, so every claim happened before it.
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

/// New memory that several tasks initialize, each its own rows or blocks, which are claimed as from a [`DisjointMut`].
pub struct DisjointVec<T: 'static> {
    /// Owns the memory that it points to.
    claims: DisjointMut<'static, MaybeUninit<T>>,
}

impl<T> DisjointVec<T> {
    /// Uninitialized memory for `length` values.
    pub fn new(length: usize) -> Self {
        let memory = Box::into_raw(Box::<[T]>::new_uninit_slice(length));
        // SAFETY: a box is not null, and `into_raw` gives its ownership to the result.
        Self { claims: unsafe { DisjointMut::from_raw(NonNull::new_unchecked(memory).cast(), length) } }
    }

    /// Ends the parallel writes and returns the values.
    ///
    /// # Safety
    ///
    /// Every claimed element must have been initialized.
    ///
    /// # Panics
    ///
    /// If an element was never claimed.
    pub unsafe fn finish(self) -> Vec<T> {
        self.claims.assert_complete();
        #[cfg_attr(not(debug_assertions), allow(unused_mut, reason = "only the bitmap is mutated"))]
        let mut this = ManuallyDrop::new(self);
        #[cfg(debug_assertions)]
        drop(std::mem::take(&mut this.claims.bitmap)); // `ManuallyDrop` would leak it
        let memory = this.memory();
        // SAFETY: `new` allocated the memory, and `self` no longer frees it. As many elements were claimed as there are, none of them
        // twice (rule 2), so all were. The caller ensures that claimed elements were initialized.
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
        // SAFETY: `new` allocated the memory, and nothing else frees it. Its values are leaked, which is safe: it is not known which
        // of them are initialized.
        drop(unsafe { Box::from_raw(self.memory()) });
    }
}

/// A block of a row-major matrix, some columns of some rows, that one task writes.
pub struct BlockMut<'a, T> {
    start: NonNull<T>,
    rows: usize,
    columns: usize,
    row_stride: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]` to some of its elements.
unsafe impl<T: Send> Send for BlockMut<'_, T> {}
// SAFETY: as above; a shared reference returns sizes only.
unsafe impl<T: Sync> Sync for BlockMut<'_, T> {}

impl<'a, T> BlockMut<'a, T> {
    /// A block `[rows, columns]` from the start of `values`, whose rows begin `row_stride` elements apart.
    ///
    /// # Panics
    ///
    /// If rows overlap, or the last exceeds the slice.
    pub fn new(values: &'a mut [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        let reach = rows.saturating_sub(1).checked_mul(row_stride).and_then(|reach| reach.checked_add(columns));
        assert!(
            (rows <= 1 || columns <= row_stride) && (rows == 0 || reach.is_some_and(|reach| reach <= values.len())),
            "[{rows}, {columns}] with rows {row_stride} apart exceeds a slice of {}",
            values.len()
        );
        Self { start: NonNull::from(values).cast(), rows, columns, row_stride, lifetime: PhantomData }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The distance from the first element of a row to that of the next row.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// The elements of a row.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the block has the row, as asserted; both ways to make a block assert that its rows are within the buffer, and the
        // block is borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(row * self.row_stride), self.columns) }
    }

    /// A pointer to the first element. Element `(row, column)` is `row * row_stride + column` elements after it.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.start.as_ptr()
    }
}

#[cfg(test)]
mod tests;

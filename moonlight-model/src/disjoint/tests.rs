use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;

/// The message that `run` panics with.
fn panic_of(run: impl FnOnce()) -> String {
    let payload = catch_unwind(AssertUnwindSafe(run)).expect_err("this must panic");
    *payload.downcast::<String>().expect("assertions panic with text")
}

#[test]
fn rows_and_blocks_have_their_own_elements_only() {
    let mut values = vec![0; 20];
    let shared = DisjointMut::new(&mut values);
    // SAFETY: the first row of [4, 5], and below it two blocks with different columns.
    unsafe {
        shared.row(0..5).fill(1);
        let (mut left, mut right) = (shared.block(5, 1..4, 0..2), shared.block(5, 1..4, 2..5));
        for row in 0..3 {
            left.row(row).fill(2);
            right.row(row).fill(3);
        }
        assert_eq!((right.rows(), right.columns(), right.row_stride()), (3, 3, 5));
    }
    shared.finish();
    assert_eq!(values[..5], [1; 5]);
    for row in values[5..].chunks(5) {
        assert_eq!(row, [2, 2, 3, 3, 3]);
    }
}

#[test]
#[cfg(debug_assertions)]
fn an_overlap_is_found() {
    // Across words of the bitmap, and within a word.
    for (first, second) in [(0..70, 69..71), (3..5, 4..5), (64..66, 65..130)] {
        let mut values = vec![0_u8; 130];
        let shared = DisjointMut::new(&mut values);
        // SAFETY: the second claim panics before it returns.
        let message = panic_of(|| unsafe {
            shared.row(first);
            shared.row(second.clone());
        });
        assert_eq!(message, format!("an overlap: element {} was claimed twice", second.start));
    }
    let shared = DisjointVec::<u8>::new(12);
    // SAFETY: as above.
    let message = panic_of(|| unsafe {
        shared.row(5..6);
        shared.block(4, 0..3, 1..3);
    });
    assert_eq!(message, "an overlap: element 5 was claimed twice");
}

#[test]
fn a_gap_is_found() {
    let gap = |message: String| {
        assert!(message.starts_with("a gap: 11 of 12 elements were claimed"), "{message}");
        assert!(!cfg!(debug_assertions) || message.ends_with(", not element 7"), "{message}");
    };
    let mut values = [0; 12];
    let shared = DisjointMut::new(&mut values);
    // SAFETY: the three parts are disjoint.
    unsafe { (shared.row(0..4), shared.row(4..7), shared.row(8..12)) };
    gap(panic_of(|| shared.finish()));
    let memory = DisjointVec::<String>::new(12);
    // SAFETY: as above; `finish` panics before it could return what is not initialized.
    unsafe { (memory.row(0..4), memory.block(4, 1..2, 0..3), memory.row(8..12)) };
    // SAFETY: as above.
    gap(panic_of(|| drop(unsafe { memory.finish() })));
}

#[test]
fn claims_that_exceed_the_buffer_are_refused() {
    let mut values = [0; 12];
    let shared = DisjointMut::new(&mut values);
    let exceeds = |claim: &dyn Fn()| {
        let message = panic_of(claim);
        assert!(message.contains(" a buffer of 12"), "{message}");
    };
    // SAFETY: all of these panic before they return.
    unsafe {
        exceeds(&|| _ = shared.row(11..13));
        exceeds(&|| _ = shared.row(usize::MAX - 1..usize::MAX));
        #[expect(clippy::reversed_empty_ranges, reason = "such a range must be refused")]
        exceeds(&|| _ = shared.row(5..4));
        exceeds(&|| _ = shared.block(4, 2..4, 0..1));
        exceeds(&|| _ = shared.block(4, 0..1, 3..5));
        exceeds(&|| _ = shared.block(usize::MAX / 2, 0..3, 0..1));
    }
    for (rows, columns, stride) in [(4, 4, 4), (2, 5, 4), (3, 4, 5), (2, 1, usize::MAX), (1, 13, 0)] {
        let message = panic_of(|| _ = BlockMut::new(&mut values, rows, columns, stride));
        assert!(message.ends_with("exceeds a slice of 12"), "{message}");
    }
    // The refused claims claimed nothing.
    let shared = DisjointMut::new(&mut values);
    // SAFETY: it is the only claim.
    unsafe { shared.block(4, 0..3, 0..4) };
    shared.finish();
}

#[test]
fn an_empty_buffer_is_complete() {
    let memory = DisjointVec::<u64>::new(0);
    assert!(memory.is_empty());
    // SAFETY: there are no elements.
    unsafe { (memory.row(0..0), memory.block(0, 0..7, 0..0), memory.block(3, 0..0, 1..2)) };
    // SAFETY: there are no elements.
    assert!(unsafe { memory.finish() }.is_empty());
}

#[test]
fn a_block_of_a_slice_has_its_rows() {
    let mut values: Vec<usize> = (0..11).collect();
    let mut block = BlockMut::new(&mut values, 3, 3, 4);
    for row in 0..3 {
        assert_eq!(*block.row(row), [4 * row, 4 * row + 1, 4 * row + 2]);
    }
    assert_eq!(panic_of(|| _ = block.row(3)), "row 3 of 3");
}

#[test]
fn threads_write_disjoint_blocks() {
    // Columns that are not whole words of the bitmap, so that threads set bits in the same word.
    let (rows, width, tasks) = (60, 7 * 13, 7);
    let memory = DisjointVec::<usize>::new(rows * width);
    std::thread::scope(|scope| {
        for task in 0..tasks {
            let memory = &memory;
            scope.spawn(move || {
                for top in (0..rows).step_by(10) {
                    // SAFETY: no two tasks share columns, and each claims each of its rows once.
                    let mut block = unsafe { memory.block(width, top..top + 10, 13 * task..13 * task + 13) };
                    for row in 0..10 {
                        block.row(row).write_copy_of_slice(&[task; 13]);
                    }
                }
            });
        }
    });
    // SAFETY: the tasks wrote all of their blocks.
    let values = unsafe { memory.finish() };
    assert!(values.iter().enumerate().all(|(at, &value)| value == at % width / 13));
}

#[test]
fn values_of_finished_memory_are_dropped_and_those_of_abandoned_memory_leak() {
    let counter = std::sync::Arc::new(());
    let fill = || {
        let memory = DisjointVec::new(3);
        for at in 0..3 {
            // SAFETY: each element is claimed once.
            unsafe { memory.row(at..at + 1)[0].write(counter.clone()) };
        }
        memory
    };
    // SAFETY: all three were written.
    let values = unsafe { fill().finish() };
    assert_eq!(std::sync::Arc::strong_count(&counter), 4);
    drop(values);
    assert_eq!(std::sync::Arc::strong_count(&counter), 1);
    drop(fill());
    assert_eq!(std::sync::Arc::strong_count(&counter), 4);
}

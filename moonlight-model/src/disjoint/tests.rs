use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;

/// What `run` panics with.
fn panic_of(run: impl FnOnce()) -> String {
    let payload = catch_unwind(AssertUnwindSafe(run)).expect_err("this must panic");
    *payload.downcast::<String>().expect("assertions panic with text")
}

#[test]
fn rows_and_blocks_reach_their_own_elements_alone() {
    let mut values = vec![0; 20];
    let shared = DisjointMut::new(&mut values);
    // SAFETY: the first row of [4, 5], and two blocks below it that divide the columns.
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
    // Beyond a word of the record, inside one, and between a row and a block.
    for (first, second) in [(0..70, 69..71), (3..5, 4..5), (64..66, 65..130)] {
        let mut values = vec![0_u8; 130];
        let shared = DisjointMut::new(&mut values);
        // SAFETY: the second claim panics before it gives anything out.
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
    // SAFETY: as above; the rest of the block is never reached, for the end of the writing panics.
    unsafe { (memory.row(0..4), memory.block(4, 1..2, 0..3), memory.row(8..12)) };
    // SAFETY: as above.
    gap(panic_of(|| drop(unsafe { memory.finish() })));
}

#[test]
fn what_leaves_the_buffer_is_found() {
    let mut values = [0; 12];
    let shared = DisjointMut::new(&mut values);
    let leaves = |claim: &dyn Fn()| {
        let message = panic_of(claim);
        assert!(message.contains(" a buffer of 12"), "{message}");
    };
    // SAFETY: all of these panic before they give anything out.
    unsafe {
        leaves(&|| _ = shared.row(11..13));
        leaves(&|| _ = shared.row(usize::MAX - 1..usize::MAX));
        #[expect(clippy::reversed_empty_ranges, reason = "it is what must be refused")]
        leaves(&|| _ = shared.row(5..4));
        leaves(&|| _ = shared.block(4, 2..4, 0..1));
        leaves(&|| _ = shared.block(4, 0..1, 3..5));
        leaves(&|| _ = shared.block(usize::MAX / 2, 0..3, 0..1));
    }
    for (rows, columns, stride) in [(4, 4, 4), (2, 5, 4), (3, 4, 5), (2, 1, usize::MAX), (1, 13, 0)] {
        let message = panic_of(|| _ = BlockMut::new(&mut values, rows, columns, stride));
        assert!(message.ends_with("leaves a slice of 12"), "{message}");
    }
    // Nothing was claimed, and nothing is left of the failures.
    let shared = DisjointMut::new(&mut values);
    // SAFETY: it is the only claim.
    unsafe { shared.block(4, 0..3, 0..4) };
    shared.finish();
}

#[test]
fn nothing_is_complete() {
    let memory = DisjointVec::<u64>::new(0);
    assert!(memory.is_empty());
    // SAFETY: there is nothing to share.
    unsafe { (memory.row(0..0), memory.block(0, 0..7, 0..0), memory.block(3, 0..0, 1..2)) };
    // SAFETY: there is nothing to write.
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
fn threads_that_write_apart_are_clean() {
    // Columns that are no whole words of the record, so that threads meet in them.
    let (rows, width, tasks) = (60, 7 * 13, 7);
    let memory = DisjointVec::<usize>::new(rows * width);
    std::thread::scope(|scope| {
        for task in 0..tasks {
            let memory = &memory;
            scope.spawn(move || {
                for top in (0..rows).step_by(10) {
                    // SAFETY: each task has columns of its own, and takes each of its rows once.
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
fn values_of_abandoned_memory_are_forgotten_and_those_of_finished_memory_dropped() {
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

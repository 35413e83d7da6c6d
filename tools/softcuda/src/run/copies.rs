//! `cp.async`: a copy takes place when its thread waits for it, as late as a device may do it, so that reading too early is found.

use std::ffi::c_int;

use crate::memory::state;

use super::block::{Block, FaultKind, WRITE, block_of};
use super::check::state_of;
use super::thread::Thread;

#[derive(Clone, Copy)]
struct Copy {
    to: u64,
    from: u64,
    size: u32,
    given: u32,
    line: u32,
}

/// The copies of a thread.
#[derive(Default)]
pub(super) struct Copies {
    pending: Vec<Copy>,
    groups: Vec<Vec<Copy>>,
}

impl Copies {
    pub(super) fn clear(&mut self) {
        self.pending.clear();
        self.groups.clear();
    }
}

pub(super) unsafe extern "C" fn copy(
    thread: *mut Thread,
    to: u64,
    from: u64,
    size: u32,
    given: u32,
    line: u32,
) -> c_int {
    // SAFETY: called by generated code with its thread.
    let (block, linear) = unsafe { (block_of(thread), (*thread).linear as usize) };
    if !matches!(size, 4 | 8 | 16) || given > size {
        block.fail(linear, line, FaultKind::Unknown(format!("`cp.async` of {size} bytes, {given} given")));
        return 0;
    }
    let good = (given == 0 || block.access(linear, 0, from, given, size, line))
        && block.access(linear, WRITE, to, size, size, line);
    if !good {
        return 0;
    }
    // Until the copy is complete there is nothing to read.
    let t = &block.threads[linear];
    let at = to.wrapping_sub(t.shared);
    if at < t.shared_size {
        // SAFETY: the range was checked.
        unsafe { std::ptr::write_bytes(t.shared_state.add(at as usize), state::ALLOCATED, size as usize) };
    }
    block.copies[linear].pending.push(Copy { to, from, size, given, line });
    1
}

/// Commits the pending copies (0), waits for all groups except the last `left` (1), or for all copies (2).
pub(super) unsafe extern "C" fn copies(thread: *mut Thread, how: u32, left: u32) -> c_int {
    // SAFETY: called by generated code with its thread.
    let (block, linear) = unsafe { (block_of(thread), (*thread).linear as usize) };
    let mine = &mut block.copies[linear];
    if how == 0 || how == 2 {
        let group = std::mem::take(&mut mine.pending);
        mine.groups.push(group);
    }
    if how == 0 {
        return 1;
    }
    let done = mine.groups.len().saturating_sub(left as usize);
    let groups: Vec<Vec<Copy>> = mine.groups.drain(..done).collect();
    for copy in groups.into_iter().flatten() {
        if !carry_out(block, linear, copy) {
            return 0;
        }
    }
    1
}

fn carry_out(block: &mut Block, linear: usize, copy: Copy) -> bool {
    let Copy { to, from, size, given, line } = copy;
    if !block.access(linear, WRITE, to, size, size, line) {
        return false;
    }
    let (target, source) = (state_of(block, to), state_of(block, from));
    // SAFETY: both ranges were checked, the source when the copy was asked for; they are in different spaces.
    unsafe {
        std::ptr::copy_nonoverlapping(source, target, given as usize);
        std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, given as usize);
        std::ptr::write_bytes((to as *mut u8).add(given as usize), 0, (size - given) as usize);
    }
    true
}

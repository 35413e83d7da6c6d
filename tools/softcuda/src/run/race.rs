//! Accesses of two threads to the same byte, one of them a write, that no barrier orders.
//!
//! Of each byte the last write and the last read are remembered. Threads of a block are ordered by its barriers, those of a
//! warp also by `bar.warp.sync`; threads of two blocks are not ordered within a launch. Atomic operations, and loads and
//! stores with an order (`.volatile`, `.relaxed`, `.acquire`, `.release`), do not race with each other.

use std::ffi::c_int;

use crate::memory::{BASE, RACES};

use super::block::{ATOMIC, Block, FaultKind, IN_SHARED, STRONG, WRITE, block_of};
use super::thread::Thread;

/// The last access to a byte.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Last {
    launch: u32,
    block: u32,
    clock: u32,
    /// The thread, whether it was ordered by itself, and whether threads of this or of other warps have read as well.
    who: u32,
    line: u32,
}

const WHO: u32 = 0x3ff;
const ORDERED: u32 = 1 << 10;
const SEVERAL: u32 = 1 << 11;
const MANY: u32 = 1 << 12;

struct Access {
    thread: u32,
    ordered: bool,
    clock: u32,
    since: u32,
    warp_since: u32,
    block: u32,
    launch: u32,
    shared: bool,
    line: u32,
}

impl Access {
    /// Whether another access is of the same launch, by another thread, and not ordered before this one.
    fn conflicts(&self, last: &Last, read: bool) -> bool {
        if last.launch != self.launch || (self.ordered && last.who & ORDERED != 0) {
            return false;
        }
        if last.block != self.block {
            return !self.shared;
        }
        let who = last.who & WHO;
        let alone = !read || last.who & (SEVERAL | MANY) == 0;
        if who == self.thread && alone {
            return false;
        }
        let same_warp = who / 32 == self.thread / 32 && (!read || last.who & MANY == 0);
        last.clock >= self.since && !(same_warp && last.clock < self.warp_since)
    }

    fn remember(&self, last: &mut Last, read: bool) {
        let mut who = self.thread | if self.ordered { ORDERED } else { 0 };
        let still = last.launch == self.launch && last.block == self.block && last.clock >= self.since;
        if read && still {
            let other = last.who & WHO;
            who |= last.who & (SEVERAL | MANY);
            if other / 32 != self.thread / 32 {
                who |= MANY;
            } else if other != self.thread {
                who |= SEVERAL;
            }
        }
        *last = Last { launch: self.launch, block: self.block, clock: self.clock, who, line: self.line };
    }
}

pub(super) unsafe extern "C" fn race(thread: *mut Thread, access: u32, address: u64, size: u32, line: u32) -> c_int {
    // SAFETY: called by generated code with its thread, after the access was checked.
    let (block, t) = unsafe { (block_of(thread), &*thread) };
    let shared = access & IN_SHARED != 0;
    let me = Access {
        thread: t.linear,
        ordered: access & 3 == ATOMIC || access & STRONG != 0,
        clock: block.clock,
        since: if block.alive > 0 { block.since } else { 0 },
        warp_since: block.warps[t.linear as usize / 32].since,
        block: block.index as u32,
        launch: block.launch,
        shared,
        line,
    };
    let base: *mut [Last; 2] = if shared {
        block.last.as_mut_ptr().wrapping_add((address - t.shared) as usize)
    } else {
        (RACES + (address - BASE) * size_of::<[Last; 2]>() as u64) as *mut [Last; 2]
    };
    for at in 0..size as usize {
        // SAFETY: the range of the address is in shared memory or in the span of the device, for which this memory is mapped.
        let [written, read] = unsafe { &mut *base.add(at) };
        let writes = access & 3 != 0;
        let other = match (me.conflicts(written, false), writes && me.conflicts(read, true)) {
            (true, _) => Some((*written, "write")),
            (false, true) => Some((*read, "read")),
            _ => None,
        };
        if let Some((other, what)) = other {
            return found(block, t.linear, access, address + at as u64, size, line, &other, what);
        }
        if access & 3 == WRITE || access & 3 == ATOMIC {
            me.remember(written, false);
        } else {
            me.remember(read, true);
        }
    }
    1
}

#[allow(clippy::too_many_arguments, reason = "all of them are in the message")]
fn found(
    block: &mut Block,
    linear: u32,
    access: u32,
    address: u64,
    size: u32,
    line: u32,
    other: &Last,
    what: &str,
) -> c_int {
    let t = &block.threads[linear as usize];
    let [x, y, _] = t.ntid;
    let who = other.who & WHO;
    let same =
        if other.block == block.index as u32 { "this block".to_owned() } else { format!("block {}", other.block) };
    let text = format!("a {what} by thread ({}, {}, {}) of {same}", who % x, who / x % y, who / x / y);
    let at = (access & IN_SHARED != 0).then(|| (address - t.shared) as u32);
    let kind = FaultKind::Race { access: access & 7, address, size, shared: at, other: text, other_line: other.line };
    block.fail(linear as usize, line, kind);
    0
}

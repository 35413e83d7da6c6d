//! Accesses to memory: the check that generated code makes, for functions of this crate, and what a failed check was.

use std::ffi::{CStr, c_char};

use crate::counts::Kind;
use crate::memory::{BASE, SECTOR, SHADOW, TOUCHED, Wrong, state};

use super::block::{Block, Fault, FaultKind, GLOBAL, IN_LOCAL, IN_SHARED, SHARED, WRITE, block_of};
use super::thread::Thread;

impl Block {
    /// Counts sectors that this launch has not touched before.
    fn touch(&mut self, address: u64, size: u32, access: u32) {
        for sector in (address - BASE) / SECTOR..=(address + u64::from(size) - 1 - BASE) / SECTOR {
            // SAFETY: the range is in the span of the device, for which this memory is mapped.
            let last = unsafe { &mut *((TOUCHED + 8 * sector) as *mut [u32; 2]) };
            let kinds = [(access & 3 != WRITE, Kind::DistinctRead), (access & 3 != 0, Kind::DistinctWritten)];
            for (last, (does, kind)) in last.iter_mut().zip(kinds) {
                if does && *last != self.launch {
                    *last = self.launch;
                    self.counts[kind as usize] += SECTOR;
                }
            }
        }
    }

    /// Whether a thread may access memory, as generated code checks it: `false` with the fault remembered.
    pub(super) fn access(
        &mut self,
        linear: usize,
        access: u32,
        address: u64,
        size: u32,
        align: u32,
        line: u32,
    ) -> bool {
        let t = &self.threads[linear];
        let shared = address.wrapping_sub(t.shared);
        let in_shared = shared < SHARED as u64;
        let bounds = if in_shared { (shared, t.shared_size) } else { (address.wrapping_sub(t.base), t.span) };
        let good =
            bounds.0 < bounds.1 && u64::from(size) <= bounds.1 - bounds.0 && address.is_multiple_of(u64::from(align));
        let at = if in_shared {
            t.shared_state.wrapping_add(shared as usize)
        } else {
            (address.wrapping_add(SHADOW)) as *mut u8
        };
        let good = good && {
            // SAFETY: the range is in shared memory or in the span of the device.
            let states = unsafe { std::slice::from_raw_parts_mut(at, size as usize) };
            if access & 3 == WRITE {
                let free = states.iter().all(|state| *state < state::GUARD);
                if free {
                    states.fill(state::WRITTEN);
                }
                free
            } else if crate::settings::get().strict {
                states.iter().all(|state| *state == state::WRITTEN)
            } else {
                states.iter().all(|state| *state < state::GUARD)
            }
        };
        let space = if in_shared { IN_SHARED } else { GLOBAL };
        if !good {
            // SAFETY: a thread of this block.
            unsafe { fault(&raw mut self.threads[linear], space | access, address, size, line) };
        }
        if good && !in_shared && self.distinct {
            self.touch(address, size, access);
        }
        if good && !self.last.is_empty() {
            // SAFETY: as above.
            return unsafe {
                super::race::race(&raw mut self.threads[linear], space | access, address, size, line) != 0
            };
        }
        good
    }
}

/// What a check of generated code found: which one is looked up here.
pub(super) unsafe extern "C" fn fault(thread: *mut Thread, access: u32, address: u64, size: u32, line: u32) {
    // SAFETY: called by generated code with its thread.
    let block = unsafe { block_of(thread) };
    // SAFETY: as above.
    let t = unsafe { &*thread };
    let misaligned = !address.is_multiple_of(u64::from(size).next_power_of_two().min(32));
    let kind = match access & (IN_SHARED | IN_LOCAL) {
        IN_LOCAL => FaultKind::Local {
            wrong: if misaligned { Wrong::Misaligned } else { Wrong::OutOfBounds },
            access: access & 7,
            size,
        },
        IN_SHARED => {
            let at = address.wrapping_sub(t.shared) as i64;
            let inside = at >= 0 && at as u64 + u64::from(size) <= t.shared_size;
            let wrong = match (inside, misaligned) {
                (false, _) => Wrong::OutOfBounds,
                (true, true) => Wrong::Misaligned,
                (true, false) => Wrong::Uninitialized,
            };
            FaultKind::Shared { wrong, access: access & 7, at, size, whole: t.shared_size as u32 }
        }
        _ => {
            let written = access & 3 != WRITE;
            let mut found = (address, Wrong::OutOfBounds);
            for at in address..address.saturating_add(size.into()) {
                let inside = at.wrapping_sub(t.base) < t.span;
                // SAFETY: the shadow of the span is mapped.
                let wrong = match inside.then(|| unsafe { *((at + SHADOW) as *const u8) }) {
                    Some(state::WRITTEN) => continue,
                    Some(found) if found < state::GUARD && !written => continue,
                    Some(found) if found < state::GUARD => Wrong::Uninitialized,
                    Some(state::FREED) => Wrong::AfterFree,
                    _ => Wrong::OutOfBounds,
                };
                found = (at, wrong);
                break;
            }
            if found == (address, Wrong::OutOfBounds) && misaligned && address.wrapping_sub(t.base) < t.span {
                // SAFETY: as above.
                let first = unsafe { *((address + SHADOW) as *const u8) };
                if first < state::GUARD {
                    found.1 = Wrong::Misaligned;
                }
            }
            FaultKind::Access { wrong: found.1, access: access & 7, address: found.0, size }
        }
    };
    block.fail(t.linear as usize, line, kind);
}

/// A thread has read what is not defined, which may be of no consequence.
pub(super) unsafe extern "C" fn undefined(thread: *mut Thread, address: u64, size: u32, line: u32) {
    // SAFETY: called by generated code with its thread.
    let (block, t) = unsafe { (block_of(thread), &*thread) };
    if block.origin.is_some() {
        return;
    }
    let at = address.wrapping_sub(t.shared);
    let kind = if at < SHARED as u64 {
        let whole = t.shared_size as u32;
        FaultKind::Shared { wrong: Wrong::Uninitialized, access: 0, at: at as i64, size, whole }
    } else if address.wrapping_sub(t.base) < t.span {
        FaultKind::Access { wrong: Wrong::Uninitialized, access: 0, address, size }
    } else {
        FaultKind::Local { wrong: Wrong::Uninitialized, access: 0, size }
    };
    block.origin = Some(Fault { kind, block: t.ctaid, thread: t.tid, line });
}

/// A value that is not defined decides something.
pub(super) unsafe extern "C" fn derived(thread: *mut Thread, what: u32, line: u32) {
    // SAFETY: called by generated code with its thread.
    let (block, linear) = unsafe { (block_of(thread), (*thread).linear) };
    let what =
        ["the thread branches by", "the thread accesses memory at", "an atomic operation takes"][what as usize % 3];
    block.fail(linear as usize, line, FaultKind::Undefined(what));
}

/// The state of a byte that a thread may read.
pub(super) fn state_of(block: &Block, address: u64) -> *mut u8 {
    let t = &block.threads[0];
    let at = address.wrapping_sub(t.shared);
    if at < SHARED as u64 { t.shared_state.wrapping_add(at as usize) } else { address.wrapping_add(SHADOW) as *mut u8 }
}

/// Whether any of some bytes that were checked is not defined.
pub(super) fn is_undefined(block: &mut Block, linear: usize, address: u64, size: u32, line: u32) -> bool {
    if !crate::settings::get().uninitialized {
        return false;
    }
    // SAFETY: the range was checked.
    let states = unsafe { std::slice::from_raw_parts(state_of(block, address), size as usize) };
    let found = states.iter().any(|&state| state != state::WRITTEN);
    if found {
        // SAFETY: a thread of this block.
        unsafe { undefined(&raw mut block.threads[linear], address, size, line) };
    }
    found
}

/// Marks some bytes that were checked as written with a value that is not defined.
pub(super) fn spoil(block: &mut Block, address: u64, size: u32) {
    let spoiled = block.threads[0].spoiled as u8;
    // SAFETY: the range was checked.
    unsafe { std::ptr::write_bytes(state_of(block, address), spoiled, size as usize) };
}

pub(super) unsafe extern "C" fn unknown(thread: *mut Thread, what: *const c_char, line: u32) {
    // SAFETY: called by generated code with its thread and a constant text.
    let (block, what) = unsafe { (block_of(thread), CStr::from_ptr(what)) };
    // SAFETY: as above.
    let linear = unsafe { (*thread).linear } as usize;
    block.fail(linear, line, FaultKind::Unknown(what.to_string_lossy().into_owned()));
}

//! Barriers of a block.

use std::ffi::c_int;

use super::block::{Block, FaultKind, block_of, pause};
use super::thread::Thread;

/// A barrier by its number.
#[derive(Clone, Debug, Default)]
pub(super) struct Barrier {
    arrived: u32,
    /// Threads that it takes; 0 for all.
    wanted: u32,
    waiting: Vec<u32>,
    sum: u32,
    and: bool,
    result: u32,
    line: u32,
}

const ARRIVE: u32 = 1;

pub(super) unsafe extern "C" fn barrier(
    thread: *mut Thread,
    id: u32,
    count: u32,
    how: u32,
    value: *mut u32,
    line: u32,
) -> c_int {
    // SAFETY: called by generated code with its thread.
    let (block, linear) = unsafe { (block_of(thread), (*thread).linear) };
    let at = linear as usize;
    if id >= 16 {
        block.fail(at, line, FaultKind::Barrier(format!("barrier {id} of 16")));
        return 0;
    }
    let (lane, bit) = (at % 32, 1_u32 << (at % 32));
    // Threads of a warp reach a barrier by the same instruction.
    let warp = &block.warps[at / 32];
    let others = warp.at_barrier & !bit;
    if others != 0 {
        let other = others.trailing_zeros() as usize;
        if warp.lines[other] != line && block.barriers[id as usize].waiting.contains(&((at / 32 * 32 + other) as u32)) {
            let other_line = warp.lines[other];
            let text = format!("threads of a warp are at different barriers, of lines {other_line} and {line}");
            block.fail(at, line, FaultKind::Barrier(text));
            return 0;
        }
    }
    let state = &mut block.barriers[id as usize];
    if state.arrived == 0 {
        state.and = true;
    }
    state.arrived += 1;
    state.line = line;
    if count > 0 {
        state.wanted = count;
    }
    if how > ARRIVE {
        // SAFETY: generated code gives the address of a variable.
        let value = unsafe { *value };
        state.sum += u32::from(value != 0);
        state.and &= value != 0;
    }
    if how == ARRIVE {
        release(block, id as usize);
        return c_int::from(block.fault.is_none());
    }
    state.waiting.push(linear);
    block.warps[at / 32].lines[lane] = line;
    block.warps[at / 32].at_barrier |= bit;
    block.warps[at / 32].ready &= !bit;
    release(block, id as usize);
    if block.fault.is_some() {
        return 0;
    }
    if block.warps[at / 32].at_barrier & bit != 0 {
        // SAFETY: the thread runs on its fiber.
        unsafe { pause(thread) };
    }
    if how > ARRIVE {
        // SAFETY: the block outlives the fiber; nothing borrowed before the pause is used.
        let state = unsafe { &block_of(thread).barriers[id as usize] };
        let result = match how {
            2 => state.result >> 1,
            3 => state.result & 1,
            _ => u32::from(state.result >> 1 != 0),
        };
        // SAFETY: as above.
        unsafe { *value = result };
    }
    1
}

/// Lets the threads of a barrier continue if all have come.
fn release(block: &mut Block, id: usize) {
    let state = &mut block.barriers[id];
    if state.waiting.is_empty() && state.arrived == 0 {
        return;
    }
    let wanted = if state.wanted > 0 { state.wanted } else { block.alive };
    if state.arrived < wanted {
        return;
    }
    let all = state.wanted == 0 || state.wanted == block.count;
    if state.wanted == 0 && block.alive < block.count && !block.exits_allowed {
        let (line, missing) = (state.line, block.count - block.alive);
        let at = state.waiting.first().copied().unwrap_or(0) as usize;
        let text = format!("a barrier is missed by {missing} of {} threads, which have ended", block.count);
        block.fail(at, line, FaultKind::Barrier(text));
        return;
    }
    let waiting = std::mem::take(&mut state.waiting);
    state.result = state.sum << 1 | u32::from(state.and);
    (state.arrived, state.wanted, state.sum) = (0, 0, 0);
    block.clock += 1;
    for &thread in &waiting {
        let warp = &mut block.warps[thread as usize / 32];
        let bit = 1 << (thread % 32);
        warp.at_barrier &= !bit;
        warp.ready |= bit;
        // Of the threads that took part only; of all if all did.
        warp.since = block.clock;
    }
    // A barrier of some threads orders more than it does here, so that what it orders is not reported.
    let _ = all;
    block.since = block.clock;
    let state = &mut block.barriers[id];
    state.waiting = waiting;
    state.waiting.clear();
}

/// A thread has ended: barriers may have waited for it only.
pub(super) fn ended(block: &mut Block) {
    if block.alive > 0 {
        for id in 0..16 {
            if block.barriers[id].arrived > 0 && block.barriers[id].wanted == 0 {
                release(block, id);
            }
        }
    }
}

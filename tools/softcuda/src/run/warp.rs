//! What threads of a warp do together. The last to come computes the results of all.

use std::ffi::c_int;

use super::block::{FaultKind, block_of, pause};
use super::matrix;
use super::moves;
use super::thread::Thread;

/// What a warp does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of the instructions")]
#[repr(u32)]
pub enum How {
    #[default]
    Sync,
    Up,
    Down,
    Butterfly,
    Index,
    Ballot,
    Active,
    MatchAny,
    MatchAll,
    Add,
    And,
    Or,
    Xor,
    Min,
    Max,
    MinSigned,
    MaxSigned,
    Elect,
    Matrix,
    Move,
}

const ALL: [How; 18] = [
    How::Sync,
    How::Up,
    How::Down,
    How::Butterfly,
    How::Index,
    How::Ballot,
    How::Active,
    How::MatchAny,
    How::MatchAll,
    How::Add,
    How::And,
    How::Or,
    How::Xor,
    How::Min,
    How::Max,
    How::MinSigned,
    How::MaxSigned,
    How::Elect,
];

/// What a thread brings and takes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lane {
    pub(super) how: How,
    pub(super) mask: u32,
    pub(super) given: [u32; 24],
    pub(super) address: u64,
    /// The form of a product or move: a constant of generated code.
    pub(super) form: usize,
    pub(super) taken: [u32; 8],
    /// Which registers that it brings and takes are not defined.
    pub(super) flags: [u32; 3],
    pub(super) flags_taken: u32,
}

/// A value that is not there.
const POISON: u32 = 0xcdcd_cdcd;

#[derive(Default)]
pub(super) struct Warp {
    pub(super) alive: u32,
    pub(super) ready: u32,
    pub(super) waiting: u32,
    pub(super) at_barrier: u32,
    pub(super) lines: [u32; 32],
    pub(super) lanes: [Lane; 32],
    /// The clock of the block at the last `bar.warp.sync` of all lanes.
    pub(super) since: u32,
    pub(super) scratch: Box<matrix::Scratch>,
}

impl Warp {
    pub(super) fn begin(&mut self, lanes: u32, clock: u32) {
        self.alive = lanes;
        self.ready = lanes;
        self.waiting = 0;
        self.at_barrier = 0;
        self.since = clock;
    }

    /// Gives threads that asked which are with them their answer, when no other thread of the warp can run.
    pub(super) fn settle_active(&mut self) -> bool {
        let mut asking = self.waiting;
        let mut settled = false;
        while asking != 0 {
            let first = asking.trailing_zeros() as usize;
            let mut group = 0;
            if self.lanes[first].how == How::Active {
                for lane in 0..32 {
                    let same = self.lanes[lane].how == How::Active && self.lines[lane] == self.lines[first];
                    group |= u32::from(same && asking >> lane & 1 == 1) << lane;
                }
                for lane in bits(group) {
                    self.lanes[lane].taken[0] = group;
                    self.lanes[lane].flags_taken = 0;
                }
                self.waiting &= !group;
                self.ready |= group;
                settled = true;
            }
            asking &= !(group | 1 << first);
        }
        settled
    }

    /// The lanes that wait for each other with this one, if all have come.
    fn group(&self, lane: usize) -> Option<u32> {
        let Lane { how, mask, .. } = self.lanes[lane];
        let need = mask & self.alive;
        let all = self.waiting & need == need
            && bits(need).all(|other| self.lanes[other].how == how && self.lanes[other].mask == mask);
        (all && how != How::Active).then_some(need)
    }

    /// A thread has ended: others may have waited for it.
    pub(super) fn end(&mut self, lane: u32) {
        self.alive &= !(1 << lane);
        self.ready &= !(1 << lane);
        while let Some((need, how)) =
            bits(self.waiting).find_map(|lane| Some((self.group(lane)?, self.lanes[lane].how)))
        {
            if matches!(how, How::Matrix | How::Move) {
                // Cannot be complete without all threads: reported when none can continue.
                break;
            }
            self.complete(how, need);
        }
    }

    fn complete(&mut self, how: How, need: u32) {
        self.results(how, need);
        self.waiting &= !need;
        self.ready |= need;
    }

    fn results(&mut self, how: How, need: u32) {
        if matches!(how, How::Sync | How::Active | How::Matrix | How::Move) {
            return;
        }
        let values: [u32; 32] =
            std::array::from_fn(|lane| if need >> lane & 1 == 1 { self.lanes[lane].given[0] } else { POISON });
        let taking = || bits(need);
        let fold = |f: fn(u32, u32) -> u32| taking().map(|lane| values[lane]).reduce(f).unwrap_or(0);
        let flags = taking().fold(0, |flags, lane| flags | self.lanes[lane].flags[0]);
        for lane in taking() {
            self.lanes[lane].flags_taken = if flags != 0 { 0xff } else { 0 };
        }
        let same = match how {
            How::Sync | How::Active | How::Matrix | How::Move => return,
            How::Up | How::Down | How::Butterfly | How::Index => {
                for lane in taking() {
                    let [_, b, c, ..] = self.lanes[lane].given;
                    let (from, inside) = source(how, lane as u32, b, c);
                    let from = from as usize & 31;
                    self.lanes[lane].taken[..2].copy_from_slice(&[values[from], u32::from(inside)]);
                    // What a thread brings that is not there is not defined.
                    self.lanes[lane].flags_taken = if need >> from & 1 == 1 { self.lanes[from].flags[0] } else { 0xff };
                }
                return;
            }
            How::MatchAny | How::MatchAll => {
                let wide = |lane: usize| (self.lanes[lane].given[0], self.lanes[lane].given[1]);
                let groups: Vec<u32> = (0..32)
                    .map(|lane| {
                        taking().filter(|&other| wide(other) == wide(lane)).fold(0, |mask, other| mask | 1 << other)
                    })
                    .collect();
                for lane in taking() {
                    let group = groups[lane];
                    self.lanes[lane].taken[0] = if how == How::MatchAny || group == need { group } else { 0 };
                }
                return;
            }
            How::Ballot => taking().fold(0, |mask, lane| mask | u32::from(values[lane] != 0) << lane),
            How::Add => fold(u32::wrapping_add),
            How::And => fold(|a, b| a & b),
            How::Or => fold(|a, b| a | b),
            How::Xor => fold(|a, b| a ^ b),
            How::Min => fold(u32::min),
            How::Max => fold(u32::max),
            How::MinSigned => fold(|a, b| (a as i32).min(b as i32) as u32),
            How::MaxSigned => fold(|a, b| (a as i32).max(b as i32) as u32),
            How::Elect => need.trailing_zeros(),
        };
        for lane in taking() {
            self.lanes[lane].taken[..2].copy_from_slice(&[same, need]);
        }
    }
}

/// The lane that a shuffle reads, and whether it is in the segment.
fn source(how: How, lane: u32, b: u32, c: u32) -> (u32, bool) {
    let (value, clamp, segment) = (b & 31, c & 31, c >> 8 & 31);
    let most = lane & segment | clamp & !segment;
    let least = lane & segment;
    let (from, inside) = match how {
        How::Up => (lane.wrapping_sub(value), lane as i32 - value as i32 >= most as i32),
        How::Down => (lane + value, lane + value <= most),
        How::Butterfly => (lane ^ value, lane ^ value <= most),
        _ => (least | value & !segment, least | value & !segment <= most),
    };
    if inside { (from, true) } else { (lane, false) }
}

/// The lanes of a mask.
pub(super) fn bits(mut mask: u32) -> impl Iterator<Item = usize> + Clone {
    std::iter::from_fn(move || {
        let lane = (mask != 0).then(|| mask.trailing_zeros() as usize)?;
        mask &= mask - 1;
        Some(lane)
    })
}

pub(super) unsafe extern "C" fn warp(
    thread: *mut Thread,
    how: u32,
    mask: u32,
    given: *const u32,
    taken: *mut u32,
    line: u32,
) -> c_int {
    let how = ALL[how as usize % ALL.len()];
    // SAFETY: called by generated code with its thread.
    let lane =
        unsafe { &mut block_of(thread).warps[(*thread).linear as usize / 32].lanes[(*thread).linear as usize % 32] };
    // SAFETY: as above.
    lane.flags = unsafe { [(*thread).flags[0], 0, 0] };
    if !given.is_null() {
        let count = match how {
            How::Up | How::Down | How::Butterfly | How::Index => 3,
            How::MatchAny | How::MatchAll => 2,
            _ => 1,
        };
        // SAFETY: generated code gives as many values as the operation takes.
        lane.given[..count].copy_from_slice(unsafe { std::slice::from_raw_parts(given, count) });
    }
    // SAFETY: as above.
    unsafe {
        if !meet(thread, how, mask, line) {
            return 0;
        }
        if !taken.is_null() {
            let linear = (*thread).linear as usize;
            let lane = &block_of(thread).warps[linear / 32].lanes[linear % 32];
            std::slice::from_raw_parts_mut(taken, 2).copy_from_slice(&lane.taken[..2]);
            (*thread).flags[3] = lane.flags_taken;
        }
    }
    1
}

/// Waits for the threads of `mask`; the last one computes the results. `false` if the thread must end.
pub(super) unsafe fn meet(thread: *mut Thread, how: How, mask: u32, line: u32) -> bool {
    // SAFETY: called by generated code with its thread.
    let (block, linear) = unsafe { (block_of(thread), (*thread).linear as usize) };
    let (at, bit) = (linear % 32, 1_u32 << (linear % 32));
    if how != How::Active && mask & bit == 0 {
        let text = format!("a thread takes part in what the mask {mask:#010x} excludes it from");
        block.fail(linear, line, FaultKind::Barrier(text));
        return false;
    }
    let warp = &mut block.warps[linear / 32];
    warp.lanes[at].how = how;
    warp.lanes[at].mask = mask;
    warp.lines[at] = line;
    warp.waiting |= bit;
    if let Some(need) = warp.group(at) {
        let good = match how {
            How::Matrix => matrix::complete(warp, need),
            // SAFETY: all lanes wait with moves.
            How::Move => unsafe { moves::complete(thread, need, line) },
            _ => true,
        };
        if !good {
            let text = format!("a matrix instruction without all threads of the warp: mask {need:#010x}");
            block.fail(linear, line, FaultKind::Barrier(text));
            return false;
        }
        let warp = &mut block.warps[linear / 32];
        warp.complete(how, need);
        if how == How::Sync && need == warp.alive {
            block.clock += 1;
            warp.since = block.clock;
        }
        return block.fault.is_none();
    }
    warp.ready &= !bit;
    // SAFETY: the thread runs on its fiber.
    unsafe { pause(thread) };
    true
}

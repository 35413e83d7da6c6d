//! Allocations of a device.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::OnceLock;

use super::{BASE, DEVICES, Mapping, RACES, SECTOR, SHADOW, SPAN, TOUCHED, Whereabouts, Wrong, state};

/// Bytes after an allocation that must not be touched, at least.
const GUARD: u64 = 16 << 10;
const PAGE: u64 = 4096;
/// Freed bytes that keep their addresses.
const QUARANTINE: u64 = 1 << 30;

/// A range that was handed out.
#[derive(Clone, Copy, Debug)]
pub struct Allocation {
    /// Its first address.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Its number, from 1 for each device.
    pub number: u64,
    /// Whether it was freed.
    pub freed: bool,
}

/// The memory of a device.
#[derive(Debug)]
pub struct Memory {
    base: u64,
    next: u64,
    total: u64,
    used: u64,
    peak: u64,
    count: u64,
    allocations: BTreeMap<u64, Allocation>,
    quarantine: VecDeque<u64>,
    quarantined: u64,
    /// Ranges for another allocation of the same room.
    free: HashMap<u64, Vec<u64>>,
}

fn reserve(races: bool) {
    static MEMORY: OnceLock<[Mapping; 3]> = OnceLock::new();
    static LAST: OnceLock<Mapping> = OnceLock::new();
    let size = SPAN as usize * DEVICES;
    let touched = (size as u64 / SECTOR * 8) as usize;
    MEMORY.get_or_init(|| {
        [(BASE, size), (BASE + SHADOW, size), (TOUCHED, touched)].map(|(at, size)| Mapping::new(Some(at), size, false))
    });
    if races {
        LAST.get_or_init(|| Mapping::new(Some(RACES), size * 40, false));
    }
}

impl Memory {
    /// The memory of a device that reports `total` bytes.
    pub fn new(device: usize, total: u64, races: bool) -> Self {
        reserve(races);
        let base = BASE + device as u64 * SPAN;
        let mut memory = Self {
            base,
            next: base,
            total,
            used: 0,
            peak: 0,
            count: 0,
            allocations: BTreeMap::new(),
            quarantine: VecDeque::new(),
            quarantined: 0,
            free: HashMap::new(),
        };
        memory.mark(base, GUARD, state::GUARD);
        memory.next += GUARD;
        memory
    }

    /// The first address.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Bytes from the first address to the end of the last guard zone.
    pub fn span(&self) -> u64 {
        self.next - self.base
    }

    /// Bytes that are allocated, and the most that were at once.
    pub fn used(&self) -> (u64, u64) {
        (self.used, self.peak)
    }

    /// Bytes that the device reports.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Hands out a range, or none where the device is full.
    pub fn allocate(&mut self, size: u64) -> Option<u64> {
        if size == 0 || self.used + size > self.total {
            return None;
        }
        let room = (size + GUARD).next_multiple_of(PAGE);
        let address = match self.free.get_mut(&room).and_then(Vec::pop) {
            Some(address) => address,
            None if self.next + room > self.base + SPAN => return None,
            None => {
                self.next += room;
                self.next - room
            }
        };
        // Pages that were used before become zero, which is the state of allocated memory.
        for at in [address, address + SHADOW] {
            // SAFETY: the range belongs to this device, and no allocation uses it.
            unsafe {
                libc::madvise(at as *mut libc::c_void, size.next_multiple_of(PAGE) as usize, libc::MADV_DONTNEED)
            };
        }
        self.mark(address + size, room - size, state::GUARD);
        self.count += 1;
        self.used += size;
        self.peak = self.peak.max(self.used);
        self.allocations.insert(address, Allocation { address, size, number: self.count, freed: false });
        Some(address)
    }

    /// Takes a range back; `false` if it is not the start of a live allocation.
    pub fn free(&mut self, address: u64) -> bool {
        let Some(allocation) = self.allocations.get_mut(&address).filter(|allocation| !allocation.freed) else {
            return false;
        };
        allocation.freed = true;
        let size = allocation.size;
        self.used -= size;
        self.mark(address, size, state::FREED);
        // SAFETY: the range belongs to a freed allocation.
        unsafe {
            libc::madvise(address as *mut libc::c_void, size.next_multiple_of(PAGE) as usize, libc::MADV_DONTNEED)
        };
        self.quarantine.push_back(address);
        self.quarantined += size;
        while self.quarantined > QUARANTINE {
            let Some(oldest) = self.quarantine.pop_front() else { break };
            if let Some(allocation) = self.allocations.remove(&oldest) {
                self.quarantined -= allocation.size;
                self.free.entry((allocation.size + GUARD).next_multiple_of(PAGE)).or_default().push(oldest);
            }
        }
        true
    }

    /// The state of a byte of this device.
    pub fn state(&self, address: u64) -> Option<u8> {
        // SAFETY: the shadow of all addresses below `next` is mapped.
        self.contains(address).then(|| unsafe { *((address + SHADOW) as *const u8) })
    }

    fn contains(&self, address: u64) -> bool {
        address.wrapping_sub(self.base) < self.span()
    }

    /// Sets the state of a range.
    pub fn mark(&mut self, address: u64, size: u64, state: u8) {
        // SAFETY: the caller's range is in this device's span, whose shadow is mapped and only used under the device's lock.
        unsafe { std::ptr::write_bytes((address + SHADOW) as *mut u8, state, size as usize) };
    }

    /// Copies the states of a range to another.
    pub fn copy_states(&mut self, to: u64, from: u64, size: u64) {
        // SAFETY: both ranges were checked by `check`; they may overlap.
        unsafe { std::ptr::copy((from + SHADOW) as *const u8, (to + SHADOW) as *mut u8, size as usize) };
    }

    /// Whether a range may be accessed: the first address that may not, and why.
    pub fn check(&self, address: u64, size: u64, written: bool) -> Result<(), (u64, Wrong)> {
        if address < self.base || size > self.span() || address - self.base > self.span() - size {
            return Err((address, Wrong::OutOfBounds));
        }
        // SAFETY: the range is in the span, whose shadow is mapped, and the device's lock is held.
        let states = unsafe { std::slice::from_raw_parts((address + SHADOW) as *const u8, size as usize) };
        let bad = states.iter().position(|&state| state >= state::GUARD || (written && state != state::WRITTEN));
        let Some(at) = bad else { return Ok(()) };
        let wrong = match states[at] {
            found if found < state::GUARD => Wrong::Uninitialized,
            state::FREED => Wrong::AfterFree,
            _ => Wrong::OutOfBounds,
        };
        Err((address + at as u64, wrong))
    }

    /// What is at an address, or next to it.
    pub fn whereabouts(&self, address: u64) -> Whereabouts {
        let before = self.allocations.range(..=address).next_back().map(|(_, allocation)| allocation);
        let after = self.allocations.range(address..).next().map(|(_, allocation)| allocation);
        let describe = |allocation: &Allocation| {
            let freed = if allocation.freed { "freed " } else { "" };
            format!("{freed}allocation {} ({} bytes at {:#x})", allocation.number, allocation.size, allocation.address)
        };
        let text = match (before, after) {
            _ if !self.contains(address) => "no memory of this device".to_owned(),
            (Some(before), _) if address < before.address + before.size => {
                format!("byte {} of {}", address - before.address, describe(before))
            }
            (Some(before), Some(after)) if after.address - address < address - before.address - before.size => {
                format!("{} bytes before {}", after.address - address, describe(after))
            }
            (Some(before), _) => {
                format!("{} bytes after the end of {}", address - before.address - before.size, describe(before))
            }
            (None, Some(after)) => format!("{} bytes before {}", after.address - address, describe(after)),
            (None, None) => "before all allocations".to_owned(),
        };
        Whereabouts(text)
    }
}

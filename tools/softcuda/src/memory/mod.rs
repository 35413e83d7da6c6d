//! Device memory: memory of the host at fixed addresses, with a byte of state for each byte.
//!
//! Each device has its own range of addresses, so that an access to another device's memory is found. Allocations are
//! separated by guard zones. Freed memory keeps its addresses until much else has been freed.

mod allocation;
mod mapping;

use std::fmt;

pub use allocation::{Allocation, Memory};
pub(crate) use mapping::Mapping;

/// The first address of the first device.
pub const BASE: u64 = 0x1000_0000_0000;
/// Addresses of a device.
pub const SPAN: u64 = 1 << 36;
/// The most devices.
pub const DEVICES: usize = 8;
/// The state of a byte is this much after it.
pub const SHADOW: u64 = 0x1000_0000_0000;
/// Where the launches that last read and wrote a sector are remembered, 8 bytes for each sector.
pub const TOUCHED: u64 = 0x2800_0000_0000;
/// Bytes of a sector, which a device moves at once.
pub const SECTOR: u64 = 32;
/// Where the last accesses to bytes are remembered, 40 bytes for each byte.
pub const RACES: u64 = 0x3000_0000_0000;

/// The state of a byte.
pub mod state {
    /// Allocated, and not written.
    pub const ALLOCATED: u8 = 0;
    /// Written. From here to `GUARD`: written with a value that is not defined.
    pub const WRITTEN: u8 = 1;
    /// Between allocations.
    pub const GUARD: u8 = 0x80;
    /// Freed.
    pub const FREED: u8 = 0x81;
}

/// What is wrong with an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// No live allocation contains it.
    OutOfBounds,
    /// Its allocation was freed.
    AfterFree,
    /// It was not written.
    Uninitialized,
    /// It is not a multiple of the size.
    Misaligned,
}

/// What is at an address, for messages.
#[derive(Clone, Debug)]
pub struct Whereabouts(String);

impl fmt::Display for Whereabouts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

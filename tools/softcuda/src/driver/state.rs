//! The devices of the process.

use std::cell::Cell;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::memory::{BASE, Memory, SPAN};
use crate::settings;

use super::{CUresult, error};

/// Bytes for the parameters of a kernel.
pub(super) const PARAMETERS: u64 = 32 << 10;

/// A device.
pub(super) struct Device {
    pub(super) memory: Memory,
    /// Where the parameters of the running kernel are.
    pub(super) parameters: u64,
    /// What a kernel did, returned by the calls after it.
    failed: CUresult,
    /// The state of what the next launch writes with a value that is not defined.
    pub(super) spoiled: u32,
}

static LAUNCHES: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

/// The number of a new launch.
pub(super) fn next_launch() -> u32 {
    LAUNCHES.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1
}

impl Device {
    /// The error of an earlier launch, if there was one.
    pub(super) fn status(&mut self) -> CUresult {
        let failed = self.failed;
        if !settings::get().sticky {
            self.failed = error::SUCCESS;
        }
        failed
    }

    pub(super) fn fail(&mut self, code: CUresult) {
        if self.failed == error::SUCCESS {
            self.failed = code;
        }
    }
}

fn devices() -> &'static [Mutex<Device>] {
    static DEVICES: OnceLock<Vec<Mutex<Device>>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let settings = settings::get();
        let device = |i| {
            // The parameters are not part of what a program may allocate.
            let mut memory = Memory::new(i, settings.memory + PARAMETERS, settings.races);
            let parameters = memory.allocate(PARAMETERS).unwrap_or(0);
            Mutex::new(Device { memory, parameters, failed: error::SUCCESS, spoiled: 2 })
        };
        (0..settings.devices).map(device).collect()
    })
}

/// The device of that number.
pub(super) fn device(number: usize) -> Option<MutexGuard<'static, Device>> {
    devices().get(number).map(|device| device.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The device whose memory contains an address.
pub(super) fn device_of(address: u64) -> Option<MutexGuard<'static, Device>> {
    device((address.checked_sub(BASE)? / SPAN) as usize)
}

thread_local! {
    static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The device whose context is current on this thread.
pub(super) fn current() -> Option<usize> {
    CURRENT.get()
}

pub(super) fn set_current(device: Option<usize>) {
    CURRENT.set(device);
}

/// The device of the current context.
pub(super) fn current_device() -> Result<MutexGuard<'static, Device>, CUresult> {
    current().and_then(device).ok_or(error::INVALID_CONTEXT)
}

//! Allocations.

use std::collections::HashMap;
use std::ffi::{c_uint, c_void};
use std::sync::{LazyLock, Mutex, PoisonError};

use super::error::{INVALID_VALUE, OUT_OF_MEMORY, SUCCESS};
use super::{CUresult, state};

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, size: usize) -> CUresult {
    let mut device = match state::current_device() {
        Ok(device) => device,
        Err(code) => return code,
    };
    if size == 0 {
        return INVALID_VALUE;
    }
    match (device.status(), device.memory.allocate(size as u64)) {
        (SUCCESS, Some(at)) => {
            // SAFETY: the caller gives a place for the address.
            unsafe { *address = at };
            SUCCESS
        }
        (SUCCESS, None) => OUT_OF_MEMORY,
        (failed, _) => failed,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(address: *mut u64, size: usize, _stream: *mut c_void) -> CUresult {
    // SAFETY: as the driver demands.
    unsafe { cuMemAlloc_v2(address, size) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> CUresult {
    if address == 0 {
        return SUCCESS;
    }
    match state::device_of(address) {
        Some(mut device) => {
            if device.memory.free(address) {
                return device.status();
            }
            let text = format!(
                "cuMemFree of {address:#x}, {}: not the start of a live allocation",
                device.memory.whereabouts(address)
            );
            crate::log::finding(&text);
            INVALID_VALUE
        }
        None => INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(address: u64, _stream: *mut c_void) -> CUresult {
    cuMemFree_v2(address)
}

/// Memory of the host by its address, with its size.
static HOST: LazyLock<Mutex<HashMap<usize, std::alloc::Layout>>> = LazyLock::new(Mutex::default);

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocHost_v2(address: *mut *mut c_void, size: usize) -> CUresult {
    let Ok(layout) = std::alloc::Layout::from_size_align(size.max(1), 4096) else { return INVALID_VALUE };
    // SAFETY: the layout has a size.
    let at = unsafe { std::alloc::alloc(layout) };
    if at.is_null() {
        return OUT_OF_MEMORY;
    }
    HOST.lock().unwrap_or_else(PoisonError::into_inner).insert(at as usize, layout);
    // SAFETY: the caller gives a place for the address.
    unsafe { *address = at.cast() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(address: *mut *mut c_void, size: usize, _flags: c_uint) -> CUresult {
    // SAFETY: as the driver demands.
    unsafe { cuMemAllocHost_v2(address, size) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(address: *mut c_void) -> CUresult {
    let Some(layout) = HOST.lock().unwrap_or_else(PoisonError::into_inner).remove(&(address as usize)) else {
        return INVALID_VALUE;
    };
    // SAFETY: allocated above with this layout, and removed from the list.
    unsafe { std::alloc::dealloc(address.cast(), layout) };
    SUCCESS
}

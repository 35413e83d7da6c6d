//! Devices and what they are.

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::settings;

use super::error::{INVALID_DEVICE, INVALID_VALUE, NOT_FOUND, SUCCESS};
use super::{CUresult, state};

/// Writes the counts when the process ends.
extern "C" fn write_counts() {
    if let Some(path) = &settings::get().counts
        && let Err(error) = std::fs::write(path, crate::counts::json())
    {
        eprintln!("softcuda: cannot write `{}`: {error}", path.display());
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> CUresult {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let settings = settings::get();
        let checks = (settings.uninitialized, settings.barriers, settings.races);
        crate::log::line(&format!(
            "start: sm_{} `{}`, {} devices, checks: bounds, uninitialized {}, barriers {}, races {}",
            settings.sm, settings.name, settings.devices, checks.0, checks.1, checks.2
        ));
        if settings.counts.is_some() {
            // SAFETY: the function takes nothing and does not unwind.
            unsafe { libc::atexit(write_counts) };
        }
    });
    SUCCESS
}

/// Writes all counts to the file of that name, for a program that counts a part of itself.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softcuda_write_counts(path: *const c_char) -> CUresult {
    // SAFETY: the caller gives a text that ends with zero.
    let path = unsafe { std::ffi::CStr::from_ptr(path) }.to_string_lossy();
    if std::fs::write(path.as_ref(), crate::counts::json()).is_ok() { SUCCESS } else { INVALID_VALUE }
}

/// Forgets all counts.
#[unsafe(no_mangle)]
pub extern "C" fn softcuda_reset_counts() {
    crate::counts::reset();
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetExportTable(table: *mut *const c_void, _id: *const c_void) -> CUresult {
    // NVRTC asks for tables where there is a driver, and does without.
    // SAFETY: the caller gives a place for the pointer.
    unsafe { *table = std::ptr::null() };
    NOT_FOUND
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> CUresult {
    // SAFETY: the caller gives a place for the number.
    unsafe { *version = settings::get().driver };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> CUresult {
    // SAFETY: the caller gives a place for the number.
    unsafe { *count = settings::get().devices as c_int };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> CUresult {
    if ordinal < 0 || ordinal as usize >= settings::get().devices {
        return INVALID_DEVICE;
    }
    // SAFETY: the caller gives a place for the number.
    unsafe { *device = ordinal };
    SUCCESS
}

/// Copies a text and its zero to a place of `length` bytes.
unsafe fn text(to: *mut c_char, length: c_int, text: &str) -> CUresult {
    if length <= 0 {
        return INVALID_VALUE;
    }
    let count = text.len().min(length as usize - 1);
    // SAFETY: the caller gives `length` bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), to, count);
        *to.add(count) = 0;
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, _device: c_int) -> CUresult {
    // SAFETY: as the driver demands.
    unsafe { text(name, length, &settings::get().name) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(id: *mut c_char, length: c_int, device: c_int) -> CUresult {
    // SAFETY: as the driver demands.
    unsafe { text(id, length, &format!("0000:{:02x}:00.0", device + 1)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) -> CUresult {
    let mut bytes = *b"softcuda device ";
    bytes[15] = b'0' + device as u8;
    // SAFETY: the caller gives a place for sixteen bytes.
    unsafe { *uuid = bytes };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int) -> CUresult {
    // SAFETY: as the driver demands.
    unsafe { cuDeviceGetUuid_v2(uuid, device) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> CUresult {
    // SAFETY: the caller gives a place for the number.
    unsafe { *bytes = settings::get().memory as usize };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> CUresult {
    match state::current_device() {
        Ok(device) => {
            let all = settings::get().memory;
            let used = device.memory.used().0.saturating_sub(state::PARAMETERS);
            // SAFETY: the caller gives places for the numbers.
            unsafe { (*free, *total) = ((all - used) as usize, all as usize) };
            SUCCESS
        }
        Err(code) => code,
    }
}

/// Shared memory of a block that a program may ask for.
pub(super) fn most_shared() -> u32 {
    match settings::get().sm {
        75 => 64 << 10,
        80 | 87 => 163 << 10,
        86 | 89 | 120.. => 99 << 10,
        _ => 227 << 10,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) -> CUresult {
    let sm = settings::get().sm;
    let (processors, registers) = match sm {
        75 => (22, 65536),
        80 => (108, 65536),
        89 => (128, 65536),
        90 => (132, 65536),
        _ => (148, 65536),
    };
    let found = match attribute {
        // Threads of a block, and its sizes.
        1..=3 => 1024,
        4 => 64,
        // Sizes of a grid.
        5 => i32::MAX,
        6 | 7 => 65535,
        // Shared memory of a block without asking, constant memory, threads of a warp, registers of a block.
        8 => 48 << 10,
        9 => 64 << 10,
        10 => 32,
        12 | 82 => registers,
        // Clock in kHz, multiprocessors.
        13 => 1_410_000,
        16 => processors,
        // Clock of the memory in kHz, width of its bus in bits, the second cache.
        36 => 1_215_000,
        37 => 5120,
        38 => 40 << 20,
        39 => {
            if sm == 75 {
                1024
            } else {
                2048
            }
        }
        // Unified addresses, and the compute capability.
        41 => 1,
        75 => (sm / 10) as c_int,
        76 => (sm % 10) as c_int,
        // Priorities of streams; shared memory of a multiprocessor, and of a block that asks for it.
        78 => 1,
        81 => most_shared() as c_int + 1024,
        97 => most_shared() as c_int,
        106 => 16,
        111 => 1024,
        115 => 1,
        _ => 0,
    };
    // SAFETY: the caller gives a place for the number.
    unsafe { *value = found };
    SUCCESS
}

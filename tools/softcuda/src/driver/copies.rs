//! Copies and fills. Ranges of device memory are checked; copies on the device carry along what was written.

use std::ffi::{c_int, c_uchar, c_uint, c_void};

use crate::counts;
use crate::memory::{Wrong, state::WRITTEN};

use super::error::{ILLEGAL_ADDRESS, INVALID_VALUE, SUCCESS};
use super::{CUresult, state};

type Stream = *mut c_void;

/// Checks a range of device memory, and marks it if it is written. `strict`: bytes that were not written are a finding.
fn check(name: &str, address: u64, size: usize, written: bool, strict: bool) -> CUresult {
    let Some(mut device) = state::device_of(address) else { return INVALID_VALUE };
    let failed = device.status();
    if failed != SUCCESS {
        return failed;
    }
    let strict = strict && crate::settings::get().host;
    if let Err((at, wrong)) = device.memory.check(address, size as u64, !written && strict) {
        let what = match wrong {
            Wrong::Uninitialized => "reads memory that was not written",
            Wrong::AfterFree => "uses freed memory",
            _ => "is out of bounds",
        };
        let place = device.memory.whereabouts(at);
        let origin = device.memory.state(at).map_or_else(String::new, crate::finding::origin);
        crate::log::finding(&format!("{name} of {size} bytes at {address:#x} {what}: {place}{origin}"));
        return if wrong == Wrong::Uninitialized { super::error::LAUNCH_FAILED } else { ILLEGAL_ADDRESS };
    }
    if written {
        device.memory.mark(address, size as u64, WRITTEN);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, size: usize) -> CUresult {
    if size == 0 {
        return SUCCESS;
    }
    counts::call("cuMemcpyHtoD", size as u64);
    let result = check("cuMemcpyHtoD", to, size, true, false);
    if result == SUCCESS {
        // SAFETY: the target was checked, and the caller gives the source.
        unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to as *mut u8, size) };
    }
    result
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, size: usize, _stream: Stream) -> CUresult {
    // SAFETY: as the driver demands.
    unsafe { cuMemcpyHtoD_v2(to, from, size) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, size: usize) -> CUresult {
    if size == 0 {
        return SUCCESS;
    }
    counts::call("cuMemcpyDtoH", size as u64);
    let result = check("cuMemcpyDtoH", from, size, false, true);
    if result == SUCCESS {
        // SAFETY: the source was checked, and the caller gives the target.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.cast(), size) };
    }
    result
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, size: usize, _stream: Stream) -> CUresult {
    // SAFETY: as the driver demands.
    unsafe { cuMemcpyDtoH_v2(to, from, size) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoD_v2(to: u64, from: u64, size: usize) -> CUresult {
    if size == 0 {
        return SUCCESS;
    }
    counts::call("cuMemcpyDtoD", size as u64);
    // Padding may be copied without having been written.
    for (address, written) in [(from, false), (to, false)] {
        let result = check("cuMemcpyDtoD", address, size, written, false);
        if result != SUCCESS {
            return result;
        }
    }
    let Some(mut device) = state::device_of(to) else { return INVALID_VALUE };
    device.memory.copy_states(to, from, size as u64);
    // SAFETY: both ranges were checked; they may overlap.
    unsafe { std::ptr::copy(from as *const u8, to as *mut u8, size) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, size: usize, _stream: Stream) -> CUresult {
    // SAFETY: as the driver demands.
    unsafe { cuMemcpyDtoD_v2(to, from, size) }
}

/// Fills `count` values of `bytes`.
fn fill(to: u64, value: &[u8], count: usize) -> CUresult {
    if count == 0 {
        return SUCCESS;
    }
    counts::call("cuMemset", (value.len() * count) as u64);
    let result = check("cuMemset", to, value.len() * count, true, false);
    if result == SUCCESS {
        // SAFETY: the range was checked.
        let bytes = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, value.len() * count) };
        bytes.chunks_exact_mut(value.len()).for_each(|part| part.copy_from_slice(value));
    }
    result
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8_v2(to: u64, value: c_uchar, count: usize) -> CUresult {
    fill(to, &[value], count)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(to: u64, value: c_uchar, count: usize, _stream: Stream) -> CUresult {
    fill(to, &[value], count)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD32_v2(to: u64, value: c_uint, count: usize) -> CUresult {
    fill(to, &value.to_ne_bytes(), count)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD32Async(to: u64, value: c_uint, count: usize, _stream: Stream) -> CUresult {
    fill(to, &value.to_ne_bytes(), count)
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub struct Copy2D {
    from_x: usize,
    from_y: usize,
    from_type: c_int,
    from_host: *const c_void,
    from_device: u64,
    from_array: *mut c_void,
    from_pitch: usize,
    to_x: usize,
    to_y: usize,
    to_type: c_int,
    to_host: *mut c_void,
    to_device: u64,
    to_array: *mut c_void,
    to_pitch: usize,
    width: usize,
    height: usize,
}

/// `CU_MEMORYTYPE_HOST`; 2 is the device.
const HOST: c_int = 1;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy2D_v2(copy: *const Copy2D) -> CUresult {
    // SAFETY: the caller gives a description.
    let c = unsafe { &*copy };
    if ![c.from_type, c.to_type].iter().all(|kind| matches!(kind, 1 | 2)) {
        return super::error::NOT_SUPPORTED;
    }
    let name = match (c.from_type, c.to_type) {
        (HOST, _) => "cuMemcpy2D host to device",
        (_, HOST) => "cuMemcpy2D device to host",
        _ => "cuMemcpy2D device to device",
    };
    counts::call(name, (c.width * c.height) as u64);
    for row in 0..c.height {
        let from = (c.from_y + row) * c.from_pitch + c.from_x;
        let to = (c.to_y + row) * c.to_pitch + c.to_x;
        let from = if c.from_type == HOST { c.from_host as u64 } else { c.from_device } + from as u64;
        let to = if c.to_type == HOST { c.to_host as u64 } else { c.to_device } + to as u64;
        if c.from_type != HOST {
            let result = check(name, from, c.width, false, true);
            if result != SUCCESS {
                return result;
            }
        }
        if c.to_type != HOST {
            let result = check(name, to, c.width, true, false);
            if result != SUCCESS {
                return result;
            }
        }
        // SAFETY: ranges of the device were checked, and the caller gives those of the host.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, c.width) };
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy2DAsync_v2(copy: *const Copy2D, _stream: Stream) -> CUresult {
    // SAFETY: as the driver demands.
    unsafe { cuMemcpy2D_v2(copy) }
}
